"""InstructPix2Pix (Brooks et al., CVPR 2023, arXiv 2211.09800) as a prior, on diffusers' components."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from csd_2d.csd import Branch
from csd_2d.priors import DEFAULT_MODEL
from csd_2d.tiles import in_tiles

if TYPE_CHECKING:
    from diffusers import StableDiffusionInstructPix2PixPipeline  # pyright: ignore[reportPrivateImportUsage]

HUB_TIMEOUT = 5.0
"""Seconds the hub has to say that it knows a model."""


def _reason(error: BaseException) -> str:
    """What went wrong first, in one sentence."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].split('. ')[0].rstrip('.')}" if lines else type(error).__name__


def _hub_refusal(model: str) -> Exception | None:
    """Why the hub cannot be asked for a model, None if it can.

    diffusers asks without a time limit and waits for minutes behind a firewall that drops packets.
    """
    import huggingface_hub

    try:
        huggingface_hub.model_info(model, timeout=HUB_TIMEOUT)
    except Exception as error:  # no network, a proxy's answer, an unknown or gated model: what is left is the cache
        return error
    return None


def _load_pipeline(
    model: str | Path, dtype: torch.dtype, local_files_only: bool
) -> "StableDiffusionInstructPix2PixPipeline":
    from diffusers import StableDiffusionInstructPix2PixPipeline  # pyright: ignore[reportPrivateImportUsage]

    folder = Path(model).is_dir()
    refusal = None if folder or local_files_only else _hub_refusal(str(model))
    try:
        return StableDiffusionInstructPix2PixPipeline.from_pretrained(
            str(model),
            dtype=dtype,
            local_files_only=local_files_only or refusal is not None,
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    except Exception as error:  # a broken file surfaces as anything from KeyError to SafetensorError
        if folder:
            tried = f"folder {model} does not hold an InstructPix2Pix pipeline that diffusers can load"
        elif local_files_only:
            tried = f"model '{model}' is not in the cache of the Hugging Face hub"
        else:
            tried = f"model '{model}' could be neither downloaded from the Hugging Face hub nor found in its cache"
        raise OSError(
            f"{tried} ({_reason(refusal or error)}); give a folder saved by diffusers' save_pretrained, "
            "or use --prior analytic, which needs no weights."
        ) from error


def _check(pipeline: "StableDiffusionInstructPix2PixPipeline") -> None:
    """Raises ValueError for pipelines that load but are no InstructPix2Pix, or would not understand the prompt."""
    unet, text_encoder, scheduler = pipeline.unet.config, pipeline.text_encoder.config, pipeline.scheduler
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if unet.in_channels != 8:
        problem = f"its U-Net takes {unet.in_channels} channels, not 8 (noisy latents and source image)"
    elif unet.cross_attention_dim != text_encoder.hidden_size:
        problem = (
            f"its U-Net takes text of {unet.cross_attention_dim} features, "
            f"not the {text_encoder.hidden_size} of its text encoder"
        )
    elif len(pipeline.tokenizer) != text_encoder.vocab_size:
        # transformers 5 makes up a tokenizer without words where the files of the real one are missing.
        problem = (
            f"its tokenizer knows {len(pipeline.tokenizer)} tokens, not the text encoder's {text_encoder.vocab_size}"
        )
    elif prediction not in ("epsilon", "v_prediction"):
        problem = f"its prediction_type is '{prediction}', not 'epsilon' or 'v_prediction'"
    elif not hasattr(scheduler, "alphas_cumprod"):
        problem = f"its scheduler, {type(scheduler).__name__}, has no alphas_cumprod"
    else:
        return
    raise ValueError(f"the model is not an InstructPix2Pix: {problem}.")


class InstructPix2PixPrior:
    """Noise estimates of InstructPix2Pix's U-Net.

    The U-Net sees x_t and the source image side by side, 4 + 4 channels, in the order and scaling of diffusers'
    `StableDiffusionInstructPix2PixPipeline`: branch "text" is (prompt, image), "image" (empty prompt, image), "uncond"
    (empty prompt, zeros). The source image is the *unscaled mode* of the VAE's posterior, which is what the model was
    trained on; latents x_0 are that mode times the VAE's scaling factor.

    Args:
        pipeline: diffusers' pipeline, e.g. with LoRA weights put in. Its weights are frozen and moved, not copied.
        device: where the networks run.
        offload: keep the networks in main memory and move one at a time to `device`.
        micro_batch: rows the U-Net takes at once; what does not fit the memory is a matter of this number alone.

    Raises:
        ValueError: if the pipeline is not an InstructPix2Pix with epsilon or v prediction.

    Note:
        The authors' CSD scripts feed a scaled sample of the posterior as source image, 5.5 times too weak.
    """

    guidance_scale = 7.5
    image_guidance_scale = 1.5

    def __init__(
        self,
        pipeline: "StableDiffusionInstructPix2PixPipeline",
        device: str | torch.device = "cpu",
        offload: bool = False,
        micro_batch: int = 8,
    ) -> None:
        if micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, got {micro_batch}.")
        _check(pipeline)
        self.device = torch.device(device)
        self.offload = offload
        self.micro_batch = micro_batch
        self.tokenizer = pipeline.tokenizer
        self.text_encoder, self.vae, self.unet = pipeline.text_encoder, pipeline.vae, pipeline.unet
        for network in (self.text_encoder, self.vae, self.unet):
            network.requires_grad_(False).eval()
            network.to("cpu" if offload else self.device)
        self.window = self.unet.config.sample_size
        self.cell = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.scaling_factor = self.vae.config.scaling_factor
        self.predicts_v = pipeline.scheduler.config.get("prediction_type") == "v_prediction"
        self.alphas_cumprod = pipeline.scheduler.alphas_cumprod.double().cpu()
        self.num_timesteps = len(self.alphas_cumprod)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = DEFAULT_MODEL,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        offload: bool = False,
        local_files_only: bool = False,
        micro_batch: int = 8,
    ) -> "InstructPix2PixPrior":
        """Loads a model from a folder or the Hugging Face hub; only safetensors, never pickles.

        Args:
            model: a folder that diffusers' `save_pretrained` wrote, or a hub id.
            dtype: what the networks compute in; default float16 on CUDA, float32 elsewhere.
            offload: see the class.
            local_files_only: do not ask the hub; take what its cache holds.
            micro_batch: see the class.

        Raises:
            OSError: if the model cannot be downloaded or read.
            ValueError: if it is not an InstructPix2Pix with epsilon or v prediction.
        """
        dtype = dtype or (torch.float16 if torch.device(device).type == "cuda" else torch.float32)
        pipeline = _load_pipeline(model, dtype, local_files_only)
        return cls(pipeline, device, offload, micro_batch)

    @contextmanager
    def _loaded(self, network: nn.Module) -> Iterator[None]:
        """With `offload`: the network is on the device inside the block. The U-Net stays until another is needed."""
        if not self.offload:
            yield
            return
        if network is not self.unet:
            self.unet.to("cpu")
        network.to(self.device)
        try:
            yield
        finally:
            # Gradients that still have to flow back through the VAE need its weights where they are.
            if network is not self.unet and not torch.is_grad_enabled():
                network.to("cpu")

    def condition(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n 4 h w"]:
        """Unscaled mode of the VAE's posterior: what diffusers' pipeline feeds to the U-Net.

        Up to `window` cells a side, that is; larger images are encoded in overlapping tiles.
        """
        pixels = (2 * images - 1).to(self.vae.dtype)
        with self._loaded(self.vae):
            mode = in_tiles(lambda tile: self.vae.encode(tile).latent_dist.mode(), pixels, self.window, (self.cell, 1))
        return mode.to(torch.promote_types(images.dtype, torch.float32))

    def encode(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n 4 h w"]:
        """Mode of the VAE's posterior times its scaling factor. Differentiable with respect to the images."""
        return self.scaling_factor * self.condition(images)

    def decode(self, latents: Float[Tensor, "n 4 h w"]) -> Float[Tensor, "n 3 H W"]:
        scaled = (latents / self.scaling_factor).to(self.vae.dtype)
        with self._loaded(self.vae):
            pixels = in_tiles(lambda tile: self.vae.decode(tile).sample, scaled, self.window, (1, self.cell))
        return (pixels.to(torch.promote_types(latents.dtype, torch.float32)) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Float[Tensor, "prompts+1 tokens features"]:
        """Embeddings of the prompts and, last, of the empty prompt, which is the negative one.

        Raises:
            ValueError: if a prompt is longer than the text encoder reads.
        """
        longest = self.tokenizer.model_max_length
        count, most = max(len(self.tokenizer.tokenize(prompt)) for prompt in prompts), longest - 2  # start, end mark
        if count > most:
            raise ValueError(f"the prompt is {count} tokens long, the model reads at most {most}; shorten it.")
        tokens = self.tokenizer([*prompts, ""], padding="max_length", max_length=longest, return_tensors="pt").input_ids
        with self._loaded(self.text_encoder):
            return self.text_encoder(tokens.to(self.device))[0]

    def alpha_sigma(self, timestep: int) -> tuple[float, float]:
        alpha_squared = self.alphas_cumprod[timestep].item()
        return alpha_squared**0.5, (1 - alpha_squared) ** 0.5

    @torch.no_grad()
    def noise_estimate(
        self,
        x_t: Float[Tensor, "b 4 h w"],
        timestep: int,
        condition: Float[Tensor, "b 4 h w"],
        text: Float[Tensor, "prompts+1 tokens features"],
        branches: Sequence[Branch],
    ) -> Float[Tensor, "b 4 h w"]:
        """The U-Net's estimate in the dtype of `x_t`, `micro_batch` rows at a time whatever their branches.

        A model that predicts v = alpha noise - sigma x_0 is converted: noise = alpha v + sigma x_t
        (Salimans & Ho 2022, arXiv 2202.00512, appendix D).
        """
        blind = torch.tensor([branch == "uncond" for branch in branches], device=x_t.device)
        image = condition.masked_fill(blind[:, None, None, None], 0)
        inputs = torch.cat([x_t, image], dim=1).to(self.unet.dtype).split(self.micro_batch)
        prompts = text[[branch if isinstance(branch, int) else -1 for branch in branches]].split(self.micro_batch)
        with self._loaded(self.unet):
            outputs = [
                self.unet(rows, timestep, encoder_hidden_states=prompt).sample
                for rows, prompt in zip(inputs, prompts, strict=True)
            ]
        output = torch.cat(outputs).to(x_t.dtype)
        if not self.predicts_v:
            return output
        alpha, sigma = self.alpha_sigma(timestep)
        return alpha * output + sigma * x_t
