"""Image files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from csd_2d.io.files import replacing

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
"""Formats that can be written: those that keep any size."""
SMALLEST = 8
"""Shortest side, in pixels, of an image that can be edited."""


def to_tensor(image: Image.Image) -> Float[Tensor, "3 H W"]:
    """Convert to RGB in [0, 1]; transparency is put on white, and the camera's orientation tag is applied.

    Raises:
        ValueError: for numbers of no known range.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("an image of floating-point numbers has no known range; save it with 8 or 16 bits a channel.")
    if image.mode.startswith("I"):  # 16-bit gray, which PIL's own conversion would clip at 255
        gray = torch.from_numpy(np.array(image).astype(np.float32) / 65535)
        return gray.clamp(0, 1).expand(3, -1, -1).clone()
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def to_array(image: Float[Tensor, "3 H W"]) -> np.ndarray:
    """Convert to uint8 (H, W, 3), rounded to nearest."""
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
    """Compute width and height after the camera's orientation tag is applied."""
    lies = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
    return (image.height, image.width) if lies else (image.width, image.height)


def read_image(path: str | Path) -> Float[Tensor, "3 H W"]:
    """Read an image file as RGB in [0, 1].

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no image, is cut short, a side is under 8 px, or as `to_tensor` raises.
    """
    with _opened(Path(path)) as image:
        return to_tensor(image)


def image_size(path: str | Path) -> tuple[int, int]:
    """Read the height and width of the image that `read_image` would return, but no pixels. Raises as it does."""
    with _opened(Path(path)) as image:
        width, height = _upright_size(image)
        return height, width


def write_image(image: Float[Tensor, "3 H W"], path: str | Path) -> None:
    """Write RGB in [0, 1] in the format that the name's ending says."""
    path = Path(path)
    with replacing(path) as temporary:
        # Of the formats written only these two are lossy by default.
        lossy: dict[str, dict[str, Any]] = {".jpg": {"quality": 95, "subsampling": 0}, ".webp": {"quality": 95}}
        suffix = path.suffix.lower().replace("jpeg", "jpg")
        Image.fromarray(to_array(image)).save(temporary, **lossy.get(suffix, {}))
