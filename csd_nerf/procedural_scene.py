"""A small scene rendered exactly, by closed-form ray tracing: an island in the sky with a house and trees.

World coordinates: z is up, the meadow is the plane z = 0, all solids lie within distance 1 of the origin and the sky
is a sphere of radius `SKY_RADIUS`. Cameras follow nerfstudio's convention: camera-to-world matrices, looking along -z,
y up in the image. Colors do not depend on the viewing direction (no highlights), so that a radiance field can match
them.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from csd_2d.io.files import replacing
from csd_2d.io.images import write_image

SKY_RADIUS = 3.4
ORBIT_RADII = (2.4, 3.1)
"""Distances of the cameras from the origin. The far cameras observe the empty space in front of the near ones, so no
floaters can form there."""
NEAR_PLANE, FAR_PLANE = 1.35, 6.5
"""Everything, including the sky, lies between these distances from each camera of the orbit."""
ELEVATIONS = (10.0, 25.0, 42.0)
"""Elevations of the camera rings, in degrees above the meadow."""
FIELD_OF_VIEW = 46.0
"""Horizontal field of view, in degrees."""
HELD_OUT_EVERY = 5

_TARGET = (0.0, 0.0, 0.02)
_SELF_HIT = 1e-4
"""Intersections closer than this are with the surface the ray starts on."""
_ON_SURFACE = 1e-5
"""Tolerance for rounding errors of points on a surface."""

Albedo = Callable[[Tensor, Tensor], Tensor]
"""Function from surface points (n, 3) and normals (n, 3) to RGB (n, 3)."""


# Shapes


class Shape(Protocol):
    """A convex solid."""

    def distances(self, origins: Float[Tensor, "n 3"], directions: Float[Tensor, "n 3"]) -> Float[Tensor, " n"]:
        """Compute the distance along each ray to its first intersection; inf if there is none."""
        ...

    def normals(self, points: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
        """Compute outward unit normals at points on the surface."""
        ...


def _first(distances: Float[Tensor, "k n"], valid: Bool[Tensor, "k n"]) -> Float[Tensor, " n"]:
    return torch.where(valid & (distances > _SELF_HIT), distances, math.inf).amin(0)


@dataclass(frozen=True)
class Ball:
    center: tuple[float, float, float]
    radius: float

    def distances(self, origins: Tensor, directions: Tensor) -> Tensor:
        offset = origins - origins.new_tensor(self.center)
        b = (offset * directions).sum(1)
        discriminant = b.square() - offset.square().sum(1) + self.radius**2
        root = discriminant.clamp(min=0).sqrt()
        return _first(torch.stack([-b - root, -b + root]), discriminant > 0)

    def normals(self, points: Tensor) -> Tensor:
        return (points - points.new_tensor(self.center)) / self.radius


@dataclass(frozen=True)
class Frustum:
    """An upright cylinder, cone or truncated cone, including its caps."""

    center: tuple[float, float]
    bottom: float
    top: float
    bottom_radius: float
    top_radius: float

    @property
    def _slope(self) -> float:
        return (self.top_radius - self.bottom_radius) / (self.top - self.bottom)

    def distances(self, origins: Tensor, directions: Tensor) -> Tensor:
        x, y, z = (origins - origins.new_tensor([*self.center, self.bottom])).unbind(1)
        dx, dy, dz = directions.unbind(1)
        height = self.top - self.bottom
        # Side: |(x, y) + t (dx, dy)| = radius + t slope dz, a quadratic equation in t. The 1e-9 prevents division
        # by zero for rays parallel to the side.
        radius = self.bottom_radius + self._slope * z
        a = dx.square() + dy.square() - (self._slope * dz).square() + 1e-9
        b = x * dx + y * dy - self._slope * radius * dz
        discriminant = b.square() - a * (x.square() + y.square() - radius.square())
        root = discriminant.clamp(min=0).sqrt()
        sides = torch.stack([(-b - root) / a, (-b + root) / a])
        at = z + sides * dz
        on_side = (discriminant > 0) & (at >= 0) & (at <= height)
        caps = torch.stack([-z / dz, (height - z) / dz])
        on_cap = torch.hypot(x + caps * dx, y + caps * dy) <= caps.new_tensor([[self.bottom_radius], [self.top_radius]])
        return _first(torch.cat([sides, caps]), torch.cat([on_side, on_cap]))

    def normals(self, points: Tensor) -> Tensor:
        radial = points[:, :2] - points.new_tensor(self.center)
        side = torch.cat([radial, -self._slope * radial.norm(dim=1, keepdim=True)], 1)
        vertical = (points[:, 2] > self.top - _ON_SURFACE).float() - (points[:, 2] < self.bottom + _ON_SURFACE).float()
        cap = vertical[:, None] * points.new_tensor([0.0, 0.0, 1.0])
        return torch.where(vertical[:, None] != 0, cap, torch.nn.functional.normalize(side, dim=1))


@dataclass(frozen=True)
class Polyhedron:
    """The set of points x with normal . x <= offset for every (unit normal, offset)."""

    faces: tuple[tuple[tuple[float, float, float], float], ...]

    def _planes(self, like: Tensor) -> tuple[Float[Tensor, "k 3"], Float[Tensor, " k"]]:
        return like.new_tensor([face[0] for face in self.faces]), like.new_tensor([face[1] for face in self.faces])

    def distances(self, origins: Tensor, directions: Tensor) -> Tensor:
        normals, offsets = self._planes(origins)
        speed = normals @ directions.T
        # A ray parallel to a face never crosses it. The 1e-9 puts the crossing far ahead if the ray is inside the
        # half-space and far behind if it is outside.
        speed = torch.where(speed == 0, 1e-9, speed)
        crossings = (offsets[:, None] - normals @ origins.T) / speed
        entry = crossings.masked_fill(speed > 0, -math.inf).amax(0)
        leave = crossings.masked_fill(speed < 0, math.inf).amin(0)
        return _first(entry[None], (entry < leave)[None])

    def normals(self, points: Tensor) -> Tensor:
        normals, offsets = self._planes(points)
        return normals[(points @ normals.T - offsets).argmax(1)]


def _box(low: tuple[float, float, float], high: tuple[float, float, float]) -> Polyhedron:
    axes = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    above = tuple((axis, bound) for axis, bound in zip(axes, high, strict=True))
    below = tuple(((-axis[0], -axis[1], -axis[2]), -bound) for axis, bound in zip(axes, low, strict=True))
    return Polyhedron(above + below)


def _gable(
    center: tuple[float, float], half_length: float, half_width: float, eaves: float, ridge: float
) -> Polyhedron:
    """Build a gable roof whose ridge runs along x."""
    x, y = center
    rise = ridge - eaves
    slant = math.hypot(rise, half_width)
    cos, sin = half_width / slant, rise / slant
    return Polyhedron(
        (
            ((0.0, sin, cos), sin * y + cos * ridge),
            ((0.0, -sin, cos), -sin * y + cos * ridge),
            ((1.0, 0.0, 0.0), x + half_length),
            ((-1.0, 0.0, 0.0), half_length - x),
            ((0.0, 0.0, -1.0), -eaves),
        )
    )


# Colors


def _paint(where: Bool[Tensor, " n"], color: tuple[float, float, float], base: Float[Tensor, "n 3"]) -> Tensor:
    return torch.where(where[:, None], base.new_tensor(color), base)


def _plain(*color: float) -> Albedo:
    return lambda points, normals: points.new_tensor(color).expand_as(points)


def _striped(first: tuple[float, float, float], second: tuple[float, float, float], period: float) -> Albedo:
    """Make horizontal bands of two alternating colors."""

    def albedo(points: Tensor, normals: Tensor) -> Tensor:
        second_band = (points[:, 2] / period).floor() % 2 == 1
        return _paint(second_band, second, points.new_tensor(first).expand_as(points))

    return albedo


_HOUSE = (-0.08, 0.16)
_HALF_LENGTH, _HALF_WIDTH, _WALL = 0.34, 0.25, 0.34
_POND = (0.42, -0.42)


def _meadow(points: Tensor, normals: Tensor) -> Tensor:
    """Color the meadow: a checkerboard of mown grass, a path from the door, a pond, and soil on the sides."""
    x, y = points[:, 0], points[:, 1]
    color = points.new_tensor([0.42, 0.60, 0.29]).expand_as(points)
    color = _paint(((x / 0.2).floor() + (y / 0.2).floor()) % 2 == 0, (0.50, 0.68, 0.34), color)
    bend = _HOUSE[0] - 0.10 * torch.sin(4 * (y - _HOUSE[1] + _HALF_WIDTH))
    color = _paint(((x - bend).abs() < 0.075) & (y < _HOUSE[1]), (0.86, 0.76, 0.55), color)
    distance = torch.hypot(x - _POND[0], (y - _POND[1]) * 1.25)
    color = _paint(distance < 0.25, (0.84, 0.78, 0.60), color)
    color = _paint(distance < 0.21, (0.30, 0.58, 0.80), color)
    return _paint(normals[:, 2] < 0.5, (0.52, 0.40, 0.26), color)


def _walls(points: Tensor, normals: Tensor) -> Tensor:
    """Color the walls: a door in the front (-y) and windows on all sides."""
    along_x = normals[:, 1].abs() > 0.5
    u = torch.where(along_x, points[:, 0] - _HOUSE[0], points[:, 1] - _HOUSE[1])
    z = points[:, 2]
    front = normals[:, 1] < -0.5
    beside = torch.where(along_x, (u.abs() - 0.205).abs(), u.abs())

    color = points.new_tensor([0.90, 0.82, 0.68]).expand_as(points)
    color = _paint((beside < 0.09) & ((z - 0.19).abs() < 0.095), (0.45, 0.28, 0.18), color)
    # Brighter than white, so that windows glow on shaded walls too and stay lit when an edit makes it night.
    color = _paint((beside < 0.065) & ((z - 0.19).abs() < 0.07), (2.4, 2.1, 0.9), color)
    return _paint(front & (u.abs() < 0.075) & (z < 0.25), (0.24, 0.45, 0.60), color)


def _roof(points: Tensor, normals: Tensor) -> Tensor:
    tiles = _striped((0.78, 0.32, 0.25), (0.66, 0.25, 0.20), 0.06)(points, normals)
    return _paint(normals[:, 0].abs() > 0.5, (0.90, 0.82, 0.68), tiles)


def _sky(directions: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
    """Color the sky: blue above, hazy below, with broad, soft clouds."""
    x, y, z = directions.unbind(1)
    height = (0.5 + 0.75 * z).clamp(0, 1)[:, None]
    color = torch.lerp(directions.new_tensor([0.80, 0.84, 0.86]), directions.new_tensor([0.34, 0.58, 0.86]), height)
    billows = torch.sin(3 * x + 2 * z + 1) + torch.sin(3.5 * y - 3 * z) + torch.sin(7 * z + 2 * x - 2 * y)
    cloud = torch.sigmoid(3 * (billows - 0.9))[:, None]
    return torch.lerp(color, directions.new_tensor([0.90, 0.90, 0.90]), 0.75 * cloud)


def _pine(x: float, y: float, height: float) -> list[tuple[Shape, Albedo]]:
    needles = _striped((0.16, 0.44, 0.28), (0.22, 0.54, 0.33), height / 8)
    return [
        (Frustum((x, y), 0.0, 0.3 * height, 0.05, 0.05), _plain(0.45, 0.30, 0.20)),
        (Frustum((x, y), 0.2 * height, 0.7 * height, 0.30 * height, 0.06 * height), needles),
        (Frustum((x, y), 0.5 * height, height, 0.22 * height, 0.0), needles),
    ]


def _round_tree(x: float, y: float, height: float, *color: float) -> list[tuple[Shape, Albedo]]:
    return [
        (Frustum((x, y), 0.0, 0.5 * height, 0.05, 0.05), _plain(0.45, 0.30, 0.20)),
        (Ball((x, y, 0.67 * height), 0.34 * height), _plain(*color)),
    ]


_ROCK = _striped((0.60, 0.50, 0.42), (0.52, 0.43, 0.37), 0.11)

_GROUND: list[tuple[Shape, Albedo]] = [
    (Frustum((0.0, 0.0), -0.10, 0.0, 0.92, 0.95), _meadow),
    (Frustum((0.0, 0.0), -0.36, -0.10, 0.52, 0.84), _ROCK),
    (Frustum((0.0, 0.0), -0.66, -0.36, 0.10, 0.52), _ROCK),
]

_OBJECTS: list[tuple[Shape, Albedo]] = [
    (
        _box(
            (_HOUSE[0] - _HALF_LENGTH, _HOUSE[1] - _HALF_WIDTH, 0.0),
            (_HOUSE[0] + _HALF_LENGTH, _HOUSE[1] + _HALF_WIDTH, _WALL),
        ),
        _walls,
    ),
    (_gable(_HOUSE, 0.39, 0.31, _WALL - 0.03, 0.58), _roof),
    (_box((0.04, 0.21, 0.40), (0.15, 0.32, 0.66)), _plain(0.62, 0.42, 0.36)),
    *_pine(0.60, 0.28, 0.58),
    *_pine(-0.68, 0.20, 0.46),
    *_round_tree(-0.52, -0.46, 0.46, 0.86, 0.54, 0.22),
    (Ball((0.12, -0.66, 0.10), 0.10), _striped((0.82, 0.26, 0.40), (0.86, 0.84, 0.78), 0.05)),
]


# Light


def _cone_of_directions(direction: tuple[float, float, float], radius: float, count: int) -> Float[Tensor, "count 3"]:
    """Compute unit vectors evenly spaced on a cone around a direction."""
    axis = torch.nn.functional.normalize(torch.tensor(direction), dim=0)
    side = torch.nn.functional.normalize(torch.linalg.cross(axis, torch.tensor([0.0, 0.0, 1.0])), dim=0)
    angles = torch.arange(count)[:, None] * (2 * math.pi / count)
    ring = angles.cos() * side + angles.sin() * torch.linalg.cross(axis, side)
    return torch.nn.functional.normalize(axis + radius * ring, dim=1)


_SUN = _cone_of_directions((-0.45, -0.62, 0.80), 0.05, 3)
"""Directions of three suns close together, which give shadows a penumbra."""
_DOME = _cone_of_directions((0.01, 0.0, 1.0), 0.9, 5)
"""Directions of skylight. It casts shadows too, which darken corners and the ground under trees."""
_FILL_DIRECTION = (0.48, 0.62, -0.62)
"""Direction of the fill light: soft, shadowless light that clouds and sky reflect from opposite the sun."""


def _irradiance(lights: Float[Tensor, "k 3"], points: Float[Tensor, "n 3"], normals: Float[Tensor, "n 3"]) -> Tensor:
    """Compute the mean over the lights of the cosine with the normal, 0 in shadow: (n, 1)."""
    total = torch.zeros_like(points[:, 0])
    for light in lights:
        cosine = normals @ light
        lit = (cosine > 0).nonzero()[:, 0]
        # Skip the ground: all lights are above it.
        for shape, _ in _OBJECTS:
            lit = lit[shape.distances(points[lit], light.expand(len(lit), 3)).isinf()]
        total[lit] += cosine[lit]
    return total[:, None] / len(lights)


def _radiance(origins: Float[Tensor, "n 3"], directions: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
    """Compute the color that reaches the origin of each ray (unit directions)."""
    along = (origins * directions).sum(1, keepdim=True)
    to_sky = -along + (along.square() - origins.square().sum(1, keepdim=True) + SKY_RADIUS**2).sqrt()
    colors = _sky((origins + to_sky * directions) / SKY_RADIUS)

    solids = _GROUND + _OBJECTS
    distances, nearest = torch.stack([shape.distances(origins, directions) for shape, _ in solids]).min(0)
    nearest[distances.isinf()] = -1
    points, normals, albedos = (torch.zeros_like(origins) for _ in range(3))
    for i, (shape, albedo) in enumerate(solids):
        hit = (nearest == i).nonzero()[:, 0]
        points[hit] = origins[hit] + distances[hit, None] * directions[hit]
        normals[hit] = shape.normals(points[hit])
        albedos[hit] = albedo(points[hit], normals[hit])

    hit = nearest >= 0
    sun = points.new_tensor([0.74, 0.68, 0.58]) * _irradiance(_SUN, points[hit], normals[hit])
    skylight = points.new_tensor([0.34, 0.38, 0.44]) * _irradiance(_DOME, points[hit], normals[hit])
    fill = (
        points.new_tensor([0.38, 0.39, 0.41]) * (1 + 0.4 * normals[hit] @ points.new_tensor(_FILL_DIRECTION))[:, None]
    )
    colors[hit] = (albedos[hit] * (sun + skylight + fill)).clamp(0.04, 0.97)
    return colors


# Cameras


def look_at(position: Float[Tensor, "3"], target: tuple[float, float, float] = _TARGET) -> Float[Tensor, "4 4"]:
    """Compute the camera-to-world matrix of a camera that looks at the target, with z up.

    Its columns are the image's right, the image's up, the direction away from the target, and the position.

    Example:
        >>> look_at(torch.tensor([2.0, 0.0, 0.0]), target=(0.0, 0.0, 0.0))[:3, 2].tolist()
        [1.0, 0.0, 0.0]
    """
    back = torch.nn.functional.normalize(position - position.new_tensor(target), dim=0)
    right = torch.nn.functional.normalize(torch.linalg.cross(position.new_tensor([0.0, 0.0, 1.0]), back), dim=0)
    matrix = torch.eye(4, dtype=position.dtype)
    matrix[:3] = torch.stack([right, torch.linalg.cross(back, right), back, position], 1)
    return matrix


def _on_sphere(azimuth: float, elevation: float, radius: float) -> Float[Tensor, "4 4"]:
    """Place a camera that looks at the scene; angles in degrees, azimuth 0 at -y (in front of the house's door)."""
    a, e = math.radians(azimuth), math.radians(elevation)
    return look_at(radius * torch.tensor([math.sin(a) * math.cos(e), -math.cos(a) * math.cos(e), math.sin(e)]))


def orbit(num: int = 36) -> Float[Tensor, "num 4 4"]:
    """Place the cameras of the data set in rings at `ELEVATIONS`, ring by ring, with staggered azimuths.

    Near and far cameras alternate within a ring.
    """
    rings = len(ELEVATIONS)

    def camera(i: int) -> Tensor:
        ring = i * rings // num
        return _on_sphere(360 / num * (rings * i + ring), ELEVATIONS[ring], ORBIT_RADII[i % len(ORBIT_RADII)])

    return torch.stack([camera(i) for i in range(num)])


def turntable(num: int = 48, elevation: float = 22.0) -> Float[Tensor, "num 4 4"]:
    """Place cameras along one full turn around the scene, for a video that loops."""
    return torch.stack([_on_sphere(360 * i / num + 24, elevation, ORBIT_RADII[0]) for i in range(num)])


def intrinsics(size: tuple[int, int]) -> dict[str, float]:
    """Compute nerfstudio's fl_x, fl_y, cx, cy, w and h for an image of `size` (width, height), in pixels.

    Pixel (column, row) covers [column, column + 1) x [row, row + 1); its center is (column + 0.5, row + 0.5).
    """
    width, height = size
    focal = width / 2 / math.tan(math.radians(FIELD_OF_VIEW) / 2)
    return {"fl_x": focal, "fl_y": focal, "cx": width / 2, "cy": height / 2, "w": width, "h": height}


def render_view(
    camera_to_world: Float[Tensor, "4 4"], size: tuple[int, int] = (96, 72), supersampling: int = 2
) -> Float[Tensor, "3 H W"]:
    """Render one view of the scene, RGB in [0, 1].

    Args:
        camera_to_world: see `look_at`; the camera must be inside the sky sphere.
        size: (width, height) in pixels.
        supersampling: rays per pixel along each axis; a pixel is the mean of supersampling^2 rays.

    Example:
        >>> render_view(turntable(1)[0], (32, 24)).shape
        torch.Size([3, 24, 32])
    """
    width, height = size
    lens = intrinsics(size)
    rows, columns = torch.meshgrid(
        (torch.arange(height * supersampling) + 0.5) / supersampling,
        (torch.arange(width * supersampling) + 0.5) / supersampling,
        indexing="ij",
    )
    x, y = (columns - lens["cx"]) / lens["fl_x"], (lens["cy"] - rows) / lens["fl_y"]
    directions = torch.stack([x, y, -torch.ones_like(x)], -1).reshape(-1, 3) @ camera_to_world[:3, :3].T
    directions = torch.nn.functional.normalize(directions, dim=1)
    colors = _radiance(camera_to_world[:3, 3].expand_as(directions), directions)
    image = colors.reshape(height * supersampling, width * supersampling, 3).permute(2, 0, 1)
    return torch.nn.functional.avg_pool2d(image, supersampling)


def write_scene(
    folder: Path, num_views: int = 36, size: tuple[int, int] = (96, 72), progress: str | None = None
) -> None:
    """Write `images/*.png` and `transforms.json` in nerfstudio's data format, with the cameras of `orbit(num_views)`.

    Every `HELD_OUT_EVERY`-th view is for evaluation, the others for training.

    To keep the coordinates of this module, pass `nerfstudio-data --orientation-method none --center-method none
    --auto-scale-poses False` to ns-train (scale factor and scene scale are 1 by default). Everything lies between
    `NEAR_PLANE` and `FAR_PLANE` of each camera. Passing the former as `--pipeline.model.near-plane` prevents floaters
    right in front of the cameras. With the far plane set as well, `--pipeline.model.proposal-initial-sampler uniform`
    wastes no samples.

    Args:
        folder: created along with its parents; it appears only when all files are written.
        num_views: at least 2.
        size: (width, height) in pixels.
        progress: label of the progress bar; None: no progress bar.

    Raises:
        ValueError: if there are fewer than 2 views: one is held out.
        FileExistsError: if the folder is not empty, or is a file.
    """
    if num_views < 2:
        raise ValueError(f"num_views must be at least 2, one of them held out; got {num_views}.")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists; name a new or an empty folder for the scene.")
    cameras = orbit(num_views)
    names = [f"images/frame_{i:04d}.png" for i in range(num_views)]
    held_out = names[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY] or names[-1:]
    transforms = {
        "camera_model": "PINHOLE",
        **intrinsics(size),
        "train_filenames": [name for name in names if name not in held_out],
        "val_filenames": held_out,
        "test_filenames": held_out,
        "frames": [
            {"file_path": name, "transform_matrix": camera.tolist()}
            for name, camera in zip(names, cameras, strict=True)
        ],
    }
    with replacing(folder) as temporary:
        for name, camera in zip(
            tqdm(names, desc=progress, disable=progress is None, unit="view"), cameras, strict=True
        ):
            write_image(render_view(camera, size), temporary / name)
        (temporary / "transforms.json").write_text(json.dumps(transforms, indent=2), encoding="utf-8")
