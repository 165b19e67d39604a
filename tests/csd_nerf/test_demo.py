"""`csd demo` from end to end, with so few steps that the scene stays a blur."""

import json
from functools import partial

import pytest

from csd_2d.cli import main
from csd_2d.io.images import read_image
from csd_2d.io.video import read_clip
from csd_nerf import demo
from csd_nerf.procedural_scene import write_scene


@pytest.mark.slow
def test_demo_leaves_its_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "VIEWS", 10)
    monkeypatch.setattr(demo, "FILM_FRAMES", 3)
    monkeypatch.setattr(demo, "FILM_SIZE", (24, 18))
    monkeypatch.setattr(demo, "write_scene", partial(write_scene, size=(48, 36)))
    monkeypatch.setattr(demo, "SCENE_STEPS", 60)
    monkeypatch.setattr(demo, "EDIT_STEPS", 150)
    folder = tmp_path / "demo"
    main(["demo", str(folder), "--prompt", "make it night"])

    report = json.loads((folder / "report.json").read_text())
    psnr = report["psnr"]
    assert psnr["edited_views_to_answer"] > psnr["unedited_views_to_answer"] + 2
    assert report["answer"] == "1 of 1"
    assert len(report["seconds"]) == 5 and report["seconds_total"] > 0
    assert len(list((folder / "edited").glob("*.png"))) == 8
    assert len(read_clip(folder / "turntable.mp4").frames) == 3
    assert read_image(folder / "before_after.png").shape == (3, 3 * 180, 2 * 240)
    output = capsys.readouterr().out
    assert "[3/5] editing it: make it night" in output and f"wrote {folder}" in output


def test_demo_refuses_unknown_prompts_and_full_folders(tmp_path):
    with pytest.raises(SystemExit, match="there is one to: make it night"):
        main(["demo", str(tmp_path / "demo"), "--prompt", "make it fly"])
    assert not (tmp_path / "demo").exists()
    (tmp_path / "file").touch()
    for output in (tmp_path, tmp_path / "file"):
        with pytest.raises(SystemExit, match="is not an empty folder"):
            main(["demo", str(output)])
