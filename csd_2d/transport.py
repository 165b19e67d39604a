"""Where one particle shows the same thing as another: what lets scores be mixed place by place."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from csd_2d.flow import optical_flow, visible, warp


class Transport(Protocol):
    """Moves values of n particles to where one of them shows the same thing."""

    def __call__(
        self, values: Float[Tensor, "n c h w"], receiver: int
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n 1 h w"]]:
        """Values of all particles at the receiver's places, and where they are valid, in [0, 1].

        The receiver's own values come back as they are, valid everywhere.

        Args:
            values: one map for each particle, the receiver among them.
            receiver: its row.
        """
        ...


class FrameFlows:
    """Correspondences of a video's frames: optical flow, estimated when a pair is first asked for, and kept.

    Frames further apart than `REACH` count as showing nothing in common. What is kept of the others is at latent
    resolution, 12 bytes a cell for each ordered pair.

    Args:
        frames: the unedited frames, of one size in whole cells, RGB in [0, 1].
        cell: pixels per latent cell along one side.
        device: where flow is estimated. What is kept of it is on the CPU.
    """

    REACH = 12

    def __init__(self, frames: Sequence[Float[Tensor, "3 H W"]], cell: int, device: str | torch.device = "cpu") -> None:
        self._frames, self._cell, self._device = frames, cell, device
        self._known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def flow(self, a: int, b: int) -> Float[Tensor, "2 H W"]:
        """From frame a to frame b, in pixels."""
        return optical_flow(*(self._frames[index].to(self._device) for index in (a, b)))

    def between(self, a: int, b: int) -> tuple[Float[Tensor, "2 h w"], Float[Tensor, "1 h w"]]:
        """Flow from frame a to frame b in latent cells, and which part of each cell of a is visible in b."""
        if (a, b) not in self._known:
            forward, backward = self.flow(a, b), self.flow(b, a)
            self._known[a, b] = self._in_cells(forward, backward)
            self._known[b, a] = self._in_cells(backward, forward)
        return self._known[a, b]

    def _in_cells(self, forward: Tensor, backward: Tensor) -> tuple[Tensor, Tensor]:
        pooled = F.avg_pool2d(torch.cat([forward, visible(forward, backward)]), self._cell).cpu()
        return pooled[:2] / self._cell, pooled[2:]

    def transport(self, indices: Sequence[int]) -> Transport:
        """Among some of the frames."""

        def moved(values: Tensor, receiver: int) -> tuple[Tensor, Tensor]:
            here = indices[receiver]
            near = [row for row, sender in enumerate(indices) if 0 < abs(sender - here) <= self.REACH]
            arrived, valid = values.clone(), torch.zeros_like(values[:, :1])
            valid[receiver] = 1
            if near:
                maps = zip(*(self.between(here, indices[row]) for row in near), strict=True)
                flows, seen = (torch.stack(rows).to(values) for rows in maps)
                arrived[near], valid[near] = warp(values[near], flows), seen
            return arrived, valid

        return moved


def window_transport(corners: Sequence[tuple[int, int]], width: int | None = None) -> Transport:
    """Among windows of one canvas: what two of them share is the cells in which they overlap.

    Args:
        corners: top and left cell of each window.
        width: of the canvas, if its left and right border are neighbours.

    Example:
        >>> moved, valid = window_transport([(0, 0), (0, 1)])(torch.tensor([[[[1, 2]]], [[[2, 3]]]]), receiver=0)
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
                _shared(shift, side) for shift, side in zip((down, right), values.shape[-2:], strict=True)
            )
            arrived[sender, :, to_y, to_x] = values[sender, :, from_y, from_x]
            valid[sender, :, to_y, to_x] = 1
        return arrived, valid

    return moved


def everywhere(transport: Transport) -> Transport:
    """The same, and elsewhere a sender is heard of the same cell of its own map: nobody is left out anywhere.

    Example:
        >>> moved, valid = everywhere(window_transport([(0, 0), (0, 1)]))(torch.tensor([[[[1, 2]]], [[[2, 3]]]]), 0)
        >>> moved.flatten(1).tolist(), valid.flatten(1).tolist()
        ([[1, 2], [2, 2]], [[1, 1], [1, 1]])
    """

    def moved(values: Tensor, receiver: int) -> tuple[Tensor, Tensor]:
        arrived, valid = transport(values, receiver)
        return valid * arrived + (1 - valid) * values, torch.ones_like(valid)

    return moved


def _shared(shift: int, size: int) -> tuple[slice, slice]:
    """The part of a window that another one shares that begins `shift` later, counted in the first and in the other."""
    shift = max(-size, min(shift, size))
    return slice(max(shift, 0), size + min(shift, 0)), slice(max(-shift, 0), size - max(shift, 0))
