"""The interface of a diffusion model as CSD uses it."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

Branch = int | Literal["image", "uncond"]
"""Conditions of a noise estimate: the image and the prompt of that number, the image alone, or neither."""


class Prior(Protocol):
    """A diffusion model that edits an image, or that follows text alone.

    It hides the parametrization, the batch size its network is run at, and where its weights live. Latents go in and
    come out in fp32; images are RGB in [0, 1].
    """

    window: int
    """Side of the square of latent cells the model works best at."""
    cell: int
    """Pixels per latent cell along one side."""
    num_timesteps: int
    """Length of the noise schedule; timesteps are 0 .. num_timesteps - 1."""
    guidance_scale: float
    """Default text guidance scale (omega_y)."""
    image_guidance_scale: float
    """Default image guidance scale (omega_s)."""
    device: torch.device

    def to(self, device: str | torch.device) -> None:
        """Move the networks to another device."""
        ...

    def encode(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n c h w"]:
        """Encode images to latents x_0; H and W are multiples of `cell`."""
        ...

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """Decode latents to images, clamped to [0, 1]."""
        ...

    def condition(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n _ h w"]:
        """Convert latents of source images to the model's image condition; no channels if it takes none.

        Must act on each cell by itself, so that the condition of a crop is the crop of the condition.
        """
        ...

    def encode_text(self, prompts: Sequence[str]) -> Any:
        """Encode instructions for `noise_estimate`. ValueError if the prior cannot follow one of them."""
        ...

    def alpha_sigma(self, timestep: int) -> tuple[float, float]:
        """Look up alpha and sigma of x_t = alpha x_0 + sigma noise."""
        ...

    def noise_estimate(
        self,
        x_t: Float[Tensor, "b c h w"],
        timestep: int,
        condition: Float[Tensor, "b _ h w"],
        text: Any,
        branches: Sequence[Branch],
    ) -> Float[Tensor, "b c h w"]:
        """Estimate the noise in x_t.

        Args:
            branches: conditions of each row; a number is the index of one of the prompts `text` was made of.
        """
        ...
