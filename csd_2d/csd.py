"""The mathematics of Collaborative Score Distillation. Pure functions on tensors: noise comes in, no device moves.

Source: Kim et al., "Collaborative Score Distillation for Consistent Visual Synthesis", arXiv 2307.04787 (NeurIPS 2023).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from csd_2d.kernels import Kernel, RBFKernel
from csd_2d.transport import Transport

if TYPE_CHECKING:
    from csd_2d.priors import Prior

Branch = int | Literal["image", "uncond"]
"""Which conditions a noise estimate sees: the image and the prompt of that number, the image alone, or neither."""

Baseline = Literal["image", "noise", "none"]
"""What is subtracted from the target's estimate: the image-conditional estimate of the noised source (CSD-Edit),
the noise itself (CSD, SDS), or nothing (plain score ascent)."""


def add_noise(
    x_0: Float[Tensor, "n c h w"], noise: Float[Tensor, "n c h w"], alpha: float, sigma: float
) -> Float[Tensor, "n c h w"]:
    """x_t = alpha x_0 + sigma noise."""
    return alpha * x_0 + sigma * noise


def guidance_weights(guidance_scale: float, image_guidance_scale: float) -> dict[str, float]:
    """Coefficients of the three noise estimates in the guided one, without those that are zero.

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
    prior: "Prior",
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
    """Guided noise estimate of the target minus the baseline: the negative of eq. 9's score.

    All branches of all particles go to the prior as one batch, at most five rows a particle: with w_s = 1 three, with
    w_y = w_s four, with both 1 two. The image baseline is text-free guidance of the noised *source*,
    e(x) + w_s [e(x; s) - e(x)].

    Several prompts are composed as sum_k a_k e(x_t; s, y_k) (arXiv 2307.04787, appendix B.1). All see the same noise,
    and everything but the text branch is evaluated once: four rows and one for each prompt that has a share.

    Args:
        x_t: noised particles.
        source_t: the unedited particles under the same noise and timestep.
        condition: what the prior takes as the source image (`Prior.condition`).
        text: the encoded prompts (`Prior.encode_text`).
        shares: a_k of each prompt in each particle, for the whole of it (n, prompts, 1, 1) or cell by cell; they add up
            to 1. Default: the first prompt everywhere.
    """
    everyone = torch.arange(len(x_t), device=x_t.device)
    if shares is None:
        shares = x_t.new_ones(len(x_t), 1, 1, 1)
    # Rows for the prior, in blocks: branch, particles, noised latents they see, factor on the estimate.
    blocks: list[tuple[Branch, Tensor, Tensor, float | Tensor]] = []
    for name, weight in guidance_weights(guidance_scale, image_guidance_scale).items():
        if name != "text":
            blocks.append((cast(Branch, name), everyone, x_t, weight))
            continue
        for prompt, share in enumerate(shares.unbind(1)):
            sees = share.flatten(1).any(1).nonzero()[:, 0]
            blocks.append((prompt, sees, x_t, weight * share[sees, None]))
    if baseline == "image":
        reference = guidance_weights(0.0, image_guidance_scale)
        blocks.extend((cast(Branch, name), everyone, source_t, -weight) for name, weight in reference.items())

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


def svgd_direction(
    scores: Float[Tensor, "n ..."],
    particles: Float[Tensor, "n ..."],
    kernel: Kernel | None = None,
    normalize_rows: bool = False,
    transport: Transport | None = None,
    rows: Sequence[int] | slice = slice(None),
    changes: Float[Tensor, "n ..."] | None = None,
) -> Float[Tensor, "m ..."]:
    """Stein variational ascent direction: particles move along +phi.

    phi_i = (1/N) sum_j [k(x_j, x_i) s_j + grad_{x_j} k(x_j, x_i)]   (Liu & Wang 2016, eq. 8; CSD eq. 6)

    With a transport T, place p of particle i hears what the others say of the same thing, where they show it: s_j(p)
    and x_j(p) become T_ji(s_j)(p) and T_ji(x_j)(p), and the terms in which place p is not valid are left out. Mixed
    scores correct what all particles have wrong together, but no particle's own deviation from the others. With
    `changes` c what is mixed is therefore where the scores point, seen from the receiver: T_ji(s_j + c_j) - c_i.

    Args:
        scores: s_j, one per particle, any trailing shape.
        particles: the x_j the kernel looks at, same first dimension.
        kernel: default `RBFKernel()`, with the median bandwidth.
        normalize_rows: divide row i by sum_j K_ij instead of N, so that equal scores keep their length whatever N is.
            With a transport by the sum, or the number, of the terms that are valid in each place.
        transport: see `Transport`; scores and particles are then (n, c, h, w). Default: same pixel, same place.
        rows: the i whose phi is computed. Default: all.
        changes: with a transport, how far each particle is from its source, in the units of its score. Default: 0.

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
    if scores.shape[0] != particles.shape[0] or scores.numel() != particles.numel():
        raise ValueError(
            "scores and particles must hold as many particles of as many elements, "
            f"got shapes {tuple(scores.shape)} and {tuple(particles.shape)}."
        )
    # Half precision overflows in squared distances of a few thousand dimensions.
    dtype = torch.promote_types(scores.dtype, torch.float32)
    x, s = particles.flatten(1).to(dtype), scores.flatten(1).to(dtype)
    gram, slope = (matrix[rows] for matrix in (kernel or RBFKernel())(x))
    mine = x[rows]
    if transport is not None:
        receivers = range(len(x))[rows] if isinstance(rows, slice) else rows
        s, x = s.view_as(scores), x.view_as(particles)
        c = torch.zeros_like(s) if changes is None else changes.to(dtype)
        pairs = zip(receivers, gram, slope, strict=True)
        moved = [_moved_row(s, x, c, weights, slopes, normalize_rows, transport, i) for i, weights, slopes in pairs]
        return torch.stack(moved).to(scores.dtype) if moved else scores[:0]
    norm = gram.sum(1, keepdim=True) if normalize_rows else len(x)
    repulsion = slope.sum(1, keepdim=True) * mine - slope @ x
    return ((gram @ s + repulsion) / norm).unflatten(1, scores.shape[1:]).to(scores.dtype)


def _moved_row(
    scores: Float[Tensor, "n c h w"],
    particles: Float[Tensor, "n c h w"],
    changes: Float[Tensor, "n c h w"],
    gram: Float[Tensor, " n"],
    slope: Float[Tensor, " n"],
    normalize_rows: bool,
    transport: Transport,
    receiver: int,
) -> Float[Tensor, "c h w"]:
    """phi of one particle; one at a time, so that memory stays O(N d)."""
    moved, valid = transport(torch.cat([scores + changes, particles], 1), receiver)
    aim, x = moved.chunk(2, 1)
    weights = gram[:, None, None, None] * valid
    repulsion = (slope[:, None, None, None] * valid * (particles[receiver] - x)).sum(0)
    norm = (weights if normalize_rows else valid).sum(0)
    return ((weights * (aim - changes[receiver])).sum(0) + repulsion) / norm


def surrogate_loss(
    x_0: Float[Tensor, "n c h w"], direction: Float[Tensor, "n c h w"], weight: float
) -> Float[Tensor, ""]:
    """Scalar whose gradient with respect to x_0 is -weight * direction; autograd pulls it back to the parameters."""
    return -(weight * direction.detach() * x_0).sum()
