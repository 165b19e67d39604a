"""Runs that are killed and go on: bit for bit what they would have been."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from csd_2d import EditConfig
from csd_nerf.artifacts import Artifacts
from csd_nerf.edit.resume import latest_whole_checkpoint, random_state, set_random_state
from tests.csd_nerf.conftest import train_in_process
from tests.csd_nerf.kill_run import go_on, run_and_die
from tests.forked import Forked


class Killed(BaseException):
    pass


def killed(*_, **__):
    raise Killed


def options(scene_run: Path, mode: str) -> dict:
    return {
        "load_run": scene_run,
        "steps_per_save": 2,
        "pipeline__mode": mode,
        "pipeline__prompt": "make it night",
        "pipeline__prior": "analytic",
        "pipeline__edit": EditConfig(steps=4, batch=2),
        "pipeline__steps_per_round": 3,
        "pipeline__views_per_round": 3,
        "pipeline__film_frames": 2,
    }


def in_child(die_at: int | None, output: Path, settings: dict) -> list[str]:
    """The names of the events; none if the run was killed."""
    events = output / "events"
    output.mkdir(parents=True)
    child = Forked(run_and_die, die_at, output, events, settings)
    assert child.ended() == (0 if die_at is None else -9), child.errors
    return json.loads(events.read_text()) if die_at is None else []


def run_folder(output: Path) -> Path:
    (folder,) = output.glob("*/csd-edit-tiny/killed")
    return folder


def resume(run: Path, **settings) -> Path:
    return train_in_process("csd-edit-tiny", run / "nowhere", 1, resume=run / "config.yml", **settings)


def result(run: Path) -> tuple[dict, dict]:
    """The last checkpoint; pictures, film and report."""
    state = torch.load(run / "nerfstudio_models" / "step-000000007.ckpt", weights_only=True)
    shown = [path for path in sorted(run.rglob("*")) if path.suffix in (".png", ".mp4")]
    report = json.loads((run / "edit.json").read_text())
    files = {"edit.json": {name: report[name] for name in ("prompt", "history", "steps", "change", "settings")}}
    files["names"] = sorted(path.name for path in run.iterdir() if not path.name.startswith("events."))
    return state, files | {str(path.relative_to(run)): path.read_bytes() for path in shown}


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_a_run_that_was_killed_after_its_last_step_writes_its_artifacts(scene_run, tmp_path, monkeypatch):
    from nerfstudio.utils import writer  # circular imports: not before nerfstudio's trainer

    monkeypatch.setattr(Artifacts, "write", killed)
    settings = options(scene_run, "dataset-update") | {"pipeline__film_frames": 2}
    with pytest.raises(Killed):
        train_in_process("csd-edit-tiny", tmp_path, 4, timestamp="killed", **settings)
    run = run_folder(tmp_path)
    assert not (run / "edit.json").exists()
    monkeypatch.undo()
    monkeypatch.delitem(writer.GLOBAL_BUFFER, "step")  # a process of its own has trained nothing yet
    resume(run)
    assert {"edit.json", "turntable.mp4", "before_after"} <= {path.name for path in run.iterdir()}


def test_a_run_that_ended_can_be_resumed(scene_run, tmp_path):
    """In a process that has trained nothing, where nerfstudio knows no last step."""
    run = train_in_process("csd-edit-tiny", tmp_path, 2, timestamp="killed", **options(scene_run, "dataset-update"))
    before = (run / "turntable.mp4").read_bytes()
    (run / "turntable.mp4").unlink()
    child = Forked(go_on, run)
    assert child.ended() == 0, child.errors
    assert (run / "turntable.mp4").read_bytes() == before


# Beside what all runs do, one makes pictures before its first step, the other measures novel views after its last.
MODES = {
    "dataset-update": {"pipeline__source": "current", "pipeline__box": (-999.0,) * 3 + (999.0,) * 3},
    "distill": {"pipeline__report": True},
}


@pytest.mark.parametrize(("mode", "every"), [("dataset-update", 1), ("distill", 4)])
def test_a_killed_run_ends_as_if_it_had_not_been(mode, every, scene_run, tmp_path):
    """Killed in each stage, and resumed, in processes of their own."""
    settings = options(scene_run, mode) | MODES[mode]
    events = in_child(None, tmp_path / "whole", settings)
    state, files = result(run_folder(tmp_path / "whole"))
    stages = sorted({*events}, key=events.index)
    assert {"edit.json", "before_after", "turntable.mp4", "edited", "step.ckpt"} <= {*stages}
    for stage in stages[::every]:
        output = tmp_path / stage.replace(" ", "_")
        # The middle one: what was finished, begun and not begun yet.
        points = [number for number, name in enumerate(events) if name == stage]
        in_child(points[len(points) // 2], output, settings)
        run = run_folder(output)
        # nerfstudio takes the rest of each name for a step's number.
        assert all(path.name.startswith("step-") for path in run.glob("nerfstudio_models/*")), stage
        child = Forked(go_on, run)
        assert child.ended() == 0, (stage, child.errors)
        assert not (run / "nowhere").exists()
        resumed, resumed_files = result(run)
        assert same(state, resumed), stage
        assert files == resumed_files, stage
        assert not list(run.glob("**/.*")) and not list(run.glob("**/*.part"))


@pytest.fixture
def interrupted(scene_run, tmp_path) -> Path:
    """A run of which six of eight steps are done."""
    output = tmp_path / "out"
    train_in_process("csd-edit-tiny", output, 6, timestamp="killed", **options(scene_run, "dataset-update"))
    path = run_folder(output) / "config.yml"
    path.write_text(path.read_text().replace("max_num_iterations: 6", "max_num_iterations: 8"))
    return path.parent


def test_what_is_cut_short_is_passed_over(interrupted, capsys):
    folder = interrupted / "nerfstudio_models"
    paths = sorted(folder.glob("*.ckpt"))
    assert [path.stem for path in paths] == ["step-000000004", "step-000000005"]
    paths[1].write_bytes(paths[1].read_bytes()[:-1000])
    resume(interrupted)
    said = " ".join(capsys.readouterr().out.split())
    assert "step-000000005.ckpt is not whole; going on from what was saved before it." in said
    assert "Going on after step 5 of 8" in said
    assert latest_whole_checkpoint(folder)[0]["step"] == 7  # type: ignore[index]


def test_a_checkpoint_without_its_other_half_is_not_whole(interrupted):
    folder = interrupted / "nerfstudio_models"
    (folder / "step-000000005.rest").unlink()
    assert latest_whole_checkpoint(folder)[0]["step"] == 4  # type: ignore[index]


def failing(run: Path, **settings) -> str:
    with pytest.raises(SystemExit) as end:
        resume(run, **settings)
    return str(end.value.code)


def test_data_that_changed_are_refused(interrupted, scene_data, tmp_path):
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    (data / "transforms.json").write_text((scene_data / "transforms.json").read_text())
    for path in (scene_data / "images").iterdir():
        (data / "images" / path.name).write_bytes(path.read_bytes() + b" ")
    message = failing(interrupted, pipeline__datamanager__data=data)
    assert "the data or the settings have changed since" in message


def test_a_missing_round_is_named(interrupted):
    (interrupted / "rounds" / "001").rename(interrupted / "rounds" / "gone")
    assert "001 is missing, but the scene was trained on it already" in failing(interrupted)


def test_what_cannot_be_resumed(interrupted, scene_run, tmp_path):
    assert "no run at --resume" in failing(tmp_path / "nothing")
    assert "is a run of 'csd-scene-tiny', not of csd-edit-tiny" in failing(scene_run)
    with pytest.raises(SystemExit, match=r"there is a run in .*killed; to go on with it set --resume"):
        train_in_process(
            "csd-edit-tiny", tmp_path / "out", 1, timestamp="killed", **options(scene_run, "dataset-update")
        )


def test_a_run_that_was_moved_is_resumed_where_it_lies(interrupted, tmp_path):
    moved = tmp_path / "other" / "scene" / "csd-edit-tiny" / "killed"
    moved.parent.mkdir(parents=True)
    interrupted.rename(moved)
    assert resume(moved, pipeline__micro_batch=2) == moved
    assert (moved / "nerfstudio_models" / "step-000000007.ckpt").is_file()


def test_a_source_that_was_moved_is_missed_at_once_and_can_be_given(interrupted, scene_run, tmp_path):
    path = interrupted / "config.yml"
    scene = yaml.load(path.read_text(), Loader=yaml.Loader).load_checkpoint
    path.write_text(path.read_text().replace(scene.name, "gone.ckpt"))
    assert re.search(r"is not at /.*gone.ckpt any more; set --load-checkpoint", failing(interrupted))
    run = resume(interrupted, load_checkpoint=scene)
    assert json.loads((run / "edit.json").read_text())["scene"] == str(scene)


def test_a_scene_given_from_here_is_found_from_elsewhere(scene_run, scene_data, tmp_path, monkeypatch):
    (scene,) = scene_run.glob("nerfstudio_models/*.ckpt")
    monkeypatch.chdir(scene.parent)
    settings = options(scene_run, "dataset-update") | {"load_run": None, "load_checkpoint": Path(scene.name)}
    run = train_in_process("csd-edit-tiny", tmp_path, 1, pipeline__datamanager__data=scene_data, **settings)
    assert yaml.load((run / "config.yml").read_text(), Loader=yaml.Loader).load_checkpoint == scene


def test_nothing_in_the_config_is_executed(interrupted, tmp_path):
    path = interrupted / "config.yml"
    config = path.read_text()
    trap = f"experiment_name: !!python/object/apply:os.mkdir ['{tmp_path / 'trap'}']"
    path.write_text(re.sub("experiment_name: .*", trap, config))
    assert trap in path.read_text()
    resume(interrupted)
    assert not (tmp_path / "trap").exists()
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(path.read_text())


def test_random_states_are_restored(tmp_path):
    torch.save(random_state(), tmp_path / "state")
    draws = [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()]
    set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()] == draws
