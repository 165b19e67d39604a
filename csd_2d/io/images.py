"""Image files: their pixels, and with `Picture` what else they carry."""

import importlib
import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from jaxtyping import Float
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from csd_2d.io.color import Profile, converted_by_tables
from csd_2d.io.deep import DEEP_SUFFIXES, read_deep, upright, write_deep
from csd_2d.io.files import replacing
from csd_2d.io.metadata import ALPHA_SUFFIXES, PROFILE_SUFFIXES, Carried, has_alpha, read_carried

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
"""Formats that can be written: those that keep any size."""
LOSSY_SUFFIXES = (".jpg", ".jpeg", ".webp")
"""Those that change the pixels a little."""
SMALLEST = 8
"""Shortest side, in pixels, of an image that can be edited."""
_BYTES_PER_PIXEL = 24
"""Memory that it takes to read a pixel: its numbers as they are stored, and as floating-point numbers."""
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_LARGEST = {".webp": 16383, ".jpg": 65500, ".jpeg": 65500}
"""Longest side, in pixels, of formats that have such a limit."""
_counting = threading.Lock()
_readers = 0
_limit: int | None = None


@dataclass(frozen=True, eq=False)
class Picture:
    """An image, and what is needed to write an edited one of its kind."""

    rgb: Float[Tensor, "3 H W"]
    """Colors in sRGB, in [0, 1]. Where a pixel is transparent all through it is white."""
    carried: Carried
    alpha: np.ndarray | None = None
    """(H, W) uint8 or uint16."""
    stored: np.ndarray | None = None
    """(H, W, 3) uint8 or uint16, the numbers in the file, where `rgb` does not tell them."""

    def on_white(self) -> Float[Tensor, "3 H W"]:
        """Return the colors with transparency put on white, as viewers show them."""
        return self.rgb if self.alpha is None else _on_white(self.rgb, self.alpha)

    def finished(
        self, rgb: Float[Tensor, "3 H W"], deep: bool = False, alpha: bool = True, profile: bool = True
    ) -> np.ndarray:
        """Turn edited colors into numbers for a file like this picture's.

        Pixels that were not edited, and transparent ones, get the very numbers they had.

        Args:
            deep: of 16 bits, not 8.
            alpha: keep transparency; otherwise it is put on white.
            profile: the file will have this picture's color profile; otherwise colors are in sRGB.

        Returns:
            (H, W, 3 or 4) uint8 or uint16.
        """
        rgb = rgb.cpu()
        if self.alpha is not None and not alpha:
            return self._numbers(_on_white(rgb, self.alpha), deep, profile)
        numbers = self._numbers(rgb, deep, profile)
        if self.stored is not None and (profile or self.carried.colors is None):
            kept = (rgb == self.rgb).all(0).numpy()
            if self.alpha is not None:
                kept |= self.alpha == 0
            numbers[kept] = _with_depth(self.stored, deep)[kept]
        return numbers if self.alpha is None else np.dstack([numbers, _with_depth(self.alpha, deep)])

    def _numbers(self, rgb: Float[Tensor, "3 H W"], deep: bool, profile: bool) -> np.ndarray:
        colors = self.carried.colors
        if not (profile and self.carried.profile and isinstance(colors, Profile)):
            return to_array(rgb, deep)
        values = colors.from_srgb(rgb.clamp(0, 1).permute(1, 2, 0).numpy())
        return to_array(torch.from_numpy(values).permute(2, 0, 1), deep)


def _with_depth(numbers: np.ndarray, deep: bool) -> np.ndarray:
    if deep == (numbers.dtype == np.uint16):
        return numbers
    return numbers.astype(np.uint16) * 257 if deep else ((numbers.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _on_white(rgb: Float[Tensor, "3 H W"], alpha: np.ndarray) -> Float[Tensor, "3 H W"]:
    return torch.lerp(torch.ones(()), rgb, torch.from_numpy(scaled(alpha)))


def scaled(numbers: np.ndarray) -> np.ndarray:
    """Scale uint8 or uint16 to [0, 1], float32."""
    return numbers.astype(np.float32) / np.float32(np.iinfo(numbers.dtype).max)


def to_picture(image: Image.Image, carried: Carried | None = None, numbers: np.ndarray | None = None) -> Picture:
    """Convert an image: orientation and color profile are applied, transparency is kept beside the colors.

    Args:
        carried: what it carries, if that was read already.
        numbers: (H, W, c) uint16, if Pillow reads but 8 bits of them.

    Raises:
        ValueError: for numbers of no known range.
    """
    carried = carried or read_carried(image)
    colors, alpha = _channels(image, carried, numbers)
    colors = upright(colors, carried.orientation)
    alpha = None if alpha is None else upright(alpha, carried.orientation)
    clear = alpha == 0 if alpha is not None and not alpha.all() else None
    if isinstance(carried.colors, Profile):
        rgb = torch.from_numpy(carried.colors.to_srgb(scaled(colors))).permute(2, 0, 1)
    else:
        rgb = torch.from_numpy(colors).permute(2, 0, 1).float().div_(np.iinfo(colors.dtype).max)
    if clear is not None:
        rgb[:, torch.from_numpy(clear)] = 1.0
    stored = colors if clear is not None or (carried.profile and carried.colors) else None
    return Picture(rgb, carried, alpha, stored)


def _channels(image: Image.Image, carried: Carried, numbers: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Return colors, (H, W, 3), and alpha, (H, W), uint8 or uint16, as they lie in the file."""
    if image.mode == "F":
        raise ValueError("an image of floating-point numbers has no known range; save it with 8 or 16 bits a channel.")
    if numbers is None and image.mode.startswith("I"):  # gray, which PIL's own conversion would clip at 255
        numbers = _wide_gray(image)[..., None]
    if numbers is not None:
        alpha = numbers[..., -1] if numbers.shape[-1] in (2, 4) else None
        return numbers[..., :1].repeat(3, -1) if numbers.shape[-1] < 3 else numbers[..., :3], alpha
    alpha = None
    if has_alpha(image):
        image = image.convert("RGBA")
        alpha = np.array(image.getchannel("A"))
    if isinstance(carried.colors, bytes):
        image = converted_by_tables(image if image.mode == "CMYK" else image.convert("RGB"), carried.colors)
    return np.array(image if image.mode == "RGB" else image.convert("RGB")), alpha


def _wide_gray(image: Image.Image) -> np.ndarray:
    """Return the numbers of a gray image of more than 8 bits as uint16, or as uint8 if they are of 8 bits."""
    array = np.array(image)
    if image.mode.startswith("I;16") or image.format == "PNG":
        return array.astype(np.uint16)
    low, high = (int(bound) for bound in (array.min(), array.max()))
    if low < 0 or high > 65535:
        raise ValueError(f"an image of mode I must hold numbers from 0 to 255 or to 65,535; got {low:,} to {high:,}.")
    return array.astype(np.uint8 if high <= 255 else np.uint16)


def channels_last(image: np.ndarray | Tensor, name: str) -> np.ndarray:
    """Return the numbers of an image as (H, W, c), of gray, RGB or RGBA, in the machine's byte order.

    Args:
        image: (H, W), an array (H, W, c) or a tensor (c, H, W); or a batch of one of these.
        name: begins the sentence of an error.

    Raises:
        ValueError: if it has another shape, is empty, or holds no numbers.
    """
    if isinstance(image, Tensor):
        cpu = image.detach().cpu()
        array: Any = (cpu.float() if cpu.dtype == torch.bfloat16 else cpu).numpy()
        if array.ndim >= 3:
            array = np.moveaxis(array, -3, -1)
    else:
        array = image
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 3 and len(array) == 1 and array.shape[-1] not in (1, 3, 4):
        array = array[0]
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or array.size == 0 or array.dtype.kind not in "buif":
        raise ValueError(
            f"{name} must be (H, W), an array (H, W, channels) or a tensor (channels, H, W), with 1, 3 or 4 channels "
            f"of numbers; got {tuple(image.shape)} of {image.dtype}."
        )
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))


def to_tensor(image: Image.Image) -> Float[Tensor, "3 H W"]:
    """Convert to RGB in [0, 1]; see `to_picture`. Transparency is put on white."""
    return to_picture(image).on_white()


def to_array(image: Float[Tensor, "3 H W"], deep: bool = False) -> np.ndarray:
    """Convert to uint8 (H, W, 3), rounded to nearest; or to uint16."""
    if deep:
        return (image.clamp(0, 1).double() * 65535).round().permute(1, 2, 0).cpu().numpy().astype(np.uint16)
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image file of any size that fits in memory; whatever goes wrong while it is read is one sentence."""
    if not path.is_file():
        raise FileNotFoundError(f"no such image: {path}.")
    try:
        with _any_size(), _open(path) as image:
            yield image
    except ImportError:
        raise
    except Exception as error:  # of damaged files Pillow raises whatever the broken bytes lead to
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"{path} cannot be read as an image ({' '.join(str(error).split()).rstrip('.')}).") from error


@contextmanager
def _any_size() -> Iterator[None]:
    """Lift Pillow's limit of 180 megapixels, which takes larger images for an attack; `_open` looks at the memory."""
    global _readers, _limit
    with _counting:
        if _readers == 0:
            _limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _readers += 1
    try:
        yield
    finally:
        with _counting:
            _readers -= 1
            if _readers == 0:
                Image.MAX_IMAGE_PIXELS = _limit


@contextmanager
def open_upright(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file, with the camera's orientation applied. Raises as `read_image` does, but takes any size."""
    with _opened(Path(path)) as image:
        yield ImageOps.exif_transpose(image)


def _open(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged EXIF data, which `read_carried` tells
        try:
            image = Image.open(path)
        except UnidentifiedImageError:
            with path.open("rb") as file:
                head = file.read(12)
            if head[4:8] != b"ftyp" or head[8:12] not in _HEIF:
                raise
            _add_heif(path)
            image = Image.open(path)
    needed, free = image.width * image.height * _BYTES_PER_PIXEL, psutil.virtual_memory().available
    if needed > free:
        image.close()
        raise ValueError(
            f"{path} is {image.width}x{image.height} px; reading it takes {needed / 1e9:.1f} GB of memory, and "
            f"{free / 1e9:.1f} GB are free."
        )
    return image


def _add_heif(path: Path) -> None:
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError as error:
        raise ImportError(
            f'{path} is a HEIC picture, which needs pillow-heif: pip install "csd-edit[heif]".'
        ) from error


def _read_carried(image: Image.Image, path: Path) -> tuple[Carried, np.ndarray | None]:
    """Return what an image carries, and its numbers if Pillow would read but 8 bits of them."""
    carried = read_carried(image)
    height, width = carried.size
    if min(height, width) < SMALLEST:
        raise ValueError(f"{path} is {width}x{height} px; both sides must be at least {SMALLEST} px.")
    if not carried.deep or image.mode.startswith("I"):
        return carried, None
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) if image.format == "TIFF" else 1
    shallow = np.array(image.convert("RGBA") if image.mode == "LA" else image)
    numbers = read_deep(path, np.atleast_3d(shallow), turned)
    if numbers is None:
        carried = replace(carried, deep=False, lost=(*carried.lost, "only 8 of its 16 bits a channel are read"))
    return carried, numbers


def read_header(path: str | Path) -> Carried:
    """Read the size of an image and what it carries, but, of most files, no pixels. Raises as `read_picture` does."""
    path = Path(path)
    with _opened(path) as image:
        return _read_carried(image, path)[0]


def read_picture(path: str | Path) -> Picture:
    """Read an image file.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if it is a HEIC picture, and pillow-heif is not installed.
        ValueError: if it is no image, is cut short, does not fit in memory, a side is under 8 px, or as `to_picture`
            raises.
    """
    path = Path(path)
    with _opened(path) as image:
        return to_picture(image, *_read_carried(image, path))


def read_image(path: str | Path) -> Float[Tensor, "3 H W"]:
    """Read an image file as RGB in [0, 1], with transparency put on white. Raises as `read_picture` does."""
    return read_picture(path).on_white()


def image_size(path: str | Path) -> tuple[int, int]:
    """Read the height and width of the image that `read_image` would return. Raises as `read_picture` does."""
    return read_header(path).size


def check_fits(path: str | Path, height: int, width: int) -> None:
    """Check that an image of that size can be written in the format that the name's ending says. ValueError if not."""
    largest = _LARGEST.get(Path(path).suffix.lower(), math.inf)
    if max(height, width) > largest:
        raise ValueError(
            f"output {path} can have {largest} px on a side, the image is {width}x{height} px; write .png."
        )


def write_image(image: Float[Tensor, "3 H W"], path: str | Path, like: Picture | None = None) -> None:
    """Write RGB in [0, 1] in the format that the name's ending says.

    Args:
        like: what the image was before an edit: it gets its transparency, profile, depth, EXIF, XMP and resolution, as
            far as such a file can hold them; see `Carried.lost_in`.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    options: dict[str, Any] = {"quality": 95} if suffix in LOSSY_SUFFIXES else {}
    if suffix in (".jpg", ".jpeg"):
        options["subsampling"] = 0
    with replacing(path) as temporary:
        if like is None:
            Image.fromarray(to_array(image)).save(temporary, **options)
            return
        options |= like.carried.options(suffix)
        deep = like.carried.deep and suffix in DEEP_SUFFIXES
        numbers = like.finished(image, deep, suffix in ALPHA_SUFFIXES, suffix in PROFILE_SUFFIXES)
        if deep:
            write_deep(numbers, temporary, Image.new("RGB" if numbers.shape[-1] == 3 else "RGBA", (1, 1)), **options)
        else:
            Image.fromarray(numbers).save(temporary, **options)
