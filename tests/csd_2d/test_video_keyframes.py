"""Keyframes and flicker, on motions and edits that are known exactly."""

from itertools import pairwise

import pytest
import torch

from csd_2d import EditConfig
from csd_2d.cli import Options, Video, main
from csd_2d.io.images import read_image, write_image
from csd_2d.io.video import Clip, read_clip, write_clip
from csd_2d.keyframes import key_indices, propagate
from csd_2d.metrics.consistency import flicker
from csd_2d.priors.analytic import AnalyticPrior
from csd_2d.video import edit_video
from tests.csd_2d.test_flow import textured

pytest.importorskip("cv2", reason="optical flow needs OpenCV")


def panning(count: int, height: int = 96, width: int = 128, step: int = 2) -> list[torch.Tensor]:
    """A camera that pans to the right over a texture."""
    large = textured(height, width + step * count)
    return [large[..., step * index : step * index + width] for index in range(count)]


def spot(image: torch.Tensor, x: int) -> torch.Tensor:
    """A mark of 16 px whose middle lies at x."""
    marked = image.clone()
    marked[0, 40:56, x - 8 : x + 8] += 0.3
    return marked.clamp(0, 1)


def test_key_indices_begin_and_end_with_the_video():
    for count in range(1, 12):
        for every in range(1, 14):
            keys = key_indices(count, every)
            assert keys[0] == 0 and keys[-1] == count - 1
            assert keys[:-1] == [*range(0, count - 1, every)]


def test_an_edit_follows_what_it_was_made_on():
    frames = panning(7)
    keys = [0, 6]
    edited = list(propagate(frames, keys, [spot(frames[key], 80 - 2 * key) for key in keys]))
    for index, (frame, result) in enumerate(zip(frames, edited, strict=True)):
        truth = spot(frame, 80 - 2 * index)
        if index in keys:
            torch.testing.assert_close(result, truth)
        off = (result - truth).abs()[:, 44:52, 76 - 2 * index : 84 - 2 * index]  # inside the spot
        assert off.mean() < 0.03
        assert (result - frame).abs()[..., 84 - 2 * index + 12 :].max() < 0.02  # away from it
        assert ((result - frame)[0] > 0.15).sum() == pytest.approx(256, abs=40)  # neither smeared nor doubled


def test_detail_between_keyframes_is_the_frames_own():
    """The change is carried, not the picture: a flash that no keyframe shows is still there."""
    frames = panning(5, step=0)
    frames[2] = frames[2].clone()
    frames[2][:, 10:20, 10:20] = 1
    keys = [0, 4]
    edited = list(propagate(frames, keys, [(frames[key] - 0.2).clamp(min=0) for key in keys]))
    assert (edited[2][:, 12:18, 12:18] - 0.8).abs().max() < 0.05


def test_what_one_keyframe_does_not_show_comes_from_the_other():
    """A disc covers the middle until it is taken away: behind it the first keyframe's change must not show."""
    ground = textured(96, 128)
    y, x = torch.meshgrid(torch.arange(96) - 48, torch.arange(128) - 64, indexing="ij")
    disc = (x.square() + y.square() < 18**2).float()
    covered = torch.lerp(ground, textured(96, 128, seed=5), disc)
    frames = [covered, ground, ground]
    change = 0.3 * disc
    edited = list(propagate(frames, [0, 2], [(covered + change).clamp(0, 1), ground]))
    leaked = (edited[1] - ground).abs()[:, disc > 0]
    assert leaked.mean() < 0.05  # blended by distance alone: 0.15


def test_what_no_keyframe_shows_changes_as_its_color_does():
    """Sepia is affine in color, so that even what is seen in one frame alone gets it exactly."""
    prior, frames = AnalyticPrior(), panning(3, step=0)
    frames[1] = torch.lerp(frames[1], textured(96, 128, seed=9).flip(0), 0.9)
    sepia = prior.answers("make it sepia", torch.stack(frames))[0]
    edited = list(propagate(frames, [0, 2], [sepia[0], sepia[2]]))
    assert (edited[1] - sepia[1]).abs().mean() < 0.02
    assert (edited[1] - frames[1]).abs().mean() > 0.1


def test_keyframes_reach_the_known_answer_and_only_they_are_edited():
    frames = panning(9)
    encoded = []

    class Watching(AnalyticPrior):
        def encode(self, images):
            encoded.append(len(images))
            return super().encode(images)

    prior = Watching()
    edited = edit_video(Clip(frames), prior, "make it night", EditConfig(steps=40), keyframes=4).frames
    assert sum(encoded) == 3
    answers = prior.answers("make it night", torch.stack(frames))[0]
    assert max((a - b).abs().mean() for a, b in zip(edited, answers, strict=True)) < 0.02


def test_masks_hold_between_keyframes_too():
    frames = panning(5)
    mask = torch.zeros(1, 96, 128)
    mask[..., :64] = 1
    config = EditConfig(steps=10)
    edited = edit_video(Clip(frames), AnalyticPrior(), "invert the colors", config, [mask] * 5, keyframes=2)
    for frame, result in zip(frames, edited.frames, strict=True):
        assert torch.equal(result[..., 64:], frame[..., 64:])
        assert (result - frame)[..., :64].abs().mean() > 0.05


def test_keyframes_that_cannot_be_are_named(tmp_path):
    with pytest.raises(ValueError, match="keyframes must be at least 1, got 0"):
        edit_video(Clip(panning(2)), AnalyticPrior(), "make it night", keyframes=0)
    mixed = Clip([torch.rand(3, 16, 16), torch.rand(3, 16, 20)])
    with pytest.raises(ValueError, match="frames differ in size"):
        edit_video(mixed, AnalyticPrior(), "make it night", keyframes=2)


def test_flicker_is_told_in_gray_levels():
    still = [textured(48, 64) * 0.8 + 0.1] * 5
    blinking = [frame + 10 / 255 * (index % 2) for index, frame in enumerate(still)]
    before, after = flicker(still, blinking, 5)
    assert before == pytest.approx(0, abs=1e-3)
    assert after == pytest.approx(10, rel=1e-3)


def test_motion_is_no_flicker():
    frames = panning(6)
    before, after = flicker(frames, [1 - frame for frame in frames], 6)
    assert before == pytest.approx(after, rel=0.02)  # inverted, nothing flickers more
    jump = torch.stack([a - b for a, b in pairwise(frames)]).square().mean().sqrt() * 255
    assert before < jump / 4


def test_of_a_long_video_a_sample_is_looked_at(monkeypatch):
    pairs = []
    monkeypatch.setattr(
        "csd_2d.metrics.consistency.optical_flow", lambda a, b: pairs.append(1) or torch.zeros(2, *a.shape[1:])
    )
    flicker([torch.rand(3, 16, 16)] * 41, [torch.rand(3, 16, 16)] * 41, 41, most_pairs=10)
    assert len(pairs) == 2 * 10


def test_from_the_command_line(tmp_path, capsys):
    write_clip(Clip(panning(6)), tmp_path / "in")
    write_image(torch.ones(3, 96, 128), tmp_path / "mask.png")
    options = [
        "--prompt",
        "make it night",
        "--prior",
        "analytic",
        "--steps",
        "30",
        "--mask",
        str(tmp_path / "mask.png"),
    ]
    main(["video", str(tmp_path / "in"), str(tmp_path / "out"), *options, "--keyframes", "3"])
    assert "flicker: " in capsys.readouterr().out
    source = torch.stack(list(read_clip(tmp_path / "in").frames))
    edited = torch.stack(list(read_clip(tmp_path / "out").frames))
    answers = AnalyticPrior().answers("make it night", source)[0]
    # The mask's border is white, too: feathering goes inwards from black alone.
    assert (edited - answers).abs().mean() < 0.02
    assert read_image(tmp_path / "out" / "00000.png").shape == (3, 96, 128)


def test_more_flicker_than_the_source_comes_with_what_lowers_it(tmp_path, capsys):
    still = [textured(48, 64) * 0.8 + 0.1] * 4
    blinking = [frame + 0.04 * (index % 2) for index, frame in enumerate(still)]
    for keyframes, hint in ((1, "; --keyframes 4 lowers it"), (4, "")):
        video = Video(tmp_path, tmp_path, Options(("make it night",)), keyframes=keyframes)
        video._print_flicker(Clip(still), Clip(blinking))
        assert capsys.readouterr().out == f"flicker: 10.2 gray levels, the source's 0.0{hint}\n"
        video._print_flicker(Clip(blinking), Clip(still))
        assert "lowers" not in capsys.readouterr().out
