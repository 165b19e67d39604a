"""Local edits of a scene: which pixels of a training view may change."""

from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from csd_2d.images import IMAGE_SUFFIXES, feathered, read_mask
from csd_nerf.scene import TrainingViews

Sphere = tuple[float, float, float, float]
"""Centre x, y, z and radius."""
Box = tuple[float, float, float, float, float, float]
"""Lowest x, y, z and highest x, y, z."""


def inside(points: Float[Tensor, "3 H W"], solid: Sphere | Box) -> Float[Tensor, "1 H W"]:
    """1 where a point lies in the solid, else 0.

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
    """For each view the pixels whose surface, as the scene is learned, lies in the solid.

    Raises:
        ValueError: if no view shows anything of it.
    """
    masks = [feathered(inside(views.surface(index), solid), feather) for index in range(len(views))]
    if not any(bool(mask.any()) for mask in masks):
        raise ValueError(
            f"nothing that the views show lies in {solid}, or nothing wider than --pipeline.feather {feather}; units "
            "are those of the scene as it was trained."
        )
    return masks


def masks_from_folder(views: TrainingViews, folder: Path, feather: float) -> list[Float[Tensor, "1 H W"]]:
    """For each view the image of its file's name, whatever the ending: white may change.

    Raises:
        ValueError: if one is missing, or as `read_mask` raises.
    """
    files = {path.stem: path for path in sorted(folder.glob("*")) if path.suffix.lower() in IMAGE_SUFFIXES}
    masks = []
    for index in range(len(views)):
        name = views.filename(index).stem
        if name not in files:
            raise ValueError(f"folder {folder} holds no mask for view {name}; there must be one for each view.")
        height, width = views.original(index).shape[-2:]
        masks.append(read_mask(files[name], (height, width), feather))
    return masks
