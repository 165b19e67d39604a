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


@dataclass(frozen=True)
class ColorConsensus:
    """Let all particles change their colors as one of them does; the rest of each score stays its own (a `Mixing`).

    Pixels of different images show different things, so that their scores cannot be averaged. A change of color has no
    place: it is an affine map from colors of the source to colors. Each particle's aim, its score plus its change so
    far, is projected onto such maps by least squares. The particle whose map agrees best with those of all others, the
    leader, passes its map on: in every other particle it replaces the particle's own map. A mean of maps would not do:
    while the instruction leaves several answers open, they cancel.

    This is SVGD in a low-dimensional projection of the particles (Chen & Ghattas, NeurIPS 2020, arXiv 2002.03469)
    with two differences: there is no repulsion, which drives particles to different answers, and the kernel's weights
    are those of a single particle.
    """

    ridge: float = 0.05
    """Pull of the leader's map towards no change in colors that it does not show, relative to how often the average
    particle shows them."""

    def __call__(
        self, scores: Float[Tensor, "n c h w"], noised: NoisedParticles
    ) -> tuple[Float[Tensor, "n c h w"], KernelMatrix]:
        source, count = noised.source, len(scores)
        colors = torch.cat([source, torch.ones_like(source[:, :1])], 1).flatten(2).mT
        aims = (scores + noised.alpha / noised.sigma * (noised.x_0 - source)).flatten(2).mT
        moments, products = colors.mT @ colors, colors.mT @ aims
        average = moments.mean(0)
        # Images of few colors do not determine a map: a thousandth of the average keeps it bounded.
        own = torch.linalg.solve(moments + 1e-3 * average, products)
        leader = most_typical(own, average)
        passed_on = torch.linalg.solve(moments[leader] + self.ridge * average, products[leader])
        shift = (colors @ (passed_on - own)).mT.view_as(scores)
        shift[leader] = 0
        gram = torch.zeros(count, count, dtype=scores.dtype, device=scores.device)
        gram[:, leader] = 1
        return scores + shift, KernelMatrix(gram, torch.zeros_like(gram))


def most_typical(maps: Float[Tensor, "n a b"], moments: Float[Tensor, "a a"]) -> int:
    """Find the map that agrees best with all others, by the sum of their positive cosines as functions of colors.

    Args:
        maps: each takes a color to a change.
        moments: second moments of the colors on which maps are compared.
    """
    products = torch.einsum("iab,ac,jcb->ij", maps, moments, maps)
    norms = products.diagonal().clamp(min=1e-12).sqrt()
    cosines = products / norms[:, None] / norms
    return int(cosines.clamp(min=0).sum(0).argmax())


def own_scores(scores: Float[Tensor, "n c h w"], noised: NoisedParticles) -> tuple[Float[Tensor, "n c h w"], None]:
    """Let every particle follow its own score (a `csd_2d.csd.Mixing`): SVGD switched off."""
    return scores, None
