"""Local edits of a scene: which pixels of a training view may change."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Coordinates:
    """Coordinates that a scene's own can be converted to."""

    name: str
    """Whose they are."""
    matrix: Float[Tensor, "3 4"]
    """From the scene's."""

    def __call__(self, points: Float[Tensor, "3 ..."]) -> Float[Tensor, "3 ..."]:
        """Convert points of the scene."""
        matrix = self.matrix.to(points)
        return (matrix[:, :3] @ points.flatten(1) + matrix[:, 3:]).view_as(points)

    @property
    def scale(self) -> float:
        """Length of one of the scene's units in these."""
        return float(self.matrix[:, 0].norm())

    def extent(self, points: Float[Tensor, "3 n"]) -> str:
        """Describe where points of the scene lie, without the outermost 5 % on each side and pixels without a surface.

        Example:
            >>> line = torch.linspace(0, 1, 101) * torch.ones(3, 1)
            >>> SCENE.extent(line)
            'x 0.05 to 0.95, y 0.05 to 0.95, z 0.05 to 0.95'
        """
        shown = self(points).where(points.norm(dim=0) < FAR / 2, torch.nan)
        ranges = shown.nanquantile(torch.tensor([0.05, 0.95]), dim=1).T.tolist()
        return ", ".join(f"{axis} {low:.3g} to {high:.3g}" for axis, (low, high) in zip("xyz", ranges, strict=True))


SCENE = Coordinates("the scene as it was trained", torch.eye(4)[:3])


def outside(points: Float[Tensor, "3 ..."], solid: Sphere | Box) -> Float[Tensor, "..."]:
    """Compute the distance of points from a solid; 0 inside.

    Example:
        >>> points = torch.tensor([[0.0, 0.5], [0.0, 0.5], [0.0, 2.0]])
        >>> [round(distance, 2) for distance in outside(points, (0.0, 0.0, 0.0, 2.0)).tolist()]
        [0.0, 0.12]
        >>> outside(points, (-1, -1, -1, 1, 1, 1)).tolist()
        [0.0, 1.0]
    """
    shape = (3, *[1] * (points.ndim - 1))
    if len(solid) == 4:
        return ((points - points.new_tensor(solid[:3]).view(shape)).norm(dim=0) - solid[3]).clamp(min=0)
    low, high = (points.new_tensor(corner).view(shape) for corner in (solid[:3], solid[3:]))
    return torch.maximum(low - points, points - high).clamp(min=0).norm(dim=0)


def masks_of_solid(
    views: TrainingViews, solid: Sphere | Box, feather: float, coordinates: Coordinates = SCENE
) -> list[Float[Tensor, "1 H W"]]:
    """Mark, in each view, the pixels whose surface in the scene lies in the solid.

    Args:
        coordinates: those that the solid is given in.

    Raises:
        ValueError: if no view shows anything of it.
    """
    masks, seen = [], []
    for index in range(len(views)):
        points = views.surface(index)
        within = outside(points if coordinates is SCENE else coordinates(points), solid) == 0
        masks.append(feathered(within[None].float(), feather))
        seen.append(points.flatten(1)[:, :: max(points[0].numel() // SAMPLED, 1)])
    if not any(bool(mask.any()) for mask in masks):
        raise ValueError(
            f"nothing that the views show lies in {solid}, or nothing wider than --pipeline.feather {feather}; most of "
            f"it lies in {coordinates.extent(torch.cat(seen, dim=1))}, in units of {coordinates.name}."
        )
    return masks


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
