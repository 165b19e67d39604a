"""Overlapping windows: where they lie along one axis, and how they fade into each other."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def window_positions(size: int, window: int, stride: int, phase: float = 0.0, wrap: bool = False) -> list[int]:
    """Place windows that cover 0..size: evenly spaced, at most `stride` apart.

    Args:
        phase: share of the spacing, in [0, 1), by which they are shifted; one window more then covers both ends.
        wrap: the axis is a circle; windows may reach over its end.

    Raises:
        ValueError: if a window does not fit.

    Example:
        >>> window_positions(10, 4, 4), window_positions(10, 4, 4, phase=0.5), window_positions(8, 4, 4, 0.5, wrap=True)
        ([0, 3, 6], [0, 2, 4, 6], [2, 6])
    """
    last = size - window
    if last < 0:
        raise ValueError(f"window of {window} cells does not fit in {size} cells; pad the canvas first.")
    if wrap:
        count = math.ceil(size / stride)
        return [round(size * (k + phase) / count) % size for k in range(count)]
    intervals = math.ceil(last / stride)
    spacing = last / max(intervals, 1)
    steps = range(intervals + 1 + (phase > 0))
    return sorted({round(min(max((k - phase) * spacing, 0), last)) for k in steps})


def fading(positions: Sequence[int], size: int, window: int, wrap: bool = False) -> Float[Tensor, "n window"]:
    """Compute weights of windows along one axis: triangles, flat towards the axis's ends, that add up to 1.

    Example:
        >>> fading([0, 2], size=6, window=4)
        tensor([[1.0000, 1.0000, 0.7500, 0.2500],
                [0.2500, 0.7500, 1.0000, 1.0000]])
    """
    rising = ((torch.arange(window) + 0.5) / (window / 2)).clamp(max=1)
    flat = torch.ones(window)
    ramps = [
        (flat if start == 0 and not wrap else rising)
        * (flat if start + window == size and not wrap else rising.flip(0))
        for start in positions
    ]
    cells = (torch.tensor(positions)[:, None] + torch.arange(window)) % size
    total = torch.zeros(size).index_put((cells,), torch.stack(ramps), accumulate=True)
    return torch.stack(ramps) / total[cells]


def in_tiles(
    function: Callable[[Float[Tensor, "n c _ _"]], Float[Tensor, "n d _ _"]],
    images: Float[Tensor, "n c _ _"],
    window: int,
    per_cell: tuple[int, int],
) -> Float[Tensor, "n d _ _"]:
    """Apply a function of images to square tiles that fade into each other over a quarter of their width.

    Images no larger than a tile go through as they are, bit for bit.

    Args:
        function: an encoder or decoder.
        window: side of a tile in latent cells.
        per_cell: pixels of a cell's side, in the function's input and in its output; one of them is 1.
    """
    before, after = per_cell
    sizes = [extent // before for extent in images.shape[-2:]]
    if max(sizes) <= window:
        return function(images)
    axes = []
    for size in sizes:
        side = min(window, size)
        starts = window_positions(size, side, max(3 * side // 4, 1))
        weights = fading([after * start for start in starts], after * size, after * side)
        axes.append([(start, side, weight.to(images.device)) for start, weight in zip(starts, weights, strict=True)])
    total: Tensor | None = None
    for (y, height, down), (x, width, across) in itertools.product(*axes):
        tile = function(images[..., before * y : before * (y + height), before * x : before * (x + width)])
        if total is None:
            total = tile.new_zeros(*tile.shape[:2], *(after * size for size in sizes))
        rows, columns = slice(after * y, after * (y + height)), slice(after * x, after * (x + width))
        total[..., rows, columns] += tile * (down[:, None] * across).to(tile.dtype)
    assert total is not None
    return total
