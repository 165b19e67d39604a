"""Panorama and video: images in, images out."""

import itertools
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from csd_2d import EditConfig, load_prior
from csd_2d.cells import pad
from csd_2d.image_set import edit_images
from csd_2d.io.files import replacing
from csd_2d.io.images import read_image, to_array, write_image
from csd_2d.io.video import Clip, check_video_output, read_clip, write_clip
from csd_2d.panorama import edit_panorama
from csd_2d.priors.analytic import AnalyticPrior
from csd_2d.video import edit_video

AMBIGUOUS = "paint it a new color"


class SmallWindow(AnalyticPrior):
    """Crops of 16 px, so that a small picture has many of them."""

    window = 16


def answers_by_tile(edited: torch.Tensor, image: torch.Tensor, tile: int = 8) -> torch.Tensor:
    """Index of the nearest known answer for every tile."""
    errors = torch.stack([(answer - edited).square().mean(0) for answer in AnalyticPrior().answers(AMBIGUOUS, image)])
    return torch.nn.functional.avg_pool2d(errors, tile).argmin(0).flatten()


def smooth(height: int, width: int) -> torch.Tensor:
    coarse = torch.rand(1, 3, 3, 5, generator=torch.Generator().manual_seed(0)) * 0.7 + 0.15
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]


@pytest.mark.parametrize("size", [(8, 8), (9, 300), (257, 31), (256, 256)])
def test_a_panorama_keeps_its_size_and_reaches_the_known_answer(size):
    image = smooth(*size)
    prior = AnalyticPrior()
    edited = edit_panorama(image, prior, "make it night", EditConfig(steps=40))
    assert edited.shape == image.shape
    error = (edited - prior.answers("make it night", image)[0]).square().mean()
    assert -10 * error.log10() > 35


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_every_cell_of_a_panorama_is_edited_whatever_the_stride(stride):
    image = smooth(23, 61)
    edited = edit_panorama(image, SmallWindow(), "invert the colors", EditConfig(steps=80), stride=stride)
    assert (edited - (1 - image)).abs().max() < 0.05  # an unedited cell is off by up to 0.7


@pytest.mark.parametrize("stride", [0, 17])
def test_strides_that_leave_gaps_are_named(stride):
    with pytest.raises(ValueError, match=f"stride must be from 1 to the window of 16 cells, got {stride}"):
        edit_panorama(smooth(20, 20), SmallWindow(), "make it night", stride=stride)


def test_a_panorama_gets_one_color_by_consensus_and_patches_without():
    # Under strong noise a window of 16 px shows too little of an answer to agree on; the tiny model's has 32 cells.
    image, prior = smooth(32, 160), SmallWindow()
    prior.window = 32
    for mixing, seed in itertools.product(("consensus", "none"), range(3)):
        edited = edit_panorama(image, prior, AMBIGUOUS, EditConfig(steps=80, mixing=mixing, seed=seed))
        colors = len({*answers_by_tile(edited, image).tolist()})
        assert colors == 1 if mixing == "consensus" else colors > 1


def test_frames_of_mixed_sizes_keep_them():
    frames = [smooth(20, 30), smooth(24, 17)]
    edited = edit_images(frames, AnalyticPrior(), "make it sepia", EditConfig(steps=40))
    for source, out in zip(frames, edited, strict=True):
        assert out.shape == source.shape
        assert (out - AnalyticPrior().answers("make it sepia", source)[0]).abs().max() < 0.02


def test_edits_may_start_from_other_images_than_the_source():
    source = smooth(16, 16)
    prior = AnalyticPrior()
    red, blue = (prior.answers(f"paint it {color}", source)[0] for color in ("red", "blue"))
    for start in (red, blue):  # a start that has already chosen decides an ambiguous edit
        config = EditConfig(steps=40, max_timestep=0.5)
        (edited,) = edit_images([source], prior, AMBIGUOUS, config, start=[start])
        assert (edited - start).square().mean() < 1e-3


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.mkv", "frames"])
@pytest.mark.parametrize("size", [(24, 32), (17, 31)])
def test_clips_survive_writing_and_reading(tmp_path, name, size):
    frames = [smooth(*size).roll(i, -1) for i in range(5)]
    write_clip(Clip(frames, Fraction(25, 2)), tmp_path / name)
    back = read_clip(tmp_path / name)
    assert [frame.shape for frame in back.frames] == [frame.shape for frame in frames]
    assert back.rate == Fraction(25, 2) or name == "frames"
    # 4:2:0 and compression: a few gray levels
    assert max((a - b).abs().mean() for a, b in zip(back.frames, frames, strict=True)) < 0.03
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_a_folder_of_frames_is_read_in_natural_order_and_keeps_its_names(tmp_path):
    for i in (10, 2, 1):
        write_image(torch.full((3, 8, 8), i / 20), tmp_path / "in" / f"{i}.png")
    (tmp_path / "in" / "notes.txt").write_text("not a frame")
    (tmp_path / "in" / "._1.png").write_bytes(b"what macOS leaves beside a file")
    clip = read_clip(tmp_path / "in")
    assert clip.names == ["1", "2", "10"]
    edited = edit_video(clip, load_prior("analytic"), "invert the colors", EditConfig(steps=40))
    write_clip(edited, tmp_path / "out")
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == {"1.png", "2.png", "10.png"}
    torch.testing.assert_close(read_image(tmp_path / "out" / "10.png"), torch.full((3, 8, 8), 0.5), atol=0.01, rtol=0)


def test_unreadable_inputs_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    text = tmp_path / "text.png"
    text.write_text("no picture")
    cut = tmp_path / "cut.jpg"
    write_image(torch.rand(3, 64, 64), cut)
    cut.write_bytes(cut.read_bytes()[:400])
    tiny = tmp_path / "tiny.png"
    write_image(torch.rand(3, 7, 40), tiny)
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())

    for path, error, message in [
        (tmp_path / "none.png", FileNotFoundError, "no such image"),
        (text, ValueError, "cannot be read as an image"),
        (cut, ValueError, "cannot be read as an image"),
        (tiny, ValueError, "40x7 px; both sides must be at least 8 px"),
    ]:
        with pytest.raises(error, match=message):
            read_image(path)
    for path, error, message in [
        (tmp_path / "none.mp4", FileNotFoundError, "no such video"),
        (tmp_path / "empty", ValueError, "holds no images"),
        (text, ValueError, "cannot be read as a video"),
        (sound, ValueError, "holds no video"),
    ]:
        with pytest.raises(error, match=message):
            read_clip(path)


def test_an_error_while_writing_leaves_what_was_there(tmp_path):
    path = tmp_path / "out.png"
    path.write_text("before")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.png"]


def test_video_outputs_that_cannot_be_are_named_before_any_work(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.png").touch()
    (tmp_path / "a.mp4").mkdir()
    mixed = Clip([smooth(8, 8), smooth(8, 10)])
    for name, message in [
        ("full", "is not empty"),
        ("a.mp4", "is a folder"),
        ("full/x.png", "must be a folder"),
        ("b.gif", "must be a folder"),
        ("b.mp4", "differ in size"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_video_output(tmp_path / name, mixed)
    check_video_output(tmp_path / "v1.0", mixed)


@pytest.mark.parametrize("size", [(48, 64), (720, 1280)])
def test_videos_keep_and_declare_their_colors(tmp_path, size):
    color = torch.tensor([0.8, 0.2, 0.2])[:, None, None]
    write_clip(Clip([color.expand(3, *size)]), tmp_path / "red.mp4")
    with av.open(str(tmp_path / "red.mp4")) as container:
        assert container.streams.video[0].codec_context.colorspace == 1  # BT.709
    torch.testing.assert_close(read_clip(tmp_path / "red.mp4").frames[0], color.expand(3, *size), atol=0.02, rtol=0)


def test_videos_of_a_turned_camera_are_read_upright(tmp_path):
    upright = torch.zeros(3, 32, 48)
    upright[0, :8] = 1  # red on top
    write_clip(Clip([upright]), tmp_path / "a.mp4")
    data = (tmp_path / "a.mp4").read_bytes()
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    track = data.index(b"tkhd")
    turned = data[:track] + data[track:].replace(identity, clockwise, 1)
    assert turned != data
    (tmp_path / "turned.mp4").write_bytes(turned)
    frame = read_clip(tmp_path / "turned.mp4").frames[0]
    assert frame.shape == (3, 48, 32)
    assert frame[0, :, -4:].mean() > 0.8  # what was on top lies on the right
    assert frame[0, :, :16].mean() < 0.2


def test_padding_mirrors_as_often_as_needed():
    row = torch.arange(3.0).expand(1, 1, 1, 3)
    assert pad(row, 1, 8).flatten().tolist() == [0, 1, 2, 2, 1, 0, 0, 1]


def test_deep_gray_images_and_rotation_marks_are_read_as_meant(tmp_path):
    Image.fromarray(np.full((8, 10), 32768, np.uint16)).save(tmp_path / "deep.png")
    torch.testing.assert_close(read_image(tmp_path / "deep.png"), torch.full((3, 8, 10), 0.5), atol=1e-4, rtol=0)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn 90 degrees clockwise
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (3, 20, 10)


def test_numbers_of_no_known_range_are_refused(tmp_path):
    Image.new("F", (8, 8), 0.5).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="floating-point numbers has no known range"):
        read_image(tmp_path / "float.tif")


def test_transparency_is_put_on_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (to_array(read_image(tmp_path / "clear.png")) == 255).all()


def test_a_diffusion_model_edits_a_panorama_and_a_video(tiny_pipeline_folder):
    """Random weights follow no instruction; they show that latents move, sizes stay and nothing breaks."""
    prior = load_prior(str(tiny_pipeline_folder))
    # On random weights guidance of 7.5 diverges: their estimates are not those of a denoiser.
    config = EditConfig(steps=3, guidance_scale=1.5, lr=0.1, batch=3)
    image = smooth(70, 150)
    edited = edit_panorama(image, prior, "make it night", config)
    assert edited.shape == image.shape
    unedited = edit_panorama(image, prior, "make it night", EditConfig(steps=1, lr=1e-8))
    assert 1e-4 < (edited - unedited).abs().mean() < 0.5

    clip = edit_video(Clip([image, image.flip(-1)], Fraction(12)), prior, "make it night", config)
    assert [frame.shape for frame in clip.frames] == [image.shape] * 2
    assert clip.rate == 12
    assert all(frame.isfinite().all() for frame in clip.frames)


def test_micro_batches_do_not_change_an_edit(tiny_pipeline_folder):
    config = EditConfig(steps=2, guidance_scale=1.5, lr=0.1)
    one, all_ = (
        edit_panorama(smooth(70, 100), load_prior(str(tiny_pipeline_folder), micro_batch=size), "x", config)
        for size in (1, 64)
    )
    torch.testing.assert_close(one, all_, atol=1e-4, rtol=0)  # fp32 convolutions of other batch sizes
