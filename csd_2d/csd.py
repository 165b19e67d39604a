"""The mathematics of Collaborative Score Distillation. Pure functions on tensors; no device moves.

Source: Kim et al., "Collaborative Score Distillation for Consistent Visual Synthesis", arXiv 2307.04787 (NeurIPS 2023).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from csd_2d.correspondence import Correspondence
from csd_2d.kernels import KernelMatrix
from csd_2d.particles import Particles
from csd_2d.prior import Branch, Prior

Baseline = Literal["image", "noise", "none"]
"""What is subtracted from the target's estimate: the image-conditional estimate of the noised source (CSD-Edit),
the noise itself (CSD, SDS), or nothing (plain score ascent)."""


Weight = Literal["noise", "image"]
"""Units of w(t) phi, w(t) = sigma^2: of noise, as published, or of the image. A score s of x_t points at the latents
x_0 + (sigma / alpha) s. In units of the image a step takes the share lr sigma^2 of that way."""


def add_noise(
    x_0: Float[Tensor, "n c h w"], noise: Float[Tensor, "n c h w"], alpha: float, sigma: float
) -> Float[Tensor, "n c h w"]:
    """Compute x_t = alpha x_0 + sigma noise."""
    return alpha * x_0 + sigma * noise


def guidance_weights(guidance_scale: float, image_guidance_scale: float) -> dict[str, float]:
    """Compute the coefficients of the three noise estimates in the guided one, without those that are zero.

    eq. 3: e(x) + w_s [e(x; s) - e(x)] + w_y [e(x; s, y) - e(x; s)], collected by estimate. Branches with a zero
    coefficient need no U-Net evaluation, which is why they are dropped here and nowhere else.

    Example:
        >>> guidance_weights(7.5, 1.5)
        {'text': 7.5, 'image': -6.0, 'uncond': -0.5}
        >>> guidance_weights(1.0, 1.0)
        {'text': 1.0}
    """
    weights = {
        "text": guidance_scale,
        "image": image_guidance_scale - guidance_scale,
        "uncond": 1 - image_guidance_scale,
    }
    return {branch: weight for branch, weight in weights.items() if weight != 0}


@torch.no_grad()
def edit_residual(
    prior: Prior,
    x_t: Float[Tensor, "n c h w"],
    source_t: Float[Tensor, "n c h w"],
    noise: Float[Tensor, "n c h w"],
    condition: Float[Tensor, "n c h w"],
    timestep: int,
    text: Any,
    guidance_scale: float,
    image_guidance_scale: float,
    baseline: Baseline = "image",
    shares: Float[Tensor, "n prompts _ _"] | None = None,
) -> Float[Tensor, "n c h w"]:
    """Compute the guided noise estimate of the target minus the baseline: the negative of eq. 9's score.

    All branches of all particles go to the prior as one batch, at most five rows a particle: with w_s = 1 three, with
    w_y = w_s four, with both 1 two. The image baseline is text-free guidance of the noised *source*,
    e(x) + w_s [e(x; s) - e(x)].

    Several prompts are composed as sum_k a_k e(x_t; s, y_k) (arXiv 2307.04787, appendix B.1). All get the same noise,
    and everything but the text branch is evaluated once: four rows and one for each prompt that has a share.

    Args:
        x_t: noised particles.
        source_t: the unedited particles under the same noise and timestep.
        condition: the model's image condition (`Prior.condition`).
        text: the encoded prompts (`Prior.encode_text`).
        shares: a_k of each prompt in each particle, for the whole of it (n, prompts, 1, 1) or cell by cell; they add up
            to 1. Default: the first prompt everywhere.
    """
    all_particles = torch.arange(len(x_t), device=x_t.device)
    if shares is None:
        shares = x_t.new_ones(len(x_t), 1, 1, 1)
    # Rows for the prior, in blocks: branch, particles, noised latents, factor on the estimate.
    blocks: list[tuple[Branch, Tensor, Tensor, float | Tensor]] = []
    for name, weight in guidance_weights(guidance_scale, image_guidance_scale).items():
        if name != "text":
            blocks.append((cast(Branch, name), all_particles, x_t, weight))
            continue
        for prompt, share in enumerate(shares.unbind(1)):
            prompted = share.flatten(1).any(1).nonzero()[:, 0]
            blocks.append((prompt, prompted, x_t, weight * share[prompted, None]))
    if baseline == "image":
        reference = guidance_weights(0.0, image_guidance_scale)
        blocks.extend((cast(Branch, name), all_particles, source_t, -weight) for name, weight in reference.items())

    rows = torch.cat([particles for _, particles, _, _ in blocks])
    estimates = prior.noise_estimate(
        torch.cat([noised[particles] for _, particles, noised, _ in blocks]),
        timestep,
        condition[rows],
        text,
        [branch for branch, particles, _, _ in blocks for _ in particles],
    )
    residual = torch.zeros_like(x_t)
    for (_, particles, _, factor), estimate in zip(
        blocks, estimates.split([len(particles) for _, particles, _, _ in blocks]), strict=True
    ):
        residual.index_add_(0, particles, factor * estimate)
    return residual - noise if baseline == "noise" else residual


def surrogate_loss(
    x_0: Float[Tensor, "n c h w"], direction: Float[Tensor, "n c h w"], weight: float
) -> Float[Tensor, ""]:
    """Build the scalar whose gradient with respect to x_0 is -weight * direction.

    Autograd pulls that gradient back to the parameters that x_0 was rendered from.
    """
    return -(weight * direction.detach() * x_0).sum()


@dataclass(frozen=True)
class NoisedParticles:
    """The particles of one step and their sources, under the same noise at one timestep.

    Noised latents and sources are computed on demand, so that a step of many particles need not hold them.
    """

    particles: Particles
    indices: list[int]
    """Which of the particles take part."""
    timestep: int
    alpha: float
    sigma: float
    noise: Float[Tensor, "n c h w"]
    x_0: Float[Tensor, "n c h w"]
    """Latents before the step, detached."""

    @property
    def x_t(self) -> Float[Tensor, "n c h w"]:
        return add_noise(self.x_0, self.noise, self.alpha, self.sigma)

    @property
    def source(self) -> Float[Tensor, "n c h w"]:
        """Latents before any edit."""
        return self.particles.source(self.indices)

    @property
    def source_t(self) -> Float[Tensor, "n c h w"]:
        return add_noise(self.source, self.noise, self.alpha, self.sigma)

    def select(self, rows: Int[Tensor, " k"]) -> "NoisedParticles":
        """Select some of the particles by their rows."""
        return replace(
            self, indices=[self.indices[row] for row in rows.tolist()], noise=self.noise[rows], x_0=self.x_0[rows]
        )

    def split(self, size: int) -> list["NoisedParticles"]:
        """Split into parts of at most `size` particles."""
        parts = zip(self.noise.split(size), self.x_0.split(size), strict=True)
        starts = range(0, len(self.indices), size)
        return [
            replace(self, indices=self.indices[start : start + size], noise=noise, x_0=x_0)
            for start, (noise, x_0) in zip(starts, parts, strict=True)
        ]


class Mixing(Protocol):
    """A rule that turns the particles' scores into the directions in which they move."""

    def __call__(
        self, scores: Float[Tensor, "n c h w"], noised: NoisedParticles
    ) -> tuple[Float[Tensor, "n c h w"], KernelMatrix | None]:
        """Compute phi, and the kernel matrix it was mixed by, if there is one."""
        ...


@dataclass(frozen=True)
class Step:
    """Everything one step of an edit computed. Tensors are shared with the edit, not copied: do not change them."""

    index: int
    """Number of the step in its edit, from 0."""
    noised: NoisedParticles
    score: Float[Tensor, "n c h w"]
    """s of eq. 9, one per particle."""
    direction: Float[Tensor, "n c h w"]
    """phi of eq. 9; particles move along +phi."""
    kernel: KernelMatrix | None
    """Kernel matrix that mixed the scores of whole particles; None if none did."""
    correspondence: Callable[[Sequence[int]], Correspondence] | None = None
    """Finds which places of some particles show the same thing, if that is known."""

    @property
    def indices(self) -> list[int]:
        """Which particles took part."""
        return self.noised.indices

    @property
    def timestep(self) -> int:
        return self.noised.timestep

    @property
    def x_0(self) -> Float[Tensor, "n c h w"]:
        """Latents of the particles before the step."""
        return self.noised.x_0

    @property
    def estimate(self) -> Float[Tensor, "n c h w"]:
        """Latents that the scores point at: x_0 + (sigma / alpha) s."""
        return self.x_0 + self.noised.sigma / self.noised.alpha * self.score

    @property
    def residual_norm(self) -> float:
        """Root mean square of the score over the step's particles."""
        return self.score.square().mean().sqrt().item()


def csd_step(
    particles: Particles,
    indices: list[int],
    prior: Prior,
    timesteps: tuple[int, int],
    draw_noise: Callable[[Sequence[int], Tensor, torch.Generator], Tensor],
    residual: Callable[[NoisedParticles], Tensor],
    mix: Mixing,
    generator: torch.Generator,
    weight: Weight = "noise",
    index: int = 0,
) -> tuple[Float[Tensor, ""], Step]:
    """Take one step of CSD-Edit (arXiv 2307.04787, eq. 9).

    Args:
        indices: the particles that take part.
        timesteps: lowest and highest timestep; one is drawn for all particles.
        draw_noise: called with the indices, latents of the wanted shape and the generator; returns the noise.
        residual: see `edit_residual`.
        mix: see `Mixing`.
        generator: source of the timestep and the noise; lives on the CPU so that devices agree.
        weight: see `Weight`.
        index: number of the step.

    Returns:
        A scalar whose gradient with respect to x_0 is -w(t) phi, and what was computed on the way.
    """
    lowest, highest = timesteps
    timestep = int(torch.randint(lowest, highest + 1, (), generator=generator))
    alpha, sigma = prior.alpha_sigma(timestep)

    rendered = particles.render(indices)
    x_0 = rendered.detach()
    noise = draw_noise(indices, x_0, generator)
    noised = NoisedParticles(particles, indices, timestep, alpha, sigma, noise, x_0)

    score = -residual(noised)
    direction, kernel = mix(score, noised)
    step = Step(index, noised, score, direction, kernel)
    return surrogate_loss(rendered, direction, sigma**2 if weight == "noise" else sigma**3 / alpha), step
