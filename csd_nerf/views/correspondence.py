"""Correspondence of a scene's views, by the depth that the scene renders."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from csd_2d.cells import pad
from csd_2d.correspondence.surface import SurfaceCorrespondence
from csd_nerf.views.base import TrainingViews


def view_correspondence(
    views: TrainingViews, indices: Sequence[int], size: tuple[int, int], cell: int
) -> SurfaceCorrespondence:
    """Match some views by the surfaces that the present scene shows in them.

    Args:
        size: height and width in pixels that views are padded to.
        cell: pixels per latent cell along one side.
    """
    return SurfaceCorrespondence(torch.stack([_cell_points(views.surface(index), size, cell) for index in indices]))


def _cell_points(surface: Float[Tensor, "3 H W"], size: tuple[int, int], cell: int) -> Float[Tensor, "3 h w"]:
    """Take the point in the middle of each latent cell."""
    return pad(surface[None], *size)[0, :, cell // 2 :: cell, cell // 2 :: cell]
