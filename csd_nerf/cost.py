"""Time and memory of the stages of a run."""

import dataclasses
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from csd_2d.progress import duration

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


@dataclass
class Cost:
    """Time and memory of a stage."""

    seconds: float = 0.0
    peak_memory_mb: float = 0.0
    """On a GPU torch's peak in this stage; without one the process's peak until its end."""

    @contextmanager
    def counted(self, device: torch.device) -> Iterator[None]:
        """Add the cost of the block on a device; the block must have waited for the work it started there."""
        begin = time.monotonic()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        yield
        self.seconds += time.monotonic() - begin
        self.peak_memory_mb = max(self.peak_memory_mb, peak_memory_mb(device))

    def rounded(self) -> dict[str, float]:
        """Return both to a tenth of a second and of a megabyte."""
        return {name: round(value, 1) for name, value in dataclasses.asdict(self).items()}


def peak_memory_mb(device: torch.device) -> float:
    """Return torch's peak on a GPU since it was last reset, else that of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if resource is None:
        return psutil.Process().memory_info().peak_wset / 1e6  # type: ignore[attr-defined]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def seconds_left(rounds: list[Cost], to_come: int, training: Cost, step: int, steps: int) -> float:
    """Estimate how many seconds a run will still take.

    nerfstudio's own estimate is the mean of the last few steps, and does not know of rounds.

    Args:
        rounds: costs of the rounds so far; without any it is not known how long those to come will take.
        to_come: number of rounds to come.
        training: cost of the training steps so far.
        step: number of these.
        steps: number of steps in all.
    """
    mean = sum(cost.seconds for cost in rounds) / max(len(rounds), 1)
    return to_come * mean + (steps - step) * training.seconds / max(step, 1)


def time_left(rounds: list[Cost], count: int, training: Cost, step: int, steps: int) -> str:
    """Estimate how long a run will still take, as a clause for a message.

    Args:
        count: number of rounds in all.
        rounds, training, step, steps: see `seconds_left`.

    Example:
        >>> time_left([Cost(600.0)] * 2, 10, Cost(100.0), 1000, 5000)
        '; about 1 h 27 min left'
        >>> time_left([Cost(600.0)], 10, Cost(), 0, 5000)
        '; about 1 h 30 min left, and the training between the rounds'
    """
    time = duration(seconds_left(rounds, count - len(rounds), training, step, steps))
    if count == len(rounds) and not step:
        return ""
    return f"; about {time} left" + ("" if step else ", and the training between the rounds")
