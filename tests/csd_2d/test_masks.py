"""Local edits: outside the mask not a bit changes, inside the answer is reached, the border is soft."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from csd_2d import EditConfig, load_prior
from csd_2d.cli import main
from csd_2d.image_set import edit_images
from csd_2d.io.images import read_image, write_image
from csd_2d.io.masks import feathered, read_mask, to_mask
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


LEFT = np.zeros((24, 40), np.uint8)
LEFT[:, :20] = 1


def colored(color: int | np.ndarray, alpha: int | np.ndarray = 255) -> Image.Image:
    """Return RGBA: a color everywhere or, of shape (24, 40), as gray."""
    gray = np.broadcast_to(np.asarray(color, np.uint8), (24, 40))
    return Image.fromarray(np.dstack([gray, gray, gray, np.broadcast_to(np.asarray(alpha, np.uint8), (24, 40))]))


def indexed(indices: np.ndarray, *colors: int) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8))
    image.putpalette(colors)
    return image


SAME = {
    "white, transparent to the right": colored(255, LEFT * 255),
    "black, transparent to the right": colored(0, LEFT * 255),
    "white, on transparent black": colored(LEFT * 255, LEFT * 255),
    "opaque RGBA": colored(LEFT * 255),
    "RGBA of one alpha": colored(LEFT * 255, 128),
    "gray with alpha": colored(255, LEFT * 255).convert("LA"),
    "gray 0 and 1": Image.fromarray(LEFT),
    "gray 0 and 255": Image.fromarray(LEFT * 255),
    "RGB 0 and 1": Image.fromarray(np.dstack([LEFT] * 3)),
    "16 bits, 0 and 1": Image.fromarray(LEFT.astype(np.uint16)),
    "8 bits in 16": Image.fromarray(LEFT.astype(np.uint16) * 255),
    "16 bits": Image.fromarray(LEFT.astype(np.uint16) * 65535),
    "one bit": Image.fromarray(LEFT * 255).convert("1"),
    "palette of an object, red": indexed(LEFT, 0, 0, 0, 128, 0, 0),
    "palette, its first color white": indexed(1 - LEFT, 255, 255, 255, 0, 0, 0),
    "bool": LEFT.astype(bool),
    "uint8": LEFT * 255,
    "uint8 of 0 and 1": LEFT,
    "int64 of 0 and 1": LEFT.astype(int),
    "uint16": LEFT.astype(np.uint16) * 65535,
    "float": LEFT.astype(float),
    "with a channel": LEFT[..., None] * 255,
    "mirrored view": np.ascontiguousarray(LEFT[:, ::-1])[:, ::-1],
    "bool tensor": torch.from_numpy(LEFT).bool(),
    "float tensor": left_half(),
    "tensor without a channel": left_half()[0],
    "half precision": left_half().bfloat16(),
    "batch of one": left_half()[None],
}


@pytest.mark.parametrize("kind", SAME)
def test_kinds_of_masks_mean_the_same(kind, tmp_path):
    mask = SAME[kind]
    assert torch.equal(to_mask(mask), left_half())
    if isinstance(mask, Image.Image):
        mask.save(tmp_path / "mask.png")
        assert torch.equal(read_mask(tmp_path / "mask.png", (24, 40)), left_half())
        if mask.mode == "P":
            mask.save(tmp_path / "mask.gif")
            assert torch.equal(read_mask(tmp_path / "mask.gif", (24, 40)), left_half())


def test_soft_masks_keep_their_grays(tmp_path):
    ramp = np.broadcast_to(np.linspace(0, 255, 40).astype(np.uint8), (24, 40))
    expected = torch.from_numpy(ramp / np.float32(255))[None]
    for mask in (
        ramp,
        Image.fromarray(ramp),
        Image.fromarray(ramp).convert("RGBA"),
        Image.fromarray(ramp).convert("P"),
    ):
        torch.testing.assert_close(to_mask(mask), expected)
    Image.fromarray(LEFT * 255).save(tmp_path / "mask.jpg")  # which adds colors a little
    assert (read_mask(tmp_path / "mask.jpg", (24, 40)) - left_half()).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            colored(np.where(np.arange(24)[:, None] < 12, 0, 255), LEFT * 255),
            "transparency that varies, as its colors do",
        ),
        (colored(255, 0), "transparency that hides it"),
        (Image.fromarray(LEFT * 2), "holds the values 0, 2; a mask holds 0 and 1, or 0 .stays. to 255 .may change."),
        (Image.fromarray(LEFT + 2), "holds the values 2, 3"),
        (LEFT * 38, "holds the values 0, 38"),
        (indexed(LEFT * 2, 0, 0, 0, 128, 0, 0, 0, 128, 0), "holds the values 0, 2"),
        (Image.fromarray(np.arange(960, dtype=np.uint8).reshape(24, 40) % 91), r"holds the values 0, 1, .* \.\.\. 90"),
        (Image.fromarray(LEFT.astype(np.uint16) * 300), r"holds the values 0, 300; .* to 65535"),
        (Image.fromarray(LEFT[..., None] * np.array([255, 0, 0], np.uint8)), "is colored"),
        (left_half() * 255, "numbers must be from 0 to 1, .* got 0 to 255"),
        (left_half() * float("nan"), "got nan to nan"),
        (LEFT.astype(int) - 1, "got -1 to 0"),
        (np.zeros((0, 8)), r"got \(0, 8\)"),
        (np.zeros((2, 24, 40)), r"got \(2, 24, 40\)"),
        (np.array([["a", "b"]]), "of numbers"),
    ],
)
def test_what_a_mask_does_not_say_is_asked(mask, message):
    with pytest.raises(ValueError, match=message):
        to_mask(mask)


def test_the_soft_border_of_a_mask_may_reach_into_an_image():
    """A mask of one view among many: its object lies beside the picture."""
    ramp = np.broadcast_to(np.linspace(0, 100, 40).astype(np.uint8), (24, 40))
    assert to_mask(ramp, one_of_many=True).max() == pytest.approx(100 / 255)
    with pytest.raises(ValueError, match="holds the values"):
        to_mask(ramp)


def test_a_mask_of_0_and_1_edits_whole_from_the_command_line(tmp_path, capsys):
    write_image(picture(), tmp_path / "in.png")
    main(["panorama", str(tmp_path / "in.png"), str(tmp_path / "whole.png"), *NIGHT])
    SAME["palette of an object, red"].save(tmp_path / "mask.png")
    options = ["--mask", str(tmp_path / "mask.png"), "--feather", "0"]
    main(["panorama", str(tmp_path / "in.png"), str(tmp_path / "out.png"), *NIGHT, *options])
    source, whole, edited = (read_image(tmp_path / name) for name in ("in.png", "whole.png", "out.png"))
    assert torch.equal(edited[..., :20], whole[..., :20]) and torch.equal(edited[..., 20:], source[..., 20:])
    Image.fromarray(LEFT * 2).save(tmp_path / "mask.png")
    with pytest.raises(SystemExit, match=r"mask\.png holds the values 0, 2;"):
        main(["panorama", str(tmp_path / "in.png"), str(tmp_path / "out.png"), *NIGHT, *options])


def test_masks_of_the_same_aspect_are_scaled_for_scenes(tmp_path):
    for size, fits in {(48, 80): True, (97, 161): True, (6, 10): True, (48, 74): False, (40, 24): False}.items():
        Image.fromarray(LEFT * 255).resize((size[1], size[0]), Image.Resampling.NEAREST).save(tmp_path / "mask.png")
        if not fits:
            with pytest.raises(ValueError, match="they must be alike, or of one aspect"):
                read_mask(tmp_path / "mask.png", (24, 40), resize=True)
            continue
        mask = read_mask(tmp_path / "mask.png", (24, 40), resize=True)
        assert mask.shape == (1, 24, 40) and mask[..., :17].min() > 0.9999 and mask[..., 23:].max() == 0
        with pytest.raises(ValueError, match="they must be alike"):
            read_mask(tmp_path / "mask.png", (24, 40))
