"""A prior without weights: exact noise estimates of a mixture of Gaussians around closed-form edits of the source."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from csd_2d.closed_form import PIXEL_EDITS, ImageEdit, normalized
from csd_2d.prior import Branch


class AnalyticPrior:
    """Exact scores of p(x_0 | source, instruction) = mean over k of N(edit_k(source), spread^2 I), in pixel space.

    Latents are the pixels scaled to [-1, 1]. With v = alpha^2 spread^2 + sigma^2 the marginal of x_t is a mixture of
    N(alpha mu_k, v I), and the noise estimate is -sigma times its score:
    (sigma / v) (x_t - alpha sum_k r_k mu_k), with r_k the posterior probability of component k given x_t.
    The image branch is N(source, spread^2 I), the unconditional one N(0, image_spread^2 I).

    Guidance scales default to 1: on exact scores the optimum is then the edit itself, while w_y > 1 overshoots it by
    (w_y - 1) times the edit.

    Args:
        spread: standard deviation of each component, in latents.
        image_spread: standard deviation of all images, in latents.

    Example:
        >>> prior = AnalyticPrior()
        >>> night = prior.answers("make it night", torch.full((1, 3, 8, 8), 0.5))
        >>> len(night), bool(night[0].mean() < 0.25)
        (1, True)
    """

    window = 256
    cell = 1
    num_timesteps = 1000
    guidance_scale = 1.0
    image_guidance_scale = 1.0

    def __init__(self, spread: float = 0.1, image_spread: float = 0.6, device: str | torch.device = "cpu") -> None:
        self.spread = spread
        self.image_spread = image_spread
        self.device = torch.device(device)
        # Stable Diffusion's "scaled linear" schedule, so that timesteps mean what they mean for learned priors.
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, self.num_timesteps, dtype=torch.float64).square()
        self.alphas_cumprod = (1 - betas).cumprod(0)

    def to(self, device: str | torch.device) -> None:
        self.device = torch.device(device)

    def encode(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n 3 H W"]:
        return 2 * images - 1

    def decode(self, latents: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n 3 H W"]:
        return ((latents + 1) / 2).clamp(0, 1)

    def condition(self, latents: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n 3 H W"]:
        return latents

    def encode_text(self, prompts: Sequence[str]) -> list[list[ImageEdit]]:
        """Look up the closed-form edits that each instruction asks for.

        Raises:
            ValueError: for an instruction without a closed form; the message lists those there are.
        """
        for prompt in prompts:
            if normalized(prompt) not in PIXEL_EDITS:
                raise ValueError(
                    f"the analytic prior does not know the prompt '{prompt}'; it knows: {'; '.join(PIXEL_EDITS)}."
                )
        return [PIXEL_EDITS[normalized(prompt)] for prompt in prompts]

    def answers(self, prompt: str, images: Float[Tensor, "n 3 H W"]) -> list[Float[Tensor, "n 3 H W"]]:
        """Compute the known answers: for each mode of the instruction, the edited images in [0, 1]."""
        return [edit(images).clamp(0, 1) for edit in self.encode_text([prompt])[0]]

    def alpha_sigma(self, timestep: int) -> tuple[float, float]:
        alpha_squared = self.alphas_cumprod[timestep].item()
        return alpha_squared**0.5, (1 - alpha_squared) ** 0.5

    def noise_estimate(
        self,
        x_t: Float[Tensor, "b 3 h w"],
        timestep: int,
        condition: Float[Tensor, "b 3 h w"],
        text: list[list[ImageEdit]],
        branches: Sequence[Branch],
    ) -> Float[Tensor, "b 3 h w"]:
        alpha, sigma = self.alpha_sigma(timestep)
        estimate = torch.empty_like(x_t)
        for branch in set(branches):
            rows = [i for i, b in enumerate(branches) if b == branch]
            if branch == "uncond":
                estimate[rows] = sigma / ((alpha * self.image_spread) ** 2 + sigma**2) * x_t[rows]
                continue
            variance = (alpha * self.spread) ** 2 + sigma**2
            edits = [lambda image: image] if branch == "image" else text[branch]
            mean = self._posterior_mode(x_t[rows], alpha, variance, condition[rows], edits)
            estimate[rows] = sigma / variance * (x_t[rows] - alpha * mean)
        return estimate

    def _posterior_mode(
        self, x_t: Tensor, alpha: float, variance: float, condition: Tensor, edits: Sequence[ImageEdit]
    ) -> Tensor:
        """Compute sum_k r_k mu_k, one component in memory at a time."""
        source = (condition + 1) / 2

        def component(edit: ImageEdit) -> Tensor:
            return 2 * edit(source) - 1

        if len(edits) == 1:
            return component(edits[0])
        log_likelihood = torch.stack(
            [-(x_t - alpha * component(edit)).square().flatten(1).sum(1) / (2 * variance) for edit in edits]
        )
        mean = torch.zeros_like(x_t)
        for weight, edit in zip(log_likelihood.softmax(0), edits, strict=True):
            mean += weight[:, None, None, None] * component(edit)
        return mean
