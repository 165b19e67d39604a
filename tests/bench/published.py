"""CSD-Edit transcribed plainly from its publication, as a yardstick of speed: one image at a time, nothing left out.

Source: arXiv 2307.04787, eq. 3, 6 and 9. What makes it slow is what the authors' 2D scripts do too: six U-Net
evaluations an image (three for the noised image, three for its noised source) whatever the guidance scales are, images
one after the other, attention in slices, an N x N x d tensor for the kernel's gradient, and loops for the gradient of a
canvas. What makes their results differ is mended, so that results can be compared: the source image goes in unscaled,
and the median is that of distances between two images.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor


class Draw(NamedTuple):
    """What is random in a step."""

    timestep: int
    indices: list[int]
    noise: Float[Tensor, "n c h w"]


class Published:
    """The update of one step.

    Args:
        unet: as `InstructPix2PixPrior` takes it; its attention is set to slices.
        alphas_cumprod: the noise schedule.
        text: embedding of the prompt and of the empty prompt.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        alphas_cumprod: Float[Tensor, " timesteps"],
        text: Float[Tensor, "2 tokens features"],
        guidance_scale: float,
        image_guidance_scale: float,
    ) -> None:
        self.unet, self.alphas_cumprod, self.text = unet, alphas_cumprod, text
        self.guidance_scale, self.image_guidance_scale = guidance_scale, image_guidance_scale
        unet.set_attention_slice("auto")

    def _estimates(self, x_t: Tensor, condition: Tensor, timestep: int) -> list[Tensor]:
        """With text and image, with the image, with neither."""
        image = torch.cat([condition, condition, torch.zeros_like(condition)])
        inputs = torch.cat([torch.cat([x_t] * 3), image], dim=1).to(self.unet.dtype)
        prompts = torch.cat([self.text[:1], self.text[1:], self.text[1:]])
        return list(self.unet(inputs, timestep, encoder_hidden_states=prompts).sample.to(x_t.dtype).chunk(3))

    def _score(self, x_t: Tensor, source_t: Tensor, condition: Tensor, timestep: int) -> Tensor:
        text, image, uncond = self._estimates(x_t, condition, timestep)
        target = uncond + self.image_guidance_scale * (image - uncond) + self.guidance_scale * (text - image)
        _, image, uncond = self._estimates(source_t, condition, timestep)
        return -(target - uncond - self.image_guidance_scale * (image - uncond))

    @torch.no_grad()
    def directions(
        self,
        x_0: Float[Tensor, "n c h w"],
        source: Float[Tensor, "n c h w"],
        condition: Float[Tensor, "n c h w"],
        draw: Draw,
    ) -> Float[Tensor, "n c h w"]:
        """w(t) phi of some images."""
        alpha_squared = self.alphas_cumprod[draw.timestep].item()
        alpha, sigma = alpha_squared**0.5, (1 - alpha_squared) ** 0.5
        noised, scores = [], []
        for i in range(len(x_0)):
            x_t = alpha * x_0[i : i + 1] + sigma * draw.noise[i : i + 1]
            source_t = alpha * source[i : i + 1] + sigma * draw.noise[i : i + 1]
            noised.append(x_t)
            scores.append(self._score(x_t, source_t, condition[i : i + 1], draw.timestep))
        return sigma**2 * _stein(torch.cat(scores), torch.cat(noised))


def _stein(scores: Float[Tensor, "n c h w"], particles: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """eq. 6 with the kernel's gradient pair by pair."""
    n = len(particles)
    x, s = particles.flatten(1), scores.flatten(1)
    differences = x[:, None] - x[None]  # (i, j, d): x_i - x_j
    squared = differences.square().sum(-1)
    off_diagonal = squared[~torch.eye(n, dtype=torch.bool, device=x.device)]
    bandwidth = off_diagonal.quantile(0.5) / torch.log(torch.tensor(n + 1.0)) if n > 1 else torch.tensor(1.0)
    gram = (-squared / bandwidth).exp()
    gradient = 2 / bandwidth * gram[..., None] * differences  # of k(x_j, x_i) with respect to x_j
    return ((gram[..., None] * s[None] + gradient).sum(1) / n).view_as(scores)


def edit_frames(
    published: Published,
    source: Float[Tensor, "n c h w"],
    condition: Float[Tensor, "n c h w"],
    draws: Iterable[Draw],
    lr: float,
) -> Iterable[Float[Tensor, "n c h w"]]:
    """Frames or views with latents of their own, after each step."""
    latents = source.clone()
    for draw in draws:
        rows = draw.indices
        directions = published.directions(latents[rows], source[rows], condition[rows], draw)
        for row, direction in zip(rows, directions, strict=True):
            latents[row] += lr * direction
        yield latents


def edit_canvas(
    published: Published,
    source: Float[Tensor, "1 c h w"],
    condition: Float[Tensor, "1 c h w"],
    corners: Sequence[tuple[int, int]],
    window: int,
    draws: Iterable[Draw],
    lr: float,
) -> Iterable[Float[Tensor, "1 c h w"]]:
    """A canvas through crops at `corners` (top, left), after each step; a cell moves by the mean of what crops say."""
    canvas = source.clone()
    for draw in draws:
        places = [corners[index] for index in draw.indices]

        def crops(picture: Tensor, places: list[tuple[int, int]] = places) -> Tensor:
            return torch.cat([picture[..., y : y + window, x : x + window] for y, x in places])

        directions = published.directions(crops(canvas), crops(source), crops(condition), draw)
        total, count = torch.zeros_like(canvas), torch.zeros_like(canvas)
        for (y, x), direction in zip(places, directions, strict=True):
            total[..., y : y + window, x : x + window] += direction
            count[..., y : y + window, x : x + window] += 1
        canvas += lr * total / count.clamp(min=1)
        yield canvas
