"""`csd eval`, and the report it writes: a table, JSON, and one HTML file."""

import json
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from csd_2d.cli import main
from csd_2d.evaluate import Evaluation, Row, Subject
from csd_2d.io.images import read_image, write_image
from csd_2d.io.video import Clip, write_clip
from csd_2d.report import SHOWN, number, write_report

OFFLINE = ["--clip", "none", "--local-files-only"]


@pytest.fixture
def files(tmp_path):
    coarse = torch.rand(4, 3, 5, 12, generator=torch.Generator().manual_seed(0)) * 0.7 + 0.15
    images = F.interpolate(coarse, (64, 160), mode="bicubic").clamp(0, 1)
    night = 0.4 * images + 0.02
    write_image(images[0], tmp_path / "day.png")
    write_image(night[0], tmp_path / "night.png")
    write_image((torch.arange(160) < 80).float().expand(3, 64, 160), tmp_path / "mask.png")
    for name, some in (("frames", images), ("edited", night)):
        for index, image in enumerate(some):
            write_image(image[..., :100], tmp_path / name / f"{index}.png")
        write_clip(Clip([image[..., :96] for image in some]), tmp_path / f"{name}.mp4")
    return tmp_path


def report_of(folder):
    report = json.loads((folder / "report.json").read_text())
    return report, {row["name"]: row for row in report["metrics"]}


def evaluated(files, *arguments):
    main(["eval", *map(str, arguments), "--output", str(files / "report"), *OFFLINE])
    return report_of(files / "report")


def embedded(folder):
    html = (folder / "report.html").read_text()
    assert not re.search(r"(src|href)=.?https?:", html)  # it opens offline
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def test_a_panorama(files, capsys):
    captions = ["--source-caption", "by day", "--target-caption", "</script> at night"]
    report, rows = evaluated(
        files, files / "day.png", files / "night.png", "--mask", files / "mask.png", "--wrap",
        "--answer", files / "night.png", *captions,
    )  # fmt: skip
    assert report["kind"] == "panorama" and report["settings"]["wrap"] is True
    assert {"torch", "csd-edit"} <= report["versions"].keys()
    assert rows["agreement"]["value"] == 1 and rows["PSNR to the answer"]["value"] == pytest.approx(120)
    assert rows["change inside"]["value"] > 0.05 and rows["wrap seam"]["source"] is not None
    assert rows["CLIP directional"]["missing"] == "left out by --clip none."
    data = embedded(files / "report")
    labels = [picture["label"] for picture in data["pictures"]]
    assert labels == ["panorama", "mask of panorama, beside the edit", "left and right border, joined in the middle"]
    assert data["title"] == "</script> at night"
    output = capsys.readouterr().out
    assert (
        re.search(r"SSIM to the source +0\.\d+", output)
        and "CLIP image similarity not available: left out by --clip none." in output
    )
    assert f"wrote {files / 'report' / 'report.html'}" in output


def test_a_video_and_a_folder(files):
    for before, after in (("frames.mp4", "edited.mp4"), ("frames", "edited")):
        report, rows = evaluated(files, files / before, files / after)
        assert report["kind"] == "video" and report["images"] == 4
        assert len(rows["warp error"]["values"]) == 3 and len(rows["edges"]["values"]) == 4
        assert rows["change"]["value"] > 0.05
        assert len(embedded(files / "report")["pictures"]) == 4
    assert "warp error" not in evaluated(files, files / "frames", files / "edited", "--kind", "images")[1]


def test_wrong_inputs_are_told(files, capsys):
    frames, edited, day, night = (str(files / name) for name in ("frames", "edited", "day.png", "night.png"))
    for arguments, message in (
        ([frames, edited, "--wrap"], "--wrap and --seam-every are for panoramas"),
        ([day, night, "--seam-every", "0"], "seam-every must be at least 2 px, got 0"),
        ([day, night, "--mask", frames], "holds 4 masks for 1 frame"),
        ([frames, day], "got 1 and 4"),
        ([day, frames], "got 4 and 1"),
        ([day, str(files / "none.png")], "no such image"),
    ):
        with pytest.raises(SystemExit, match=message):
            evaluated(files, *arguments)
    evaluated(files, day, day)
    assert "BEFORE and AFTER are alike" in capsys.readouterr().err


def test_a_square_picture_that_wraps_is_a_panorama(files):
    for name in ("day", "night"):
        write_image(read_image(files / f"{name}.png")[..., :64], files / f"{name}.png")
    report, rows = evaluated(files, files / "day.png", files / "night.png", "--wrap")
    assert report["kind"] == "panorama" and rows["wrap seam"]["value"] is not None
    assert "views" not in report["settings"]


def test_images_of_several_sizes_are_no_video(files):
    for name in ("frames", "edited"):
        write_image(read_image(files / name / "0.png")[..., :70], files / name / "0.png")
    report, rows = evaluated(files, files / "frames", files / "edited")
    assert report["kind"] == "images" and rows["ghosting"]["value"] is not None


def test_a_long_video_is_shown_in_part_and_numbers_may_be_infinite(tmp_path):
    frames = [torch.full((3, 8, 8), shade) for shade in torch.linspace(0, 1, 40).tolist()]
    rows = [Row("a metric", "what it is", "higher", float("nan"), float("inf"), [1.0, float("nan")])]
    write_report(Evaluation("video", 40, rows, 1.0), Subject("video", frames, frames), tmp_path, "x", {"none": None})
    report, read = report_of(tmp_path)
    assert read["a metric"]["value"] is None and read["a metric"]["values"] == [1.0, None]
    assert report["settings"] == {}
    pictures = embedded(tmp_path)["pictures"]
    assert len(pictures) == SHOWN and pictures[-1]["label"] == "frame 40 of 40"


def test_numbers():
    shown = [number(value) for value in (None, 0.0, 0.12345, 1e-5, 123456.0, 35.25)]
    assert shown == ["-", "0", "0.1235", "1.00e-05", "1.23e+05", "35.25"]


def test_without_nerfstudio_a_run_says_what_to_install(tmp_path):
    (tmp_path / "config.yml").touch()
    run = str(tmp_path / "config.yml")
    code = (
        "import sys\n"
        "sys.modules['nerfstudio'] = None\n"
        "from csd_2d.cli import main\n"
        f"main(['eval', {run!r}, {run!r}, '--output', {str(tmp_path / 'report')!r}])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip() == 'csd: csd eval of a run needs nerfstudio: pip install "csd-edit[nerf]".'
