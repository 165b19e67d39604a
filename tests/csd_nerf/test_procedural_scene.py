"""The procedural scene: closed-form ray tracing, cameras, and files that nerfstudio reads without a change."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from csd_2d.io.images import read_image
from csd_nerf import procedural_scene
from csd_nerf.procedural_scene import (
    ELEVATIONS,
    NEAR_PLANE,
    ORBIT_RADII,
    Ball,
    Frustum,
    Polyhedron,
    Shape,
    intrinsics,
    look_at,
    orbit,
    render_view,
    turntable,
    write_scene,
)

SIZE = (48, 36)
CUBE = Polyhedron(tuple(((x, y, z), 0.4) for x, y, z in (*torch.eye(3).tolist(), *(-torch.eye(3)).tolist())))
SHAPES = [
    Ball((0.1, 0.2, -0.1), 0.5),
    Frustum((0.1, -0.1), -0.3, 0.4, 0.5, 0.2),
    Frustum((0, 0), 0, 0.5, 0.4, 0),
    CUBE,
]


def inside(shape: Shape, points: Tensor) -> Tensor:
    """Membership, written down independently of the intersections."""
    if isinstance(shape, Ball):
        return (points - torch.tensor(shape.center)).norm(dim=1) < shape.radius
    if isinstance(shape, Frustum):
        share = (points[:, 2] - shape.bottom) / (shape.top - shape.bottom)
        radius = torch.lerp(torch.tensor(float(shape.bottom_radius)), torch.tensor(float(shape.top_radius)), share)
        return (share > 0) & (share < 1) & ((points[:, :2] - torch.tensor(shape.center)).norm(dim=1) < radius)
    return points.abs().amax(1) < 0.4


def rays(n: int = 400) -> tuple[Tensor, Tensor]:
    """From all round towards the origin, more or less."""
    generator = torch.Generator().manual_seed(0)
    origins = 2 * torch.nn.functional.normalize(torch.randn(n, 3, generator=generator), dim=1)
    aims = 0.4 * torch.randn(n, 3, generator=generator)
    return origins, torch.nn.functional.normalize(aims - origins, dim=1)


def project(points: Tensor, camera_to_world: Tensor, lens: dict[str, float]) -> Tensor:
    """World points (n, 3) to pixel coordinates (n, 2), x right and y down, by the inverse of the camera matrix."""
    local = (torch.linalg.inv(camera_to_world) @ torch.cat([points, torch.ones(len(points), 1)], 1).T)[:3].T
    x, y, depth = local[:, 0], local[:, 1], -local[:, 2]
    return torch.stack([lens["cx"] + lens["fl_x"] * x / depth, lens["cy"] - lens["fl_y"] * y / depth], 1)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("procedural") / "scene"
    write_scene(folder, num_views=12, size=SIZE)
    return folder


@pytest.mark.parametrize("shape", SHAPES)
def test_first_intersection_is_where_marching_along_the_ray_enters(shape: Shape) -> None:
    origins, directions = rays()
    step = 0.002
    steps = torch.arange(0, 4, step)
    points = origins[:, None] + steps[:, None] * directions[:, None]
    members = inside(shape, points.reshape(-1, 3)).reshape(len(origins), -1)
    marched = torch.where(members.any(1), steps[members.int().argmax(1)], math.inf)
    distances = shape.distances(origins, directions)

    # Marching misses a chord shorter than its step; it must agree on all but such grazing rays.
    agree = ((distances - marched).abs() <= step) | (distances == marched)
    assert agree.float().mean() >= 0.99
    assert 0.2 < distances.isfinite().float().mean() < 1


@pytest.mark.parametrize("shape", SHAPES)
def test_normals_point_out_of_the_surface(shape: Shape) -> None:
    origins, directions = rays()
    distances = shape.distances(origins, directions)
    hit = distances.isfinite()
    points = origins[hit] + distances[hit, None] * directions[hit]
    normals = shape.normals(points)

    torch.testing.assert_close(normals.norm(dim=1), torch.ones(len(points)))
    assert ((normals * directions[hit]).sum(1) < 0).all()
    assert not inside(shape, points + 1e-3 * normals).any()
    # Next to an edge the inward normal may leave through another face.
    assert inside(shape, points - 1e-3 * normals).float().mean() >= 0.98


@pytest.mark.parametrize("cameras", [orbit(36), orbit(7), turntable(10)])
def test_cameras_are_right_handed_rotations_that_look_at_the_scene(cameras: Tensor) -> None:
    rotations, positions = cameras[:, :3, :3], cameras[:, :3, 3]
    torch.testing.assert_close(rotations.mT @ rotations, torch.eye(3).expand_as(rotations), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(len(cameras)))
    assert (rotations[:, 2, 1] > 0).all(), "up in the image is up in the world"
    torch.testing.assert_close(rotations[:, 2, 0], torch.zeros(len(cameras)), atol=1e-6, rtol=0)
    target = torch.tensor(procedural_scene._TARGET)
    torch.testing.assert_close(rotations[:, :, 2], torch.nn.functional.normalize(positions - target, dim=1))
    assert torch.isclose(positions.norm(dim=1)[:, None], torch.tensor(ORBIT_RADII)).any(1).all()


def test_orbit_visits_every_elevation_and_no_place_twice() -> None:
    positions = orbit(36)[:, :3, 3]
    radii = positions.norm(dim=1)
    heights = (positions[:, 2] / radii).asin().rad2deg()
    for elevation in ELEVATIONS:
        assert (heights - elevation).abs().lt(1e-3).sum() == 36 // len(ELEVATIONS)
        for radius in ORBIT_RADII:
            assert ((heights - elevation).abs().lt(1e-3) & torch.isclose(radii, torch.tensor(radius))).any()
    assert torch.pdist(positions).min() > 0.3


@pytest.mark.parametrize("camera", orbit(6))
def test_a_point_is_seen_where_the_intrinsics_project_it(camera: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scene is replaced by one small sphere: where black and white spheres differ is centered on its projection."""
    center = (0.3, -0.2, 0.15)
    monkeypatch.setattr(procedural_scene, "_GROUND", [])

    def render(albedo: float) -> Tensor:
        # Albedos so extreme that clamping makes the sphere uniform, whatever the light.
        sphere = (Ball(center, 0.06), lambda points, _: torch.full_like(points, albedo))
        monkeypatch.setattr(procedural_scene, "_OBJECTS", [sphere])
        return render_view(camera, SIZE, supersampling=8)

    change = (render(100.0) - render(0.0)).sum(0)

    rows, columns = torch.meshgrid(torch.arange(SIZE[1]) + 0.5, torch.arange(SIZE[0]) + 0.5, indexing="ij")
    seen = torch.stack([(change * columns).sum(), (change * rows).sum()]) / change.sum()
    # A sphere's outline is an ellipse whose center lies some hundredths of a pixel off the projected center.
    torch.testing.assert_close(seen, project(torch.tensor([center]), camera, intrinsics(SIZE))[0], atol=0.05, rtol=0)


def test_colors_do_not_depend_on_the_viewpoint() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.cat([1.2 * torch.rand(300, 2, generator=generator) - 0.6, torch.zeros(300, 1)], 1)
    seen = []
    for camera in (orbit(36)[24], orbit(36)[31]):
        origins = camera[:3, 3].expand_as(points)
        directions = torch.nn.functional.normalize(points - origins, dim=1)
        solids = procedural_scene._GROUND + procedural_scene._OBJECTS
        nearest = torch.stack([shape.distances(origins, directions) for shape, _ in solids]).amin(0)
        visible = (nearest - (points - origins).norm(dim=1)).abs() < 1e-3
        seen.append((visible, procedural_scene._radiance(origins, directions)))
    (visible_a, colors_a), (visible_b, colors_b) = seen
    both = visible_a & visible_b
    assert both.sum() > 50
    difference = (colors_a - colors_b)[both].abs().amax(1)
    # Float rounding may put a point on the other side of a shadow's or a tile's edge.
    assert (difference < 1e-4).float().mean() > 0.97


def test_every_solid_lies_between_the_near_plane_and_the_sky() -> None:
    for camera in torch.cat([orbit(36), turntable(8)]):
        image_rays = torch.cartesian_prod(torch.linspace(-0.45, 0.45, 40), torch.linspace(-0.35, 0.35, 30))
        directions = torch.cat([image_rays, -torch.ones(len(image_rays), 1)], 1) @ camera[:3, :3].T
        directions = torch.nn.functional.normalize(directions, dim=1)
        for shape, _ in procedural_scene._GROUND + procedural_scene._OBJECTS:
            distances = shape.distances(camera[:3, 3].expand_as(directions), directions)
            distances = distances[distances.isfinite()]
            assert (distances > NEAR_PLANE).all()
            assert (distances < max(ORBIT_RADII) + 1.1).all()


def test_views_are_images_with_room_for_an_edit() -> None:
    image = render_view(turntable(3)[0], SIZE)
    assert image.shape == (3, SIZE[1], SIZE[0])
    assert 0.03 < image.min() < 0.3 < image.mean() < 0.7 < image.max() < 0.98
    # More rays change a view at its edges alone, which are the smaller part of the pixels.
    finer = render_view(turntable(3)[0], SIZE, supersampling=4)
    assert (image - finer).abs().median() < 2e-3


def test_camera_above_looks_down_with_the_door_below() -> None:
    camera = look_at(torch.tensor([0.0, -0.01, 2.5]))
    door, ridge = project(torch.tensor([[-0.08, -0.09, 0.1], [-0.08, 0.16, 0.58]]), camera, intrinsics(SIZE))
    assert door[1] > ridge[1]


def test_written_scene(scene: Path) -> None:
    transforms = json.loads((scene / "transforms.json").read_text())
    names = [frame["file_path"] for frame in transforms["frames"]]
    train, held_out = transforms["train_filenames"], transforms["val_filenames"]
    assert sorted(train + held_out) == names
    assert len(held_out) == 2
    assert sorted(path.name for path in (scene / "images").iterdir()) == [Path(name).name for name in names]
    assert {key: transforms[key] for key in intrinsics(SIZE)} == intrinsics(SIZE)
    for i in (0, 7):
        camera = torch.tensor(transforms["frames"][i]["transform_matrix"])
        assert torch.equal(camera, orbit(12)[i])
        torch.testing.assert_close(read_image(scene / names[i]), render_view(camera, SIZE), atol=0.51 / 255, rtol=0)


def test_nerfstudio_reads_the_scene_in_its_own_coordinates(scene: Path) -> None:
    dataparser = pytest.importorskip(
        "nerfstudio.data.dataparsers.nerfstudio_dataparser", reason="needs the extra 'nerf'"
    )
    config = dataparser.NerfstudioDataParserConfig(
        data=scene, orientation_method="none", center_method="none", auto_scale_poses=False
    )
    outputs = config.setup().get_dataparser_outputs("val")
    lens = intrinsics(SIZE)
    assert [path.name for path in outputs.image_filenames] == ["frame_0002.png", "frame_0007.png"]
    assert torch.equal(outputs.cameras.camera_to_worlds, orbit(12)[[2, 7], :3])
    # The ray through a pixel's center meets a point there, and our projection of the point is that center.
    rays = outputs.cameras.generate_rays(camera_indices=0)
    point = (rays.origins + 2 * rays.directions)[20, 30]
    pixel = project(point[None], orbit(12)[2], lens)[0]
    torch.testing.assert_close(pixel, torch.tensor([30.5, 20.5]), atol=1e-3, rtol=0)


def test_a_crash_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def crash(image: Tensor, path: Path) -> None:
        written.append(path)
        raise OSError("disk full")

    monkeypatch.setattr(procedural_scene, "write_image", crash)
    with pytest.raises(OSError, match="disk full"):
        write_scene(tmp_path / "scene", num_views=2, size=(16, 12))
    assert written
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_filled_and_a_full_one_refused(tmp_path: Path) -> None:
    write_scene(tmp_path / "new", num_views=2, size=(16, 12))
    (tmp_path / "empty").mkdir()
    write_scene(tmp_path / "empty", num_views=2, size=(16, 12))
    with pytest.raises(FileExistsError, match="new or an empty folder"):
        write_scene(tmp_path / "empty", num_views=2, size=(16, 12))


def test_too_few_views(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_views must be at least 2"):
        write_scene(tmp_path / "scene", num_views=1)
