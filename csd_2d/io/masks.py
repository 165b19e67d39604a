"""Masks: where an edit may change an image."""

import math
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from csd_2d.blur import gaussian_blur
from csd_2d.io.images import read_image


def read_mask(
    path: str | Path, size: tuple[int, int], feather: float = 0.0, may_be_black: bool = False
) -> Float[Tensor, "1 H W"]:
    """Read an image file as a mask: white is 1, where the edit may change the image; black is 0.

    Args:
        size: (height, width) it must have.
        feather: see `feathered`.
        may_be_black: allow a mask that is black all over; for one of many images, which need not show what is edited.

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
    """Soften the border of a mask inwards over `radius` pixels: what was 0 stays exactly 0.

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
