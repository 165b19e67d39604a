"""Local edits of a scene: which pixels of a training view may change."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
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


def masks_from_folder(views: TrainingViews, folder: str | Path, feather: float) -> list[Float[Tensor, "1 H W"]]:
    """Read a mask for each view; white may change. They lie as the images do, see `mask_files`.

    Masks of the images' full size serve a scene that is used at a reduced one: they are scaled.

    Raises:
        ValueError: if one is missing or all are black, or as `mask_files` and `read_mask` raise.
    """
    masks = []
    for index, file in enumerate(mask_files([views.filename(index) for index in range(len(views))], Path(folder))):
        height, width = views.original(index).shape[-2:]
        # A view need not show what is edited.
        masks.append(read_mask(file, (height, width), feather, may_be_black=True, resize=True))
    if not any(bool(mask.any()) for mask in masks):
        raise ValueError(f"all masks in {folder} are black, or show nothing wider than --pipeline.feather {feather}.")
    return masks


def mask_files(images: Sequence[Path], folder: Path) -> list[Path]:
    """Find the mask of each image: by its path, or by its name if all images lie in one folder.

    The ending may differ (`left/001.png` for `left/001.jpg`) or be added to the image's (`left/001.jpg.png`).

    Raises:
        ValueError: if there is none, or two, or one that two images would share.
    """
    by_path, by_name = defaultdict(list), defaultdict(list)
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."):
            by_path[file.relative_to(folder).with_suffix("")].append(file)
            by_name[file.stem].append(file)
    if len({image.parent for image in images}) > 1:
        by_name.clear()  # in another folder, the same name is that of another image
    chosen = [_mask_file(image, folder, by_path, by_name) for image in images]
    owners: dict[Path, Path] = {}
    for image, file in zip(images, chosen, strict=True):
        if (other := owners.setdefault(file, image)) != image:
            raise ValueError(
                f"mask {file} has the name of two images, {other} and {image}; lay masks out in folders as the images."
            )
    return chosen


def _mask_file(
    image: Path, folder: Path, by_path: Mapping[Path, Sequence[Path]], by_name: Mapping[str, Sequence[Path]]
) -> Path:
    """Choose a mask: the one whose path agrees in most folders, or else the one of that name."""
    below = [Path(*image.parts[-depth:]) for depth in range(len(image.parts) - 1, 0, -1)]
    paths = [path for name in below for path in (name, name.with_suffix(""))]
    candidates = next((by_path[path] for path in paths if path in by_path), None)
    if candidates is None:
        candidates = by_name.get(image.name) or by_name.get(image.stem) or []
    if not candidates:
        raise ValueError(f"folder {folder} holds no mask for view {image.stem}; there must be one for each view.")
    if len(candidates) > 1:
        raise ValueError(f"both {candidates[0]} and {candidates[1]} could be the mask of {image}; keep one.")
    return candidates[0]
