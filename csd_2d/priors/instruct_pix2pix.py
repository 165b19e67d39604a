"""InstructPix2Pix (Brooks et al., CVPR 2023, arXiv 2211.09800) as a prior, on diffusers' components."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from csd_2d.prior import Branch
from csd_2d.priors.schedules import EDMSchedule
from csd_2d.priors.unet import XL, UNetPrior


class InstructPix2PixPrior(UNetPrior):
    """Noise estimates of InstructPix2Pix's U-Net.

    The U-Net gets x_t and the source image as 4 + 4 channels, in the order and scaling of diffusers'
    `StableDiffusionInstructPix2PixPipeline`: a prompt's branch is (prompt, image), "image" (empty prompt, image),
    "uncond" (empty prompt, zeros). The source image is the *unscaled mode* of the VAE's posterior, which is what the
    model was trained on; latents x_0 are that mode times the VAE's scaling factor.

    Args: see `DiffusersPrior`.

    Raises:
        ValueError: if the pipeline is not an InstructPix2Pix with epsilon or v prediction.

    Note:
        The authors' CSD scripts feed a scaled sample of the posterior as source image, 5.5 times too weak.
    """

    kind = "an InstructPix2Pix"
    pipeline_class = "StableDiffusionInstructPix2PixPipeline"
    default_model = "timbrooks/instruct-pix2pix"
    unused_components: ClassVar[dict[str, Any]] = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    input_parts = ("noisy latents", "source image")
    guidance_scale = 7.5
    image_guidance_scale = 1.5

    def condition(self, latents: Float[Tensor, "n 4 h w"]) -> Float[Tensor, "n 4 h w"]:
        """Convert to the unscaled mode of the VAE's posterior, which diffusers' pipeline feeds to the U-Net."""
        return latents / self.scaling_factor

    def _extra_channels(
        self, condition: Float[Tensor, "b 4 h w"], branches: Sequence[Branch]
    ) -> Float[Tensor, "b 4 h w"]:
        unconditional = torch.tensor([branch == "uncond" for branch in branches], device=condition.device)
        return condition.masked_fill(unconditional[:, None, None, None], 0)


class InstructPix2PixXLPrior(XL, InstructPix2PixPrior):
    """InstructPix2Pix on Stable Diffusion XL, as in diffusers' `StableDiffusionXLInstructPix2PixPipeline`.

    CosXL-Edit, too: an EDM schedule with v prediction, and a source image that *is* multiplied by the VAE's scaling
    factor. It is known by the pipeline's `is_cosxl_edit` or by its schedule, for diffusers 0.42 forgets the first when
    a pipeline is saved.

    Args: see `DiffusersPrior`.
    """

    kind = "an InstructPix2Pix of Stable Diffusion XL"
    pipeline_class = "StableDiffusionXLInstructPix2PixPipeline"
    default_model = "diffusers/sdxl-instructpix2pix-768"
    unused_components: ClassVar[dict[str, Any]] = {"add_watermarker": False}
    guidance_scale = 5.0

    def _setup(self, pipeline: Any) -> None:
        super()._setup(pipeline)
        cosxl = pipeline.is_cosxl_edit or isinstance(self.schedule, EDMSchedule)
        self._condition_scale = self.scaling_factor if cosxl else 1.0

    def condition(self, latents: Float[Tensor, "n 4 h w"]) -> Float[Tensor, "n 4 h w"]:
        """Convert to the mode of the VAE's posterior: unscaled, but for CosXL-Edit times its scaling factor."""
        return self._condition_scale * super().condition(latents)
