"""Pipelines in the style of diffusers: PIL images, arrays or tensors in, the same out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from csd_2d.config import EditConfig
from csd_2d.csd import Step
from csd_2d.edit import edit
from csd_2d.image_set import ImageStack
from csd_2d.io.images import to_array, to_tensor
from csd_2d.loss import Prompt, check_prompt
from csd_2d.panorama import PanoramaCanvas
from csd_2d.particles import Layout, Particles
from csd_2d.prior import Prior
from csd_2d.priors.loading import load_prior
from csd_2d.video import followed

ImageLike = Image.Image | np.ndarray | Tensor
"""A PIL image; (H, W, 3) uint8, or float in [0, 1]; or a (3, H, W) tensor in [0, 1]."""

OutputType = Literal["pil", "np", "pt", "latent"]
"""PIL images; (H, W, 3) float arrays in [0, 1]; (3, H, W) tensors in [0, 1]; or latents as the prior has them."""

StepCallback = Callable[["CsdPipeline", int, int, dict[str, Any]], dict[str, Any]]
"""(pipeline, step, timestep, {"latents": ...}) -> the same, with latents of its own if they are to change."""


@dataclass
class PanoramaOutput:
    """Result of `CsdPanoramaPipeline`."""

    images: list[Any]
    """The edited image, in the form of `output_type`."""


@dataclass
class VideoOutput:
    """Result of `CsdVideoPipeline`."""

    frames: list[Any]
    """The edited frames, in the form of `output_type`."""


class CsdPipeline:
    """Base of both pipelines: holds a prior and runs edits.

    Args:
        prior: the diffusion model that edits; see `from_pretrained`.
    """

    def __init__(self, prior: Prior) -> None:
        self.prior = prior
        self.interrupt = False
        """Set to True, for example by a callback, it ends the edit after the present step; the result so far is
        returned."""

    @classmethod
    def from_pretrained(cls, model: str = "ip2p", **options: Any):
        """Load a prior by its name and make a pipeline of it.

        Args:
            model: `ip2p`, `tiny`, `analytic`, a folder that diffusers' `save_pretrained` wrote, or a hub id.
            options: device, dtype, offload, micro_batch, ...; see `csd_2d.load_prior`.

        Raises:
            ValueError, OSError: as `load_prior` raises.
        """
        return cls(load_prior(model, **options))

    def to(self, device: str | torch.device):
        """Move the prior to a device; returns the pipeline."""
        self.prior.to(device)
        return self

    def _run(
        self,
        particles: Particles,
        layout: Layout,
        latents: Tensor,
        prompt: Prompt,
        config: EditConfig,
        callback: StepCallback | None,
        progress: bool,
        resume: str | Path | None,
    ) -> None:
        self.interrupt = False

        def on_step(step: Step) -> bool:
            if callback is not None:
                with torch.no_grad():
                    latents.copy_(
                        callback(self, step.index, step.timestep, {"latents": latents}).get("latents", latents)
                    )
            return self.interrupt

        label = "editing" if progress else None
        edit(particles, self.prior, prompt, config, on_step, label, resume, layout=layout)


class CsdPanoramaPipeline(CsdPipeline):
    """Edits an image of any size through overlapping crops that agree with each other.

    Example:
        >>> from PIL import Image
        >>> pipeline = CsdPanoramaPipeline.from_pretrained("analytic")
        >>> river = Image.new("RGB", (300, 40), "skyblue")
        >>> output = pipeline("make it night", river, num_inference_steps=3, progress=False)
        >>> output.images[0].size
        (300, 40)
    """

    def __call__(
        self,
        prompt: Prompt,
        image: ImageLike,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: StepCallback | None = None,
        config: EditConfig | None = None,
        progress: bool = True,
        resume: str | Path | None = None,
        **canvas: Any,
    ) -> PanoramaOutput:
        """Run one edit.

        Args:
            prompt: one instruction, or several that each have a region.
            num_inference_steps, guidance_scale, image_guidance_scale: override those of `config`.
            generator: the edit's seed is drawn from it. Default: `config.seed`.
            callback_on_step_end: see `StepCallback`; "latents" is the canvas, (1, c, h, w).
            config: all settings of the edit; default `EditConfig()`.
            progress: show a progress bar.
            resume: see `csd_2d.edit.edit`.
            canvas: stride, mask, regions, wrap, ...; see `csd_2d.panorama.PanoramaCanvas`.

        Raises:
            ValueError: for an input or an output type of another kind, or as `PanoramaCanvas` and `edit` raise.
        """
        config = _settings(config, num_inference_steps, guidance_scale, image_guidance_scale, generator)
        _check_output(output_type)
        panorama = PanoramaCanvas(_tensor(image), self.prior, len(check_prompt(prompt)), **canvas)
        crops = panorama.crops
        self._run(crops, crops.layout, crops.canvas, prompt, config, callback_on_step_end, progress, resume)
        if output_type == "latent":
            return PanoramaOutput([crops.canvas.detach()[0]])
        return PanoramaOutput([_output(panorama.decode(), output_type)])


class CsdVideoPipeline(CsdPipeline):
    """Edits the frames of a clip together; or any images, with `follow=False`.

    Example:
        >>> pipeline = CsdVideoPipeline.from_pretrained("analytic")
        >>> clip = [np.full((16, 24, 3), shade) for shade in (0.2, 0.5, 0.8)]
        >>> output = pipeline("invert the colors", clip, num_inference_steps=120, output_type="np", progress=False)
        >>> [round(float(frame.mean()), 1) for frame in output.frames]
        [0.8, 0.5, 0.2]
    """

    def __call__(
        self,
        prompt: str,
        frames: Sequence[ImageLike],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: StepCallback | None = None,
        config: EditConfig | None = None,
        progress: bool = True,
        resume: str | Path | None = None,
        follow: bool = True,
        **stack: Any,
    ) -> VideoOutput:
        """Run one edit; see `CsdPanoramaPipeline`.

        Args:
            callback_on_step_end: see `StepCallback`; "latents" are those of all frames, (n, c, h, w).
            follow: the frames are those of a video, and places that optical flow finds to be the same move alike, if
                frames are of one size.
            stack: start, masks; see `csd_2d.image_set.ImageStack`.

        Raises:
            ValueError: for an input or an output type of another kind, or as `ImageStack` and `edit` raise.
        """
        config = _settings(config, num_inference_steps, guidance_scale, image_guidance_scale, generator)
        _check_output(output_type)
        sources = [_tensor(frame) for frame in frames]
        sizes = [(source.shape[-2], source.shape[-1]) for source in sources]
        find = followed(sources, sizes, self.prior, config) if follow else None
        images = ImageStack(sources, self.prior, correspondence=find, **stack)
        stacked = images.particles
        self._run(stacked, images.layout, stacked.latents, prompt, config, callback_on_step_end, progress, resume)
        if output_type == "latent":
            return VideoOutput(list(stacked.render(range(len(stacked))).detach()))
        return VideoOutput([_output(frame, output_type) for frame in images.decode()])


def _settings(
    config: EditConfig | None,
    steps: int | None,
    guidance_scale: float | None,
    image_guidance_scale: float | None,
    generator: torch.Generator | None,
) -> EditConfig:
    given = {
        "steps": steps,
        "guidance_scale": guidance_scale,
        "image_guidance_scale": image_guidance_scale,
        "seed": None
        if generator is None
        else int(torch.randint(2**40, (), generator=generator, device=generator.device)),
    }
    return replace(config or EditConfig(), **{name: value for name, value in given.items() if value is not None})


def _check_output(output_type: str) -> None:
    if output_type not in get_args(OutputType):
        raise ValueError(f"output_type must be one of {', '.join(get_args(OutputType))}; got {output_type!r}.")


def _tensor(image: ImageLike) -> Float[Tensor, "3 H W"]:
    """Convert to RGB in [0, 1]."""
    if isinstance(image, Image.Image):
        return to_tensor(image)
    if isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[-1] == 3:
        array = torch.from_numpy(image).permute(2, 0, 1)
        return array.float() / 255 if image.dtype == np.uint8 else _in_range(array)
    if isinstance(image, Tensor) and image.ndim == 3 and len(image) == 3:
        return _in_range(image.detach().cpu())
    shape = getattr(image, "shape", "")
    raise ValueError(
        "an image must be a PIL image, an (H, W, 3) array, uint8 or in [0, 1], or a (3, H, W) tensor in [0, 1]; got "
        f"{type(image).__name__} {tuple(shape) if shape else ''}."
    )


def _in_range(image: Tensor) -> Float[Tensor, "3 H W"]:
    # What resampling leaves a little outside is clamped when the image is decoded.
    if not image.is_floating_point() or not -0.1 <= image.min() <= image.max() <= 1.1:
        raise ValueError(
            f"an image's numbers must be in [0, 1], or uint8 in an array; got {image.dtype} from {image.min():g} to "
            f"{image.max():g}."
        )
    return image.float()


def _output(image: Float[Tensor, "3 H W"], output_type: str) -> ImageLike:
    if output_type == "pil":
        return Image.fromarray(to_array(image))
    return image if output_type == "pt" else image.permute(1, 2, 0).numpy()
