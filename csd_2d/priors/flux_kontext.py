"""FLUX.1 Kontext (Labs et al. 2025, arXiv 2506.15742), a flow-matching editor, as a prior on diffusers' components."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from csd_2d.prior import Branch
from csd_2d.priors.diffusers_model import DiffusersPrior, PooledText, check_length
from csd_2d.priors.schedules import FlowSchedule


class FluxKontextPrior(DiffusersPrior):
    """Noise estimates of FLUX.1 Kontext's transformer: noise = x_t + (1 - s) v at flow time s.

    The transformer takes 2x2 cells of the VAE as one token, and the source image as tokens behind those of x_t. Here a
    latent cell is such a token, 64 channels and 16 px, so that crops and images of any whole number of cells fit.

    A prompt's branch gets prompt and image, "image" the empty prompt and the image, "uncond" the empty prompt and no
    image tokens at all, which is how the model makes images from text. Guidance was distilled into the model: it is
    told a guidance scale, the same in every branch, and both scales of eq. 3 are 1 by default. A text guidance scale
    above 1 is guidance on top of it, diffusers' `true_cfg_scale` with an empty negative prompt.

    Args:
        pipeline, device, offload, micro_batch: see `DiffusersPrior`.
        distilled_guidance: the guidance scale that the transformer is told (model card: 2.5).

    Raises:
        ValueError: if the pipeline is not a FLUX.1 Kontext.
    """

    kind = "a FLUX.1 Kontext"
    pipeline_class = "FluxKontextPipeline"
    default_model = "black-forest-labs/FLUX.1-Kontext-dev"
    unused_components: ClassVar[dict[str, Any]] = {"image_encoder": None, "feature_extractor": None}
    cuda_dtype = torch.bfloat16
    guidance_scale = 1.0
    image_guidance_scale = 1.0

    TOKENS = 512
    """Longest prompt that T5 was trained to read for FLUX, with its end mark."""

    def __init__(
        self,
        pipeline: Any,
        device: str | torch.device = "cpu",
        offload: bool = False,
        micro_batch: int = 8,
        distilled_guidance: float = 2.5,
    ) -> None:
        super().__init__(pipeline, device, offload, micro_batch)
        self.distilled_guidance = distilled_guidance

    def _setup(self, pipeline: Any) -> None:
        self._pipeline, self.transformer = pipeline, pipeline.transformer
        self.window, self.cell = pipeline.default_sample_size // 2, 2 * self._vae_cell
        self.schedule = FlowSchedule(pipeline.scheduler, tokens=self.window**2)

    @property
    def denoiser(self) -> Any:
        return self.transformer

    def _text_encoders(self, pipeline: Any) -> list[Any]:
        return [pipeline.text_encoder, pipeline.text_encoder_2]

    def _problem(self, pipeline: Any) -> str | None:
        transformer, channels = pipeline.transformer.config, 4 * pipeline.vae.config.latent_channels
        if transformer.in_channels != channels:
            return f"its transformer takes tokens of {transformer.in_channels} channels, not {channels}"
        if not hasattr(pipeline.scheduler, "time_shift"):
            return f"its scheduler, {type(pipeline.scheduler).__name__}, is none for flow matching"
        return None

    def encode(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n 64 h w"]:
        """Encode to the mode of the VAE's posterior, shifted and scaled, 2x2 cells in one. Differentiable."""
        return F.pixel_unshuffle(super().encode(images), 2)

    def decode(self, latents: Float[Tensor, "n 64 h w"]) -> Float[Tensor, "n 3 H W"]:
        """Decode latents to images, clamped to [0, 1]."""
        return super().decode(F.pixel_shuffle(latents, 2))

    def condition(self, latents: Float[Tensor, "n 64 h w"]) -> Float[Tensor, "n 64 h w"]:
        """Return the latents of the source image: the model takes them as they are."""
        return latents

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> PooledText:
        """Encode the prompts and, last, the empty prompt with T5 and CLIP.

        Raises:
            ValueError: if a prompt is longer than T5 reads. CLIP reads 75 tokens and leaves out the rest.
        """
        check_length(prompts, self._pipeline.tokenizer_2, self.TOKENS - 1)
        with self._loaded(*self._text_encoders(self._pipeline)):
            embeddings, pooled, _ = self._pipeline.encode_prompt(
                [*prompts, ""], device=self.device, max_sequence_length=self.TOKENS
            )
        return PooledText(embeddings, pooled)

    @torch.no_grad()
    def noise_estimate(
        self,
        x_t: Float[Tensor, "b 64 h w"],
        timestep: int,
        condition: Float[Tensor, "b 64 h w"],
        text: PooledText,
        branches: Sequence[Branch],
    ) -> Float[Tensor, "b 64 h w"]:
        """Estimate the noise in the dtype of `x_t`, `micro_batch` rows at a time.

        Rows without an image are shorter and go through in batches of their own.
        """
        scaled, time = self.schedule.network_input(x_t, timestep)
        velocity = torch.empty_like(x_t)
        numbers = torch.tensor([branch if isinstance(branch, int) else -1 for branch in branches])
        unconditional = torch.tensor([branch == "uncond" for branch in branches])
        for rows, images in ((~unconditional, [condition]), (unconditional, [])):
            if not rows.any():
                continue
            pictures = torch.stack([picture[rows] for picture in (scaled, *images)], 1)
            texts = [part[numbers[rows]] for part in text]
            output = self._in_micro_batches(lambda *batch: self._velocity(time, *batch), pictures, *texts)
            velocity[rows] = output.to(x_t.dtype)
        return self.schedule.noise(x_t, velocity, timestep)

    def _velocity(
        self,
        time: float,
        pictures: Float[Tensor, "b pictures c h w"],
        embeddings: Float[Tensor, "b words features"],
        pooled: Float[Tensor, "b pooled_features"],
    ) -> Float[Tensor, "b c h w"]:
        """Compute the velocity of the first picture; positions of tokens are picture, row and column."""
        transformer = self.transformer
        count, height, width = pictures.shape[1], *pictures.shape[-2:]
        places = torch.cartesian_prod(*(torch.arange(size, device=self.device) for size in (count, height, width)))
        tokens = pictures.permute(0, 1, 3, 4, 2).flatten(1, 3).to(transformer.dtype)
        guidance = tokens.new_full((len(tokens),), self.distilled_guidance, dtype=torch.float32)
        velocity = transformer(
            hidden_states=tokens,
            timestep=tokens.new_full((len(tokens),), time),
            guidance=guidance if transformer.config.guidance_embeds else None,
            encoder_hidden_states=embeddings,
            pooled_projections=pooled,
            txt_ids=tokens.new_zeros(embeddings.shape[1], 3),
            img_ids=places.to(tokens.dtype),
        ).sample
        return velocity[:, : height * width].mT.unflatten(2, (height, width))
