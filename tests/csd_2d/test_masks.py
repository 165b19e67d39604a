"""Local edits: outside the mask not a bit changes, inside the answer is reached, the border is soft."""

import pytest
import torch
import torch.nn.functional as F

from csd_2d import EditConfig, load_prior
from csd_2d.cli import main
from csd_2d.image_set import edit_images
from csd_2d.io.images import read_image, write_image
from csd_2d.io.masks import feathered, read_mask
from csd_2d.io.video import Clip, read_clip, read_masks, write_clip
from csd_2d.panorama import edit_panorama
from csd_2d.priors.analytic import AnalyticPrior
from csd_2d.video import edit_video
from tests.csd_2d.test_cli import NIGHT


def picture(height=24, width=40, seed=0):
    coarse = torch.rand(1, 3, 3, 4, generator=torch.Generator().manual_seed(seed)) * 0.7 + 0.15
    return F.interpolate(coarse, (height, width), mode="bilinear")[0]


def left_half(height=24, width=40):
    mask = torch.zeros(1, height, width)
    mask[..., : width // 2] = 1
    return mask


def night(image):
    return AnalyticPrior().answers("make it night", image[None])[0][0]


def test_feathering_falls_off_inwards_and_adds_nothing():
    mask = left_half()
    soft = feathered(mask, 6)
    assert not soft[mask == 0].any()
    assert torch.all(soft[..., :12] > 0.99)
    ramp = soft[0, 12, 12:20]
    assert torch.all(ramp[1:] <= ramp[:-1]) and ramp[-1] < 0.25
    assert torch.equal(feathered(mask, 0), mask)
    corner = torch.ones(1, 16, 16)
    corner[..., 8:, 8:] = 0  # around whose tip a blur is above 1/2
    assert not feathered(corner, 8)[corner == 0].any()


def test_images_change_inside_only():
    images = [picture(seed=0), picture(20, 30, seed=1)]
    masks = [left_half(), left_half(20, 30)]
    edited = edit_images(images, load_prior("analytic"), "make it night", EditConfig(steps=40), masks=masks)
    for image, mask, result in zip(images, masks, edited, strict=True):
        assert torch.equal(result * (1 - mask), image * (1 - mask))
        assert ((result - night(image)) * mask).abs().max() < 0.02


def test_a_render_to_start_from_does_not_show_outside():
    image, mask = picture(), left_half()
    start = [1 - image]
    config = EditConfig(steps=40)
    prior = load_prior("analytic")
    (edited,) = edit_images([image], prior, "make it night", config, start=start, masks=[mask])
    assert torch.equal(edited * (1 - mask), image * (1 - mask))
    assert ((edited - night(image)) * mask).abs().max() < 0.02


@pytest.mark.parametrize("soft", [0, 8])
def test_a_panorama_changes_inside_only(soft):
    image, mask = picture(30, 600), feathered(left_half(30, 600), soft)
    edited = edit_panorama(image, load_prior("analytic"), "make it night", EditConfig(steps=60), mask=mask)
    assert torch.equal(edited[..., 300:], image[..., 300:])
    torch.testing.assert_close(edited, torch.lerp(image, night(image), mask), rtol=0, atol=0.02)


def test_coarse_cells_may_change_wherever_one_of_their_pixels_may(tiny_pipeline_folder):
    image, mask = picture(64, 64), torch.zeros(1, 64, 64)
    mask[0, 5, 5] = 1
    config = EditConfig(steps=2, lr=50)
    (edited,) = edit_images([image], load_prior(str(tiny_pipeline_folder)), "x", config, masks=[mask])
    changed = (edited != image).any(0)
    assert changed[5, 5] and changed.sum() == 1


def test_masks_of_another_size_are_named(tmp_path):
    prior = load_prior("analytic")
    with pytest.raises(ValueError, match="one mask for each image, of its size"):
        edit_images([picture()], prior, "make it night", masks=[left_half(10, 10)])
    with pytest.raises(ValueError, match="must be of the image's size"):
        edit_panorama(picture(), prior, "make it night", mask=left_half(10, 10))
    write_image(torch.zeros(3, 24, 40), tmp_path / "black.png")
    with pytest.raises(ValueError, match="black all over"):
        read_mask(tmp_path / "black.png", (24, 40))
    assert not read_mask(tmp_path / "black.png", (24, 40), may_be_black=True).any()
    line = torch.zeros(3, 24, 40)
    line[:, 10:12] = 1
    write_image(line, tmp_path / "line.png")
    assert read_mask(tmp_path / "line.png", (24, 40)).any()
    with pytest.raises(ValueError, match="nowhere wider than its soft border"):
        read_mask(tmp_path / "line.png", (24, 40), feather=4)


def test_single_frames_may_show_nothing_of_what_is_edited(tmp_path):
    folder, frames = tmp_path / "masks", [picture(), picture()]
    for name, mask in (("0.png", left_half().expand(3, -1, -1)), ("1.png", torch.zeros(3, 24, 40))):
        write_image(mask, folder / name)
    clip = Clip(frames)
    masks = read_masks(folder, clip, feather=0)
    edited = edit_video(clip, load_prior("analytic"), "invert the colors", EditConfig(steps=5), masks).frames
    assert not torch.equal(edited[0], frames[0]) and torch.equal(edited[1], frames[1])
    with pytest.raises(ValueError, match="masks are black all over"):
        edit_video(clip, load_prior("analytic"), "invert the colors", masks=[torch.zeros(1, 24, 40)] * 2)


def test_masks_from_the_command_line(tmp_path, capsys):
    image = picture()
    write_image(image, tmp_path / "in.png")
    write_image(left_half().expand(3, -1, -1), tmp_path / "mask.png")
    write_image(torch.ones(3, 24, 41), tmp_path / "wide.png")
    mask = ["--mask", str(tmp_path / "mask.png"), "--feather", "0"]
    main(["panorama", str(tmp_path / "in.png"), str(tmp_path / "out.png"), *NIGHT, *mask])
    source, edited = read_image(tmp_path / "in.png"), read_image(tmp_path / "out.png")
    assert torch.equal(edited[..., 20:], source[..., 20:])
    assert (edited - night(source))[..., :20].abs().max() < 0.02

    write_clip(Clip([image] * 3), tmp_path / "frames")
    write_clip(Clip([left_half().expand(3, -1, -1)] * 2), tmp_path / "masks")
    main(["video", str(tmp_path / "frames"), str(tmp_path / "edited"), *NIGHT, *mask])
    for frame in read_clip(tmp_path / "edited").frames:
        assert torch.equal(frame[..., 20:], source[..., 20:]) and not torch.equal(frame, source)
    for command, options, message in (
        ("panorama", ["--mask", "wide.png"], "is 41x24 px, the image 40x24 px"),
        ("video", ["--mask", "masks"], "holds 2 masks for 3 frames"),
    ):
        with pytest.raises(SystemExit, match=message):
            ins, out = ("in.png", "o.png") if command == "panorama" else ("frames", "o")
            main([command, str(tmp_path / ins), str(tmp_path / out), *NIGHT, "--mask", str(tmp_path / options[1])])
