"""Which places of several particles show the same thing, so that they can move alike."""

from typing import Protocol

from jaxtyping import Float
from torch import Tensor


class Correspondence(Protocol):
    """Averages values of n particles over the places that show the same thing."""

    def __call__(self, values: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Return the mean at each place. Where only one particle shows a place its value stays as it is."""
        ...
