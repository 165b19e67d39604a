"""Diffusion priors: what a prior must offer, and how one is chosen by name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from csd_2d.csd import Branch

DEFAULT_MODEL = "timbrooks/instruct-pix2pix"


class Prior(Protocol):
    """An image-conditioned diffusion model as CSD needs it.

    It hides the parametrisation, the batch size its network is run at, and where its weights live. Latents go in and
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

    def encode(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n c h w"]:
        """Latents x_0 of images; H and W are multiples of `cell`."""
        ...

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """Images of latents, clamped to [0, 1]."""
        ...

    def condition(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n c h w"]:
        """Images as the model takes them for its source."""
        ...

    def encode_text(self, prompts: Sequence[str]) -> Any:
        """Instructions in the form `noise_estimate` takes. ValueError if the prior cannot follow one of them."""
        ...

    def alpha_sigma(self, timestep: int) -> tuple[float, float]:
        """alpha and sigma of x_t = alpha x_0 + sigma noise."""
        ...

    def noise_estimate(
        self,
        x_t: Float[Tensor, "b c h w"],
        timestep: int,
        condition: Float[Tensor, "b c h w"],
        text: Any,
        branches: Sequence[Branch],
    ) -> Float[Tensor, "b c h w"]:
        """The model's estimate of the noise in x_t.

        Args:
            branches: for each row which conditions it sees; a number is that of one of the prompts `text` was made of.
        """
        ...


def load_prior(
    name: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    micro_batch: int = 8,
    offload: bool = False,
    local_files_only: bool = False,
) -> Prior:
    """The prior a user names.

    Args:
        name: `tiny` (ships with this package), `analytic`, `ip2p`, a folder with a diffusers InstructPix2Pix pipeline,
            or a hub id.
        dtype, micro_batch, offload, local_files_only: see `InstructPix2PixPrior.from_pretrained`; the analytic prior
            has no weights and needs none of them.

    Raises:
        ValueError: if there is no such prior or device, or the model is not an InstructPix2Pix.
        OSError: if a model cannot be read or downloaded.
    """
    device = _checked_device(device)
    check_prior(name)
    if name == "analytic":
        from csd_2d.priors.analytic import AnalyticPrior

        return AnalyticPrior(device=device)
    from csd_2d import tiny
    from csd_2d.priors.instruct_pix2pix import InstructPix2PixPrior

    model = {"ip2p": DEFAULT_MODEL, "tiny": tiny.MODEL}.get(name, name)
    prior = InstructPix2PixPrior.from_pretrained(model, device, dtype, offload, local_files_only, micro_batch)
    if name == "tiny":
        prior.guidance_scale, prior.image_guidance_scale = tiny.GUIDANCE_SCALE, tiny.IMAGE_GUIDANCE_SCALE
    return prior


def check_prior(name: str, prompt: str | None = None) -> None:
    """Raises ValueError, without loading a model, if there is no such prior or it cannot follow the prompt."""
    if name == "analytic":
        from csd_2d.priors.analytic import AnalyticPrior

        if prompt is not None:
            AnalyticPrior().encode_text([prompt])
    elif name == "tiny":
        from csd_2d.tiny.instructions import INSTRUCTIONS, unknown_words

        if prompt is not None and (unknown := unknown_words(prompt)):
            raise ValueError(
                f"the tiny model was never taught the words {', '.join(map(repr, unknown))}; it knows: "
                f"{'; '.join(INSTRUCTIONS)}. The prior ip2p follows any instruction."
            )
    elif name != "ip2p" and not Path(name).is_dir() and name.count("/") != 1:
        raise ValueError(
            f"unknown prior '{name}'; expected 'tiny', 'analytic', 'ip2p' ({DEFAULT_MODEL}), a folder with a diffusers "
            "InstructPix2Pix pipeline, or a hub id like 'owner/model'."
        )


def _checked_device(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # unknown name, or a torch built without that device
        raise ValueError(f"device '{name}' cannot be used: {str(error).splitlines()[0]}") from error
    return device
