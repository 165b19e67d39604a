"""Local edits of a scene: which pixels of a training view may change."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from csd_2d.io.images import IMAGE_SUFFIXES
from csd_2d.io.masks import feathered, read_mask
from csd_nerf.views.base import FAR, TrainingViews

SAMPLED = 1000
"""Pixels of a view, at least, from which an error message tells where surfaces lie."""

Sphere = tuple[float, float, float, float]
"""Center x, y, z and radius."""
Box = tuple[float, float, float, float, float, float]
"""Lowest x, y, z and highest x, y, z."""


def inside(points: Float[Tensor, "3 H W"], solid: Sphere | Box) -> Float[Tensor, "1 H W"]:
    """Mark points inside the solid with 1, others with 0.

    Example:
        >>> import torch
        >>> points = torch.tensor([[0.0, 0.5], [0.0, 0.5], [0.0, 2.0]])[:, None]
        >>> inside(points, (0.0, 0.0, 0.0, 1.0)).tolist(), inside(points, (-1, -1, -1, 1, 1, 1)).tolist()
        ([[[1.0, 0.0]]], [[[1.0, 0.0]]])
    """
    if len(solid) == 4:
        within = (points - points.new_tensor(solid[:3])[:, None, None]).norm(dim=0) <= solid[3]
    else:
        low, high = points.new_tensor(solid).view(2, 3, 1, 1)
        within = ((points >= low) & (points <= high)).all(0)
    return within[None].float()


def masks_of_solid(views: TrainingViews, solid: Sphere | Box, feather: float) -> list[Float[Tensor, "1 H W"]]:
    """Mark, in each view, the pixels whose surface in the scene lies in the solid.

    Raises:
        ValueError: if no view shows anything of it.
    """
    masks, seen = [], []
    for index in range(len(views)):
        points = views.surface(index)
        masks.append(feathered(inside(points, solid), feather))
        seen.append(points.flatten(1)[:, :: max(points[0].numel() // SAMPLED, 1)])
    if not any(bool(mask.any()) for mask in masks):
        raise ValueError(
            f"nothing that the views show lies in {solid}, or nothing wider than --pipeline.feather {feather}; most of "
            f"it lies in {_extent(torch.cat(seen, dim=1))}, in units of the scene as it was trained."
        )
    return masks


def _extent(points: Float[Tensor, "3 n"]) -> str:
    """Describe where points lie, without the outermost 5 % on each side and pixels that show nothing."""
    shown = points.where(points.norm(dim=0) < FAR / 2, torch.nan)
    ranges = shown.nanquantile(torch.tensor([0.05, 0.95]), dim=1).T.tolist()
    return ", ".join(f"{axis} {low:.3g} to {high:.3g}" for axis, (low, high) in zip("xyz", ranges, strict=True))


def masks_from_folder(views: TrainingViews, folder: Path, feather: float) -> list[Float[Tensor, "1 H W"]]:
    """Read a mask for each view, by the name of its file without the ending: white may change.

    Raises:
        ValueError: if one is missing or all are black, or as `read_mask` raises.
    """
    files = {path.stem: path for path in sorted(folder.glob("*")) if path.suffix.lower() in IMAGE_SUFFIXES}
    masks = []
    for index in range(len(views)):
        name = views.filename(index).stem
        if name not in files:
            raise ValueError(f"folder {folder} holds no mask for view {name}; there must be one for each view.")
        height, width = views.original(index).shape[-2:]
        # A view need not show what is edited.
        masks.append(read_mask(files[name], (height, width), feather, may_be_black=True))
    if not any(bool(mask.any()) for mask in masks):
        raise ValueError(f"all masks in {folder} are black, or show nothing wider than --pipeline.feather {feather}.")
    return masks
