"""What a run says: our own lines, errors in one sentence, options in order, and nothing of what nerfstudio prints."""

import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from nerfstudio.utils import rich_utils
from rich.console import Console
from tqdm.auto import tqdm

from csd_2d.errors import NonFiniteError, one_sentence

_CONSOLE = Console(soft_wrap=True, highlight=False, markup=False)


def say(text: str) -> None:
    """Print a line, whole, whatever the width of the terminal."""
    _CONSOLE.print(text)


def warn(text: str) -> None:
    """Print a line in yellow."""
    _CONSOLE.print(text, style="yellow")


def first(*names: str) -> Callable[[type], type]:
    """Make a class decorator that puts some fields of a dataclass first, which is the order of `--help`.

    Example:
        >>> import dataclasses
        >>> @first("b")
        ... @dataclasses.dataclass
        ... class Config:
        ...     a: int = 0
        ...     b: int = 1
        >>> [field.name for field in dataclasses.fields(Config)]
        ['b', 'a']
    """

    def reordered(cls: Any) -> Any:
        known = cls.__dataclass_fields__
        cls.__dataclass_fields__ = {name: known[name] for name in (*names, *(n for n in known if n not in names))}
        return cls

    return reordered


class Progress:
    """Progress of a training: a bar on a terminal, elsewhere a line after every tenth.

    Args:
        start, total: steps that are done, and steps in all.
    """

    def __init__(self, label: str, start: int, total: int) -> None:
        self._label, self._done, self._total = label, start, total
        self._bar = tqdm(desc=label, initial=start, total=total, unit="step", disable=None)  # None: off a terminal

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step_done(self) -> None:
        """Count a step."""
        self._done += 1
        self._bar.update()
        if self._bar.disable and self._done % max(self._total // 10, 1) == 0:
            say(f"{self._label}: step {self._done} of {self._total}")

    def close(self) -> None:
        """Let what is printed next stand below the bar."""
        self._bar.close()


@contextmanager
def quiet_nerfstudio(verbose: bool = False) -> Iterator[None]:
    """Drop what nerfstudio prints, and warnings of its and torch's code, inside the block.

    Args:
        verbose: drop nothing.
    """
    console, was = rich_utils.CONSOLE, rich_utils.CONSOLE.quiet
    with warnings.catch_warnings():
        if not verbose:
            console.quiet = True
            warnings.filterwarnings("ignore", module=r"(nerfstudio|torch|gsplat)(\.|$)")
        try:
            yield
        finally:
            console.quiet = was


@contextmanager
def told(program: str | None) -> Iterator[None]:
    """End the program with one sentence, whatever happens inside the block.

    An error that this package raises on purpose is its own message. Any other is nerfstudio's, or a mistake: the
    sentence then names a file with the traceback. With CSD_TRACEBACK=1 in the environment all come through.
    """
    with one_sentence(program):
        try:
            yield
        except Exception as error:
            if os.environ.get("CSD_TRACEBACK") or _is_told(error):
                raise
            raise SystemExit(f"{program}: {_reported(error)}") from error


def _is_told(error: Exception) -> bool:
    """Tell whether an error's message was written for the user."""
    if isinstance(error, OSError | NonFiniteError | torch.OutOfMemoryError):
        return True
    raised_in = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    return isinstance(error, ValueError | ImportError) and raised_in.startswith(("csd_2d.", "csd_nerf."))


def _reported(error: Exception) -> str:
    """Write the traceback of an error to a file; returns a sentence that names it."""
    lines = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {lines[0].strip()[:200]}" if lines else type(error).__name__
    with tempfile.NamedTemporaryFile("w", prefix="csd-edit-error-", suffix=".txt", delete=False) as file:
        file.write(f"{' '.join(sys.argv)}\n")
        traceback.print_exception(error, file=file)
    return f"stopped by {what} (the traceback, for a report of this bug, is in {file.name})."
