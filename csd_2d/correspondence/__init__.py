"""Which places of two particles show the same thing, so that scores can be mixed place by place."""

from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor


class Correspondence(Protocol):
    """Moves values of n particles to the places where one of them shows the same thing."""

    def __call__(
        self, values: Float[Tensor, "n c h w"], receiver: int
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n 1 h w"]]:
        """Warp the values of all particles to the receiver's places; also return where they are valid, in [0, 1].

        The receiver's own values come back unchanged, valid everywhere.

        Args:
            values: one map for each particle, the receiver among them.
            receiver: its row.
        """
        ...


def everywhere(correspondence: Correspondence) -> Correspondence:
    """Extend a correspondence to all places: one without a counterpart gets the sender's value at the same pixel.

    Example:
        >>> from csd_2d.correspondence.windows import window_correspondence
        >>> overlap = window_correspondence([(0, 0), (0, 1)])
        >>> moved, valid = everywhere(overlap)(torch.tensor([[[[1, 2]]], [[[2, 3]]]]), 0)
        >>> moved.flatten(1).tolist(), valid.flatten(1).tolist()
        ([[1, 2], [2, 2]], [[1, 1], [1, 1]])
    """

    def moved(values: Tensor, receiver: int) -> tuple[Tensor, Tensor]:
        arrived, valid = correspondence(values, receiver)
        return valid * arrived + (1 - valid) * values, torch.ones_like(valid)

    return moved
