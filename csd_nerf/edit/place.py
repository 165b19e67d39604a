"""Where a box or a sphere lies: whose coordinates its numbers are, and whether the views show anything of it."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig, DataparserOutputs
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from torch import Tensor

from csd_nerf.edit.masks import SCENE, Box, Coordinates, Sphere, outside
from csd_nerf.views.base import FAR, TrainingViews

RAYS = {"cpu": 20_000, "cuda": 1_000_000}
"""Rays by which to look for a solid: seconds."""
FEW_RAYS, FEW_VIEWS = 1000, 4
"""Rays and views by which to say where a scene lies."""

PixelOfView = tuple[str, int, int, float]
"""Name of a view's image, x and y of a pixel in it, and a radius."""


def data_coordinates(outputs: DataparserOutputs, dataparser: DataParserConfig) -> Coordinates:
    """Return the coordinates of the poses in the data: in transforms.json, or whatever other file a data parser reads.

    A data parser turns, centers and scales a scene.
    """
    to_scene = torch.eye(4, dtype=torch.float64)
    to_scene[:3] = outputs.dataparser_transform[:3].double()
    scale = float(outputs.dataparser_scale)
    name = "the data"
    if isinstance(dataparser, NerfstudioDataParserConfig):
        # What ns-process-data did before it wrote the file is part of nerfstudio's transformation, too.
        path = dataparser.data if dataparser.data.suffix == ".json" else dataparser.data / "transforms.json"
        meta = json.loads(path.read_text(encoding="utf8"))
        applied = meta.get("applied_transform")
        if applied is None and (dataparser.data / "colmap/sparse/0").exists():
            applied = [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0]]  # nerfstudio's assumption about older files
        if applied is not None:
            to_scene = to_scene @ torch.tensor([*applied, [0, 0, 0, 1]], dtype=torch.float64).inverse()
        scale /= float(meta.get("applied_scale", 1.0))
        name = path.name
    to_scene[:3] *= scale
    return Coordinates(name, to_scene.inverse()[:3].float())


@dataclass(frozen=True)
class Look:
    """Points of a scene that its views show, in its own coordinates."""

    points: Float[Tensor, "3 n"]
    spacing: Float[Tensor, " n"]
    """About how far each is from its neighbors."""

    def extent(self, coordinates: Coordinates = SCENE) -> str:
        """Describe where most of the points lie."""
        return f"{coordinates.extent(self.points)} of {coordinates.name}"


def look(views: TrainingViews, indices: Sequence[int], rays: int) -> Look:
    """Look at what some views show, with about as many rays."""
    cameras = views.cameras
    pixels = sum(int(cameras.width[index]) * int(cameras.height[index]) for index in indices)
    every = max(1, math.ceil(math.sqrt(pixels / rays)))
    seen, spacing = [], []
    for index in indices:
        points = views.surface(index, every).flatten(1)
        points = points[:, points.norm(dim=0) < FAR / 2]
        distances = (points - views.positions()[index][:, None]).norm(dim=0)
        seen.append(points)
        spacing.append(distances * every / float(cameras.fx[index]))
    return Look(torch.cat(seen, dim=1), torch.cat(spacing))


def center_at(views: TrainingViews, pixel: PixelOfView) -> Sphere:
    """Return the sphere around the surface that a view shows in a pixel, in the scene's coordinates.

    Raises:
        ValueError: if there is no such view or pixel, or the pixel shows nothing.
    """
    name, x, y, radius = pixel
    names = [views.filename(index).name for index in range(len(views))]
    found = [
        i for i, file in enumerate(names) if name in (file, Path(file).stem, views.name(i), str(views.filename(i)))
    ]
    if len(found) != 1:
        which = "no training view" if not found else f"{len(found)} training views"
        known = f"{', '.join(sorted(names)[:3])}, …" if not found else ", ".join(views.name(i) for i in found)
        raise ValueError(f"--pipeline.sphere-at names {which}: '{name}'; expected one of {known}.")
    points = views.surface(found[0])
    height, width = points.shape[1:]
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"--pipeline.sphere-at: pixel {x} {y} is not in {name}, which is {width}x{height} px.")
    point = points[:, y, x]
    if not point.norm() < FAR / 2:
        raise ValueError(f"--pipeline.sphere-at: {name} shows nothing at pixel {x} {y}.")
    return (*point.tolist(), radius)  # type: ignore[return-value]


def check_shown(seen: Look, solid: Sphere | Box, coordinates: Coordinates) -> None:
    """Refuse a solid with nothing in it that the views show; one that could lie between the points is let through.

    Raises:
        ValueError: says where most of what the views show lies.
    """
    if bool((outside(coordinates(seen.points), solid) <= seen.spacing * coordinates.scale).any()):
        return
    raise ValueError(
        f"nothing that the views show lies in {'sphere' if len(solid) == 4 else 'box'} "
        f"{' '.join(f'{number:g}' for number in solid)} of {coordinates.name}; most of it lies in "
        f"{coordinates.extent(seen.points)}."
    )
