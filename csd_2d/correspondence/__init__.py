"""Which places of several particles show the same thing, so that they can move alike."""

from typing import Protocol

from jaxtyping import Float, Int
from torch import Tensor

_PRECEDENCE = 30.0
"""How much more a value counts than one of the next rank."""


class Correspondence(Protocol):
    """Averages values of n particles over the places that show the same thing."""

    def __call__(self, values: Float[Tensor, "n c h w"], ranks: Int[Tensor, " n"] | None = None) -> Tensor:
        """Return the mean at each place. Where only one particle shows a place its value stays as it is.

        Args:
            ranks: of the particles, from 0, each another; at each place the lowest rank that shows it decides. Default:
                all count alike.
        """
        ...


def precedence(ranks: Int[Tensor, " k"], reference: Int[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Compute how much values count, by their ranks, next to those of other ranks.

    Example:
        >>> import torch
        >>> precedence(torch.tensor([0, 1, 2]), torch.tensor([1, 1, 1])).tolist()
        [30.0, 1.0, 0.03333333507180214]
    """
    return _PRECEDENCE ** (reference - ranks).clamp(-20, 20).float()
