"""Base of priors on diffusers' pipelines: loading, placement on devices, the autoencoder, micro-batches."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from csd_2d.errors import NonFiniteError
from csd_2d.hub import hub_refusal, reason
from csd_2d.prior import Branch
from csd_2d.priors.schedules import Schedule
from csd_2d.tiles import in_tiles

if TYPE_CHECKING:
    from typing_extensions import Self


@contextmanager
def _reading(model: str | Path, kind: str, local_files_only: bool) -> Iterator[bool]:
    """Yield whether to keep to local files; any error inside becomes one sentence that says what to do.

    Raises:
        OSError: in place of any error inside the block.
    """
    folder = Path(model).is_dir()
    refusal = None if folder or local_files_only else hub_refusal(str(model))
    try:
        yield local_files_only or refusal is not None
    except Exception as error:  # a broken file surfaces as anything from KeyError to SafetensorError
        if folder:
            tried = f"folder {model} does not hold {kind} pipeline that diffusers can load"
        elif local_files_only:
            tried = f"model '{model}' is not in the cache of the Hugging Face hub"
        else:
            tried = f"model '{model}' could be neither downloaded from the Hugging Face hub nor found in its cache"
        raise OSError(
            f"{tried} ({reason(refusal or error)}); give a folder saved by diffusers' save_pretrained. "
            "To edit images, --prior tiny ships with csd."
        ) from error


def pipeline_class_of(model: str | Path, local_files_only: bool = False) -> str:
    """Read the name of the diffusers pipeline in a folder or hub id, from its `model_index.json` alone.

    Raises:
        OSError: if that cannot be downloaded or read.
    """
    from diffusers import DiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

    with _reading(model, "a", local_files_only) as keep_local:
        index: Any = DiffusionPipeline.load_config(str(model), local_files_only=keep_local)
        return str(index["_class_name"])


class PooledText(NamedTuple):
    """Encoded prompts for networks that take a text token by token and pooled."""

    embeddings: Float[Tensor, "prompts tokens features"]
    pooled: Float[Tensor, "prompts pooled_features"]


class DiffusersPrior(ABC):
    """A prior on the networks of a diffusers pipeline; subclasses implement its noise estimate.

    Args:
        pipeline: diffusers' pipeline, e.g. with LoRA weights put in. Its weights are frozen and moved, not copied.
        device: where the networks run.
        offload: keep the networks in main memory and move one at a time to `device`.
        micro_batch: rows the denoiser takes at once; what does not fit the memory is a matter of this number alone.

    Raises:
        ValueError: if the pipeline is not of the kind the prior needs.
    """

    kind: ClassVar[str]
    """Name of the family with its article, for messages."""
    pipeline_class: ClassVar[str]
    """Name of diffusers' pipeline."""
    default_model: ClassVar[str]
    """Hub id of the family's best known model."""
    unused_components: ClassVar[dict[str, Any]] = {}
    """Components of a pipeline that need not be loaded."""
    cuda_dtype: ClassVar[torch.dtype] = torch.float16
    """Precision the model was released for."""

    window: int
    cell: int
    guidance_scale: float
    image_guidance_scale: float
    schedule: Schedule

    def __init__(
        self,
        pipeline: Any,
        device: str | torch.device = "cpu",
        offload: bool = False,
        micro_batch: int = 8,
    ) -> None:
        if micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, got {micro_batch}.")
        if problem := self._problem(pipeline) or self._text_problem(pipeline):
            raise ValueError(f"the model is not {self.kind}: {problem}.")
        self.offload = offload
        self.micro_batch = micro_batch
        self.vae = pipeline.vae
        self.scaling_factor: float = self.vae.config.scaling_factor
        self._shift: float = self.vae.config.shift_factor or 0.0
        self._vae_cell = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self._setup(pipeline)
        self.num_timesteps = self.schedule.num_timesteps
        self._networks = [*self._text_encoders(pipeline), self.vae, self.denoiser]
        for network in self._networks:
            network.requires_grad_(False).eval()
        self.to(device)

    def to(self, device: str | torch.device) -> None:
        """Move the networks to another device; with `offload` one at a time, while it is in use."""
        self.device = torch.device(device)
        for network in self._networks:
            network.to("cpu" if self.offload else self.device)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        offload: bool = False,
        local_files_only: bool = False,
        micro_batch: int = 8,
        **options: Any,
    ) -> "Self":
        """Load a model from a folder or the Hugging Face hub; only safetensors, never pickles.

        Args:
            model: a folder that diffusers' `save_pretrained` wrote, or a hub id; default `default_model`.
            dtype: what the networks compute in; default `cuda_dtype` on CUDA, float32 elsewhere.
            local_files_only: do not ask the hub; take what its cache holds.
            device, offload, micro_batch, options: see the class.

        Raises:
            OSError: if the model cannot be downloaded or read.
            ValueError: if it is not of the kind the prior needs.
        """
        import diffusers

        model = model or cls.default_model
        with _reading(model, cls.kind, local_files_only) as keep_local:
            pipeline = getattr(diffusers, cls.pipeline_class).from_pretrained(
                str(model),
                dtype=dtype or (cls.cuda_dtype if torch.device(device).type == "cuda" else torch.float32),
                local_files_only=keep_local,
                use_safetensors=True,
                **cls.unused_components,
            )
        return cls(pipeline, device, offload, micro_batch, **options)

    @property
    @abstractmethod
    def denoiser(self) -> Any:
        """The network that estimates noise."""

    @abstractmethod
    def _setup(self, pipeline: Any) -> None:
        """Set the networks, schedule, window and cell from a pipeline."""

    @abstractmethod
    def _problem(self, pipeline: Any) -> str | None:
        """Say why a pipeline that loads is not of the kind the prior needs; None if it is."""

    @abstractmethod
    def condition(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n _ h w"]:
        """See `Prior`, as for the next two methods."""

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> Any: ...

    @abstractmethod
    def noise_estimate(
        self,
        x_t: Float[Tensor, "b c h w"],
        timestep: int,
        condition: Float[Tensor, "b _ h w"],
        text: Any,
        branches: Sequence[Branch],
    ) -> Float[Tensor, "b c h w"]: ...

    def _text_encoders(self, pipeline: Any) -> list[Any]:
        return [pipeline.text_encoder]

    def _text_problem(self, pipeline: Any) -> str | None:
        """Say why a pipeline would not understand a prompt; None if it would."""
        tokenizers = [pipeline.tokenizer, getattr(pipeline, "tokenizer_2", None)]
        for tokenizer, text_encoder in zip(tokenizers, self._text_encoders(pipeline), strict=False):
            known, read = len(tokenizer), text_encoder.config.vocab_size
            # transformers 5 makes up a tokenizer without words where the files of the real one are missing. T5's
            # vocabulary is rounded up by a handful of tokens nobody uses.
            if not 0.99 * read <= known <= read:
                return f"its tokenizer knows {known} tokens, not the text encoder's {read}"
        return None

    def use_attention(self, backend: str) -> None:
        """Let the denoiser compute attention by one of diffusers' backends, e.g. "flash" or "sage".

        Raises:
            ValueError: if there is no such backend, what it needs is not installed, or diffusers offers the denoiser no
                choice, as it does not for U-Nets.
        """
        processors = (getattr(module, "processor", None) for module in self.denoiser.modules())
        if not any(hasattr(processor, "_attention_backend") for processor in processors):
            raise ValueError(
                f"attention '{backend}' cannot be had: diffusers offers no choice for {self.kind}; leave it out."
            )
        try:
            self.denoiser.set_attention_backend(backend)
        except (ValueError, RuntimeError, ImportError) as error:
            raise ValueError(f"attention '{backend}' cannot be had ({reason(error)}).") from error

    @contextmanager
    def _loaded(self, *networks: nn.Module) -> Iterator[None]:
        """With `offload`, keep networks on the device inside the block; the denoiser stays until others are needed."""
        if not self.offload:
            yield
            return
        denoising = self.denoiser in networks
        if not denoising:
            self.denoiser.to("cpu")
        for network in networks:
            network.to(self.device)
        try:
            yield
        finally:
            # Gradients that still have to flow back through the VAE need its weights where they are.
            if not denoising and not torch.is_grad_enabled():
                for network in networks:
                    network.to("cpu")

    def encode(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n c h w"]:
        """Encode to the mode of the VAE's posterior, shifted and scaled. Differentiable with respect to the images.

        Images larger than `window` are encoded in overlapping tiles.

        Raises:
            NonFiniteError: if the VAE overflows, as some do in float16.
        """
        pixels = (2 * images - 1).to(self.vae.dtype)
        tile = self.window * self.cell // self._vae_cell
        with self._loaded(self.vae):
            mode = in_tiles(lambda part: self.vae.encode(part).latent_dist.mode(), pixels, tile, (self._vae_cell, 1))
        latents = mode.to(torch.promote_types(images.dtype, torch.float32))
        return self.scaling_factor * (self._finite(latents) - self._shift)

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """Decode latents to images, clamped to [0, 1]. Raises as `encode`."""
        scaled = (latents / self.scaling_factor + self._shift).to(self.vae.dtype)
        tile = self.window * self.cell // self._vae_cell
        with self._loaded(self.vae):
            pixels = in_tiles(lambda part: self.vae.decode(part).sample, scaled, tile, (1, self._vae_cell))
        pixels = pixels.to(torch.promote_types(latents.dtype, torch.float32))
        return (self._finite(pixels) / 2 + 0.5).clamp(0, 1)

    def _finite(self, values: Tensor) -> Tensor:
        # A clamped NaN would be written as black.
        if not values.isfinite().all():
            raise NonFiniteError(f"the model's autoencoder overflows in {self.vae.dtype}; use float32 or bfloat16.")
        return values

    def alpha_sigma(self, timestep: int) -> tuple[float, float]:
        return self.schedule.alpha_sigma(timestep)

    def _in_micro_batches(self, network: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """Apply a function of rows to `micro_batch` of them at a time, with the denoiser on the device."""
        with self._loaded(self.denoiser):
            parts = zip(*(stack.split(self.micro_batch) for stack in rows), strict=True)
            return torch.cat([network(*part) for part in parts])


def check_length(prompts: Sequence[str], tokenizer: Any, most: int) -> None:
    """Check that no prompt has more than `most` tokens: the model would cut off the rest. ValueError if one has."""
    count = max(len(tokenizer.tokenize(prompt)) for prompt in prompts)
    if count > most:
        raise ValueError(f"the prompt is {count} tokens long, the model reads at most {most}; shorten it.")
