"""Instructions with known answers: edits in closed form."""

import math
import re
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from csd_2d.blur import gaussian_blur

ImageEdit = Callable[[Tensor], Tensor]
"""Function from RGB (..., 3, H, W) in [0, 1] to RGB that may exceed [0, 1]."""


def _luma(image: Tensor) -> Tensor:
    """Compute the Rec. 601 luma, (..., 1, H, W)."""
    return (image * image.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(-3, keepdim=True)


def _rgb(image: Tensor, *color: float) -> Tensor:
    return image.new_tensor(color)[:, None, None]


def _night(image: Tensor) -> Tensor:
    # Day for night: underexposed and blue, but warm, bright surfaces stay lit as if by street lamps.
    muted = torch.lerp(_luma(image), image, 0.5)
    moonlit = muted.pow(1.35) * _rgb(image, 0.26, 0.34, 0.58) + _rgb(image, 0.01, 0.02, 0.05)
    warmth = ((image[..., :1, :, :] - image[..., 2:, :, :] - 0.1) / 0.4).clamp(0, 1)
    lamplit = image * _rgb(image, 0.95, 0.75, 0.45)
    return torch.lerp(moonlit, lamplit, 0.7 * warmth * _luma(image))


def _black_and_white(image: Tensor) -> Tensor:
    return _luma(image).expand_as(image)


def _sepia(image: Tensor) -> Tensor:
    return _luma(image) * _rgb(image, 0.97, 0.80, 0.58) + _rgb(image, 0.03, 0.02, 0.0)


def _foggy(image: Tensor) -> Tensor:
    return torch.lerp(_luma(image), image, 0.4) * 0.4 + _rgb(image, 0.48, 0.50, 0.52)


def _snowy(image: Tensor) -> Tensor:
    # Snow covers everything outside deep shadows; greens turn white first.
    greenness = (image[..., 1:2, :, :] - image[..., :1, :, :].maximum(image[..., 2:, :, :])).clamp(0, 0.2) * 3
    cover = (((_luma(image) - 0.12) / 0.4).clamp(0, 1) * 0.65 + greenness).clamp(0, 0.85)
    return torch.lerp(torch.lerp(_luma(image), image, 0.5), _rgb(image, 0.93, 0.96, 1.0).expand_as(image), cover)


def _invert(image: Tensor) -> Tensor:
    return 1 - image


def _sunset(image: Tensor) -> Tensor:
    return torch.lerp(_luma(image), image, 0.6) * _rgb(image, 1.0, 0.62, 0.40) + _rgb(image, 0.10, 0.03, 0.06)


def _spring(image: Tensor) -> Tensor:
    # Blossoms: pale and pink, greens most of all.
    greenness = (image[..., 1:2, :, :] - image[..., :1, :, :].maximum(image[..., 2:, :, :])).clamp(0, 0.3)
    pale = torch.lerp(_luma(image), image, 0.6) * _rgb(image, 0.60, 0.50, 0.58) + _rgb(image, 0.40, 0.27, 0.36)
    return pale + greenness * _rgb(image, 1.2, -0.8, 0.8)


def _summer(image: Tensor) -> Tensor:
    # Lush: greener and with more contrast, like grass in the sun.
    return torch.lerp(_luma(image), image, 0.7) * _rgb(image, 0.80, 1.15, 0.45) + _rgb(image, -0.05, 0.05, -0.05)


def _autumn(image: Tensor) -> Tensor:
    return torch.lerp(_luma(image), image, 0.5) * _rgb(image, 1.15, 0.55, 0.15) + _rgb(image, 0.04, 0.0, 0.0)


def _pencil_sketch(image: Tensor) -> Tensor:
    """Divide luma by its blur ("dodge"): dark lines where brightness drops, white paper elsewhere."""
    luma = _luma(image)
    blurred = gaussian_blur(luma.reshape(-1, 1, *luma.shape[-2:]), deviation=2.5, reach=6).view_as(luma)
    ratio = (luma + 0.05) / (blurred + 0.05)
    return (0.95 * ratio.clamp(max=1).pow(2.5)).expand_as(image)


HUES = {"red": 0, "orange": 30, "yellow": 60, "green": 120, "cyan": 180, "blue": 240, "purple": 300, "pink": 330}
"""Angles in degrees in the plane of RGB vectors whose components sum to zero."""
NEW_COLORS = ("red", "yellow", "green", "cyan", "blue", "purple")
"""Answers to "paint it a new color": evenly spaced hues, so that each has two equally close neighbors."""
_TINT = 0.42


def paint(hue: float) -> ImageEdit:
    """Make an edit that shifts colors toward a hue and preserves detail.

    The shift has the same length for every hue and does not depend on the source's colors. All hues are therefore
    equally far from the source, and noise alone decides an ambiguous instruction. The shift fades to zero toward black
    and white, where RGB has no room for color. It is not clipped, because clipping would favor some hues.
    """
    angle = math.radians(hue)

    def painted(image: Tensor) -> Tensor:
        # Orthonormal basis of the plane of RGB vectors whose components sum to zero.
        axes = torch.stack([_rgb(image, 2, -1, -1) / 6**0.5, _rgb(image, 0, 1, -1) / 2**0.5])
        direction = math.cos(angle) * axes[0] + math.sin(angle) * axes[1]
        mean = image.mean(-3, keepdim=True)
        return image + _TINT * (4 * mean * (1 - mean)).clamp(min=0) * direction

    return painted


def recolor(hue: float) -> ImageEdit:
    """Make an edit that removes a surface's own color and then paints it, as in "make the ball blue"."""
    painted = paint(hue)
    return lambda image: painted(0.15 + 0.7 * _luma(image).expand_as(image))


PIXEL_EDITS: dict[str, list[ImageEdit]] = {
    "make it night": [_night],
    "make it sunset": [_sunset],
    "make it black and white": [_black_and_white],
    "make it sepia": [_sepia],
    "make it foggy": [_foggy],
    "make it snowy": [_snowy],
    "make it spring": [_spring],
    "make it summer": [_summer],
    "make it autumn": [_autumn],
    "invert the colors": [_invert],
    **{f"paint it {color}": [paint(hue)] for color, hue in HUES.items()},
    "paint it a new color": [paint(HUES[color]) for color in NEW_COLORS],
    "change the season": [_spring, _summer, _autumn, _snowy],
}
"""Instruction -> its answers; an ambiguous instruction has several. Edits are pixelwise: the edit of a crop is the crop
of the edit."""

EDITS: dict[str, list[ImageEdit]] = {**PIXEL_EDITS, "turn it into a pencil sketch": [_pencil_sketch]}
"""Instruction -> its answers, for all instructions that edit the whole image."""


def normalized(prompt: str) -> str:
    """Convert a prompt to the form used as keys: lower case, no punctuation, "color" for "colour".

    Example:
        >>> normalized("Paint it a new COLOUR!")
        'paint it a new color'
    """
    words = re.sub(r"[^a-z ]", " ", prompt.lower().replace("colour", "color")).split()
    return " ".join(words)


def known_answers(prompt: str, images: Float[Tensor, "n 3 H W"]) -> list[Float[Tensor, "n 3 H W"]]:
    """Compute the answers to an instruction, in [0, 1]: one, or several if it is ambiguous.

    Raises:
        ValueError: if the instruction has no closed form; the message lists those that do.
    """
    edits = EDITS.get(normalized(prompt))
    if edits is None:
        raise ValueError(f"there is no known answer to '{prompt}'; there is one to: {'; '.join(EDITS)}.")
    return [edit(images).clamp(0, 1) for edit in edits]
