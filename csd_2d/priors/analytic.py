"""A prior without weights: exact noise estimates of a mixture of Gaussians around closed-form edits of the source."""

import math
import re
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from csd_2d.csd import Branch

ImageEdit = Callable[[Tensor], Tensor]
"""RGB (..., 3, H, W) in [0, 1] to RGB. Pixel by pixel, so that the edit of a crop is the crop of the edit."""


def _luma(image: Tensor) -> Tensor:
    """Rec. 601 luma, (..., 1, H, W)."""
    return (image * image.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(-3, keepdim=True)


def _rgb(image: Tensor, *color: float) -> Tensor:
    return image.new_tensor(color)[:, None, None]


def _night(image: Tensor) -> Tensor:
    # Day for night: underexposed and blue, while warm bright surfaces stay lit as if by street lamps.
    muted = torch.lerp(_luma(image), image, 0.5)
    moonlit = muted.pow(1.35) * _rgb(image, 0.26, 0.34, 0.58) + _rgb(image, 0.01, 0.02, 0.05)
    warmth = ((image[..., :1, :, :] - image[..., 2:, :, :] - 0.1) / 0.4).clamp(0, 1)
    lamplit = image * _rgb(image, 0.95, 0.75, 0.45)
    return torch.lerp(moonlit, lamplit, 0.7 * warmth * _luma(image))


def _black_and_white(image: Tensor) -> Tensor:
    return _luma(image).expand_as(image)


def _sepia(image: Tensor) -> Tensor:
    return _luma(image) * _rgb(image, 0.97, 0.80, 0.58) + _rgb(image, 0.03, 0.02, 0.0)


def _foggy(image: Tensor) -> Tensor:
    return torch.lerp(_luma(image), image, 0.4) * 0.4 + _rgb(image, 0.48, 0.50, 0.52)


def _snowy(image: Tensor) -> Tensor:
    # Snow lies on whatever is not in deep shadow; greens turn white first.
    greenness = (image[..., 1:2, :, :] - image[..., :1, :, :].maximum(image[..., 2:, :, :])).clamp(0, 0.2) * 3
    cover = (((_luma(image) - 0.12) / 0.4).clamp(0, 1) * 0.65 + greenness).clamp(0, 0.85)
    return torch.lerp(torch.lerp(_luma(image), image, 0.5), _rgb(image, 0.93, 0.96, 1.0).expand_as(image), cover)


def _invert(image: Tensor) -> Tensor:
    return 1 - image


def _sunset(image: Tensor) -> Tensor:
    return torch.lerp(_luma(image), image, 0.6) * _rgb(image, 1.0, 0.62, 0.40) + _rgb(image, 0.10, 0.03, 0.06)


_HUES = {"red": 0, "yellow": 60, "green": 120, "cyan": 180, "blue": 240, "purple": 300}
_TINT = 0.42


def _paint(hue: float) -> ImageEdit:
    """Adds a hue and leaves luma and detail alone.

    The shift has the same length for every hue and does not depend on the source's own colours: all hues are equally
    far from the source, so that an ambiguous instruction is decided by noise alone. It fades out towards black and
    white, where no colour fits, and is not clipped, for clipping would favour some hues.
    """
    angle = math.radians(hue)

    def paint(image: Tensor) -> Tensor:
        # An orthonormal basis of the plane of RGB vectors whose components sum to zero.
        axes = torch.stack([_rgb(image, 2, -1, -1) / 6**0.5, _rgb(image, 0, 1, -1) / 2**0.5])
        direction = math.cos(angle) * axes[0] + math.sin(angle) * axes[1]
        mean = image.mean(-3, keepdim=True)
        return image + _TINT * (4 * mean * (1 - mean)).clamp(min=0) * direction

    return paint


_COLORS = {color: _paint(hue) for color, hue in _HUES.items()}

EDITS: dict[str, list[ImageEdit]] = {
    "make it night": [_night],
    "make it sunset": [_sunset],
    "make it black and white": [_black_and_white],
    "make it sepia": [_sepia],
    "make it foggy": [_foggy],
    "make it snowy": [_snowy],
    "invert the colors": [_invert],
    **{f"paint it {color}": [edit] for color, edit in _COLORS.items()},
    "paint it a new color": list(_COLORS.values()),
}
"""Instruction -> its answers; more than one where the instruction is ambiguous."""


def _normalized(prompt: str) -> str:
    words = re.sub(r"[^a-z ]", " ", prompt.lower().replace("colour", "color")).split()
    return " ".join(words)


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

    def encode(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n 3 H W"]:
        return 2 * images - 1

    def decode(self, latents: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n 3 H W"]:
        return ((latents + 1) / 2).clamp(0, 1)

    def condition(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n 3 H W"]:
        return self.encode(images)

    def encode_text(self, prompt: str) -> list[ImageEdit]:
        """The closed-form edits the instruction asks for.

        Raises:
            ValueError: for an instruction without a closed form; the message lists those there are.
        """
        edits = EDITS.get(_normalized(prompt))
        if edits is None:
            raise ValueError(f"the analytic prior does not know the prompt '{prompt}'; it knows: {'; '.join(EDITS)}.")
        return edits

    def answers(self, prompt: str, images: Float[Tensor, "n 3 H W"]) -> list[Float[Tensor, "n 3 H W"]]:
        """The known answers: for each mode of the instruction, the edited images in [0, 1]."""
        return [edit(images).clamp(0, 1) for edit in self.encode_text(prompt)]

    def alpha_sigma(self, timestep: int) -> tuple[float, float]:
        alpha_squared = self.alphas_cumprod[timestep].item()
        return alpha_squared**0.5, (1 - alpha_squared) ** 0.5

    def noise_estimate(
        self,
        x_t: Float[Tensor, "b 3 h w"],
        timestep: int,
        condition: Float[Tensor, "b 3 h w"],
        text: list[ImageEdit],
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
            edits = text if branch == "text" else [lambda image: image]
            mean = self._posterior_mode(x_t[rows], alpha, variance, condition[rows], edits)
            estimate[rows] = sigma / variance * (x_t[rows] - alpha * mean)
        return estimate

    def _posterior_mode(
        self, x_t: Tensor, alpha: float, variance: float, condition: Tensor, edits: Sequence[ImageEdit]
    ) -> Tensor:
        """sum_k r_k mu_k, one component in memory at a time."""
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
