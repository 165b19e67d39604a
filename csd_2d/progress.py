"""The state of an edit on disk, for resuming."""

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from torch import Tensor

from csd_2d import ranks
from csd_2d.io.files import replacing
from csd_2d.particles import Layout, Particles


class Resumable(Protocol):
    """An edit as far as its progress file is concerned; see `csd_2d.edit.Edit`."""

    index: int
    particles: Particles
    layout: Layout

    def fingerprint(self) -> str: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class ProgressFile:
    """Keeps the state of an edit: written twice a minute, so that no more than that is ever lost.

    Args:
        path: if the file exists the edit goes on from it.

    Raises:
        ValueError: if the file is of another edit or cannot be read, or not all processes have it.
    """

    SECONDS = 30.0

    def __init__(self, path: Path, edit: Resumable) -> None:
        self.path, self._edit = path, edit
        self._fingerprint = [edit.fingerprint(), fingerprint(edit.particles, edit.layout)]
        self._saved = time.monotonic()
        if path.exists():
            self._load()
        if len({*ranks.gather_numbers(edit.index)}) > 1:
            raise ValueError(f"{path} must lie where all processes can read it; here it is at step {edit.index}.")

    def _load(self) -> None:
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            if state["fingerprint"] != self._fingerprint:
                raise ValueError(
                    f"{self.path} is of an edit with another prompt, other settings or images; give what was "
                    "given then, or delete it to begin anew."
                )
            self._edit.load_state_dict(state["edit"])
        except (RuntimeError, UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path} cannot be read as the state of an edit; delete it to begin anew.") from error

    def step_done(self) -> None:
        """Save if it is time to; the first process's clock counts."""
        if ranks.gather_numbers(time.monotonic() - self._saved >= self.SECONDS)[0]:
            self.save()

    def save(self) -> None:
        self._saved = time.monotonic()
        if ranks.rank() == 0:
            with replacing(self.path) as temporary:
                torch.save({"fingerprint": self._fingerprint, "edit": self._edit.state_dict()}, temporary)


FINGERPRINTED = 16
"""Particles that are rendered together for a fingerprint."""


def fingerprint(particles: Particles, layout: Layout) -> str:
    """Hash what tells one set of particles from another before any edit.

    That is their sources, where prompts apply, whether corresponding places are known, and, by the gradient of what is
    rendered, which parameters may change and how much.
    """
    digest = hashlib.sha256(repr(layout.correspondence is not None).encode())
    parameters = list(particles.parameters())
    for indices in layout.rounds or [list(range(len(particles)))]:
        for start in range(0, len(indices), FINGERPRINTED):
            some = indices[start : start + FINGERPRINTED]
            shares = [] if layout.shares is None else [layout.shares(some)]
            for values in (particles.source(some), *shares, *_gradients(particles.render, some, parameters)):
                digest.update(values.cpu().numpy().tobytes())
    return digest.hexdigest()


def _gradients(
    render: Callable[[Sequence[int]], Tensor], indices: Sequence[int], parameters: Sequence[Tensor]
) -> list[Tensor]:
    gradients = torch.autograd.grad(render(indices).sum(), parameters, allow_unused=True)
    return [gradient for gradient in gradients if gradient is not None]


def duration(seconds: float) -> str:
    """Write a time to the minute.

    Example:
        >>> duration(20), duration(3700)
        ('1 min', '1 h 2 min')
    """
    hours, minutes = divmod(max(round(seconds / 60), 1), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
