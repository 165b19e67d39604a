"""Local edits of a scene: which pixels change, and that no other does."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from nerfstudio.utils.eval_utils import eval_setup

from csd_2d.io.images import read_image, write_image
from csd_2d.priors.analytic import AnalyticPrior
from csd_nerf.edit.masks import mask_files, masks_of_solid
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
