"""Load a diffusion prior by its name."""

from pathlib import Path

import torch

from csd_2d.prior import Prior
from csd_2d.priors.analytic import AnalyticPrior
from csd_2d.priors.diffusers_model import DiffusersPrior, pipeline_class_of
from csd_2d.priors.flux_kontext import FluxKontextPrior
from csd_2d.priors.instruct_pix2pix import InstructPix2PixPrior, InstructPix2PixXLPrior
from csd_2d.priors.text_to_image import TextToImagePrior, TextToImageXLPrior
from csd_2d.priors.tiny import TinyPrior, check_words

DEFAULT_MODEL = InstructPix2PixPrior.default_model
DEFAULT_TEXT_TO_IMAGE = TextToImagePrior.default_model
EDITORS = ("tiny", "analytic", "ip2p")
"""Names of priors that edit an image; a folder or hub id may be another, and of either kind."""
FAMILIES: dict[str, type[DiffusersPrior]] = {
    family.pipeline_class: family
    for family in (
        InstructPix2PixPrior,
        InstructPix2PixXLPrior,
        TextToImagePrior,
        TextToImageXLPrior,
        FluxKontextPrior,
    )
}
"""Priors by the class of diffusers' pipeline they are made from."""


def load_prior(
    name: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    micro_batch: int = 8,
    offload: bool = False,
    local_files_only: bool = False,
    source_prompt: str | None = None,
    compile: bool = False,
    attention: str | None = None,
    torch_dtype: torch.dtype | str | None = None,
) -> Prior:
    """Load a prior by its name.

    Args:
        name: `tiny` (ships with this package), `analytic`, `ip2p`, `sd` (text-to-image), or a folder or hub id with a
            diffusers pipeline: InstructPix2Pix, its XL and CosXL-Edit, text-to-image Stable Diffusion and its XL, or
            FLUX.1 Kontext. Which of them it is, its `model_index.json` says.
        dtype: precision of the weights, also by its name, "float16". Default: see `DiffusersPrior.from_pretrained`.
        micro_batch, offload, local_files_only: see `DiffusersPrior.from_pretrained`; the analytic prior has no weights
            and needs none of these, nor `dtype`, `compile` and `attention`.
        source_prompt: what the images to edit show; for text-to-image models only, see `TextToImagePrior`.
        compile: compile the denoiser with torch.compile; its first steps then take minutes.
        attention: how the denoiser computes attention, see `DiffusersPrior.use_attention`.
        torch_dtype: the name that diffusers has for `dtype`.

    Raises:
        ValueError: if there is no such prior, device, precision or attention, the model is of no family known here, or
            it takes no source prompt.
        OSError: if a model cannot be read or downloaded.
    """
    device, precision = _checked_device(device), _checked_dtype(dtype, torch_dtype)
    check_prior(name)
    if name == "analytic":
        if source_prompt is not None:
            raise ValueError(_NO_SOURCE_PROMPT.format(name))
        return AnalyticPrior(device=device)
    model = {"ip2p": DEFAULT_MODEL, "sd": DEFAULT_TEXT_TO_IMAGE, "tiny": TinyPrior.default_model}.get(name, name)
    family = TinyPrior if name == "tiny" else _family(model, local_files_only)
    if source_prompt is not None and not issubclass(family, TextToImagePrior):
        raise ValueError(_NO_SOURCE_PROMPT.format(name))
    options = {} if source_prompt is None else {"source_prompt": source_prompt}
    prior = family.from_pretrained(model, device, precision, offload, local_files_only, micro_batch, **options)
    if attention is not None:
        prior.use_attention(attention)
    if compile:
        prior.denoiser.compile()
    return prior


_NO_SOURCE_PROMPT = "the prior '{}' follows instructions and takes no source prompt; leave it out."


def _family(model: str | Path, local_files_only: bool) -> type[DiffusersPrior]:
    """Find the class of priors that a folder or hub id is for. ValueError if there is none."""
    name = pipeline_class_of(model, local_files_only)
    if name not in FAMILIES:
        raise ValueError(f"{model} holds a {name}, which csd cannot use; it can use {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def check_prior(name: str, prompt: str | None = None) -> None:
    """Check, without loading a model, that there is such a prior and it can follow the prompt. ValueError if not."""
    if name == "analytic":
        if prompt is not None:
            AnalyticPrior().encode_text([prompt])
    elif name == "tiny":
        if prompt is not None:
            check_words([prompt])
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


def _checked_dtype(dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is not None and torch_dtype is not None:
        raise ValueError("dtype and torch_dtype are two names of one option; give one of them.")
    given = torch_dtype if dtype is None else dtype
    precision = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if given is not None and precision not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {given!r}.")
    return precision
