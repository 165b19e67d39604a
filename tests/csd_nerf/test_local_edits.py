"""Local edits of a scene: which pixels change, and that no other does."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.utils.eval_utils import eval_setup

from csd_2d.io.images import read_image, write_image
from csd_2d.priors.analytic import AnalyticPrior
from csd_nerf.capture import parse
from csd_nerf.edit.masks import SCENE, Coordinates, mask_files, masks_of_solid
from csd_nerf.edit.place import RAYS, center_at, check_shown, data_coordinates, look
from csd_nerf.pipeline import CsdEditPipelineConfig
from csd_nerf.views.nerfacto import NerfactoViews
from tests.csd_nerf.test_training import edit_in_process, failing


@pytest.fixture(scope="module")
def views(scene_run):
    pipeline: Any = eval_setup(scene_run / "config.yml")[1]
    return NerfactoViews(pipeline)


def test_surfaces_lie_on_the_rays_at_the_rendered_depth(views):
    points = views.surface(2)
    camera = views.cameras[2:3].to("cpu")
    rays = camera.generate_rays(camera_indices=0, keep_shape=True)
    towards = points.permute(1, 2, 0) - rays.origins
    depth = views._model.get_outputs_for_camera(camera)["depth"]
    torch.testing.assert_close(towards.norm(dim=-1, keepdim=True), depth)
    torch.testing.assert_close(torch.nn.functional.normalize(towards, dim=-1), rays.directions)


def test_solids_hold_what_lies_in_them(views):
    points = torch.stack([views.surface(i) for i in range(len(views))])
    middle = points[0, :, 12, 16]
    distances = (points - middle[:, None, None]).square().sum(1).sqrt()
    radius = distances.median().item() * 1.01
    x, y, z = middle.tolist()
    ball = masks_of_solid(views, (x, y, z, radius), feather=0)
    expected = distances <= radius
    assert torch.equal(torch.stack(ball)[:, 0].bool(), expected) and expected.any() and not expected.all()
    with pytest.raises(ValueError, match="nothing that the views show lies in") as error:
        masks_of_solid(views, (100, 100, 100, 101, 101, 101), feather=0)
    ranges = re.findall(r"[xyz] (\S+) to (\S+),", str(error.value))
    for axis, (low, high) in zip(points.unbind(1), ranges, strict=True):
        assert (axis < float(low)).float().mean() == pytest.approx(0.05, abs=0.01)
        assert (axis > float(high)).float().mean() == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize("applied", [None, [[0, 1, 0, 2], [1, 0, 0, 0], [0, 0, -1, 5]]], ids=["plain", "turned"])
def test_coordinates_of_the_data_are_those_of_the_poses_in_transforms_json(applied, scene_data, tmp_path):
    meta = json.loads((scene_data / "transforms.json").read_text())
    poses = {Path(frame["file_path"]).name: torch.tensor(frame["transform_matrix"]) for frame in meta["frames"]}
    data = shutil.copytree(scene_data, tmp_path / "data")
    (data / "transforms.json").write_text(json.dumps(meta | ({"applied_transform": applied} if applied else {})))
    parser = NerfstudioDataParserConfig(data=data)  # turns, centers and scales
    outputs = parse(data, parser)
    coordinates = data_coordinates(outputs, parser)
    positions = coordinates(outputs.cameras.camera_to_worlds[..., 3].T).T
    expected = torch.stack([poses[path.name][:3, 3] for path in outputs.image_filenames])
    torch.testing.assert_close(positions, expected, atol=1e-4, rtol=1e-4)
    apart = (expected[0] - expected[1]).norm() / (outputs.cameras.camera_to_worlds[:2, :, 3].diff(dim=0)).norm()
    assert coordinates.scale == pytest.approx(float(apart), rel=1e-3)


def test_a_pixel_of_a_view_is_a_center(views):
    name = views.filename(2).name
    expected = views.surface(2)[:, 12, 20].tolist()
    for way in (name, Path(name).stem, views.name(2)):
        assert center_at(views, (way, 20, 12, 0.3)) == pytest.approx((*expected, 0.3))
    with pytest.raises(ValueError, match=r"pixel 32 0 is not in .*, which is 32x24 px"):
        center_at(views, (name, 32, 0, 1.0))
    with pytest.raises(ValueError, match=r"names no training view: 'sky.png'; expected one of frame_0000.png, "):
        center_at(views, ("sky.png", 0, 0, 1.0))


def test_a_look_takes_few_rays_and_finds_what_is_there(views):
    few = look(views, range(len(views)), 500)
    everything = torch.cat([views.surface(i).flatten(1) for i in range(len(views))], dim=1)
    assert 200 < few.points.shape[1] <= 600 < everything.shape[1]
    low, high = (torch.quantile(points, torch.tensor([0.05, 0.95]), dim=1) for points in (few.points, everything))
    torch.testing.assert_close(low, high, atol=0.2 * float((high[1] - high[0]).max()), rtol=0)
    points, refused = everything[:, ::97].T.tolist(), 0
    for point in points:  # hardly a surface is refused for lying between rays, where the depth jumps
        for solid in ((*point, 1e-3), (*point, *point)):
            try:
                check_shown(few, solid, SCENE)
            except ValueError:
                refused += 1
    assert refused <= 0.1 * 2 * len(points)


def test_a_sphere_where_nothing_is_fails_before_views_are_rendered_whole(scene_run, tmp_path, monkeypatch, num_views):
    pixels = []
    monkeypatch.setattr(NerfactoViews, "render", lambda *_: pytest.fail("a view is rendered"))
    surface = NerfactoViews.surface
    monkeypatch.setattr(NerfactoViews, "surface", lambda *args: pixels.append(args) or surface(*args))
    monkeypatch.setitem(RAYS, "cpu", 500)
    message = failing(
        tmp_path, load_run=scene_run, pipeline__sphere=(50.0, 50.0, 50.0, 0.1), pipeline__source="current"
    )
    assert (
        "nothing that the views show lies in sphere 50 50 50 0.1 of the scene as it was trained; most of it" in message
    )
    assert len(pixels) == num_views and all(every > 1 for *_, every in pixels)


def test_a_sphere_by_a_pixel_is_the_one_by_its_coordinates(scene_run, views, tmp_path, capsys):
    run = edit_in_process(
        tmp_path,
        1,
        load_run=scene_run,
        pipeline__sphere_at=(views.filename(1).name, 16, 12, 0.4),
        pipeline__feather=0.0,
    )
    masks = [read_image(path)[:1] for path in sorted((run / "masks").iterdir())]
    center = views.surface(1)[:, 12, 16].tolist()
    expected = masks_of_solid(views, (*center, 0.4), feather=0)
    assert all(map(torch.equal, masks, expected))
    said = capsys.readouterr().out
    assert re.search(r"The cameras look at x \S+ to \S+, y .*, z .* of the scene as it was trained", said)
    assert f"The sphere's center is {center[0]:.3g}" in said


def test_a_box_in_other_coordinates(views):
    turn = Coordinates("turned", torch.tensor([[0.0, 2.0, 0.0, 1.0], [2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]]))
    x, y, z = views.surface(0)[:, 12, 16].tolist()
    here = masks_of_solid(views, (x - 0.2, y - 0.3, z - 0.4, x + 0.2, y + 0.3, z + 0.4), feather=0)
    low, high = (2 * y - 0.6 + 1, 2 * x - 0.4, 2 * z - 0.8), (2 * y + 0.6 + 1, 2 * x + 0.4, 2 * z + 0.8)
    there = masks_of_solid(views, (*low, *high), feather=0, coordinates=turn)
    assert sum(float((a != b).sum()) for a, b in zip(here, there, strict=True)) <= 2  # at the border, rounded otherwise


def test_training_images_stay_outside_the_mask_and_are_edited_inside(scene_run, views, tmp_path):
    masks = tmp_path / "masks"
    for i in range(len(views)):
        mask = torch.zeros_like(views.original(i))
        mask[:, :12] = 1
        write_image(mask, masks / f"{views.filename(i).stem}.png")
    run = edit_in_process(tmp_path / "out", 1, load_run=scene_run, pipeline__masks=masks, pipeline__feather=0.0)
    edited = sorted((run / "edited").iterdir())
    assert edited
    for path in edited:
        original = views.original(int(path.stem[:4]))
        image = read_image(path)
        assert torch.equal(image[:, 12:], original[:, 12:])
        (night,) = AnalyticPrior().answers("make it night", original[None])
        assert (image - night[0])[:, :12].abs().mean() < 0.02


def test_views_that_do_not_show_what_is_edited_have_black_masks(scene_run, views, tmp_path):
    masks = tmp_path / "masks"
    for i in range(len(views)):
        write_image(torch.full_like(views.original(i), float(i == 2)), masks / f"{views.filename(i).stem}.png")
    run = edit_in_process(tmp_path / "out", 1, load_run=scene_run, pipeline__masks=masks, pipeline__views_per_round=0)
    for i, path in enumerate(sorted((run / "edited").iterdir())):
        assert torch.equal(read_image(path), views.original(i)) == (i != 2)
    (masks / f"{views.filename(2).stem}.png").write_bytes((masks / f"{views.filename(0).stem}.png").read_bytes())
    assert "all masks in" in failing(tmp_path / "black", load_run=scene_run, pipeline__masks=masks)


def test_masks_that_cannot_be_are_named(scene_run, views, tmp_path):
    (tmp_path / "masks").mkdir()
    message = failing(tmp_path, load_run=scene_run, pipeline__masks=tmp_path / "masks")
    assert "holds no mask for view" in message
    with pytest.raises(ValueError, match="box and sphere cannot be used together"):
        CsdEditPipelineConfig(box=(0, 0, 0, 1, 1, 1), sphere=(0, 0, 0, 1))
    with pytest.raises(ValueError, match="masks must be a folder"):
        CsdEditPipelineConfig(masks=tmp_path / "gone")


def touched(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [folder / name for name in names]


def test_masks_lie_as_images_do(tmp_path):
    images = touched(tmp_path / "images", "left/001.jpg", "right/001.jpg", "right/002.jpg")
    masks = touched(tmp_path / "nested", "left/001.png", "right/001.png", "right/002.jpg.png", "right/.001.png")
    assert mask_files(images, tmp_path / "nested") == masks[:3]
    touched(tmp_path / "flat", "001.png", "002.png")
    with pytest.raises(ValueError, match=r"001\.png has the name of two images, .*left/001\.jpg and .*right/001\.jpg"):
        mask_files(images, tmp_path / "flat")
    with pytest.raises(ValueError, match="holds no mask for view 001"):  # not that of the other camera
        mask_files(images, touched(tmp_path / "half", "right/001.png", "right/002.png")[0].parents[1])
    right = touched(tmp_path / "elsewhere", "masks/001.png", "masks/002.png")
    assert mask_files(images[1:], tmp_path / "elsewhere") == right  # names are unique
    touched(tmp_path / "elsewhere", "masks/001.webp")
    with pytest.raises(ValueError, match="could be the mask of"):
        mask_files(images[1:], tmp_path / "elsewhere")
