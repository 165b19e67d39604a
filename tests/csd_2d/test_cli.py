"""The `csd` command as a user meets it: results, and one sentence for every error."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from csd_2d.cli import main
from csd_2d.correspondence import flow
from csd_2d.io.images import read_image, write_image
from csd_2d.io.video import Clip, read_clip, write_clip
from csd_2d.priors.analytic import AnalyticPrior

NIGHT = ["--prompt", "make it night", "--prior", "analytic", "--steps", "30"]


@pytest.fixture
def picture(tmp_path):
    coarse = torch.rand(1, 3, 3, 4, generator=torch.Generator().manual_seed(0)) * 0.7 + 0.15
    image = torch.nn.functional.interpolate(coarse, (24, 40), mode="bilinear")[0]
    write_image(image, tmp_path / "in.png")
    write_clip(Clip([image] * 3), tmp_path / "in.mp4")
    return tmp_path


def night_error(image, source):
    return (image - AnalyticPrior().answers("make it night", source[None])[0][0]).abs().mean()


def test_panorama(picture, capsys):
    main(["panorama", str(picture / "in.png"), str(picture / "out.png"), *NIGHT])
    assert night_error(read_image(picture / "out.png"), read_image(picture / "in.png")) < 0.01
    output = capsys.readouterr()
    assert f"wrote {picture / 'out.png'} (40x24 px)" in output.out
    assert "30/30" in output.err  # the progress bar


def test_video(picture, capsys):
    main(["video", str(picture / "in.mp4"), str(picture / "out.mp4"), *NIGHT])
    frames = read_clip(picture / "out.mp4").frames
    assert len(frames) == 3
    assert night_error(frames[1], read_image(picture / "in.png")) < 0.03
    assert "(3 frames)" in capsys.readouterr().out


def test_presets_set_defaults_and_options_override_them(picture, capsys):
    with pytest.raises(SystemExit):
        main(["panorama", "--preset", "paper", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: noisy)" in text and "(default: 2.0)" in text
    arguments = [str(picture / "in.png"), str(picture / "out.png"), *NIGHT]
    main(["panorama", *arguments, "--preset", "paper", "--lr", "1.5"])
    assert night_error(read_image(picture / "out.png"), read_image(picture / "in.png")) < 0.01


@pytest.mark.parametrize("command", [[], ["panorama"], ["video"], ["generate"], ["demo"], ["eval"], ["ablate"]])
def test_help_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "Example: csd" in text or command == ["demo"]


def errors(folder):
    picture, out, report = (str(folder / name) for name in ("in.png", "out.png", "report"))
    return {
        "no such image": ["panorama", str(folder / "none.png"), out, *NIGHT],
        "cannot be read as an image": ["panorama", str(folder / "in.mp4"), out, *NIGHT],
        "no such video or folder": ["video", str(folder / "none.mp4"), str(folder / "out.mp4"), *NIGHT],
        "prompt is empty": ["panorama", picture, out, "--prompt", " ", "--prior", "analytic"],
        "it knows: make it night": ["panorama", picture, out, "--prompt", "make it fly", "--prior", "analytic"],
        "unknown prior 'nope'": ["panorama", picture, out, "--prompt", "x", "--prior", "nope"],
        "unknown preset 'nope'": ["panorama", picture, out, *NIGHT, "--preset", "nope"],
        "lr must be from": ["panorama", picture, out, *NIGHT, "--lr", "-1"],
        "stride must be from 1": ["panorama", picture, out, *NIGHT, "--stride", "0"],
        "latents are not finite after step": [
            *["panorama", picture, out, *NIGHT, "--lr", "10000", "--guidance-scale", "1000"]
        ],
        "must end in one of": ["panorama", picture, str(folder / "out.xyz"), *NIGHT],
        "is the input itself": ["panorama", picture, picture, *NIGHT],
        "must be a folder, or end in": ["video", str(folder / "in.mp4"), str(folder / "out.gif"), *NIGHT],
        "cannot be written": ["panorama", picture, str(folder / "in.png" / "out.png"), *NIGHT],
        "is not empty": ["video", str(folder / "in.mp4"), str(folder), *NIGHT],
        "diffusers offers no choice": [
            *["panorama", picture, out, "--prompt", "make it night", "--prior", "tiny", "--attention", "flash"]
        ],
        "feather must be from 0": ["panorama", picture, out, *NIGHT, "--mask", picture, "--feather", "nan"],
        "takes no source prompt": ["panorama", picture, out, *NIGHT, "--source-prompt", "a river"],
        "device 'tpu9' cannot be used": ["panorama", picture, out, *NIGHT, "--device", "tpu9"],
        "the other one is missing": ["eval", picture, picture, "--output", report, "--source-caption", "a river"],
        "as many edited images as images": ["eval", str(folder / "in.mp4"), picture, "--output", report],
        "no such video or folder: ": ["eval", str(folder / "none.mp4"), picture, "--output", report],
        "unknown study 'nope'": ["ablate", "nope", "--output", report],
        "jobs must be at least 1": ["ablate", "known-answers-tiny", "--output", report, "--jobs", "0"],
    }


@pytest.mark.parametrize("sentence", errors(Path()))
def test_errors_are_one_sentence_and_leave_nothing_behind(picture, capsys, sentence):
    before = {entry: entry.stat().st_mtime_ns for entry in picture.iterdir()}
    with pytest.raises(SystemExit) as exit_:
        main(errors(picture)[sentence])
    message = str(exit_.value.code)
    assert message.startswith("csd: ") and sentence in message and "\n" not in message
    assert {entry: entry.stat().st_mtime_ns for entry in picture.iterdir()} == before


def test_a_missing_option_is_named(picture, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["panorama", str(picture / "in.png"), str(picture / "out.png")])
    assert exit_.value.code == 2
    assert "--prompt" in capsys.readouterr().err


def test_importing_the_package_and_running_the_analytic_prior_loads_no_heavy_library():
    code = (
        "import sys, torch, csd_2d, csd_2d.cli;"
        "csd_2d.load_prior('analytic').encode_text(['make it night']);"
        "print({m.split('.')[0] for m in sys.modules} & {'diffusers', 'transformers', 'nerfstudio', 'csd_nerf'})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_package_works_where_nerfstudio_is_not_installed(tmp_path):
    """A base install: importing nerfstudio fails, everything of csd_2d imports, and the demo says what to install."""
    code = (
        "import sys\n"
        "sys.modules['nerfstudio'] = None\n"
        "import csd_2d, csd_2d.panorama, csd_2d.video, csd_2d.priors.instruct_pix2pix\n"
        "from csd_2d.cli import main\n"
        f"main(['demo', {str(tmp_path / 'demo')!r}])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip() == 'csd: csd demo needs nerfstudio: pip install "csd-edit[nerf]".'


@pytest.mark.parametrize(
    ("option", "replacement"),
    [("--transport", "correspondence"), ("--together=0.5", "mixing"), ("--no-svgd", "mixing")],
)
def test_options_of_earlier_versions_name_what_took_their_place(picture, option, replacement):
    with pytest.raises(SystemExit, match=f"^csd: .* is gone; {replacement} took its place.$"):
        main(["panorama", str(picture / "in.png"), str(picture / "out.png"), *NIGHT, option])
    (picture / "old.yaml").write_text("svgd: false\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="svgd is gone; mixing took its place"):
        main(["panorama", "a.png", "b.png", *NIGHT, "--preset", str(picture / "old.yaml")])


def test_a_video_that_cannot_be_followed_is_told_in_one_line(picture, capsys, monkeypatch):
    def missing():
        raise ImportError("optical flow needs OpenCV.")

    monkeypatch.setattr(flow, "check_flow", missing)
    flow.flow_is_available.cache_clear()
    shown = warnings.showwarning
    try:
        main(["video", str(picture / "in.mp4"), str(picture / "out.mp4"), *NIGHT, "--steps", "2"])
    finally:
        flow.flow_is_available.cache_clear()
    assert warnings.showwarning is shown
    line = "csd: frames of a video will share colors, but will not follow its motion: optical flow needs OpenCV."
    assert capsys.readouterr().err.splitlines().count(line) == 1
