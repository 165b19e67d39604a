"""What an edit leaves beside nerfstudio's files, what it says when it cannot go on, and edits of edited scenes."""

import copy
import json

import pytest
import torch
import yaml
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.utils.eval_utils import eval_setup

from csd_2d import EditConfig, load_preset
from csd_2d.io.images import read_image
from csd_2d.io.video import read_clip
from csd_2d.metrics.fidelity import change
from csd_2d.priors.analytic import AnalyticPrior
from csd_nerf.artifacts import SHOWN, camera_path, results
from csd_nerf.cost import Cost
from csd_nerf.edit import rounds
from csd_nerf.methods import csd_edit
from csd_nerf.models import SceneModel
from csd_nerf.pipeline import CsdEditPipelineConfig, memory_advice
from csd_nerf.trainer import EditTrainer
from csd_nerf.views.nerfacto import NerfactoViews
from tests.csd_nerf.test_training import QUICK, checkpoint, edit_in_process, failing


@pytest.fixture(scope="module")
def edit_run(scene_run, tmp_path_factory):
    return edit_in_process(tmp_path_factory.mktemp("edit"), load_run=scene_run, pipeline__film_frames=7)


def views_of(run):
    return NerfactoViews(eval_setup(run / "config.yml")[1])


def test_pictures_show_the_source_and_the_scene_before_and_after(edit_run, scene_run, num_views):
    views, unedited = views_of(edit_run), views_of(scene_run)
    paths = sorted((edit_run / "before_after").iterdir())
    assert len(paths) == min(SHOWN, num_views)
    for path in paths:
        source, before, after = read_image(path).chunk(3, dim=-1)
        index = int(path.stem[:4])
        torch.testing.assert_close(source, views.original(index), atol=0.51 / 255, rtol=0)
        torch.testing.assert_close(before, unedited.render(index), atol=0.51 / 255, rtol=0)
        torch.testing.assert_close(after, views.render(index), atol=0.51 / 255, rtol=0)


def test_the_film_shows_both_scenes(edit_run, scene_run):
    frames = list(read_clip(edit_run / "turntable.mp4").frames)
    assert len(frames) == 7 and frames[0].shape == (3, 264, 2 * 352)  # views of 32x24 px, 11 times as large
    before, after = torch.stack(frames).chunk(2, dim=-1)
    dark = [torch.stack([views_of(run).render(i) for i in range(6)]).mean() for run in (scene_run, edit_run)]
    assert dark[1] < 0.9 * dark[0]
    assert after.mean() < 0.9 * before.mean()


def test_the_report_says_what_was_done_and_what_it_took(edit_run, scene_run):
    report = json.loads((edit_run / "edit.json").read_text())
    assert report["prompt"] == "make it night" and report["history"] == ["make it night"]
    assert report["settings"]["edit"]["steps"] == QUICK.steps and report["settings"]["prior"] == "analytic"
    assert report["steps"] == 6 and report["seed"] == 42
    assert len(report["costs"]["rounds"]) == 2
    costs = [*report["costs"]["rounds"], report["costs"]["training"], report["costs"]["artifacts"]]
    assert all(cost["seconds"] > 0 and cost["peak_memory_mb"] > 50 for cost in costs)
    before, after = ([views_of(run).render(i) for i in range(len(views_of(run)))] for run in (scene_run, edit_run))
    if len(before) <= SHOWN:
        assert report["change"] == pytest.approx(change(before, after, None), abs=1e-3)


def test_writing_them_leaves_the_edited_scene(edit_run):
    views = views_of(edit_run)
    pair = sorted((edit_run / "before_after").iterdir())[0]
    shown = read_image(pair).chunk(3, dim=-1)[2]
    assert (shown - views.render(int(pair.stem[:4]))).abs().max() < 1 / 255


@pytest.mark.parametrize("source", [None, "original"])
def test_edits_add_up(edit_run, scene_run, tmp_path, source):
    """A second edit is, by default, of what the first one left; and no view pulls the scene back to the original."""
    again = edit_in_process(tmp_path, 1, load_run=edit_run, pipeline__prompt="make it sepia", pipeline__source=source)
    settings = yaml.load((again / "config.yml").read_text(), Loader=yaml.Loader).pipeline
    assert settings.source == (source or "current")
    assert json.loads((again / "edit.json").read_text())["history"] == ["make it night", "make it sepia"]
    first = views_of(edit_run)
    for path in (again / "edited").iterdir():
        index = int(path.stem[:4])
        shown = first.original(index) if source else first.render(index)
        (sepia,) = AnalyticPrior().answers("make it sepia", shown[None])
        assert (read_image(path) - sepia[0]).abs().mean() < 0.02
    kept = sorted((again / "source").iterdir()) if not source else []
    assert bool(kept) == (not source)
    for index, path in enumerate(kept):
        torch.testing.assert_close(read_image(path), first.render(index), atol=0.51 / 255, rtol=0)


def test_a_run_of_the_data_is_conditioned_on_the_originals(edit_run):
    assert yaml.load((edit_run / "config.yml").read_text(), Loader=yaml.Loader).pipeline.source == "original"


def test_distill_says_what_it_takes_and_shows_the_edited_views(scene_run, tmp_path, num_views, capsys):
    run = edit_in_process(tmp_path, 2, load_run=scene_run, pipeline__mode="distill")
    assert "Distilling: 2 steps, up to" in " ".join(capsys.readouterr().out.split())
    paths = sorted((run / "edited").iterdir())
    assert len(paths) == num_views
    torch.testing.assert_close(read_image(paths[3]), views_of(run).render(3), atol=0.51 / 255, rtol=0)


def test_nothing_is_rendered_while_a_viewer_may_render(scene_run, tmp_path, monkeypatch):
    trainers, locked = [], []
    setup, render = EditTrainer.setup, SceneModel.get_outputs_for_camera_ray_bundle
    monkeypatch.setattr(EditTrainer, "setup", lambda self: trainers.append(self) or setup(self))

    def observed(self, rays):
        locked.append(trainers[0].train_lock.locked())
        return render(self, rays)

    monkeypatch.setattr(SceneModel, "get_outputs_for_camera_ray_bundle", observed)
    edit_in_process(tmp_path, 2, load_run=scene_run, pipeline__source="current")
    assert len(locked) > 20 and all(locked)


def test_a_scene_of_a_single_view_is_filmed(scene_run):
    cameras = views_of(scene_run).cameras[:1]
    path = camera_path(cameras, 5)
    assert len(path) == 5
    for pose in path.camera_to_worlds:
        torch.testing.assert_close(pose, cameras.camera_to_worlds[0].to(pose), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(40, 40), (41, 30)])
def test_a_film_has_the_size_of_the_cameras_wherever_their_principal_point_is(size, scene_run):
    cameras = copy.deepcopy(views_of(scene_run).cameras)
    cameras.width[:], cameras.height[:], cameras.cx[:], cameras.cy[:] = *size, 23.7, 12.2
    path = camera_path(cameras, 5)
    assert {*path.width.flatten().tolist()} == {size[0] // 2 * 2} and {*path.height.flatten().tolist()} == {size[1]}
    torch.testing.assert_close(path.cx, torch.full_like(path.cx, 23.7))


def test_what_a_run_says_is_short_and_ends_with_its_results(scene_run, tmp_path, capsys):
    run = edit_in_process(tmp_path, 6, load_run=scene_run)
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert len(lines) < 30 and "\x1b" not in said
    assert lines[0].startswith("Editing the scene of ") and str(run) in lines[0]
    end = lines[next(i for i, line in enumerate(lines) if line.startswith("Done. Results in")) :]
    shown = [*results(run)]
    assert [line.split()[0] for line in end[1 : 1 + len(shown)]] == shown
    assert shown == ["before_after", "edited", "turntable.mp4", "edit.json"]
    assert all((run / name).exists() for name in results(run))
    assert f"ns-viewer --load-config {run / 'config.yml'}" in said
    assert "Making pictures of it before and after, a film of 2 frames …" in said


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_counts_its_own_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    cost = Cost()
    with cost.counted(torch.device("cpu")):
        pass
    assert cost.peak_memory_mb > 50


def test_change_outside_a_solid_is_measured_and_its_masks_are_kept(scene_run, tmp_path, num_views):
    views = views_of(scene_run)
    center = views.surface(0)[:, 12, 16].tolist()
    run = edit_in_process(
        tmp_path, 20, load_run=scene_run, pipeline__sphere=(*center, 0.5), pipeline__feather=1.0,
        pipeline__steps_per_round=20, pipeline__views_per_round=0,
    )  # fmt: skip
    measured = json.loads((run / "edit.json").read_text())["change"]
    masks = [read_image(path)[:1] for path in sorted((run / "masks").iterdir())]
    assert len(masks) == num_views
    if num_views <= SHOWN:
        after = views_of(run)
        pictures = ([v.render(i) for i in range(num_views)] for v in (views, after))
        assert measured == pytest.approx(change(*pictures, masks), rel=0.02, abs=1e-3)


def test_a_scene_that_is_not_finite_stops_the_run_and_is_not_saved(scene_run, tmp_path):
    wild = {
        group: {"optimizer": AdamOptimizerConfig(lr=lr), "scheduler": None}
        for group, lr in (("fields", 1e30), ("proposal_networks", 1e-3))
    }
    with pytest.raises(SystemExit) as end:
        edit_in_process(tmp_path, 6, load_run=scene_run, optimizers=wild, steps_per_save=1, timestamp="wild")
    assert "is not finite" in str(end.value.code) and "learning rates" in str(end.value.code)
    for path in tmp_path.glob("*/*/wild/nerfstudio_models/*.ckpt"):
        state = torch.load(path, weights_only=True)["pipeline"]
        assert all(tensor.isfinite().all() for tensor in state.values())


def test_running_out_of_memory_says_what_takes_less(scene_run, tmp_path, monkeypatch):
    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rounds, "edit_images", no_memory)  # there is no GPU to fill
    message = failing(tmp_path, load_run=scene_run)
    assert "out of GPU memory; --pipeline.micro-batch 4 takes 50% off" in message and "--pipeline.offload" in message
    thrifty = CsdEditPipelineConfig(datamanager=csd_edit.config.pipeline.datamanager, micro_batch=1, offload=True)
    assert memory_advice(thrifty).startswith("--pipeline.datamanager.train-num-rays-per-batch 2048 halves")


OWN_PRESET = "{steps: 60, scene: {views_per_round: 16, steps_per_round: 2000, max_num_iterations: 30000}}"


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("own.yaml", {"views_per_round": 16, "steps_per_round": 2000, "edit": EditConfig(steps=60)}),
        ("paper", {"views_per_round": 16, "steps_per_round": 2000, "edit": load_preset("paper")}),
        ("low-memory", {"micro_batch": 1, "offload": True, "views_per_round": 0, "edit": EditConfig()}),
    ],
)
def test_presets_of_scenes(preset, expected, scene_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(OWN_PRESET)
    config = csd_edit.config
    config = type(config)(**{**vars(config), "load_run": scene_run, "prompt": "make it night"})
    config.pipeline = CsdEditPipelineConfig(**{**vars(config.pipeline), "preset": preset, "prior": "analytic"})
    config.settle()
    assert {name: getattr(config.pipeline, name) for name in expected} == expected
    steps = 3000 if preset == "low-memory" else 30000
    assert config.max_num_iterations == steps
    assert all(optimizer["scheduler"].max_steps == steps for optimizer in config.optimizers.values())
    assert csd_edit.config.optimizers["fields"]["scheduler"].max_steps == 3000


@pytest.mark.parametrize(("mode", "steps"), [("distill", 250), ("dataset-update", 1000)])
def test_slow_steps_are_saved_more_often(mode, steps, scene_run):
    config = copy.deepcopy(csd_edit.config)
    config.load_run, config.pipeline.mode = scene_run, mode  # type: ignore[attr-defined]
    config.pipeline.prompt, config.pipeline.prior = "make it night", "analytic"  # type: ignore[attr-defined]
    config.settle()  # type: ignore[attr-defined]
    assert config.steps_per_save == steps


def test_presets_of_scenes_that_cannot_be(scene_run, tmp_path):
    for settings, message in {
        "{scene: {nothing: 1}}": "cannot be used",
        "{scene: {micro_batch: 0}}": "micro_batch must be at least 1",
        "{scene: 7}": "scene must hold settings, got 7",
    }.items():
        path = tmp_path / "own.yaml"
        path.write_text(settings)
        assert message in failing(tmp_path, load_run=scene_run, pipeline__preset=str(path))


def test_the_last_checkpoint_is_the_edited_scene(edit_run):
    assert checkpoint(edit_run)["step"] == 5
