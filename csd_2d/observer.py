"""Look at the steps of an edit while it runs, for somebody who watches it, in a small share of its time."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from csd_2d.csd import Step
from csd_2d.io.images import to_array
from csd_2d.mixing import FindCorrespondence

SHOWN = 8
"""Particles whose images are shown."""
MATCHED = 24
"""Most particles whose correspondence is shown: its matrix takes a channel for each."""
WIDTH = 192
"""Largest width of a thumbnail, in pixels."""


class Budget:
    """Allows work to take a share of the time that passes."""

    def __init__(self, share: float) -> None:
        self._share, self._free_from = share, 0.0

    @property
    def allows(self) -> bool:
        return time.monotonic() >= self._free_from

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Count the time of the block: there is a pause after it, as long as makes it the share of both.

        It is this thread's own time: what it waits for others does not count.
        """
        begin = time.thread_time()
        yield
        self._free_from = time.monotonic() + (time.thread_time() - begin) * (1 / self._share - 1)


@dataclass(frozen=True)
class Thumbnails:
    """Images of a particle: bytes (h, w, 3)."""

    source: np.ndarray
    current: np.ndarray
    estimate: np.ndarray | None = None
    """What the particle's score points at, x_0 + (sigma / alpha) s."""
    step: int = 0
    """Step before which the particle looked like this, from 1; 0: before the edit."""


@dataclass
class Observation:
    """What was seen of an edit, from its beginning."""

    label: str = ""
    names: dict[int, str] = field(default_factory=dict)
    """Names of the particles."""
    steps: int = 0
    """Number of steps that the edit will take."""
    taken: int = 0
    """Number of steps so far."""
    begun: float = field(default_factory=time.monotonic)
    indices: list[int] = field(default_factory=list)
    """Particles of the last step."""
    thumbnails: dict[int, Thumbnails] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    """Values of the steps that were seen, by name."""
    matrix: np.ndarray | None = None
    """(n, n): how much the particle of a row takes over from that of a column."""
    matrix_title: str = ""
    matrix_names: list[str] = field(default_factory=list)


def thumbnail(image: Float[Tensor, "3 h w"]) -> np.ndarray:
    """Convert an image to bytes (h, w, 3), at most `WIDTH` wide."""
    if image.shape[-1] > WIDTH:
        size = (max(round(image.shape[-2] * WIDTH / image.shape[-1]), 1), WIDTH)
        image = torch.nn.functional.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
    return to_array(image)


class Observer:
    """Measures the steps of edits, one edit after the other.

    Steps are measured, and images decoded, one particle at a time, in turn, when their budgets allow. With nobody
    watching nothing is done.

    Args:
        watched: tells whether anybody watches.
    """

    def __init__(self, watched: Callable[[], bool]) -> None:
        self._watched, self._for_measures, self._for_images = watched, Budget(0.01), Budget(0.02)
        self._lock = threading.Lock()
        self._seen = Observation()
        self._decode: Callable[[Tensor], Tensor] | None = None
        self._find: FindCorrespondence | None = None
        self._sizes: dict[int, tuple[int, ...]] = {}
        self._stepped = time.monotonic()
        self.version = 0
        """Grows with every observation."""

    @property
    def seen(self) -> Observation:
        """What was seen of the present edit, or else of the last; for any thread."""
        with self._lock:
            seen = self._seen
            curves = {name: list(values) for name, values in seen.curves.items()}
            return Observation(**{**vars(seen), "thumbnails": dict(seen.thumbnails), "curves": curves})

    def begin(
        self,
        label: str,
        names: Sequence[str],
        steps: int,
        decode: Callable[[Tensor], Tensor],
        find: FindCorrespondence | None = None,
        images: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        """Begin with an edit.

        Args:
            names: of all its particles.
            decode: decodes latents.
            find: finds corresponding places, if any are known.
            images: source of each particle, and what it is before the edit, where both are at hand.
        """
        shown = images[:SHOWN] if self._watched() else ()
        thumbnails = {i: Thumbnails(thumbnail(before), thumbnail(now)) for i, (before, now) in enumerate(shown)}
        with self._lock:
            self._seen = Observation(label, dict(enumerate(names)), steps, thumbnails=thumbnails)
            self._decode, self._find, self.version = decode, find, self.version + 1
            self._sizes = {index: source.shape[-2:] for index, (source, _) in enumerate(images)}
            self._stepped = time.monotonic()

    @torch.no_grad()
    def on_step(self, step: Step) -> None:
        """Look at a step; see `csd_2d.edit.edit`."""
        seconds, self._stepped = time.monotonic() - self._stepped, time.monotonic()
        self._seen.indices, self._seen.taken = step.indices, step.index + 1
        if self._decode is None or not self._watched():
            return
        if self._for_measures.allows:
            with self._for_measures.spending():
                self._measure(step, {"step": step.index + 1, "seconds per step": seconds} | self._measured(step))
        if self._for_images.allows:
            with self._for_images.spending():
                self._picture(step, self._decode)

    def _measure(self, step: Step, measured: dict[str, float]) -> None:
        matrix = self._matrix(step)
        with self._lock:
            seen = self._seen
            for name, value in measured.items():
                seen.curves.setdefault(name, []).append(value)
            if matrix is not None:
                seen.matrix_title, values, indices = matrix
                order = np.argsort([seen.names.get(index, str(index)) for index in indices], kind="stable")
                seen.matrix = values[order][:, order]
                seen.matrix_names = [seen.names.get(indices[place], str(indices[place])) for place in order]
            self.version += 1

    def _picture(self, step: Step, decode: Callable[[Tensor], Tensor]) -> None:
        row = self._next_row(step.indices)
        index, before = step.indices[row], self._seen.thumbnails.get(step.indices[row])
        wanted = [step.x_0, step.estimate] + ([] if before is not None else [step.noised.source])
        height, width = self._sizes.get(index, (None, None))  # latents are padded
        decoded = (decode(latents[row : row + 1])[0, :, :height, :width] for latents in wanted)
        images = [thumbnail(image.clamp(0, 1).cpu()) for image in decoded]
        source = images[2] if before is None else before.source
        with self._lock:
            seen = self._seen
            seen.thumbnails.pop(index, None)
            seen.thumbnails[index] = Thumbnails(source, images[0], images[1], step.index + 1)
            while len(seen.thumbnails) > SHOWN:
                seen.thumbnails.pop(next(iter(seen.thumbnails)))
            self.version += 1

    def _next_row(self, indices: list[int]) -> int:
        """Choose the particle to decode: one that was not yet, while there is room, else the one seen longest ago."""
        shown = list(self._seen.thumbnails)
        known = [index for index in shown if index in indices]
        fresh = [index for index in indices if index not in shown]
        return indices.index(fresh[0] if fresh and (len(known) < min(SHOWN, len(indices))) else known[0])

    def _measured(self, step: Step) -> dict[str, float]:
        change = step.x_0 - step.noised.source
        size = change.square().mean().sqrt().item()
        measured = {"size of the change": size, "residual": step.residual_norm}
        if self._find is not None and len(step.indices) > 1 and size > 0:
            same_place = self._find(step.indices)
            apart = (change - same_place(change)).square().mean().sqrt().item()
            measured["agreement in same places"] = 1 - apart / size
            measured["warp error"] = (step.x_0 - same_place(step.x_0)).square().mean().sqrt().item()
        return measured

    def _matrix(self, step: Step) -> tuple[str, np.ndarray, list[int]] | None:
        """Return title, matrix and particles of what is shared between particles; None if it is as it was."""
        if step.kernel is not None:
            title = f"Who follows whom (kernel, step {step.index + 1})"
            gram = step.kernel.gram[:MATCHED, :MATCHED]
            return title, gram.float().cpu().numpy(), step.indices[:MATCHED]
        if self._find is not None and not self._seen.matrix_title.startswith("Places"):
            indices = step.indices[:MATCHED]
            marks = torch.eye(len(indices))[:, :, None, None].expand(-1, -1, step.x_0.shape[-2], step.x_0.shape[-1])
            shares = self._find(indices)(marks).mean((2, 3))
            return "Places in common (share of a row's cells)", shares.cpu().numpy(), indices
        if self._find is None and self._seen.matrix is None:
            change = (step.x_0 - step.noised.source)[:MATCHED].flatten(1)
            alike = torch.nn.functional.normalize(change, dim=1)
            return f"How alike changes are (step {step.index + 1})", (alike @ alike.mT).cpu().numpy(), step.indices
        return None
