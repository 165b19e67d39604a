"""Correspondence of a scene's views, by the depth that the scene renders."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from csd_2d.cells import pad
from csd_2d.correspondence.surface import SurfaceCorrespondence
from csd_nerf.views.base import TrainingViews
from csd_nerf.views.surround import extended


def view_correspondence(
    views: TrainingViews,
    source: Callable[[int], Tensor],
    indices: Sequence[int],
    size: tuple[int, int],
    cell: int,
    margins: Sequence[int] | None = None,
) -> SurfaceCorrespondence:
    """Match some views by the surfaces that the present scene shows in them.

    Args:
        source: the unedited image of a view, (3, H, W).
        size: height and width in pixels that views are padded to.
        cell: pixels per latent cell along one side.
        margins: width by which each view is continued, see `csd_nerf.views.surround`.
    """
    margins = margins or [0] * len(indices)
    middle = slice(cell // 2, None, cell)
    whole = list(zip(indices, margins, strict=True))
    points = [pad(extended(views.surface(i), margin)[None], *size)[..., middle, middle] for i, margin in whole]
    colors = [F.avg_pool2d(pad(extended(source(i), margin)[None], *size), cell).cpu() for i, margin in whole]
    return SurfaceCorrespondence(torch.cat(points), torch.cat(colors), views.positions()[list(indices)])
