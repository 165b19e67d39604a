"""Mix the scores of particles: by SVGD, between corresponding places, or not at all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from csd_2d.correspondence import Correspondence
from csd_2d.csd import NoisedParticles
from csd_2d.kernels import Kernel, KernelMatrix, RBFKernel, low_pass

KernelInput = Literal["clean", "low_pass", "noisy"]
"""Latents a kernel compares: x_0, x_0 without detail, or x_t as published."""


def svgd_direction(
    scores: Float[Tensor, "n ..."],
    particles: Float[Tensor, "n ..."],
    kernel: Kernel | None = None,
    normalize_rows: bool = False,
) -> Float[Tensor, "n ..."]:
    """Compute the Stein variational ascent direction: particles move along +phi.

    phi_i = (1/N) sum_j [k(x_j, x_i) s_j + grad_{x_j} k(x_j, x_i)]   (Liu & Wang 2016, eq. 8; CSD eq. 6)

    Args:
        scores: s_j, one per particle, any trailing shape.
        particles: the x_j that the kernel compares, same first dimension.
        kernel: default `RBFKernel()`, with the median bandwidth.
        normalize_rows: divide row i by sum_j K_ij instead of N, so that equal scores keep their length whatever N is.

    Returns:
        phi, in the shape and dtype of `scores`. N = 1 returns the score itself.

    Raises:
        ValueError: if scores and particles differ in number or in elements per particle.

    Note:
        The paper prints the update as descent with a plus before the second term, which attracts if taken literally.
        Here, as in SVGD and in the authors' code, it repels.

    Example:
        >>> svgd_direction(torch.ones(1, 3), torch.zeros(1, 3)).tolist()
        [[1.0, 1.0, 1.0]]
    """
    x, s = _as_vectors(scores, particles)
    return _stein(s, x, (kernel or RBFKernel())(x), normalize_rows).view_as(scores).to(scores.dtype)


def _as_vectors(scores: Tensor, particles: Tensor) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """Flatten particles and scores. Half precision overflows in squared distances of a few thousand dimensions."""
    if scores.shape[0] != particles.shape[0] or scores.numel() != particles.numel():
        raise ValueError(
            "scores and particles must have the same number of particles and of elements per particle, "
            f"got shapes {tuple(scores.shape)} and {tuple(particles.shape)}."
        )
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return particles.flatten(1).to(dtype), scores.flatten(1).to(dtype)


def _stein(
    scores: Float[Tensor, "n d"], particles: Float[Tensor, "n d"], kernel: KernelMatrix, normalize_rows: bool
) -> Float[Tensor, "n d"]:
    gram, weight = kernel
    norm = gram.sum(1, keepdim=True) if normalize_rows else len(particles)
    repulsion = weight.sum(1, keepdim=True) * particles - weight @ particles
    return (gram @ scores + repulsion) / norm


def corresponding_direction(
    scores: Float[Tensor, "n c h w"],
    particles: Float[Tensor, "n c h w"],
    changes: Float[Tensor, "n c h w"],
    kernel: KernelMatrix,
    correspondence: Correspondence,
    normalize_rows: bool = False,
) -> Float[Tensor, "n c h w"]:
    """Compute `svgd_direction` between corresponding places instead of equal pixels.

    With a correspondence T, s_j(p) and x_j(p) of place p in particle i become T_ji(s_j)(p) and T_ji(x_j)(p); terms in
    which place p is not valid are left out. Mixed scores correct the errors that all particles share, but not the
    deviation of one particle from the others. Therefore the changes c that the scores point at are mixed, relative to
    the receiver: T_ji(s_j + c_j) - c_i.

    Args:
        changes: how far each particle is from its source, in the units of its score.
        kernel: of the particles as vectors.
        normalize_rows: divide by the sum, instead of the number, of the terms that are valid in each place.
    """
    rows = [
        _corresponding_row(scores, particles, changes, *row, correspondence, normalize_rows, receiver)
        for receiver, row in enumerate(zip(*kernel, strict=True))
    ]
    return torch.stack(rows)


def _corresponding_row(
    scores: Float[Tensor, "n c h w"],
    particles: Float[Tensor, "n c h w"],
    changes: Float[Tensor, "n c h w"],
    gram: Float[Tensor, " n"],
    repulsion_weight: Float[Tensor, " n"],
    correspondence: Correspondence,
    normalize_rows: bool,
    receiver: int,
) -> Float[Tensor, "c h w"]:
    """Compute phi of one particle; one at a time, so that memory stays O(N d)."""
    moved, valid = correspondence(torch.cat([scores + changes, particles], 1), receiver)
    aim, x = moved.chunk(2, 1)
    weights = gram[:, None, None, None] * valid
    repulsion = (repulsion_weight[:, None, None, None] * valid * (particles[receiver] - x)).sum(0)
    norm = (weights if normalize_rows else valid).sum(0)
    return ((weights * (aim - changes[receiver])).sum(0) + repulsion) / norm


@dataclass(frozen=True)
class SVGD:
    """Mix scores by Stein variational gradient descent (a `csd_2d.csd.Mixing`)."""

    kernel: Kernel = field(default_factory=RBFKernel)
    kernel_input: KernelInput = "clean"
    normalize_rows: bool = False
    """See `svgd_direction`."""
    correspondence: Callable[[Sequence[int]], Correspondence] | None = None
    """Finds the correspondence of some particles, by their indices. None: equal pixels correspond."""

    def __call__(
        self, scores: Float[Tensor, "n c h w"], noised: NoisedParticles
    ) -> tuple[Float[Tensor, "n c h w"], KernelMatrix]:
        compared = {"clean": lambda: noised.x_0, "low_pass": lambda: low_pass(noised.x_0), "noisy": lambda: noised.x_t}
        x, s = _as_vectors(scores, compared[self.kernel_input]())
        kernel = self.kernel(x)
        if self.correspondence is None:
            return _stein(s, x, kernel, self.normalize_rows).view_as(scores), kernel
        # A score s of x_t = alpha x_0 + sigma noise points at x_0 + sigma / alpha s.
        changes = noised.alpha / noised.sigma * (noised.x_0 - noised.source)
        correspondence = self.correspondence(noised.indices)
        s, x = s.view_as(scores), x.view_as(scores)
        return corresponding_direction(s, x, changes, kernel, correspondence, self.normalize_rows), kernel


def own_scores(scores: Float[Tensor, "n c h w"], noised: NoisedParticles) -> tuple[Float[Tensor, "n c h w"], None]:
    """Let every particle follow its own score (a `csd_2d.csd.Mixing`): SVGD switched off."""
    return scores, None
