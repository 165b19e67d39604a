"""Correspondence of views of a scene: the cells whose surfaces lie in one place."""

from collections.abc import Sequence
from itertools import product

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from csd_2d.correspondence import Correspondence, precedence

FAR = 1e9
"""Distance from the camera from which on a cell shows nothing: renderers give rays that hit nothing a huge depth."""
ALIKE = 0.1
"""Difference in color, in [0, 1], at which two cells no longer count as the same place: depth may be wrong."""
NEAR = 0.03
"""Share of the cells that measures what lies near: more than that may show a far background."""


def contracted(
    points: Float[Tensor, "... 3"], origin: Float[Tensor, "3"], unit: Float[Tensor, ""]
) -> Float[Tensor, "... 3"]:
    """Map space into a ball of radius 2: what lies near keeps its place, the far ends up at its direction.

    x for |x| <= 1, else (2 - 1/|x|) x/|x| (Barron et al., mip-NeRF 360, CVPR 2022, eq. 10).

    Example:
        >>> line = torch.tensor([[-1.0, 0, 0], [0, 0, 0], [1, 0, 0], [1e9, 0, 0]])
        >>> contracted(line, torch.zeros(3), torch.tensor(2.0))[:, 0].tolist()
        [-0.5, 0.0, 0.5, 2.0]
    """
    places = (points - origin) / unit
    radius = places.norm(dim=-1, keepdim=True).clamp(min=1)
    return (2 - 1 / radius) * places / radius


class SurfaceCorrespondence:
    """Lets cells of different views move alike where they show the same place of a scene.

    Space is divided into cubes that measure `cube` cells. In each of them, the mean over the cells of one view is
    replaced by that over the cells of all; what is finer stays each view's own, so that inexact depth does not blur it.
    A cell has shares in the eight cubes around it (trilinear interpolation), so that cubes leave no borders.

    A place is the same only if it is seen from the same side, so that both faces of a thin wall stay apart: each cube
    counts for six directions of view, in which a view has shares by the squares of its direction's coordinates. And it
    must have the same color before the edit, which depth that is wrong does not have.

    Memory: about 200 bytes a cell.

    Args:
        points: the point of the scene that each cell of each view shows, in the scene's coordinates. Cells that are
            not finite, or `FAR` from the camera, show nothing and stay as they are.
        colors: of the cells before the edit, RGB in [0, 1].
        positions: of the cameras.
        cube: side of a cube, in distances of neighboring cells, of which it is the median over those that are near.
    """

    def __init__(
        self,
        points: Float[Tensor, "n 3 h w"],
        colors: Float[Tensor, "n 3 h w"],
        positions: Float[Tensor, "n 3"],
        cube: float = 3.0,
    ) -> None:
        points = points.movedim(1, -1).double()
        rays = points - positions[:, None, None].double()
        distance = rays.norm(dim=-1)
        shown = distance < FAR  # false where it is not a number
        places, side = _places(points.where(shown[..., None], 0), distance, shown, cube)
        scaled = (places / side).reshape(-1, 1, 3)
        corners = torch.tensor(list(product((0, 1), repeat=3)))
        whole = scaled.floor()
        near = (1 - (scaled - whole - corners).abs()).prod(-1).clamp(min=0)
        view = torch.where(shown[..., None], rays / distance.clamp(min=1e-12)[..., None], 0).reshape(-1, 1, 3)
        self._views = len(points)
        self._shares: Float[Tensor, "cells 24"] = (near[..., None] * view.square()).flatten(1).float()
        # Cubes by number, each for six directions, and the parts of cubes that belong to one view each.
        x, y, z = (whole + corners).long().unbind(-1)
        reach = int(4 / side) + 4
        number = (6 * ((x * reach + y) * reach + z))[..., None] + 2 * torch.arange(3) + (view > 0)
        cubes, inverse = number.flatten(1).unique(return_inverse=True)
        owner = torch.arange(self._views).repeat_interleave(len(inverse) // self._views)
        parts, part = (inverse * self._views + owner[:, None]).unique(return_inverse=True)
        self._part: Int[Tensor, "cells 24"] = part.int()
        self._cube_of_part: Int[Tensor, " parts"] = parts // self._views
        self._owner_of_part: Int[Tensor, " parts"] = parts % self._views
        self._cubes = len(cubes)
        self._colors: Float[Tensor, "n cells 3"] = colors.flatten(2).mT.cpu().float()

    def __call__(self, indices: Sequence[int]) -> Correspondence:
        """Match some of the views, by their indices (a `csd_2d.mixing.FindCorrespondence`)."""
        rows = list(indices)
        part, shares = (table.view(self._views, -1, 24)[rows].flatten(0, 1) for table in (self._part, self._shares))
        colors = self._colors[rows]

        def averaged(values: Float[Tensor, "n c h w"], ranks: Int[Tensor, " n"] | None = None) -> Tensor:
            own_values = values.flatten(2).mT.cpu().float()
            cells = torch.cat([own_values, colors, torch.ones_like(colors[..., :1])], -1).flatten(0, 1)
            sums = cells.new_zeros(len(self._cube_of_part), cells.shape[-1])
            for k in range(24):  # one after the other, to save memory
                sums.index_add_(0, part[:, k], cells * shares[:, k, None])
            gap, unlike = (self._everyone(sums, rows, ranks) - _mean(sums)).tensor_split([-3], 1)
            gap = gap * (-unlike.square().mean(1, keepdim=True) / (2 * ALIKE**2)).exp()
            shift = torch.zeros_like(own_values).flatten(0, 1)
            for k in range(24):
                shift += gap[part[:, k]] * shares[:, k, None]
            return values + shift.view_as(own_values).mT.reshape(values.shape).to(values)

        return averaged

    def _everyone(
        self, sums: Float[Tensor, "parts _"], rows: list[int], ranks: Int[Tensor, " n"] | None
    ) -> Float[Tensor, "parts _"]:
        """Average over all views, in the cube of each part; see `Correspondence` for the ranks."""
        if ranks is not None:
            of_view = torch.zeros(self._views, dtype=torch.long)
            of_view[rows] = ranks.cpu().long()
            rank = of_view[self._owner_of_part]
            present = torch.where(sums[:, -1] > 1e-6, rank, self._views)
            first = torch.full((self._cubes,), self._views).scatter_reduce_(0, self._cube_of_part, present, "amin")
            sums = sums * precedence(rank, first[self._cube_of_part])[:, None]
        return _mean(sums.new_zeros(self._cubes, sums.shape[1]).index_add_(0, self._cube_of_part, sums))[
            self._cube_of_part
        ]


def _places(
    points: Float[Tensor, "n h w 3"],
    distance: Float[Tensor, "n h w"],
    shown: Bool[Tensor, "n h w"],
    cube: float,
) -> tuple[Float[Tensor, "n h w 3"], Float[Tensor, ""]]:
    """Contract points about what lies near; returns them and the side of a cube of so many neighboring cells."""
    if not shown.any():
        return points, points.new_ones(())
    distances = distance[shown]
    near = shown & (distance <= 2 * distances.kthvalue(1 + int(NEAR * (len(distances) - 1))).values)
    origin = points[near].median(0).values
    unit = 2 * (points[near] - origin).norm(dim=-1).median()
    places = contracted(points, origin, unit.clamp(min=1e-12))
    across = (places[:, :, 1:] - places[:, :, :-1]).norm(dim=-1)[near[:, :, 1:] & near[:, :, :-1]]
    return places, cube * across.median().clamp(min=1e-6) if across.numel() else places.new_ones(())


def _mean(sums: Float[Tensor, "m _"]) -> Float[Tensor, "m c"]:
    """Divide sums by their weights, which are in the last column."""
    return sums[:, :-1] / sums[:, -1:].clamp(min=1e-12)
