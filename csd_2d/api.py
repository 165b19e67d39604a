"""Pipelines in the style of diffusers: PIL images, arrays or tensors in, the same out."""

from collections.abc import Callable, Iterable, Sequence
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
from csd_2d.io.images import Picture, channels_last, scaled, to_array, to_picture
from csd_2d.io.masks import to_mask
from csd_2d.loss import Prompt, check_prompt
from csd_2d.panorama import PanoramaCanvas
from csd_2d.particles import Layout, Particles
from csd_2d.prior import Prior
from csd_2d.priors.loading import load_prior
from csd_2d.video import followed

ImageLike = Image.Image | np.ndarray | Tensor
"""A PIL image; an (H, W, c) array of uint8, uint16, or floats in [0, 1]; or a (c, H, W) tensor in [0, 1]. Gray, RGB, or
RGBA; also as a batch of one."""

OutputType = Literal["pil", "np", "pt", "latent"]
"""PIL images, (H, W, 3) float arrays in [0, 1], or (3, H, W) tensors in [0, 1], with a fourth channel if the image has
transparency, which stays; or latents as the prior has them."""

StepCallback = Callable[["CsdPipeline", int, int, dict[str, Any]], dict[str, Any] | None]
"""(pipeline, step, timestep, {"latents": ...}) -> the same, with latents of its own if they are to change, or None."""


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
                    latents.copy_(_returned(callback(self, step.index, step.timestep, {"latents": latents}), latents))
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
        image: ImageLike | Sequence[ImageLike],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
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
            image: one, or a list of one, as diffusers' pipelines take it.
            num_inference_steps, guidance_scale, image_guidance_scale: override those of `config`.
            generator: the edit's seed is drawn from it. One, or a list of one. Default: `config.seed`.
            callback_on_step_end: see `StepCallback`; "latents" is the canvas, (1, c, h, w).
            config: all settings of the edit; default `EditConfig()`.
            progress: show a progress bar.
            resume: see `csd_2d.edit.edit`.
            canvas: stride, mask, regions, wrap, ...; see `csd_2d.panorama.PanoramaCanvas`. Masks and regions are what
                `csd_2d.io.masks.to_mask` takes: PIL images, arrays or tensors.

        Raises:
            ValueError: for an input or an output type of another kind, or as `PanoramaCanvas` and `edit` raise.
        """
        config = _settings(config, num_inference_steps, guidance_scale, image_guidance_scale, generator)
        _check_output(output_type)
        source = _source(_only(image, "image"))
        if canvas.get("mask") is not None:
            (canvas["mask"],) = _masks([canvas["mask"]])
        if canvas.get("regions") is not None:
            canvas["regions"] = [to_mask(region, "region") for region in canvas["regions"]]
        panorama = PanoramaCanvas(source.rgb, self.prior, len(check_prompt(prompt)), **canvas)
        crops = panorama.crops
        self._run(crops, crops.layout, crops.canvas, prompt, config, callback_on_step_end, progress, resume)
        if output_type == "latent":
            return PanoramaOutput([crops.canvas.detach()[0]])
        return PanoramaOutput([source.output(panorama.decode(), output_type)])


class CsdVideoPipeline(CsdPipeline):
    """Edits the frames of a clip together; or any images, with `follow=False`.

    Example:
        >>> pipeline = CsdVideoPipeline.from_pretrained("analytic")
        >>> clip = [np.full((16, 24, 3), shade) for shade in (0.2, 0.4, 0.8)]
        >>> output = pipeline("invert the colors", clip, num_inference_steps=120, output_type="np", progress=False)
        >>> [round(float(frame.mean()), 1) for frame in output.frames]
        [0.8, 0.6, 0.2]
    """

    def __call__(
        self,
        prompt: str,
        frames: Sequence[ImageLike],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
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
            stack: start, masks; see `csd_2d.image_set.ImageStack`. Masks are what `csd_2d.io.masks.to_mask` takes: PIL
                images, arrays or tensors.

        Raises:
            ValueError: for an input or an output type of another kind, or as `ImageStack` and `edit` raise.
        """
        config = _settings(config, num_inference_steps, guidance_scale, image_guidance_scale, generator)
        _check_output(output_type)
        sources = [_source(frame) for frame in _several(frames)]
        images = [source.rgb for source in sources]
        if stack.get("start") is not None:
            stack["start"] = [_source(frame).rgb for frame in _several(stack["start"])]
        if stack.get("masks") is not None:
            stack["masks"] = _masks(stack["masks"])
        check_prompt(prompt)
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        find = followed(images, sizes, self.prior, config) if follow else None
        images = ImageStack(images, self.prior, correspondence=find, **stack)
        stacked = images.particles
        self._run(stacked, images.layout, stacked.latents, prompt, config, callback_on_step_end, progress, resume)
        if output_type == "latent":
            return VideoOutput(list(stacked.render(range(len(stacked))).detach()))
        edited = zip(sources, images.decode(), strict=True)
        return VideoOutput([source.output(frame, output_type) for source, frame in edited])


def _settings(
    config: EditConfig | None,
    steps: int | None,
    guidance_scale: float | None,
    image_guidance_scale: float | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> EditConfig:
    generator = _only(generator, "generator")
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise ValueError(f"generator must be a torch.Generator, got {type(generator).__name__}.")
    given = {
        "steps": steps,
        "guidance_scale": guidance_scale,
        "image_guidance_scale": image_guidance_scale,
        "seed": None
        if generator is None
        else int(torch.randint(2**40, (), generator=generator, device=generator.device)),
    }
    return replace(config or EditConfig(), **{name: value for name, value in given.items() if value is not None})


def _only(given: Any, name: str) -> Any:
    """Return the one element of a list, as diffusers' pipelines take it; or what is no list."""
    if not isinstance(given, list | tuple):
        return given
    if len(given) != 1:
        raise ValueError(f"{name} must be one, or a list of one, got {len(given)}: all that is edited is one edit.")
    return given[0]


def _masks(given: Iterable[Any]) -> list[Tensor]:
    given = list(given)
    masks = [to_mask(mask, one_of_many=len(given) > 1) for mask in given]
    if masks and not any(bool(mask.any()) for mask in masks):
        raise ValueError("nothing is left to edit: masks are black all over; white is what may change.")
    return masks


def _several(frames: Any) -> list[Any]:
    array = isinstance(frames, np.ndarray | Tensor)
    if not isinstance(frames, Iterable) or isinstance(frames, str) or (array and frames.ndim != 4):
        shape = f" {tuple(frames.shape)}" if array else ""
        raise ValueError(f"frames must be a list of images, got {type(frames).__name__}{shape}; make it [image].")
    if not (images := list(frames)):
        raise ValueError("there are no images to edit.")
    return images


def _returned(outputs: Any, latents: Tensor) -> Tensor:
    """Return the latents that a callback wants; those it got if it says nothing of them."""
    if outputs is None:
        return latents
    if not isinstance(outputs, dict):
        raise ValueError(f"callback_on_step_end must return a dictionary or None, got {type(outputs).__name__}.")
    wanted = outputs.get("latents", latents)
    if not isinstance(wanted, Tensor) or wanted.shape != latents.shape:
        shape = tuple(wanted.shape) if isinstance(wanted, Tensor) else type(wanted).__name__
        raise ValueError(
            f"latents that callback_on_step_end returns must be of shape {tuple(latents.shape)}, got {shape}."
        )
    return wanted


def _check_output(output_type: str) -> None:
    if output_type not in get_args(OutputType):
        raise ValueError(f"output_type must be one of {', '.join(get_args(OutputType))}; got {output_type!r}.")


@dataclass(frozen=True)
class _Source:
    """An image as it is edited, and what the result takes over from it."""

    rgb: Float[Tensor, "3 H W"]
    alpha: Float[Tensor, "1 H W"] | None = None
    picture: Picture | None = None
    """What a PIL image is beside that: its color profile and what else it carries."""

    def output(self, rgb: Float[Tensor, "3 H W"], output_type: str) -> ImageLike:
        if output_type == "pil":
            return self._pil(rgb)
        image = rgb if self.alpha is None else torch.cat([rgb, self.alpha])
        return image if output_type == "pt" else image.permute(1, 2, 0).numpy()

    def _pil(self, rgb: Float[Tensor, "3 H W"]) -> Image.Image:
        if self.picture is None:
            return Image.fromarray(to_array(rgb if self.alpha is None else torch.cat([rgb, self.alpha])))
        image = Image.fromarray(self.picture.finished(rgb))
        carried = self.picture.carried
        kept = {"icc_profile": carried.profile, "exif": carried.exif, "xmp": carried.xmp, "dpi": carried.dpi}
        image.info.update({name: value for name, value in kept.items() if value is not None})
        return image


def _source(image: ImageLike) -> _Source:
    """Convert to RGB in [0, 1], and alpha if there is any."""
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f"an image must have pixels, got {image.width}x{image.height} px.")
        picture = to_picture(image)
        alpha = None if picture.alpha is None else torch.from_numpy(scaled(picture.alpha))[None]
        return _Source(picture.rgb, alpha, picture)
    if not isinstance(image, np.ndarray | Tensor):
        raise ValueError(f"an image must be a PIL image, an array or a tensor, got {type(image).__name__}.")
    numbers = torch.from_numpy(_in_range(channels_last(image, "an image"))).permute(2, 0, 1)
    alpha = numbers[-1:] if len(numbers) == 4 else None
    colors = numbers if alpha is None else numbers[:-1]
    return _Source(colors.expand(3, -1, -1), alpha)


def _in_range(image: np.ndarray) -> np.ndarray:
    """Scale to [0, 1], float32."""
    if image.dtype in (np.uint8, np.uint16):
        return scaled(image)
    # What resampling leaves a little outside is clamped when the image is decoded.
    if image.dtype.kind != "f" or not -0.1 <= image.min() <= image.max() <= 1.1:
        raise ValueError(
            f"an image's numbers must be in [0, 1], or uint8 or uint16; got {image.dtype} from {image.min():g} to "
            f"{image.max():g}."
        )
    return image.astype(np.float32)
