"""Mix the scores of particles: by SVGD, by consensus on colors and places, or not at all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from csd_2d.correspondence import Correspondence
from csd_2d.csd import Mixing, NoisedParticles
from csd_2d.kernels import Kernel, KernelMatrix, RBFKernel

KernelInput = Literal["clean", "noisy"]
"""Latents a kernel compares: x_0, or x_t as published."""

FindCorrespondence = Callable[[Sequence[int]], Correspondence]
"""Finds the correspondence of some particles, given by their indices."""


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


@dataclass(frozen=True)
class SVGD:
    """Mix scores by Stein variational gradient descent (a `csd_2d.csd.Mixing`)."""

    kernel: Kernel = field(default_factory=RBFKernel)
    kernel_input: KernelInput = "clean"
    normalize_rows: bool = False
    """See `svgd_direction`."""

    def __call__(
        self, scores: Float[Tensor, "n c h w"], noised: NoisedParticles
    ) -> tuple[Float[Tensor, "n c h w"], KernelMatrix]:
        x, s = _as_vectors(scores, noised.x_0 if self.kernel_input == "clean" else noised.x_t)
        kernel = self.kernel(x)
        return _stein(s, x, kernel, self.normalize_rows).view_as(scores), kernel


def change_so_far(noised: NoisedParticles) -> Float[Tensor, "n c h w"]:
    """Compute how far particles are from their sources, in the units of their scores.

    A score s of x_t = alpha x_0 + sigma noise points at x_0 + (sigma / alpha) s. Score plus change so far is a
    particle's *aim*: the whole change of its source that the model asks for.
    """
    return noised.alpha / noised.sigma * (noised.x_0 - noised.source)


@dataclass(frozen=True)
class PlaceConsensus:
    """Let places that show the same thing move alike (a `csd_2d.csd.Mixing`).

    Aims (see `change_so_far`) are averaged over corresponding places, not scores: a mean of scores corrects the errors
    that all particles share, but leaves the deviation of one particle from the others. Where a place is seen once, its
    score stays its own.
    """

    find: FindCorrespondence
    led: bool = False
    """While particles disagree, each place takes the aim of the most typical particle that shows it, in place of the
    mean: where an instruction leaves several answers open, the mean of two is none of them."""
    alike: float = 0.95
    """Cosine of a particle's aim and the means of all in its places, of the median particle, from which on particles
    count as agreeing. The mean is then the better one: it is right about what a single particle has wrong."""

    def __call__(
        self, scores: Float[Tensor, "n c h w"], noised: NoisedParticles
    ) -> tuple[Float[Tensor, "n c h w"], None]:
        change = change_so_far(noised)
        aims, match = scores + change, self.find(noised.indices)
        shared = match(aims)
        typical = torch.cosine_similarity(aims.flatten(1), shared.flatten(1))
        if self.led and typical.median() < self.alike:
            shared = match(aims, typical.argsort(descending=True, stable=True).argsort())
        return shared - change, None


@dataclass
class ColorLeader:
    """Remembers whom one batch followed, so that the next ones follow the same."""

    stays: bool = False
    """The next batch follows it. Otherwise that looks for a leader of its own, the most like this one."""
    known: tuple[Float[Tensor, "a a"], Float[Tensor, "a c"]] | None = None
    """Second moments of its colors, and their products with the change that it aims at, in units of the image."""


@dataclass(frozen=True)
class ColorConsensus:
    """Let all particles change their colors as one of them does; the rest of each score stays its own (a `Mixing`).

    Pixels of different images show different things, so that their scores cannot be averaged. A change of color has no
    place: it is an affine map from colors of the source to colors. Each particle's aim (see `change_so_far`) is
    projected onto such maps by least squares. The particle whose map agrees best with those of all others, the leader,
    passes its map on: it replaces those of the particles that disagree with it. A mean of maps would not do: while the
    instruction leaves several answers open, they cancel. Where most aims are no changes of color, of one object for
    example, nothing is shared.

    This is SVGD in a low-dimensional projection of the particles (Chen & Ghattas, NeurIPS 2020, arXiv 2002.03469)
    with two differences: there is no repulsion, which drives particles to different answers, and the kernel's weights
    are those of a single particle.
    """

    explained: float = 0.8
    """Share of an aim's square that its map must explain, of the median particle, or nothing is shared."""
    alike: float = 0.8
    """Cosine of a particle's map and the leader's, on the particle's own colors, from which on it keeps its own."""
    ridge: float = 0.01
    """Pull of the leader's map towards no change in colors that it does not show, relative to how often the average
    particle shows them."""
    remembered: ColorLeader | None = field(default=None, repr=False)
    """Whom to follow, and where to put who is followed. Default: each call chooses anew."""

    def __call__(
        self, scores: Float[Tensor, "n c h w"], noised: NoisedParticles
    ) -> tuple[Float[Tensor, "n c h w"], KernelMatrix]:
        # Half precision overflows in sums over cells, and torch solves no equations in it.
        dtype = torch.promote_types(scores.dtype, torch.float32)
        source = noised.source.to(dtype)
        colors = torch.cat([source, torch.ones_like(source[:, :1])], 1).flatten(2).mT
        aims = (scores + change_so_far(noised)).to(dtype).flatten(2).mT
        moments, products = colors.mT @ colors, colors.mT @ aims
        # Gray images, or those of one color, do not determine a map, not even all together.
        average = moments.mean(0) + 1e-3 * colors.shape[1] * torch.eye(colors.shape[-1]).to(moments)
        count, strength, remembered = len(scores), noised.alpha / noised.sigma, self.remembered or ColorLeader()
        known = remembered.known
        if known is not None:  # one more particle
            moments = torch.cat([moments, known[0].to(moments)[None]])
            products = torch.cat([products, strength * known[1].to(products)[None]])
        own = torch.linalg.solve(moments + 1e-3 * average, products)
        alike = cosines(own, moments)
        if known is None:
            leader = int(alike.clamp(min=0).sum(0).argmax())
        else:
            leader = count if remembered.stays else int(alike[:count, -1].argmax())
        remembered.known = moments[leader].clone(), products[leader] / strength
        passed_on = torch.linalg.solve(moments[leader] + self.ridge * average, products[leader])
        explained = (colors @ own[:count]).square().sum((1, 2)) / aims.square().sum((1, 2)).clamp(min=1e-12)
        follows = (alike[:, leader] < self.alike) & (explained.median() > self.explained)
        follows[leader] = False
        shift = (colors @ (passed_on - own[:count])).mT.view_as(scores).to(scores.dtype)
        gram = torch.eye(len(alike), dtype=dtype, device=scores.device)
        gram[follows] = gram[leader].clone()
        gram, follows = gram[:count, :count], follows[:count]
        direction = torch.where(follows[:, None, None, None], scores + shift, scores)
        return direction, KernelMatrix(gram, torch.zeros_like(gram))


def cosines(maps: Float[Tensor, "n a b"], moments: Float[Tensor, "n a a"]) -> Float[Tensor, "n n"]:
    """Compare changes of color, in row i on the colors of particle i.

    On colors that a particle does not show its map means nothing.

    Args:
        maps: each takes a color to a change.
        moments: second moments of each particle's colors.
    """
    products = (moments @ maps).flatten(1) @ maps.flatten(1).mT
    norms = (moments.flatten(1) @ (maps @ maps.mT).flatten(1).mT).clamp(min=1e-12).sqrt()
    return products / norms.diagonal()[:, None] / norms


def own_scores(scores: Float[Tensor, "n c h w"], noised: NoisedParticles) -> tuple[Float[Tensor, "n c h w"], None]:
    """Let every particle follow its own score (a `csd_2d.csd.Mixing`): SVGD switched off."""
    return scores, None


def per_prompt(rule: Mixing, shares: Callable[[Sequence[int]], Float[Tensor, "n prompts _ _"]]) -> Mixing:
    """Apply a rule to the particles of each of several prompts by themselves; particles of two keep their scores.

    Args:
        shares: see `csd_2d.particles.Layout`.
    """

    def mix(scores: Float[Tensor, "n c h w"], noised: NoisedParticles) -> tuple[Float[Tensor, "n c h w"], KernelMatrix]:
        direction = scores.clone()
        gram = torch.eye(len(scores), dtype=scores.dtype, device=scores.device)
        for share in shares(noised.indices).flatten(2).amin(2).unbind(1):
            rows = (share > 0.99).nonzero()[:, 0]
            if len(rows):
                direction[rows], kernel = rule(scores[rows], noised.select(rows))
                if kernel is not None:
                    gram[rows[:, None], rows] = kernel.gram
        return direction, KernelMatrix(gram, torch.zeros_like(gram))

    return mix


def chained(*rules: Mixing) -> Mixing:
    """Apply several rules, each to what the one before it returned. The first kernel matrix is passed on."""

    def mix(
        scores: Float[Tensor, "n c h w"], noised: NoisedParticles
    ) -> tuple[Float[Tensor, "n c h w"], KernelMatrix | None]:
        kernels = []
        for rule in rules:
            scores, kernel = rule(scores, noised)
            kernels.append(kernel)
        return scores, next((kernel for kernel in kernels if kernel is not None), None)

    return mix
