"""Errors a user can mend, told in one sentence: the boundary of both command lines."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class EditWarning(UserWarning):
    """An edit goes on, but does less than it could."""


class NonFiniteError(ArithmeticError):
    """Latents or images became NaN or infinite."""


@contextmanager
def one_sentence(program: str | None) -> Iterator[None]:
    """End the program with exit code 1 and the error's message in place of a traceback.

    With CSD_TRACEBACK=1 in the environment the traceback comes through, for debugging. An `EditWarning` is printed as
    one sentence, too, and once, however many processes there are.
    """
    other = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **rest: Any) -> None:
        if not issubclass(category, EditWarning):
            other(message, category, *where, **rest)
        elif os.environ.get("RANK", "0") == "0":
            print(f"{program}: {message}", file=sys.stderr)

    warnings.showwarning = show
    try:
        yield
    except BrokenPipeError:  # whoever read our output, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still flushes when it ends
        raise SystemExit(1) from None
    except (ValueError, OSError, ImportError, NonFiniteError, torch.OutOfMemoryError) as error:
        if os.environ.get("CSD_TRACEBACK"):
            raise
        message = str(error)
        if isinstance(error, torch.OutOfMemoryError):
            message = "out of GPU memory; lower the micro-batch, turn offload on, or take smaller images."
        raise SystemExit(f"{program}: {message}") from error
    finally:
        warnings.showwarning = other
