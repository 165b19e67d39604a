"""Diffusion priors: what a prior must offer, and how one is chosen by name."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from csd_2d.csd import Branch

if TYPE_CHECKING:
    from csd_2d.priors.diffusers_model import DiffusersPrior

DEFAULT_MODEL = "timbrooks/instruct-pix2pix"
DEFAULT_TEXT_TO_IMAGE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
EDITORS = ("tiny", "analytic", "ip2p")
"""Names of priors that edit an image; a folder or hub id may be another, and of either kind."""


class Prior(Protocol):
    """A diffusion model as CSD needs it: one that edits an image, or one that follows text alone.

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

    def to(self, device: str | torch.device) -> None:
        """Moves the networks to another device."""
        ...

    def encode(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n c h w"]:
        """Latents x_0 of images; H and W are multiples of `cell`."""
        ...

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """Images of latents, clamped to [0, 1]."""
        ...

    def condition(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n _ h w"]:
        """Images, given by their latents, as the model takes them for its source; without channels if it takes none."""
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
        condition: Float[Tensor, "b _ h w"],
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
    source_prompt: str | None = None,
    compile: bool = False,
    attention: str | None = None,
) -> Prior:
    """The prior a user names.

    Args:
        name: `tiny` (ships with this package), `analytic`, `ip2p`, `sd` (text-to-image), or a folder or hub id with a
            diffusers pipeline: InstructPix2Pix, its XL and CosXL-Edit, text-to-image Stable Diffusion and its XL, or
            FLUX.1 Kontext. Which of them it is, its `model_index.json` says.
        dtype, micro_batch, offload, local_files_only: see `DiffusersPrior.from_pretrained`; the analytic prior has no
            weights and needs none of these, nor the last two.
        source_prompt: what the images to edit show; for text-to-image models only, see `TextToImagePrior`.
        compile: have torch.compile make the denoiser faster; its first steps then take minutes.
        attention: how the denoiser computes attention, see `DiffusersPrior.use_attention`.

    Raises:
        ValueError: if there is no such prior, device or attention, the model is of no family known here, or it takes no
            source prompt.
        OSError: if a model cannot be read or downloaded.
    """
    device = _checked_device(device)
    check_prior(name)
    if name == "analytic":
        if source_prompt is not None:
            raise ValueError(_NO_SOURCE_PROMPT.format(name))
        from csd_2d.priors.analytic import AnalyticPrior

        return AnalyticPrior(device=device)
    from csd_2d import tiny
    from csd_2d.priors.text_to_image import TextToImagePrior

    model = {"ip2p": DEFAULT_MODEL, "sd": DEFAULT_TEXT_TO_IMAGE, "tiny": tiny.MODEL}.get(name, name)
    family = _family(model, local_files_only)
    if source_prompt is not None and not issubclass(family, TextToImagePrior):
        raise ValueError(_NO_SOURCE_PROMPT.format(name))
    options = {} if source_prompt is None else {"source_prompt": source_prompt}
    prior = family.from_pretrained(model, device, dtype, offload, local_files_only, micro_batch, **options)
    if name == "tiny":
        prior.guidance_scale, prior.image_guidance_scale = tiny.GUIDANCE_SCALE, tiny.IMAGE_GUIDANCE_SCALE
    if attention is not None:
        prior.use_attention(attention)
    if compile:
        prior.denoiser.compile()
    return prior


_NO_SOURCE_PROMPT = "the prior '{}' follows instructions and takes no source prompt; leave it out."


def _family(model: str | Path, local_files_only: bool) -> "type[DiffusersPrior]":
    """The class of priors that a folder or hub id is for. ValueError if there is none."""
    from csd_2d.priors.diffusers_model import pipeline_class_of
    from csd_2d.priors.flux_kontext import FluxKontextPrior
    from csd_2d.priors.instruct_pix2pix import InstructPix2PixPrior, InstructPix2PixXLPrior
    from csd_2d.priors.text_to_image import TextToImagePrior, TextToImageXLPrior

    families: tuple[type[DiffusersPrior], ...] = (
        InstructPix2PixPrior,
        InstructPix2PixXLPrior,
        TextToImagePrior,
        TextToImageXLPrior,
        FluxKontextPrior,
    )
    known = {family.pipeline_class: family for family in families}
    name = pipeline_class_of(model, local_files_only)
    if name not in known:
        raise ValueError(f"{model} holds a {name}, which csd cannot use; it can use {', '.join(known)}.")
    return known[name]


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
    elif name not in ("ip2p", "sd") and not Path(name).is_dir() and name.count("/") != 1:
        raise ValueError(
            f"unknown prior '{name}'; expected 'tiny', 'analytic', 'ip2p' ({DEFAULT_MODEL}), 'sd' "
            f"({DEFAULT_TEXT_TO_IMAGE}), a folder with a diffusers pipeline, or a hub id like 'owner/model'."
        )


def _checked_device(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # unknown name, or a torch built without that device
        raise ValueError(f"device '{name}' cannot be used: {str(error).splitlines()[0]}") from error
    return device
