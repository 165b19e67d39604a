"""Correspondence of windows of one canvas: the cells in which they overlap."""

from collections.abc import Sequence

import torch
from torch import Tensor

from csd_2d.correspondence import Correspondence


def window_correspondence(corners: Sequence[tuple[int, int]], width: int | None = None) -> Correspondence:
    """Match windows of one canvas by their offsets.

    Args:
        corners: top and left cell of each window.
        width: of the canvas, if its left and right border are neighbors.

    Example:
        >>> moved, valid = window_correspondence([(0, 0), (0, 1)])(torch.tensor([[[[1, 2]]], [[[2, 3]]]]), receiver=0)
        >>> moved.flatten(1).tolist(), valid.flatten(1).tolist()
        ([[1, 2], [0, 2]], [[1, 1], [0, 1]])
    """

    def moved(values: Tensor, receiver: int) -> tuple[Tensor, Tensor]:
        arrived, valid = torch.zeros_like(values), torch.zeros_like(values[:, :1])
        for sender, (y, x) in enumerate(corners):
            down, right = y - corners[receiver][0], x - corners[receiver][1]
            if width is not None:
                right = (right + width // 2) % width - width // 2
            (to_y, from_y), (to_x, from_x) = (
                _overlap(shift, side) for shift, side in zip((down, right), values.shape[-2:], strict=True)
            )
            arrived[sender, :, to_y, to_x] = values[sender, :, from_y, from_x]
            valid[sender, :, to_y, to_x] = 1
        return arrived, valid

    return moved


def _overlap(shift: int, size: int) -> tuple[slice, slice]:
    """Intersect a window with one that begins `shift` later: the cells in common, counted in the first and second."""
    shift = max(-size, min(shift, size))
    return slice(max(shift, 0), size + min(shift, 0)), slice(max(-shift, 0), size - max(shift, 0))
