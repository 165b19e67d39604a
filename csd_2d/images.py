"""Image files, padding, and the edit of a set of images: what video and 3D scenes share."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from csd_2d import ranks
from csd_2d.closed_form import gaussian_blur
from csd_2d.edit import EditConfig, StepInfo, edit
from csd_2d.files import replacing
from csd_2d.particles import LatentStack
from csd_2d.priors import Prior
from csd_2d.transport import FrameFlows

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
"""Formats written: those that keep any size."""
SMALLEST = 8
"""Shortest side, in pixels, of an image that can be edited."""


def to_tensor(image: Image.Image) -> Float[Tensor, "3 H W"]:
    """RGB in [0, 1]; transparency is put on white, a camera's rotation mark is obeyed.

    Raises:
        ValueError: for numbers of no known range.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("an image of floating-point numbers has no known range; save it with 8 or 16 bits a channel.")
    if image.mode.startswith("I"):  # 16-bit grey, which PIL's own conversion would clip at 255
        grey = torch.from_numpy(np.array(image).astype(np.float32) / 65535)
        return grey.clamp(0, 1).expand(3, -1, -1).clone()
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def to_array(image: Float[Tensor, "3 H W"]) -> np.ndarray:
    """uint8 (H, W, 3), rounded to nearest."""
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    if not path.is_file():
        raise FileNotFoundError(f"no such image: {path}.")
    try:
        with Image.open(path) as image:
            if min(image.size) < SMALLEST:
                width, height = _upright_size(image)
                raise ValueError(f"{path} is {width}x{height} px; both sides must be at least {SMALLEST} px.")
            yield image
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error}).") from error


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height once a camera's rotation mark is obeyed."""
    lies = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
    return (image.height, image.width) if lies else (image.width, image.height)


def read_image(path: Path) -> Float[Tensor, "3 H W"]:
    """An image file as RGB in [0, 1].

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no image, is cut short, a side is under 8 px, or as `to_tensor` raises.
    """
    with _opened(path) as image:
        return to_tensor(image)


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of the image that `read_image` would return; reads no pixels. Raises as it does."""
    with _opened(path) as image:
        width, height = _upright_size(image)
        return height, width


def read_mask(
    path: Path, size: tuple[int, int], feather: float = 0.0, may_be_black: bool = False
) -> Float[Tensor, "1 H W"]:
    """An image file as a mask: white is 1, where the edit may go; black is 0.

    Args:
        size: (height, width) it must have.
        feather: see `feathered`.
        may_be_black: all over; for one of many images, which need not show what is edited.

    Raises:
        FileNotFoundError, ValueError: as `read_image` and `feathered`; also if it has another size, or is black.
    """
    mask = read_image(path).mean(0, keepdim=True)
    if mask.shape[-2:] != size:
        height, width = mask.shape[-2:]
        raise ValueError(f"mask {path} is {width}x{height} px, the image {size[1]}x{size[0]} px; they must be alike.")
    mask = feathered(mask, feather)
    if not may_be_black and not mask.any():
        raise ValueError(
            f"mask {path} is black all over, or nowhere wider than its soft border, so that nothing is left to edit; "
            "white is what may change."
        )
    return mask


def feathered(mask: Float[Tensor, "1 H W"], radius: float) -> Float[Tensor, "1 H W"]:
    """A mask whose border falls off inwards over `radius` pixels: what was 0 stays exactly 0.

    Raises:
        ValueError: if the radius is not from 0 to 1000.
    """
    if not 0 <= radius <= 1000:
        raise ValueError(f"feather must be from 0 to 1000 px, got {radius}.")
    if radius == 0:
        return mask
    blurred = gaussian_blur(mask[None], deviation=radius / 2, reach=math.ceil(radius))[0]
    # Blurred, a straight border is at 1/2: the ramp begins there.
    return mask * (2 * blurred - 1).clamp(0, 1)


def cell_mask(masks: Float[Tensor, "n 1 H W"], cell: int) -> Bool[Tensor, "n 1 h w"]:
    """Latent cells of which some pixel may change. They change without restraint: what is soft is mixed in pixels."""
    return F.max_pool2d(masks, cell) > 0


def write_image(image: Float[Tensor, "3 H W"], path: Path) -> None:
    """Writes RGB in [0, 1] in the format the name ends in."""
    with replacing(path) as temporary:
        # Of the formats written only these two are lossy by default.
        lossy: dict[str, dict[str, Any]] = {".jpg": {"quality": 95, "subsampling": 0}, ".webp": {"quality": 95}}
        suffix = path.suffix.lower().replace("jpeg", "jpg")
        Image.fromarray(to_array(image)).save(temporary, **lossy.get(suffix, {}))


def pad(images: Float[Tensor, "n c h w"], height: int, width: int) -> Float[Tensor, "n c height width"]:
    """Mirrors the bottom and right border outwards, as often as needed, up to the given size."""
    bottom, right = height - images.shape[-2], width - images.shape[-1]
    rows = np.pad(np.arange(images.shape[-2]), (0, bottom), mode="symmetric")
    columns = np.pad(np.arange(images.shape[-1]), (0, right), mode="symmetric")
    return images[..., torch.from_numpy(rows), :][..., torch.from_numpy(columns)]


def round_up(size: int, multiple: int) -> int:
    """Smallest multiple that is not under `size`."""
    return -(-size // multiple) * multiple


def common_size(sizes: Sequence[Sequence[int]], cell: int) -> tuple[int, int]:
    """Height and width in whole latent cells that all of some sizes fit in."""
    height, width = (round_up(max(sides), cell) for sides in zip(*sizes, strict=True))
    return height, width


class ImageStack:
    """A set of images as particles, one each, and the way back.

    Sizes may differ; all are padded to the largest, never squeezed, and cropped again. Encoding and decoding take one
    image at a time. Of several processes (`csd_2d.ranks`) each takes some of the images.

    Args:
        images: the sources, RGB in [0, 1].
        start: images to start from, of the same sizes (a scene's present renders); default: the sources.
        masks: what of each image may change, in [0, 1]; where 0 the source stays bit for bit. Default: all.
        follow: the images are frames of one video, and optical flow tells where they show the same things.

    Raises:
        ValueError: if there are no images, or fewer than processes, or masks do not fit them.
        ImportError: if flow is wanted and cannot be estimated, see `optical_flow`.
    """

    def __init__(
        self,
        images: Sequence[Float[Tensor, "3 _ _"]],
        prior: Prior,
        start: Sequence[Float[Tensor, "3 _ _"]] | None = None,
        masks: Sequence[Float[Tensor, "1 _ _"]] | None = None,
        follow: bool = False,
    ) -> None:
        if not images:
            raise ValueError("there are no images to edit.")
        if masks is not None and [mask.shape[1:] for mask in masks] != [image.shape[1:] for image in images]:
            raise ValueError("there must be one mask for each image, of its size.")
        self._prior, self._size = prior, common_size([image.shape[-2:] for image in images], prior.cell)
        self._shapes = [image.shape for image in images]
        frames = [pad(image[None], *self._size)[0] for image in images] if follow else []
        flows = FrameFlows(frames, prior.cell, prior.device) if follow else None
        held = ranks.held(len(images))
        mine = slice(held.start, held.stop)
        self._images, self._masks = images[mine], None if masks is None else masks[mine]
        source = self._encoded(prior.encode, self._images)
        self.particles = LatentStack(
            source,
            condition=prior.condition(source),
            start=None if start is None else self._encoded(prior.encode, start[mine]),
            mask=None if self._masks is None else self._encoded(lambda mask: cell_mask(mask, prior.cell), self._masks),
            transport=None if flows is None else flows.transport,
            held=held,
            count=len(self._shapes),
        )

    @torch.no_grad()
    def _encoded(self, encode: Callable[[Tensor], Tensor], images: Sequence[Tensor]) -> Tensor:
        return torch.cat([encode(pad(image[None], *self._size).to(self._prior.device)) for image in images])

    @torch.no_grad()
    def decode(self) -> list[Float[Tensor, "3 _ _"]]:
        """The images as edited, on the CPU, in the sources' sizes; of several processes the first gets all of them."""
        decoded = (self._prior.decode(self.particles.render([i]))[0].cpu() for i in self.particles.held)
        edited = [
            out[:, : image.shape[-2], : image.shape[-1]] for out, image in zip(decoded, self._images, strict=True)
        ]
        if self._masks is not None:
            rows = zip(self._images, edited, self._masks, strict=True)
            edited = [torch.lerp(image.cpu(), out, mask.cpu()) for image, out, mask in rows]
        return ranks.to_first(edited, self._shapes)


def edit_images(
    images: Sequence[Float[Tensor, "3 _ _"]],
    prior: Prior,
    prompt: str,
    config: EditConfig | None = None,
    on_step: Callable[[StepInfo], bool | None] | None = None,
    progress: str | None = None,
    resume: Path | None = None,
    **stack: Any,
) -> list[Float[Tensor, "3 _ _"]]:
    """Edits a set of images together.

    Args:
        config, on_step, progress, resume: see `csd_2d.edit.edit`.
        stack: start, masks, follow; see `ImageStack`.

    Returns:
        The edited images on the CPU, in the sources' sizes; of several processes the first gets all of them.

    Raises:
        ValueError, ImportError: as `ImageStack` and `edit` raise.
    """
    together = ImageStack(images, prior, **stack)
    edit(together.particles, prior, prompt, config, on_step, progress, resume)
    return together.decode()
