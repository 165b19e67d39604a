"""Runs that are steered while they run, repeated and resumed."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from csd_2d import EditConfig
from csd_nerf.edit.steering import Change, Settings, Steering, read_changes
from csd_nerf.pipeline import CsdEditPipeline
from tests.csd_nerf.conftest import train_in_process
from tests.csd_nerf.test_resume import in_child, options, result, resume, run_folder, same


def steering(**options) -> Steering:
    return Steering(Settings("make it night", EditConfig()), **options)


def test_a_change_takes_effect_at_the_next_point_and_is_written_before(tmp_path):
    steered = steering()
    steered.record(tmp_path / "edit.json")
    assert not (tmp_path / "edit.json").exists()
    steered.ask("guidance_scale", 5.0)
    steered.ask("pause")
    assert steered.settings.edit.guidance_scale is None and steered.waiting == ["guidance_scale", "pause"]
    steered.take_over(3, 7)
    assert steered.settings.edit.guidance_scale == 5.0 and not steered.waiting
    assert read_changes(tmp_path / "edit.json") == [Change("guidance_scale", 5.0, 3, 7), Change("pause", None, 3, 7)]
    assert steered.ends_round and steered.next_action() == "pause" and not steered.ends_round


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("prompt", " ", "prompt is empty"),
        ("prompt", 3, "prompt must be a text"),
        ("guidance_scale", -1.0, "guidance_scale must be from 0 to 1000, got -1"),
        ("guidance_scale", float("nan"), "guidance_scale must be from 0"),
        ("steps", 0, "steps must be a whole number from 1"),
        ("lr", "x", "lr must be a number from"),
        ("mixing", "all", "mixing must be one of consensus, svgd, none"),
        ("views_per_round", -1, "views_per_round must be a whole number from 0"),
        ("colour", 1, "colour cannot be changed in this run"),
    ],
)
def test_a_bad_value_is_refused_and_the_old_one_kept(name, value, reason):
    steered = steering()
    with pytest.raises(ValueError, match=reason):
        steered.ask(name, value)
    assert steered.take_over(0) == [] and steered.settings == steering().settings


def test_a_prompt_that_the_model_cannot_follow_is_refused():
    def check(prompt):
        raise ValueError("unknown words")

    with pytest.raises(ValueError, match="unknown words"):
        steering(check_prompt=check).ask("prompt", "make it better")


def test_what_is_as_it_was_is_no_change():
    steered = steering()
    steered.ask("steps", 30)
    assert not steered.waiting


def test_refusals_say_why_and_end():
    steered = steering()
    steered.refuse("undo", "there was no round yet.")
    with pytest.raises(ValueError, match="no round yet"):
        steered.ask("undo")
    steered.refuse("undo", None)
    steered.ask("undo")
    steered.refuse_all("the run is over.")
    with pytest.raises(ValueError, match="over"):
        steered.ask("prompt", "make it snowy")


def test_recorded_changes_come_back_at_their_points_among_new_ones(tmp_path):
    old = [Change("prompt", "make it snowy", 2, 5), Change("undo", None, 4), Change("stop", None, 9)]
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"changes": [vars(change) for change in old]}))
    steered = steering()
    steered.record(tmp_path / "edit.json", replay=path)
    assert read_changes(tmp_path / "edit.json") == old
    assert steered.take_over(2) == [] and steered.take_over(2, 4) == []
    steered.ask("steps", 12)
    assert steered.take_over(2, float("inf")) == old[:1] and steered.waiting == ["steps"]
    assert steered.take_over(3) == [Change("steps", 12, 3)]
    assert steered.take_over(4) == old[1:2]
    steered.ask("stop")
    steered.take_over(5)
    assert [change.name for change in read_changes(tmp_path / "edit.json")] == ["prompt", "steps", "undo", "stop"]


def test_a_stop_is_over_once_the_report_is_written(tmp_path):
    changes = [vars(Change(name, None, 4)) for name in ("pause", "stop")]
    for report, left in (({}, ["pause", "stop"]), ({"history": []}, ["pause"])):
        (tmp_path / "edit.json").write_text(json.dumps({"changes": changes} | report))
        steered = steering()
        steered.record(tmp_path / "edit.json")
        assert [change.name for change in read_changes(tmp_path / "edit.json")] == left
    steered = steering()
    steered.record(tmp_path / "another.json", replay=written(tmp_path / "old.json", *(Change("stop", None, 4),)))
    assert [change.name for change in steered.changes] == ["stop"]


@pytest.mark.parametrize("content", ["", "[]", '{"changes": [{"name": "prompt"}]}', '{"history": []}'])
def test_what_is_no_edit_json_is_refused(content, tmp_path):
    (tmp_path / "edit.json").write_text(content)
    with pytest.raises(ValueError, match=r"edit.json is no edit.json of a run"):
        read_changes(str(tmp_path / "edit.json"))
    with pytest.raises(FileNotFoundError, match=r"no edit.json to replay"):
        read_changes(tmp_path / "nothing.json")


def written(path: Path, *changes: Change) -> Path:
    path.write_text(json.dumps({"changes": [vars(change) for change in changes]}))
    return path


EVERYTHING = (
    Change("views_per_round", 2, 0),
    Change("guidance_scale", 0.8, 0, 1),
    Change("prompt", "make it snowy", 0, 2),
    Change("lr", 0.3, 0, 2),
    Change("pause", None, 0, 3),  # in the middle of the first round, whose rest runs before step 2
    Change("resume", None, 2),
    Change("steps", 3, 3),
    Change("edit_now", None, 4),
    Change("undo", None, 5),
    Change("mixing", "svgd", 5),
    Change("edit_now", None, 6),
    Change("undo", None, 6, 1),  # gives it up
    Change("edit_now", None, 7),
)


@pytest.mark.parametrize(
    "last", [(), (Change("reset", None, 7, 1),)], ids=["edited to the end", "reset in the last round"]
)
def test_a_steered_run_that_is_killed_ends_as_if_it_had_not_been(last, scene_run, tmp_path):
    changes = written(tmp_path / "changes.json", *EVERYTHING, *last)
    settings = options(scene_run, "dataset-update") | {"pipeline__replay": changes}
    events = len(in_child(None, tmp_path / "whole", settings))
    whole = run_folder(tmp_path / "whole")
    state, pictures = result(whole)
    rounds = sorted(path.name for path in (whole / "rounds").iterdir())
    assert rounds == (["000", "001", "002", "004"] if not last else ["000", "001", "002"])
    assert bool(list(whole.glob("edited/*"))) == (not last)
    points = 3 if last else 6
    for point in range(points):
        output = tmp_path / str(point)
        in_child(point * (events - 1) // points, output, settings)
        run = resume(run_folder(output))
        resumed, resumed_pictures = result(run)
        assert same(state, resumed), point
        assert pictures == resumed_pictures, point
        assert json.loads((run / "edit.json").read_text())["changes"] == json.loads(changes.read_text())["changes"]
        assert not list(run.glob("**/.*")) and not list(run.glob("**/*.part"))


def test_a_distilled_run_that_is_steered_and_killed_ends_as_if_it_had_not_been(scene_run, tmp_path):
    changes = [Change("prompt", "make it snowy", 2), Change("guidance_scale", 2.0, 3), Change("reset", None, 5)]
    settings = options(scene_run, "distill")
    settings |= {"pipeline__replay": written(tmp_path / "changes.json", *changes)}
    events = len(in_child(None, tmp_path / "whole", settings))
    state, _ = result(run_folder(tmp_path / "whole"))
    for point in range(2):
        output = tmp_path / str(point)
        in_child((point + 1) * (events - 1) // 3, output, settings)
        assert same(state, result(resume(run_folder(output)))[0]), point


def test_distill_refuses_what_belongs_to_rounds(scene_run, tmp_path):
    settings = options(scene_run, "distill")
    settings |= {"pipeline__replay": written(tmp_path / "changes.json", Change("edit_now", None, 2))}
    with pytest.raises(SystemExit, match="edit now cannot be changed in this run"):
        train_in_process("csd-edit-tiny", tmp_path, 4, **settings)


@pytest.fixture
def steered_by_hand(scene_run, tmp_path, monkeypatch) -> Path:
    """A run in which, as by somebody at a viewer, things are asked for at the wrong and the right moment."""
    asked = {1: [("prompt", "make it snowy"), ("edit_now", None)], 3: [("undo", None)], 4: [("stop", None)]}
    step_of = CsdEditPipeline.get_train_loss_dict

    def at_the_viewer(self: CsdEditPipeline, step: int):
        for change in asked.get(step, []):
            self.steering.ask(*change)
        return step_of(self, step)

    monkeypatch.setattr(CsdEditPipeline, "get_train_loss_dict", at_the_viewer)
    settings = options(scene_run, "dataset-update") | {"pipeline__steps_per_round": 100, "steps_per_save": 100}
    run = train_in_process("csd-edit-tiny", tmp_path, 8, timestamp="by hand", **settings)
    monkeypatch.undo()
    return run


def test_a_run_steered_by_hand_is_repeated_by_one_option(steered_by_hand, tmp_path):
    report = json.loads((steered_by_hand / "edit.json").read_text())
    assert [(change["name"], change["training_step"]) for change in report["changes"]] == [
        ("prompt", 2),
        ("edit_now", 2),
        ("undo", 4),
        ("stop", 5),
    ]
    assert report["history"] == ["make it night", "make it snowy"]
    replayed = train_in_process(
        "csd-edit-tiny", tmp_path / "replayed", 450, pipeline__replay=steered_by_hand / "edit.json", timestamp="again"
    )
    assert replayed != steered_by_hand and replayed.name == "again"
    assert json.loads((replayed / "edit.json").read_text())["changes"] == report["changes"]
    ours, theirs = (
        {path.relative_to(run): path.read_bytes() for path in run.glob("*/**/*.png")}
        for run in (steered_by_hand, replayed)
    )
    assert ours == theirs and len(ours) > 6
    checkpoint = "nerfstudio_models/step-000000005.ckpt"
    states = [torch.load(run / checkpoint, weights_only=True)["pipeline"] for run in (steered_by_hand, replayed)]
    assert same(*states)


def test_a_run_that_was_stopped_can_go_on(steered_by_hand):
    """But not before what is written at its end is there: the kill may have come in between."""
    path = steered_by_hand / "config.yml"
    assert "max_num_iterations: 8" in path.read_text()
    report = json.loads((steered_by_hand / "edit.json").read_text())
    assert report["steps"] == 6 and (steered_by_hand / "rounds" / "001" / "scene_before.ckpt").is_file()

    (steered_by_hand / "edit.json").write_text(json.dumps({"changes": report["changes"]}))
    shutil.rmtree(steered_by_hand / "before_after")
    resume(steered_by_hand)
    again = json.loads((steered_by_hand / "edit.json").read_text())
    assert again["changes"] == report["changes"] and again["steps"] == 6
    assert list(steered_by_hand.glob("before_after/*"))

    resume(steered_by_hand)
    assert (steered_by_hand / "nerfstudio_models" / "step-000000007.ckpt").is_file()
    finished = json.loads((steered_by_hand / "edit.json").read_text())
    assert finished["changes"] == report["changes"][:-1] and finished["steps"] == 8
    assert not list(steered_by_hand.glob("rounds/*/scene_before.ckpt"))


def test_reset_brings_back_the_scene_bit_for_bit(scene_run, tmp_path):
    settings = options(scene_run, "dataset-update")
    settings |= {
        "pipeline__replay": written(tmp_path / "changes.json", Change("reset", None, 2), Change("stop", None, 2))
    }
    seen = {}
    restore = CsdEditPipeline._restore_scene

    def watched(self, state):
        restore(self, state)
        seen.update({name: tensor.clone() for name, tensor in self.state_dict().items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CsdEditPipeline, "_restore_scene", watched)
        run = train_in_process("csd-edit-tiny", tmp_path / "out", 8, **settings)
    (scene,) = scene_run.glob("nerfstudio_models/*.ckpt")
    original = torch.load(scene, weights_only=True)["pipeline"]
    assert all(torch.equal(seen[name], original[name]) for name in original if "lpips" not in name)
    assert not list(run.glob("edited/*")) and (run / "nerfstudio_models" / "step-000000002.ckpt").is_file()
