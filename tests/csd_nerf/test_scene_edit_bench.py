"""The benchmark of ways to edit a scene: what its methods cost, and that it goes on where it stopped."""

import json
from pathlib import Path

import pytest

from csd_2d import EditConfig
from csd_2d.io.images import read_image
from csd_nerf.methods import csd_edit_tiny
from tests.bench import scene_edit
from tests.bench.scene_edit import Results, edit_scene, image_steps, main, methods


def rows_an_image(name: str) -> int:
    """Count the rows of the analytic prior, whose guidance scales are 1: the text's, and of an image baseline one."""
    return 2 if name == "paper" else 1


@pytest.mark.parametrize("selection", [False, True])
def test_all_methods_cost_the_same(selection):
    edit = csd_edit_tiny.config.pipeline.edit  # type: ignore[attr-defined]
    compared = methods(20, 240, edit, selection).values()
    costs = [method.rounds * image_steps(method.edit, method.views_per_round or 20) for method in compared]
    assert all(abs(cost / image_steps(edit, 20) - 1) < 0.03 for cost in costs)


@pytest.mark.parametrize("name", ["one view at a time", "paper", "default", "distill"])
def test_the_cost_is_what_the_prior_is_asked_for(name, scene_run, num_views, tmp_path):
    method = methods(num_views, 8, EditConfig(steps=5, batch=4), selection=False)[name]
    _, cost = edit_scene(tmp_path, scene_run, "analytic", "paint it blue", method, 8, seed=0)
    planned = method.rounds * image_steps(method.edit, method.views_per_round or num_views)
    assert cost == {"unet_rows": rows_an_image(name) * planned, "nerf_steps": 5 if name == "distill" else 8}


def test_rows_are_measured_once(scene_run, num_views, tmp_path, monkeypatch):
    runs = tmp_path / "scene" / "runs" / "demo" / "csd-scene-tiny"
    runs.mkdir(parents=True)
    (runs / "learned").symlink_to(scene_run)
    output = tmp_path / "results.json"

    def run() -> list[dict]:
        main(tmp_path / "scene", output, only=("one by one",), seeds=1, nerf_steps=4)
        return json.loads(output.read_text())["rows"]

    rows = run()
    assert [row["prompt"] for row in rows] == ["paint it blue", "paint it a new color"]
    assert rows[0]["agreement"] is None and 0 < rows[1]["agreement"] <= 1
    # Exact scores; six images, each for itself, do not take the same of six answers but once in 7,776 times.
    assert 1 / num_views <= rows[1]["agreement_training"] < 1
    for row in rows:
        # The squared error is that of the colors and that of the gray, which clipping changes a little.
        parts = sum(10 ** (-row[part] / 10) for part in ("color_psnr", "gray_psnr"))
        assert parts == pytest.approx(10 ** (-row["psnr"] / 10), rel=0.1)
    assert read_image(output.with_suffix("") / "paint_it_blue_one_by_one.png").shape[0] == 3

    monkeypatch.setattr(scene_edit, "train", lambda config: pytest.fail("measured again"))
    assert run() == rows


def test_results_of_other_settings_are_refused(tmp_path: Path):
    path = tmp_path / "results.json"
    Results(path, {"prior": "analytic"}).add({"method": "default", "seed": 0})
    again = Results(path, {"prior": "analytic"})
    assert again.holds(seed=0, method="default") and not again.holds(seed=1, method="default")
    with pytest.raises(ValueError, match="holds results of other settings"):
        Results(path, {"prior": "tiny"})
