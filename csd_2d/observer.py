"""Look at the steps of an edit while it runs, for somebody who watches it, in a small share of its time."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from csd_2d.csd import Step
from csd_2d.io.images import to_array

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
    def spending(self, device: torch.device | None = None) -> Iterator[None]:
        """Count the time of the block: there is a pause after it, as long as makes it the share of both.

        On a GPU it is the time until its work is done; else this thread's own: what it waits for others does not count.

        Args:
            device: where the block computes.
        """
        clock = time.thread_time if device is None or device.type != "cuda" else partial(_time_on_gpu, device)
        begin = clock()
        try:
            yield
        finally:
            pause = (clock() - begin) * (1 / self._share - 1)
            self._free_from = max(self._free_from, time.monotonic()) + pause


def _time_on_gpu(device: torch.device) -> float:
    torch.cuda.synchronize(device)
    return time.monotonic()


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
    seconds: float = 0.0
    """Time of the steps that were counted, in this process."""
    counted: int = 0
    indices: list[int] = field(default_factory=list)
    """Particles of the last step."""
    thumbnails: dict[int, Thumbnails] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    """Values of the steps that were seen, by name."""
    matrix: np.ndarray | None = None
    """(n, n): how much the particle of a row takes over from that of a column."""
    matrix_title: str = ""
    matrix_names: list[str] = field(default_factory=list)
    matrix_of: list[int] = field(default_factory=list)
    """Particles of the matrix."""
    trouble: str = ""
    """Why nothing more is shown."""

    @property
    def seconds_left(self) -> float:
        """Seconds that the remaining steps will take, as far as is known."""
        return (self.steps - self.taken) * self.seconds / max(self.counted, 1)


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
        self._watched, self._for_measures, self._for_images = watched, Budget(0.01), Budget(0.01)
        self._lock = threading.Lock()
        self._seen = Observation()
        self._decode: Callable[[Tensor], Tensor] | None = None
        self._images: list[tuple[Tensor, Tensor]] = []
        self._sizes: dict[int, tuple[int, ...]] = {}
        self._stepped = time.monotonic()
        self.running = False
        """An edit has begun, and not ended."""
        self.version = 0
        """Grows with every observation."""

    @property
    def seen(self) -> Observation:
        """What was seen of the present edit, or else of the last; for any thread."""
        self._show_beginning()
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
        images: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        """Begin with an edit.

        Args:
            names: of all its particles.
            decode: decodes latents.
            images: source of each particle, and what it is before the edit, where both are at hand.
        """
        with self._lock:
            self._seen = Observation(label, dict(enumerate(names)), steps)
            self._decode, self._images, self.version = decode, list(images[:SHOWN]), self.version + 1
            self._sizes = {index: source.shape[-2:] for index, (source, _) in enumerate(images)}
            self._stepped, self.running = time.monotonic(), True

    def end(self) -> None:
        """Let go of what the edit needed: it has ended, and its images need not stay in memory."""
        with self._lock:
            self._decode, self._images, self.running = None, [], False

    def _show_beginning(self) -> None:
        """Make thumbnails of what particles are before the edit: by the first who looks, which may be late."""
        with self._lock:
            images, self._images, seen = self._images, [], self._seen
        made = {i: Thumbnails(thumbnail(before), thumbnail(now)) for i, (before, now) in enumerate(images)}
        with self._lock:
            seen.thumbnails = made | seen.thumbnails

    @torch.no_grad()
    def on_step(self, step: Step) -> None:
        """Look at a step; see `csd_2d.edit.edit`. What fails here, for want of memory say, must not end the edit."""
        seconds, self._stepped = time.monotonic() - self._stepped, time.monotonic()
        seen = self._seen
        seen.indices, seen.taken = step.indices, step.index + 1
        seen.seconds, seen.counted = seen.seconds + seconds, seen.counted + 1
        if self._decode is None or not self._watched():
            return
        try:
            self._look(step, seconds, self._decode)
        except Exception as error:
            self._decode, self._images = None, []
            seen.trouble = f"Nothing more is shown of this edit: {type(error).__name__}: {error}"

    def _look(self, step: Step, seconds: float, decode: Callable[[Tensor], Tensor]) -> None:
        device = step.x_0.device
        if self._for_measures.allows:
            with self._for_measures.spending(device):
                self._measure(step, {"step": step.index + 1, "seconds per step": seconds} | self._measured(step))
        if self._for_images.allows:
            with self._for_images.spending(device):
                self._picture(step, decode)

    def _measure(self, step: Step, measured: dict[str, float]) -> None:
        matrix = self._matrix(step)
        with self._lock:
            seen = self._seen
            for name, value in measured.items():
                seen.curves.setdefault(name, []).append(value)
            if matrix is not None:
                seen.matrix_title, values, indices = matrix
                seen.matrix_of = indices
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
        count = len(step.indices)
        if count < 2 or size == 0:
            return measured
        if step.correspondence is None:
            measured["likeness of changes"] = (_likeness(change).sum().item() - count) / (count * (count - 1))
            return measured
        same_place = step.correspondence(step.indices)
        apart = (change - same_place(change)).square().mean().sqrt().item()
        measured["agreement in same places"] = 1 - apart / size
        measured["warp error"] = (step.x_0 - same_place(step.x_0)).square().mean().sqrt().item()
        return measured

    def _matrix(self, step: Step) -> tuple[str, np.ndarray, list[int]] | None:
        """Return title, matrix and particles of what is shared between particles; None if it is as it was."""
        indices = step.indices[:MATCHED]
        if step.kernel is not None:
            gram = step.kernel.gram[:MATCHED, :MATCHED]
            return f"Who follows whom (kernel, step {step.index + 1})", gram.float().cpu().numpy(), indices
        if step.correspondence is None:
            change = (step.x_0 - step.noised.source)[:MATCHED]
            return f"How alike changes are (step {step.index + 1})", _likeness(change).cpu().numpy(), indices
        if self._seen.matrix_of == indices:
            return None
        marks = torch.eye(len(indices))[:, :, None, None].expand(-1, -1, step.x_0.shape[-2], step.x_0.shape[-1])
        shares = step.correspondence(indices)(marks.to(step.x_0)).mean((2, 3))
        return "Places in common (share of a row's cells)", shares.cpu().numpy(), indices


def _likeness(changes: Float[Tensor, "n c h w"]) -> Float[Tensor, "n n"]:
    """Compute the cosine of every two changes."""
    directions = torch.nn.functional.normalize(changes.float().flatten(1), dim=1)
    return directions @ directions.mT
