"""Masks: where an edit may change an image."""

import math
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from csd_2d.blur import gaussian_blur
from csd_2d.io.images import channels_last, open_upright

MaskLike = Image.Image | np.ndarray | Tensor
"""A PIL image, or numbers: bool, 0 and 1, uint8, or floats in [0, 1], as (H, W), with or without a channel or a batch
of one."""
_COLORED = 0.125
"""Difference of a pixel's channels, as a share of white, from which it has a color; JPEG files of gray have some."""


def read_mask(
    path: str | Path, size: tuple[int, int], feather: float = 0.0, may_be_black: bool = False, resize: bool = False
) -> Float[Tensor, "1 H W"]:
    """Read an image file as a mask, see `to_mask`: white is 1, where the edit may change the image; black is 0.

    Args:
        size: (height, width) it must have.
        feather: see `feathered`.
        may_be_black: allow a mask that is black all over; for one of many images, which need not show what is edited.
        resize: scale a mask of the same aspect to `size`.

    Raises:
        FileNotFoundError, ValueError: as `read_image`, `to_mask` and `feathered`; also if it has another size, or is
            black.
    """
    _check_radius(feather)
    with open_upright(path) as image:
        mask = to_mask(image, f"mask {path}", may_be_black)
    if mask.shape[-2:] != size:
        height, width = mask.shape[-2:]
        if not (resize and _same_aspect((height, width), size)):
            raise ValueError(
                f"mask {path} is {width}x{height} px, the image {size[1]}x{size[0]} px; they must be alike"
                f"{', or of one aspect' if resize else ''}."
            )
        mask = F.interpolate(mask[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)
    mask = feathered(mask, feather)
    if not may_be_black and not mask.any():
        raise ValueError(
            f"mask {path} is black all over, or nowhere wider than its soft border, so that nothing is left to edit; "
            "white is what may change."
        )
    return mask


def _same_aspect(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether one size is the other, scaled and rounded to whole pixels."""
    (height, width), (low, narrow) = sorted((one, other), reverse=True)
    return abs(height * narrow / width - low) <= 1 or abs(width * low / height - narrow) <= 1


def to_mask(mask: MaskLike, name: str = "mask", one_of_many: bool = False) -> Float[Tensor, "1 H W"]:
    """Convert to numbers in [0, 1]: 1 where an edit may change the image.

    In whole numbers white is 1 if there is nothing above, or else 255, or 65,535. Of a palette the
    indices count, which is how masks of objects are kept, but colors if they are black, white and gray. Of a picture in
    one color the transparency counts.

    Args:
        name: begins the sentence of an error.
        one_of_many: it may lie on the soft border of a mask, and be nowhere white.

    Raises:
        ValueError: if it is of no such form, holds other numbers, is colored, or both colors and transparency vary.
    """
    numbers, white = _from_pil(mask, name) if isinstance(mask, Image.Image) else _from_array(mask, name)
    if numbers.shape[-1] == 4:
        numbers = _without_alpha(numbers[..., :-1], numbers[..., -1:], white, name)
    if numbers.shape[-1] == 3:
        spread = numbers.max(-1).astype(float) - numbers.min(-1)
        if spread.max() > _COLORED * white:
            raise ValueError(
                f"{name} is colored; it must be white where the edit may change something, and else black."
            )
    gray = numbers.mean(-1, dtype=np.float32) if numbers.shape[-1] > 1 else numbers[..., 0]
    if white > 1:
        if gray.max() <= 1:
            white = 1
        else:
            _check_values(gray, white, name, one_of_many)
    return torch.from_numpy(gray.astype(np.float32) / np.float32(white))[None]


def _check_values(gray: np.ndarray, white: int, name: str, one_of_many: bool) -> None:
    """Refuse numbers that are labels, or of another range."""
    high = gray.max()
    if high > 0.9 * white:
        return
    values = np.unique(gray)
    soft = len(values) > 4 and high > (white // 20 if one_of_many else white // 2)
    if not soft:
        shown = ", ".join(f"{value:g}" for value in values[:6]) + (f", ... {high:g}" if len(values) > 6 else "")
        raise ValueError(
            f"{name} holds the values {shown}; a mask holds 0 and 1, or 0 (stays) to {white} (may change)."
        )


def _from_pil(image: Image.Image, name: str) -> tuple[np.ndarray, int]:
    """Return numbers, (H, W, 1 to 4), and the one that is white."""
    if image.mode == "F":
        return _from_array(np.array(image), name)
    if image.mode == "1":
        return np.array(image)[..., None].astype(np.uint8), 1
    if image.mode.startswith("I"):
        return _from_array(np.array(image).astype(np.int32), name)
    if image.mode == "P" and "transparency" not in image.info:
        colors = np.array(image.convert("RGB"))
        gray = bool((colors == colors[..., :1]).all())
        return (colors if gray and colors.max() == 255 else np.array(image)[..., None]), 255
    if image.mode in ("PA", "LA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        return np.array(image.convert("RGBA")), 255
    if image.mode == "L":
        return np.array(image)[..., None], 255
    return np.array(image.convert("RGB")), 255


def _from_array(mask: np.ndarray | Tensor, name: str) -> tuple[np.ndarray, int]:
    """Return numbers, (H, W, 1 to 4), and the one that is white."""
    numbers = channels_last(mask, name)
    low, high = numbers.min(), numbers.max()
    if numbers.dtype == bool:
        return numbers.astype(np.uint8), 1
    if np.issubdtype(numbers.dtype, np.floating):
        if not -0.001 <= low <= high <= 1.001:  # resampling goes a little beyond
            raise ValueError(f"{name}'s numbers must be from 0 to 1, or whole numbers; got {low:g} to {high:g}.")
        return numbers.clip(0, 1), 1
    if low < 0 or high > 65535:
        raise ValueError(f"{name}'s numbers must be from 0 to 1, 255 or 65,535; got {low} to {high}.")
    return numbers, 65535 if high > 255 else 255


def _without_alpha(colors: np.ndarray, alpha: np.ndarray, white: int, name: str) -> np.ndarray:
    """Return what says more, colors or alpha.

    Raises:
        ValueError: if both say something.
    """
    varies = alpha.min() != alpha.max()
    shown = colors[alpha[..., 0] > 0] if varies else colors.reshape(-1, colors.shape[-1])
    one_color = bool((shown.max(0).astype(float) - shown.min(0) <= 0.03 * white).all())
    if not varies and (not one_color or alpha.max() == white):
        return colors
    if varies and one_color:
        return alpha
    raise ValueError(
        f"{name} has transparency that {'varies, as its colors do' if varies else 'hides it, and one color'}; save it "
        "without transparency, white where the edit may change something, and else black."
    )


def feathered(mask: Float[Tensor, "1 H W"], radius: float) -> Float[Tensor, "1 H W"]:
    """Soften the border of a mask inwards over `radius` pixels: what was 0 stays exactly 0.

    Raises:
        ValueError: if the radius is not from 0 to 1000.
    """
    _check_radius(radius)
    if radius == 0:
        return mask
    blurred = gaussian_blur(mask[None], deviation=radius / 2, reach=math.ceil(radius))[0]
    # Blurred, a straight border is at 1/2: the ramp begins there.
    return mask * (2 * blurred - 1).clamp(0, 1)


def _check_radius(radius: float) -> None:
    if not 0 <= radius <= 1000:
        raise ValueError(f"feather must be from 0 to 1000 px, got {radius}.")
