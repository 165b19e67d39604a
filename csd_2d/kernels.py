"""RKHS kernels over particles: Gram matrix and repulsion weights, in O(N d) memory."""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class KernelMatrix(NamedTuple):
    """A kernel and its gradient, evaluated on all pairs of N particles."""

    gram: Float[Tensor, "n n"]
    """K_ij = k(x_j, x_i)."""
    repulsion_weight: Float[Tensor, "n n"]
    """L_ij with grad_{x_j} k(x_j, x_i) = L_ij (x_i - x_j): positive where particles repel each other."""


class Kernel(Protocol):
    """A positive definite kernel of the distance between particles, with its gradient."""

    def __call__(self, particles: Float[Tensor, "n d"]) -> KernelMatrix: ...


def median_bandwidth(squared_distances: Float[Tensor, " pairs"], count: int) -> float:
    """Compute the median of the squared distances over pairs i < j of N particles, divided by log(N + 1).

    Zero distances of particles to themselves are left out: with them two particles, or half of them identical, would
    give a bandwidth of zero (and NaN weights). Where the median itself is zero the mean takes its place, and 1 where
    all particles coincide.

    Source: the median heuristic of Liu & Wang (NeurIPS 2016), section 5, with log(N + 1) for log N.
    """
    if not squared_distances.any():
        return 1.0
    typical = squared_distances.quantile(0.5).item() or squared_distances.mean().item()
    return typical / math.log(count + 1)


@dataclass(frozen=True)
class RBFKernel:
    """The kernel of CSD, k(a, b) = exp(-||a - b||^2 / h) (arXiv 2307.04787, section 3.1).

    Its gradient is grad_{x_j} k(x_j, x_i) = (2 / h) K_ij (x_i - x_j), so that no N x N x d tensor is ever built.

    Example:
        >>> gram, repulsion_weight = RBFKernel(bandwidth=1.0)(torch.tensor([[0.0], [1.0]]))
        >>> bool(gram[0, 1] == torch.tensor(-1.0).exp()), bool(repulsion_weight[0, 1] == 2 * gram[0, 1])
        (True, True)
    """

    bandwidth: float | None = None
    """h, in units of squared distance. None: `median_bandwidth` of the particles at hand."""
    bandwidth_scale: float = 1.0
    """Factor on h. Above 1 the particles share more of their scores, towards 0 each keeps its own."""

    def __post_init__(self) -> None:
        for name in ("bandwidth", "bandwidth_scale"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise ValueError(f"{name} must be positive and finite, got {value}.")

    def __call__(self, particles: Float[Tensor, "n d"]) -> KernelMatrix:
        count = len(particles)
        if count == 1:
            return KernelMatrix(particles.new_ones(1, 1), particles.new_zeros(1, 1))
        # Not cdist: by default it subtracts products of matrices, and nearly equal frames come out with distance 0.
        pairs = F.pdist(particles).square()
        h = self.bandwidth_scale * (median_bandwidth(pairs, count) if self.bandwidth is None else self.bandwidth)
        i, j = torch.triu_indices(count, count, offset=1, device=particles.device)
        gram = particles.new_ones(count, count)
        gram[i, j] = gram[j, i] = (-pairs / h).exp()
        return KernelMatrix(gram, gram * (2 / h))
