"""The pipelines in diffusers' manner."""

import numpy as np
import pytest
import torch
from PIL import Image

from csd_2d import EditConfig
from csd_2d.api import CsdPanoramaPipeline, CsdVideoPipeline
from csd_2d.image_set import edit_images
from csd_2d.io.images import to_tensor
from csd_2d.panorama import edit_panorama

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
        (np.zeros((3, 8, 8)), "pil", r"an image must be a PIL image, .* got ndarray \(3, 8, 8\)"),
        ("river.jpg", "pil", "got str"),
        (np.full((8, 8, 3), 200.0), "pil", r"must be in \[0, 1\], or uint8 in an array; got torch.float64 from 200"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "pil", r"must be in \[0, 1\], or uint8 in an array"),
        (torch.full((3, 8, 8), torch.nan), "pil", "from nan to nan"),
        (picture(), "jpg", "output_type must be one of pil, np, pt, latent; got 'jpg'"),
    ],
)
def test_what_it_cannot_take_is_said(panorama, image, output_type, message):
    with pytest.raises(ValueError, match=message):
        panorama(NIGHT, image, output_type=output_type, progress=False)
