"""Text-to-image Stable Diffusion as a prior: edits from a source to a target prompt, and images from text alone."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from csd_2d.prior import Branch
from csd_2d.priors.diffusers_model import PooledText
from csd_2d.priors.unet import XL, UNetPrior


class TextToImagePrior(UNetPrior):
    """Noise estimates of Stable Diffusion's U-Net, which takes no source image: the source is described by a prompt.

    A prompt's branch gets that prompt, "image" the source prompt, "uncond" the empty one. With both guidance scales w
    alike, as they are by default, eq. 9 becomes the delta denoising score (Hertz et al. 2023, arXiv 2304.07090)

        s = -(e^w(x_t; target) - e^w(source_t; source prompt)),    e^w(x; y) = e(x) + w [e(x; y) - e(x)].

    With scales of their own the text's weighs the step from the source prompt to the target, the image's the source
    prompt. The baseline "noise" makes it score distillation, which `csd_2d.generate` uses.

    Args:
        pipeline, device, offload, micro_batch: see `DiffusersPrior`.
        source_prompt: what the images to edit show. Default: the source is estimated without a prompt, as "uncond" is.

    Raises:
        ValueError: if the pipeline is no text-to-image Stable Diffusion.
    """

    kind = "a text-to-image Stable Diffusion"
    pipeline_class = "StableDiffusionPipeline"
    default_model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    unused_components: ClassVar[dict[str, Any]] = {
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
        "requires_safety_checker": False,
    }
    guidance_scale = 7.5
    image_guidance_scale = 7.5

    def __init__(
        self,
        pipeline: Any,
        device: str | torch.device = "cpu",
        offload: bool = False,
        micro_batch: int = 8,
        source_prompt: str = "",
    ) -> None:
        super().__init__(pipeline, device, offload, micro_batch)
        self._source = [source_prompt] if source_prompt.strip() else []
        self.promptless_rows = {"image": -1 - len(self._source), "uncond": -1}

    def condition(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 0 h w"]:
        """Return an image condition without channels: the model takes none."""
        return latents[:, :0]

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Float[Tensor, "_ tokens features"] | PooledText:
        """Encode the target prompts, the source prompt if there is one, and the empty prompt.

        Raises:
            ValueError: if a prompt is longer than the text encoder reads.
        """
        return super().encode_text([*prompts, *self._source])

    def _extra_channels(
        self, condition: Float[Tensor, "b 0 h w"], branches: Sequence[Branch]
    ) -> Float[Tensor, "b 0 h w"]:
        return condition


class TextToImageXLPrior(XL, TextToImagePrior):
    """`TextToImagePrior` on Stable Diffusion XL.

    Args: see `TextToImagePrior`.
    """

    kind = "a text-to-image Stable Diffusion XL"
    pipeline_class = "StableDiffusionXLPipeline"
    default_model = "stabilityai/stable-diffusion-xl-base-1.0"
    unused_components: ClassVar[dict[str, Any]] = {
        "feature_extractor": None,
        "image_encoder": None,
        "add_watermarker": False,
    }
