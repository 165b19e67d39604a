"""Gaussian blur."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def gaussian_blur(images: Float[Tensor, "n 1 H W"], deviation: float, reach: int) -> Float[Tensor, "n 1 H W"]:
    """Blur with a Gaussian cut off `reach` pixels from its center; borders are repeated outwards.

    Separable, unlike torchvision's, whose two-dimensional kernel takes 2,001 times as long at a reach of 1,000, and
    which mirrors borders and therefore fails where the reach exceeds the image.
    """
    offsets = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    taps = (-offsets.square() / (2 * deviation**2)).exp()
    taps = taps / taps.sum()
    padded = F.pad(images, [reach] * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, taps[None, None, None]), taps[None, None, :, None])
