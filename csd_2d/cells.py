"""From pixels to whole latent cells, by padding."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def pad(images: Float[Tensor, "n c h w"], height: int, width: int) -> Float[Tensor, "n c height width"]:
    """Mirror the bottom and right border outwards, as often as needed, up to the given size."""
    bottom, right = height - images.shape[-2], width - images.shape[-1]
    rows = np.pad(np.arange(images.shape[-2]), (0, bottom), mode="symmetric")
    columns = np.pad(np.arange(images.shape[-1]), (0, right), mode="symmetric")
    return images[..., torch.from_numpy(rows), :][..., torch.from_numpy(columns)]


def round_up(size: int, multiple: int) -> int:
    """Round up to a multiple."""
    return -(-size // multiple) * multiple


def common_size(sizes: Sequence[Sequence[int]], cell: int) -> tuple[int, int]:
    """Find the height and width, in pixels, of whole latent cells that all of some sizes fit in."""
    height, width = (round_up(max(sides), cell) for sides in zip(*sizes, strict=True))
    return height, width
