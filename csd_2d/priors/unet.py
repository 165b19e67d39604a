"""Stable Diffusion's U-Nets and text encoders, of the first generations and XL."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from csd_2d.prior import Branch
from csd_2d.priors.diffusers_model import DiffusersPrior, PooledText, check_length
from csd_2d.priors.schedules import EDMSchedule, VariancePreservingSchedule


class UNetPrior(DiffusersPrior):
    """Noise estimates of Stable Diffusion's U-Net. Subclasses define its extra channels and the text of each branch.

    The schedule is the scheduler's own: variance preserving, or EDM where it is preconditioned. Epsilon and v
    prediction are both understood.
    """

    input_parts: ClassVar[tuple[str, ...]] = ("noisy latents",)
    """What the U-Net's input channels hold, in order."""
    promptless_rows: Mapping[Branch, int] = {"image": -1, "uncond": -1}
    """Row of the encoded texts that each branch without a prompt gets; the empty prompt is the last."""

    def _setup(self, pipeline: Any) -> None:
        self.tokenizer = pipeline.tokenizer
        self.text_encoder, self.unet = pipeline.text_encoder, pipeline.unet
        self.window = self.unet.config.sample_size
        self.cell = self._vae_cell
        preconditioned = hasattr(pipeline.scheduler, "precondition_outputs")
        self.schedule = (EDMSchedule if preconditioned else VariancePreservingSchedule)(pipeline.scheduler)

    @property
    def denoiser(self) -> Any:
        return self.unet

    def _problem(self, pipeline: Any) -> str | None:
        unet, vae, scheduler = pipeline.unet.config, pipeline.vae.config, pipeline.scheduler
        features = sum(encoder.config.hidden_size for encoder in self._text_encoders(pipeline))
        channels = len(self.input_parts) * vae.latent_channels
        prediction = scheduler.config.get("prediction_type", "epsilon")
        if unet.in_channels != channels:
            return f"its U-Net takes {unet.in_channels} channels, not {channels} ({' and '.join(self.input_parts)})"
        if unet.cross_attention_dim != features:
            return (
                f"its U-Net takes text of {unet.cross_attention_dim} features, not the {features} of its text encoder"
            )
        if getattr(vae, "latents_mean", None) is not None:
            return "its latents are normalized by mean and deviation, which this prior does not undo"
        if prediction not in ("epsilon", "v_prediction"):
            return f"its prediction_type is '{prediction}', not 'epsilon' or 'v_prediction'"
        if not hasattr(scheduler, "alphas_cumprod") and not hasattr(scheduler, "precondition_outputs"):
            return f"its scheduler, {type(scheduler).__name__}, has no alphas_cumprod"
        return None

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Any:
        """Encode the prompts and, last, the empty prompt, which is the negative one.

        Raises:
            ValueError: if a prompt is longer than the text encoder reads.
        """
        check_length(prompts, self.tokenizer, self.tokenizer.model_max_length - 2)  # start and end mark
        return self._embed(prompts)

    def _embed(self, prompts: Sequence[str]) -> Any:
        """Encode the prompts, and the empty one behind them."""
        longest = self.tokenizer.model_max_length
        tokens = self.tokenizer([*prompts, ""], padding="max_length", max_length=longest, return_tensors="pt").input_ids
        with self._loaded(self.text_encoder):
            return self.text_encoder(tokens.to(self.device))[0]

    @abstractmethod
    def _extra_channels(
        self, condition: Float[Tensor, "b _ h w"], branches: Sequence[Branch]
    ) -> Float[Tensor, "b _ h w"]:
        """Make the input channels of the U-Net beside those of x_t."""

    def _estimate(self, rows: Tensor, time: float, *text: Tensor) -> Tensor:
        return self.unet(rows, time, encoder_hidden_states=text[0]).sample

    @torch.no_grad()
    def noise_estimate(
        self,
        x_t: Float[Tensor, "b c h w"],
        timestep: int,
        condition: Float[Tensor, "b _ h w"],
        text: Any,
        branches: Sequence[Branch],
    ) -> Float[Tensor, "b c h w"]:
        """Estimate the noise in the dtype of `x_t`, `micro_batch` rows at a time whatever their branches."""
        scaled, time = self.schedule.network_input(x_t, timestep)
        rows = torch.cat([scaled, self._extra_channels(condition, branches)], dim=1).to(self.unet.dtype)
        numbers = [branch if isinstance(branch, int) else self.promptless_rows[branch] for branch in branches]
        texts = [part[numbers] for part in (text if isinstance(text, PooledText) else (text,))]
        output = self._in_micro_batches(lambda batch, *parts: self._estimate(batch, time, *parts), rows, *texts)
        return self.schedule.noise(x_t, output.to(x_t.dtype), timestep)


class XL(UNetPrior):
    """Mixin for a U-Net prior: the two text encoders and the sizes of Stable Diffusion XL (arXiv 2307.01952).

    The U-Net is told that the image was neither scaled nor cropped: original and target size are what it is given. The
    empty prompt is all zeros where the model was trained so. A VAE that overflows in float16 stays in float32.
    """

    def _setup(self, pipeline: Any) -> None:
        super()._setup(pipeline)
        self._pipeline = pipeline
        if self.vae.dtype == torch.float16 and self.vae.config.force_upcast:
            self.vae.float()

    def _text_encoders(self, pipeline: Any) -> list[Any]:
        return [pipeline.text_encoder, pipeline.text_encoder_2]

    def _embed(self, prompts: Sequence[str]) -> PooledText:
        with self._loaded(*self._text_encoders(self._pipeline)):
            embeddings, _, pooled, _ = self._pipeline.encode_prompt(
                [*prompts, ""], device=self.device, do_classifier_free_guidance=False
            )
        if self._pipeline.config.force_zeros_for_empty_prompt:
            embeddings[-1], pooled[-1] = 0, 0
        return PooledText(embeddings, pooled)

    def _estimate(self, rows: Tensor, time: float, *text: Tensor) -> Tensor:
        embeddings, pooled = text
        height, width = (self.cell * size for size in rows.shape[-2:])
        sizes = rows.new_tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).expand(len(rows), -1)
        added = {"text_embeds": pooled, "time_ids": sizes}
        return self.unet(rows, time, encoder_hidden_states=embeddings, added_cond_kwargs=added).sample
