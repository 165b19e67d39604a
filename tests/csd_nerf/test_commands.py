"""The commands as a user types them: pretrain, edit, render, evaluate."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from csd_2d.closed_form import known_answers
from csd_2d.io.images import read_image

pytestmark = pytest.mark.slow


def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / args[0]), *map(str, args[1:])]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def run_folder(output: Path, method: str) -> Path:
    (folder,) = output.glob(f"*/{method}/*")
    return folder


def test_pretrain_edit_render_and_evaluate(scene_data, tmp_path):
    out = tmp_path / "out"
    done = run("ns-train", "csd-scene-tiny", "--data", scene_data, "--output-dir", out, "--max-num-iterations", "150")
    assert done.returncode == 0, done.stderr
    scene = run_folder(out, "csd-scene-tiny")

    # fmt: off
    done = run("ns-train", "csd-edit-tiny", "--load-run", scene / "config.yml", "--pipeline.prompt", "make it night",
               "--pipeline.steps-per-round", "75", "--max-num-iterations", "150", "--output-dir", out)
    # fmt: on
    assert done.returncode == 0, done.stderr
    assert "round 2 of 2 is done" in done.stdout
    edit = run_folder(out, "csd-edit-tiny")

    done = run("ns-render", "dataset", "--load-config", edit / "config.yml", "--output-path", tmp_path / "renders",
               "--rendered-output-names", "rgb", "--image-format", "png")  # fmt: skip
    assert done.returncode == 0, done.stderr
    render = next((tmp_path / "renders").rglob("*.png"))
    original = read_image(scene_data / "images" / render.name)
    (night,) = known_answers("make it night", original[None])
    rendered = read_image(render)
    assert (rendered - night[0]).square().mean() < 0.12 * (rendered - original).square().mean()

    done = run("ns-eval", "--load-config", edit / "config.yml", "--output-path", tmp_path / "metrics.json")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "metrics.json").read_text())["results"]
    assert "psnr" in results and "lpips" not in results


def test_an_error_is_one_sentence(scene_run, tmp_path):
    done = run("ns-train", "csd-edit-tiny", "--load-run", scene_run, "--pipeline.prompt", "make it rain",
               "--output-dir", tmp_path / "out")  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.rstrip().splitlines()[-1].startswith("csd-edit-tiny: the tiny model was never taught")
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()
