"""Scenes are measured on novel views: `csd eval` of two runs, the report of a run, studies of scenes."""

import json
import os

import pytest
import torch
from nerfstudio.utils.eval_utils import eval_setup

from csd_2d.ablate import load_study, run_study
from csd_2d.evaluate import Learned, evaluate
from csd_2d.metrics.consistency import warp_error
from csd_nerf.evaluate import motions, novel_cameras, novel_views, see
from tests.csd_nerf.test_training import edit_in_process


@pytest.fixture(scope="module")
def edit_run(scene_run, tmp_path_factory):
    return edit_in_process(
        tmp_path_factory.mktemp("edit"), load_run=scene_run, pipeline__film_frames=0, pipeline__report=True
    )


@pytest.fixture(scope="module")
def scene(scene_run):
    return eval_setup(scene_run / "config.yml")[1]


def test_novel_views_are_not_in_the_training_set(scene):
    cameras = scene.datamanager.train_dataset.cameras
    for count in (1, 5, 24):
        path = novel_cameras(cameras, count)
        assert len(path) == count
        gaps = torch.cdist(path.camera_to_worlds[:, :, 3], cameras.camera_to_worlds[:, :, 3])
        assert gaps.min() > 1e-3
    assert len(novel_cameras(cameras[:1], 4)) == 4


def test_places_that_two_views_show_look_alike_along_the_scenes_depth(scene):
    """The surfaces of a wall in the scene are where the depth says: reprojected views agree better than still ones."""
    cameras = novel_cameras(scene.datamanager.train_dataset.cameras, 12)
    seen = see(scene.model, cameras, surfaces=True, progress="views")
    found = motions(seen.points, cameras)
    assert len(found) == 11
    flows, visible = (torch.stack(parts) for parts in zip(*found, strict=True))
    assert visible.mean() > 0.2
    moved = warp_error(torch.stack(seen.images), flows, visible)
    still = warp_error(torch.stack(seen.images), torch.zeros_like(flows), visible)
    assert moved < 0.8 * still


def test_an_edit_ends_with_its_report(edit_run):
    report = json.loads((edit_run / "report.json").read_text())
    rows = {row["name"]: row for row in report["metrics"]}
    assert report["kind"] == "scene" and report["title"] == "make it night"
    assert report["settings"]["settings"]["edit"]["steps"] == 60
    assert rows["change"]["value"] > 0.01 and rows["reprojection error"]["source"] > 0
    assert "csd eval SCENE/config.yml" in rows["CLIP consistency"]["missing"]
    assert "nothing is downloaded" in rows["LPIPS to the source"]["missing"]
    assert report["seconds"] < 60
    assert (edit_run / "report.html").stat().st_size > 10_000


def test_no_report_where_none_is_wanted(scene_run, tmp_path):
    run = edit_in_process(tmp_path, 1, load_run=scene_run, pipeline__report=False, pipeline__film_frames=0)
    assert (run / "edit.json").is_file() and not (run / "report.html").exists()


def test_two_runs_are_measured_on_one_path(scene_run, edit_run):
    subject = novel_views(scene_run, edit_run / "config.yml", 6, "cpu")
    evaluation = evaluate(subject, Learned(None, local_files_only=True))
    assert evaluation.images == 6 and evaluation.value("reprojection error") is not None
    changed = evaluation.value("change")
    assert changed is not None and changed > 0.01
    same = evaluate(novel_views(scene_run, scene_run, 2, "cpu"), Learned(None, local_files_only=True))
    assert same.value("change") == 0
    with pytest.raises(ValueError, match="at least 2 views"):
        novel_views(scene_run, edit_run, 1, "cpu")
    with pytest.raises(FileNotFoundError, match="no run at AFTER"):
        novel_views(scene_run, edit_run / "none", 2, "cpu")


def test_the_tiny_study_of_scenes(scene_run, tmp_path):
    os.symlink(scene_run, tmp_path / "scene")
    rows = run_study(load_study("paper-scene-tiny"), tmp_path / "out", data=tmp_path)
    assert [row["variant"] for row in rows] == ["full paper", "default"]
    assert all(row["figures"]["change"] > 0.005 and row["figures"]["reprojection error"] > 0 for row in rows)
    assert list((tmp_path / "out" / "pictures").glob("*.png"))
