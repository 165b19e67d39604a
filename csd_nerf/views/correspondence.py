"""Correspondence of a scene's views, by the depth that the scene renders."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from csd_2d.cells import pad
from csd_2d.correspondence.surface import SurfaceCorrespondence
from csd_nerf.views.base import TrainingViews


def view_correspondence(
    views: TrainingViews,
    source: Callable[[int], Tensor],
    indices: Sequence[int],
    size: tuple[int, int],
    cell: int,
) -> SurfaceCorrespondence:
    """Match some views by the surfaces that the present scene shows in them.

    Args:
        source: the unedited image of a view, (3, H, W).
        size: height and width in pixels that views are padded to.
        cell: pixels per latent cell along one side.
    """
    middle = slice(cell // 2, None, cell)
    points = [pad(views.surface(index)[None], *size)[..., middle, middle] for index in indices]
    colors = [F.avg_pool2d(pad(source(index)[None], *size), cell).cpu() for index in indices]
    return SurfaceCorrespondence(torch.cat(points), torch.cat(colors), views.positions()[list(indices)])
