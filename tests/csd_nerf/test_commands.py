"""The commands as a user types them: pretrain, edit, render, evaluate."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from csd_2d.closed_form import known_answers
from csd_2d.io.images import read_image
from tests.forked import Forked

pytestmark = pytest.mark.slow


def entry(module: str, arguments: list[str]) -> None:
    """What the command's script does."""
    sys.argv = [module.rpartition(".")[2], *arguments]
    importlib.import_module(module).entrypoint()


def run(command: str, *arguments: str | Path) -> Forked:
    process = Forked(entry, f"nerfstudio.scripts.{command}", [*map(str, arguments)])
    assert process.ended(600) == 0, process.errors
    return process


def run_folder(output: Path, method: str) -> Path:
    (folder,) = output.glob(f"*/{method}/*")
    return folder


def test_pretrain_edit_render_and_evaluate(scene_data, tmp_path):
    out = tmp_path / "out"
    run("train", "csd-scene-tiny", "--data", scene_data, "--output-dir", out, "--max-num-iterations", "150")
    scene = run_folder(out, "csd-scene-tiny")

    # fmt: off
    done = run("train", "csd-edit-tiny", "--load-run", scene / "config.yml", "--pipeline.prompt", "make it night",
               "--pipeline.steps-per-round", "75", "--max-num-iterations", "150", "--output-dir", out)
    # fmt: on
    assert "round 2 of 2 is done" in done.output and "Done. Results in" in done.output
    assert len(done.output.splitlines()) < 120 and "\x1b" not in done.output
    edit = run_folder(out, "csd-edit-tiny")

    run("render", "dataset", "--load-config", edit / "config.yml", "--output-path", tmp_path / "renders",
               "--rendered-output-names", "rgb", "--image-format", "png")  # fmt: skip
    render = next((tmp_path / "renders").rglob("*.png"))
    original = read_image(scene_data / "images" / render.name)
    (night,) = known_answers("make it night", original[None])
    rendered = read_image(render)
    assert (rendered - night[0]).square().mean() < 0.12 * (rendered - original).square().mean()

    run("eval", "--load-config", edit / "config.yml", "--output-path", tmp_path / "metrics.json")
    results = json.loads((tmp_path / "metrics.json").read_text())["results"]
    assert "unedited_photographs_psnr" in results and not any("lpips" in name for name in results)


def test_an_error_is_one_sentence(scene_run, tmp_path):
    command = [Path(sys.executable).parent / "ns-train", "csd-edit-tiny", "--load-run", scene_run]
    command += ["--pipeline.prompt", "make it rain", "--output-dir", tmp_path / "out"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.rstrip().splitlines()[-1].startswith("csd-edit-tiny: the tiny model was never taught")
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()
