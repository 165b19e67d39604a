"""Correspondence of views of a scene: the cells whose surfaces lie in one place."""

from collections.abc import Sequence
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor

from csd_2d.correspondence import Correspondence


def contracted(points: Float[Tensor, "... 3"]) -> Float[Tensor, "... 3"]:
    """Map space into a ball of radius 2: what lies near keeps its place, the far ends up at its direction.

    x for |x| <= 1, else (2 - 1/|x|) x/|x| (Barron et al., mip-NeRF 360, CVPR 2022, eq. 10). The origin is the median of
    the points, and the unit twice their median distance from it.

    Example:
        >>> line = torch.tensor([[-1.0, 0, 0], [0, 0, 0], [1, 0, 0], [1e9, 0, 0]])
        >>> contracted(line)[:, 0].tolist()
        [-0.5, 0.0, 0.5, 2.0]
    """
    places = points - points.reshape(-1, 3).median(0).values
    radius = places.norm(dim=-1, keepdim=True)
    unit = 2 * radius.median().clamp(min=1e-12)
    places, radius = places / unit, (radius / unit).clamp(min=1)
    return (2 - 1 / radius) * places / radius


class SurfaceCorrespondence:
    """Lets cells of different views move alike where they show the same place of a scene.

    Space is divided into cubes that measure `cube` cells. In each of them, the mean over the cells of one view is
    replaced by that over the cells of all; what is finer stays each view's own, so that inexact depth does not blur it.
    A cell has shares in the eight cubes around it (trilinear interpolation), so that cubes leave no borders. A surface
    that another view does not see has no cells of that view near it, unless another surface lies within a cube of it:
    both sides of a thin wall are mixed. Where most cells show a far background, cubes are too large for what is near.

    Args:
        points: the point of the scene that each cell of each view shows, in the scene's coordinates.
        cube: side of a cube, in distances of neighboring cells, of which it is the median over all views.
    """

    def __init__(self, points: Float[Tensor, "n 3 h w"], cube: float = 3.0) -> None:
        places = contracted(points.movedim(1, -1).double())
        across = (places[:, :, 1:] - places[:, :, :-1]).norm(dim=-1)
        side = cube * across.median().clamp(min=1e-6) if across.numel() else places.new_ones(())
        scaled = places.reshape(len(points), -1, 1, 3) / side
        corners = torch.tensor(list(product((0, 1), repeat=3)))
        whole = scaled.floor()
        self._shares: Float[Tensor, "n cells 8"] = (1 - (scaled - whole - corners).abs()).prod(-1).float().clamp(min=0)
        # Cubes by number, and the parts of cubes that belong to one view each.
        x, y, z = (whole + corners).long().unbind(-1)
        reach = int(4 / side) + 4
        number = (x * reach + y) * reach + z
        cubes, inverse = number.unique(return_inverse=True)
        views = torch.arange(len(points))[:, None, None].expand_as(inverse)
        parts, part = (inverse * len(points) + views).unique(return_inverse=True)
        self._part: Int[Tensor, "n cells 8"] = part
        self._cube_of_part: Int[Tensor, " parts"] = parts // len(points)
        self._cubes = len(cubes)

    def __call__(self, indices: Sequence[int]) -> Correspondence:
        """Match some of the views, by their indices (a `csd_2d.mixing.FindCorrespondence`)."""
        rows = list(indices)
        part, shares = self._part[rows].flatten(), self._shares[rows].flatten()

        def averaged(values: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
            cells = values.flatten(2).mT.cpu().float()
            weighted = torch.cat([cells, torch.ones_like(cells[..., :1])], -1)
            spread = weighted[:, :, None].expand(-1, -1, 8, -1).reshape(len(part), -1) * shares[:, None]
            own = spread.new_zeros(len(self._cube_of_part), spread.shape[-1]).index_add_(0, part, spread)
            all_views = own.new_zeros(self._cubes, own.shape[-1]).index_add_(0, self._cube_of_part, own)
            gap = _mean(all_views)[self._cube_of_part] - _mean(own)
            shift = (gap[part] * shares[:, None]).view(*cells.shape[:2], 8, -1).sum(2)
            return values + shift.mT.reshape(values.shape).to(values)

        return averaged


def _mean(sums: Float[Tensor, "m _"]) -> Float[Tensor, "m c"]:
    """Divide sums by their weights, which are in the last column."""
    return sums[:, :-1] / sums[:, -1:].clamp(min=1e-6)
