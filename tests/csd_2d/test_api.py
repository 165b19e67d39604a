"""The pipelines in diffusers' manner."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from csd_2d import EditConfig
from csd_2d.api import CsdPanoramaPipeline, CsdVideoPipeline
from csd_2d.image_set import edit_images
from csd_2d.io.images import image_size, read_image, to_tensor, write_image
from csd_2d.io.masks import read_mask
from csd_2d.io.video import Clip, read_clip, read_masks, write_clip
from csd_2d.panorama import edit_panorama
from tests.csd_2d.test_image_files import DISPLAY_P3

NIGHT = "make it night"


@pytest.fixture
def panorama():
    return CsdPanoramaPipeline.from_pretrained("analytic")


@pytest.fixture
def video():
    return CsdVideoPipeline.from_pretrained("analytic")


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 24, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["pil", "uint8", "float", "tensor"])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_every_kind_of_image_gives_the_same_edit(panorama, kind, output_type):
    image = picture()
    given = {"pil": image, "uint8": np.array(image), "float": np.array(image) / 255.0, "tensor": to_tensor(image)}[kind]
    (edited,) = panorama(NIGHT, given, num_inference_steps=5, output_type=output_type, progress=False).images
    expected = edit_panorama(to_tensor(image), panorama.prior, NIGHT, EditConfig(steps=5))
    if output_type == "pil":
        assert edited.size == image.size
        edited = to_tensor(edited)
    elif output_type == "np":
        edited = torch.from_numpy(edited).permute(2, 0, 1)
    torch.testing.assert_close(edited, expected, rtol=0, atol=1 / 254)


def test_frames_are_edited_as_by_edit_images(video):
    frames = [picture(seed) for seed in range(3)]
    edited = video(NIGHT, frames, num_inference_steps=4, output_type="pt", progress=False, follow=False).frames
    expected = edit_images([to_tensor(frame) for frame in frames], video.prior, NIGHT, EditConfig(steps=4))
    assert all(torch.equal(*pair) for pair in zip(edited, expected, strict=True))


def test_frames_of_a_video_follow_its_motion_and_frames_of_several_sizes_do_not(video):
    frames = [picture().resize((96, 64))] * 2
    options = {"num_inference_steps": 4, "output_type": "pt", "progress": False}
    alone, following = (video(NIGHT, frames, follow=follow, **options).frames for follow in (False, True))
    gaps = [(one - other).abs().mean() for one, other in (alone, following)]
    assert gaps[1] < 0.01 * gaps[0]  # of a still picture, noise alone makes frames differ
    mixed = [frames[0], frames[0].resize((48, 32))]
    assert [frame.shape for frame in video(NIGHT, mixed, **options).frames] == [(3, 64, 96), (3, 32, 48)]


def test_latents_come_out_as_the_prior_has_them(panorama, video):
    image = to_tensor(picture())
    options = {"num_inference_steps": 3, "progress": False}
    latents = panorama(NIGHT, image, output_type="latent", **options).images[0]
    assert latents.shape == (3, 256, 256)  # the canvas has at least the window's size
    decoded = panorama.prior.decode(latents[None])[0, :, :16, :24]
    assert torch.equal(decoded, panorama(NIGHT, image, output_type="pt", **options).images[0])
    latents = video(NIGHT, [image, image], output_type="latent", **options).frames
    assert [tuple(latent.shape) for latent in latents] == [(3, 16, 24)] * 2


def test_a_callback_sees_every_step_changes_latents_and_interrupts(panorama):
    seen = []

    def callback(pipeline, step, timestep, inputs):
        seen.append((step, timestep))
        pipeline.interrupt = step == 2
        return {"latents": torch.zeros_like(inputs["latents"])}

    (edited,) = panorama(NIGHT, picture(), 10, output_type="pt", callback_on_step_end=callback, progress=False).images
    assert [step for step, _ in seen] == [0, 1, 2] and all(0 < timestep < 1000 for _, timestep in seen)
    assert (edited == 0.5).all()
    seen.clear()
    panorama(NIGHT, picture(), 2, callback_on_step_end=lambda *args: seen.append(args) or {}, progress=False)
    assert len(seen) == 2


def test_generators_decide_and_agree(video):
    frames = [np.full((8, 8, 3), 0.3 + 0.1 * i) + np.eye(8)[..., None] * 0.1 for i in range(3)]

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        options = {"num_inference_steps": 20, "output_type": "pt", "progress": False}
        return torch.stack(video("paint it a new color", frames, generator=generator, **options).frames)

    assert torch.equal(run(1), run(1))
    assert len({run(seed).mean((0, 2, 3)).argmax().item() for seed in range(8)}) > 1


def test_scales_override_the_settings(panorama):
    options = {"num_inference_steps": 4, "output_type": "pt", "progress": False}
    strong = panorama(NIGHT, picture(), guidance_scale=3.0, config=EditConfig(lr=0.5), **options).images[0]
    expected = edit_panorama(
        to_tensor(picture()), panorama.prior, NIGHT, EditConfig(steps=4, lr=0.5, guidance_scale=3.0)
    )
    assert torch.equal(strong, expected)


@pytest.mark.parametrize(
    ("image", "output_type", "message"),
    [
        (np.zeros((3, 8, 8)), "pil", r"an image must be \(H, W\), .* got \(3, 8, 8\) of float64"),
        (np.zeros((0, 8, 3)), "pil", r"got \(0, 8, 3\)"),
        (torch.zeros(2, 3, 8, 8), "pil", r"got \(2, 3, 8, 8\)"),
        (np.array([["a"]]), "pil", "of numbers"),
        ([picture(), picture()], "pil", "image must be one, or a list of one, got 2"),
        ("river.jpg", "pil", "got str"),
        (None, "pil", "got NoneType"),
        (Image.new("RGB", (0, 8)), "pil", "must have pixels, got 0x8 px"),
        (Image.fromarray(np.full((8, 8), -1, np.int32)), "pil", "must hold numbers from 0 to 255 .* got -1 to -1"),
        (Image.fromarray(np.full((8, 8), 70000, np.int32)), "pil", "got 70,000 to 70,000"),
        (np.full((8, 8, 3), 200.0), "pil", r"must be in \[0, 1\], or uint8 or uint16; got float64 from 200"),
        (np.full((8, 8, 3), 200), "pil", "got int64 from 200"),
        (torch.full((3, 8, 8), torch.nan), "pil", "from nan to nan"),
        (picture(), "jpg", "output_type must be one of pil, np, pt, latent; got 'jpg'"),
    ],
)
def test_what_it_cannot_take_is_said(panorama, image, output_type, message):
    with pytest.raises(ValueError, match=message):
        panorama(NIGHT, image, output_type=output_type, progress=False)


def edited(pipeline, image, output_type="pt", **options):
    return pipeline(NIGHT, image, 3, output_type=output_type, progress=False, **options).images[0]


NUMBERS = np.array(picture())
WIDE = NUMBERS.astype(np.uint16) * 257
READ_ONLY = NUMBERS.copy()
READ_ONLY.flags.writeable = False
KINDS = {
    "uint16": WIDE,
    "mirrored view": np.ascontiguousarray(NUMBERS[:, ::-1])[:, ::-1],
    "read-only": READ_ONLY,
    "big-endian": (NUMBERS / np.float32(255)).astype(">f4"),
    "batch of one": NUMBERS[None],
    "list of one": [picture()],
    "tensor of uint8": torch.from_numpy(NUMBERS).permute(2, 0, 1),
    "tensor, batch of one": to_tensor(picture())[None],
}
GRAYS = {
    "L": Image.fromarray(NUMBERS[..., 0]),
    "I, of 8 bits": Image.fromarray(NUMBERS[..., 0].astype(np.int32)),
    "I, of 16 bits": Image.fromarray(WIDE[..., 0].astype(np.int32)),
    "I;16": Image.fromarray(WIDE[..., 0]),
    "array": NUMBERS[..., 0],
    "array with a channel": NUMBERS[..., :1],
    "tensor": to_tensor(picture())[:1],
}


@pytest.mark.parametrize("kind", [*KINDS, *GRAYS])
def test_kinds_of_images_mean_the_same(panorama, kind, recwarn):
    expected = NUMBERS if kind in KINDS else np.repeat(NUMBERS[..., :1], 3, -1)
    result = edited(panorama, (KINDS | GRAYS)[kind])
    torch.testing.assert_close(result, edited(panorama, Image.fromarray(expected)), rtol=0, atol=1e-6)
    assert not [one for one in recwarn if "writable" in str(one.message)]


@pytest.mark.parametrize("kind", ["pil", "array", "tensor"])
def test_transparency_comes_back(panorama, kind):
    numbers = np.dstack([NUMBERS, np.tile(np.arange(0, 240, 10, dtype=np.uint8), (16, 1))])
    tensor = torch.from_numpy(numbers).permute(2, 0, 1) / 255
    image = {"pil": Image.fromarray(numbers), "array": numbers, "tensor": tensor}[kind]
    result = edited(panorama, image, "pil")
    assert result.mode == "RGBA" and np.array_equal(np.asarray(result)[..., 3], numbers[..., 3])
    assert torch.equal(edited(panorama, image)[3], tensor[3])
    assert edited(panorama, image, "np").shape == (16, 24, 4)
    opaque = edited(panorama, Image.fromarray(NUMBERS), "pil")
    assert np.array_equal(np.asarray(result)[:, 1:, :3], np.asarray(opaque)[:, 1:])  # the first column cannot be seen


def test_a_pil_image_keeps_its_profile_and_its_pixels_outside_a_mask(panorama):
    image = picture()
    image.info.update(icc_profile=DISPLAY_P3, dpi=(300, 300))
    mask = np.zeros((16, 24), bool)
    mask[:, :12] = True
    result = edited(panorama, image, "pil", mask=mask)
    assert result.info["icc_profile"] == DISPLAY_P3 and result.info["dpi"] == (300, 300)
    assert np.array_equal(np.asarray(result)[:, 12:], NUMBERS[:, 12:])
    assert not np.array_equal(np.asarray(result)[:, :12], NUMBERS[:, :12])


@pytest.mark.parametrize("kind", ["pil", "uint8", "float", "bool", "tensor", "0 to 255"])
def test_masks_of_all_kinds_are_taken(panorama, video, kind):
    left = np.zeros((16, 24), np.uint8)
    left[:, :12] = 255
    tensor = torch.from_numpy(left / np.float32(255))[None]
    kinds = {"pil": Image.fromarray(left), "uint8": left, "float": left / 255, "bool": left > 0, "tensor": tensor}
    mask = kinds.get(kind, tensor * 255)
    source = to_tensor(picture())

    def results(mask):
        frames = video(NIGHT, [source], 3, output_type="pt", progress=False, masks=[mask]).frames
        regions = panorama([NIGHT], source, 3, output_type="pt", progress=False, regions=[mask]).images
        return edited(panorama, source, mask=mask), frames[0], regions[0]

    if kind == "0 to 255":
        with pytest.raises(ValueError, match=r"mask.s numbers must be from 0 to 1, .* got 0 to 255"):
            results(mask)
        return
    for result, expected in zip(results(mask), results(tensor), strict=True):
        assert torch.equal(result, expected) and torch.equal(result[..., 12:], source[..., 12:])
    with pytest.raises(ValueError, match="nothing is left to edit"):
        edited(panorama, source, mask=torch.zeros(1, 16, 24))


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (picture(), "frames must be a list of images, got Image; make it"),
        (NUMBERS, r"frames must be a list of images, got ndarray \(16, 24, 3\)"),
        (None, "frames must be a list of images, got NoneType"),
        ("clip.mp4", "frames must be a list of images, got str"),
        ([], "there are no images to edit"),
    ],
)
def test_frames_that_are_no_list_are_said(video, frames, message):
    with pytest.raises(ValueError, match=message):
        video(NIGHT, frames, progress=False)


def test_frames_may_be_a_batch_or_an_iterator(video):
    frames = [NUMBERS, NUMBERS]
    expected, *others = (
        video(NIGHT, given, 2, output_type="np", progress=False).frames
        for given in (frames, np.stack(frames), iter(frames))
    )
    assert all(np.array_equal(*pair) for other in others for pair in zip(expected, other, strict=True))


@pytest.mark.parametrize("prompt", [None, [None], [], "  ", [NIGHT, ""]])
def test_a_prompt_that_says_nothing_is_said(panorama, video, prompt):
    for pipeline, image in ((panorama, NUMBERS), (video, [NUMBERS])):
        with pytest.raises(ValueError, match="prompt is empty"):
            pipeline(prompt, image, progress=False)


def test_what_callbacks_return(panorama):
    unchanged = edited(panorama, NUMBERS)
    assert torch.equal(edited(panorama, NUMBERS, callback_on_step_end=lambda *args: None), unchanged)
    for returned, message in (
        (3, "must return a dictionary or None, got int"),
        ({"latents": torch.zeros(2)}, r"must be of shape \(1, 3, 256, 256\), got \(2,\)"),
        ({"latents": 0}, "got int"),
    ):
        with pytest.raises(ValueError, match=message):
            edited(panorama, NUMBERS, callback_on_step_end=lambda *args, returned=returned: returned)


def test_generators_as_diffusers_takes_them(panorama):
    def generator():
        return torch.Generator().manual_seed(3)

    assert torch.equal(*(edited(panorama, NUMBERS, generator=given) for given in (generator(), [generator()])))
    for given, message in (([generator()] * 2, "generator must be one, or a list of one, got 2"), (7, "got int")):
        with pytest.raises(ValueError, match=message):
            edited(panorama, NUMBERS, generator=given)


def test_numbers_given_as_text_are_said(panorama):
    with pytest.raises(ValueError, match="guidance_scale must be a number from 0 to 1000, got '7'"):
        edited(panorama, NUMBERS, guidance_scale="7")
    with pytest.raises(ValueError, match=r"steps must be a whole number from 1 to 1000000, got 3\.0"):
        panorama(NIGHT, NUMBERS, 3.0, progress=False)


def test_precisions_by_name_and_as_diffusers_calls_them():
    for options in ({"dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}, {"dtype": "torch.bfloat16"}):
        prior: Any = CsdPanoramaPipeline.from_pretrained("tiny", **options).prior
        assert next(prior.denoiser.parameters()).dtype == torch.bfloat16
    for options, message in (
        ({"dtype": "float99"}, "dtype must be float32, float16 or bfloat16, got 'float99'"),
        ({"torch_dtype": torch.int8}, "got torch.int8"),
        ({"dtype": "float32", "torch_dtype": "float32"}, "two names of one option"),
    ):
        with pytest.raises(ValueError, match=message):
            CsdPanoramaPipeline.from_pretrained("tiny", **options)


def test_paths_may_be_text(tmp_path):
    clip = Clip([to_tensor(picture())])
    write_image(clip.frames[0], str(tmp_path / "a.png"))
    write_clip(clip, str(tmp_path / "frames"))
    assert image_size(str(tmp_path / "a.png")) == (16, 24)
    assert read_image(str(tmp_path / "a.png")).shape == read_clip(str(tmp_path / "frames")).frames[0].shape
    Image.new("L", (24, 16), 255).save(tmp_path / "mask.png")
    assert read_masks(str(tmp_path / "mask.png"), clip, 0.0)[0].all()
    assert read_mask(str(tmp_path / "mask.png"), (16, 24)).all()
