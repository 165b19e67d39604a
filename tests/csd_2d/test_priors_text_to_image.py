"""Text-to-image priors: against diffusers' own pipelines, and eq. 9 against the delta denoising score."""

import pytest
import torch
from torch import Tensor

from csd_2d import EditConfig, LatentStack, edit_residual
from csd_2d.csd import guidance_weights
from csd_2d.edit import edit
from csd_2d.image_set import edit_images
from csd_2d.io.video import Clip
from csd_2d.panorama import edit_panorama
from csd_2d.priors.text_to_image import TextToImagePrior, TextToImageXLPrior
from csd_2d.video import edit_video
from tests.tiny_pipeline import TOKENS, tiny_pipeline, tiny_text_to_image, tiny_text_to_image_xl

SOURCE, TARGET, OTHER = "a river by day", "a river by night", "a river in fog"
PRIORS = {"sd": (tiny_text_to_image, TextToImagePrior), "sdxl": (tiny_text_to_image_xl, TextToImageXLPrior)}


@pytest.fixture(scope="module", params=PRIORS)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipeline(family):
    pipeline = PRIORS[family][0]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def prior(family, pipeline, tmp_path_factory) -> TextToImagePrior:
    folder = tmp_path_factory.mktemp(family)
    pipeline.save_pretrained(folder)
    return PRIORS[family][1].from_pretrained(folder, source_prompt=SOURCE)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(n: int = 1, height: int = 64, width: int = 48) -> Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_frames_of_a_video_are_edited(prior):
    clip = Clip(list(images(3)))
    edited = edit_video(clip, prior, TARGET, EditConfig(steps=2, correspondence=False))
    together = edit_images(clip.frames, prior, TARGET, EditConfig(steps=2, correspondence=False))
    assert all(torch.equal(*pair) for pair in zip(edited.frames, together, strict=True))
    assert not torch.equal(together[0], prior.decode(prior.encode(images()))[0])


@pytest.mark.parametrize("scale", [7.5, 3.0])
def test_guided_noise_is_that_of_diffusers(pipeline, prior, scale):
    inputs: list[tuple[Tensor, int]] = []
    guided: list[Tensor] = []
    step = pipeline.scheduler.step

    def scheduler_called(model_output, *args, **kwargs):
        guided.append(model_output)
        return step(model_output, *args, **kwargs)

    handle = pipeline.unet.register_forward_pre_hook(lambda module, args: inputs.append((args[0], int(args[1]))))
    pipeline.scheduler.step = scheduler_called
    try:
        pipeline(
            prompt=TARGET,
            height=64,
            width=48,
            num_inference_steps=4,
            guidance_scale=scale,
            generator=torch.Generator().manual_seed(0),
        )
    finally:
        handle.remove()
        pipeline.scheduler.step = step
    text, condition = prior.encode_text([TARGET]), prior.condition(prior.encode(images()))
    for (rows, timestep), expected in zip(inputs, guided, strict=True):
        x_t = rows[:1]
        estimate = edit_residual(prior, x_t, x_t, x_t, condition, timestep, text, scale, scale, baseline="none")
        torch.testing.assert_close(estimate, expected, atol=2e-4, rtol=0)


def test_residual_is_the_delta_denoising_score(pipeline, prior):
    """s = -(e^w(x_t; target) - e^w(source_t; source prompt)), each prompt encoded and evaluated by itself."""
    w, n, timestep = prior.guidance_scale, 2, 300
    assert prior.image_guidance_scale == w
    x_t, source_t, noise = (randn(n, 4, 16, 12, seed=seed) for seed in range(3))

    def estimate(x: Tensor, prompt: str) -> Tensor:
        prompt_embeds, negative, *pooled = pipeline.encode_prompt(
            prompt, device=torch.device("cpu"), num_images_per_prompt=n, do_classifier_free_guidance=True
        )

        def network(text: Tensor, whole: int) -> Tensor:
            sizes = torch.tensor([[64, 48, 0, 0, 64, 48]] * n)
            added = {"text_embeds": pooled[whole], "time_ids": sizes} if pooled else None
            with torch.no_grad():
                return pipeline.unet(x, timestep, encoder_hidden_states=text, added_cond_kwargs=added).sample

        uncond = network(negative, 1)
        return uncond + w * (network(prompt_embeds, 0) - uncond)

    expected = estimate(x_t, TARGET) - estimate(source_t, SOURCE)
    condition, text = prior.condition(prior.encode(images(n))), prior.encode_text([TARGET])
    residual = edit_residual(prior, x_t, source_t, noise, condition, timestep, text, w, w)
    torch.testing.assert_close(residual, expected, atol=2e-4, rtol=0)
    assert guidance_weights(w, w).keys() == {"text", "uncond"}  # four rows a particle with the baseline's two


def test_each_branch_sees_its_prompt(prior):
    text, x_t = prior.encode_text([TARGET, OTHER]), randn(1, 4, 16, 12)

    def estimate(branch, text=text, prior=prior):
        return prior.noise_estimate(x_t, 300, prior.condition(prior.encode(images())), text, [branch])

    alone = [prior.encode_text([prompt]) for prompt in (TARGET, OTHER, SOURCE)]
    for branch, encoded in zip((0, 1, "image"), alone, strict=True):
        torch.testing.assert_close(estimate(branch), estimate(0, encoded), atol=1e-5, rtol=0)
    answers = [estimate(branch) for branch in (0, 1, "image", "uncond")]
    for i, answer in enumerate(answers):
        assert not any(torch.allclose(answer, other, atol=1e-4) for other in answers[:i])


def test_without_a_source_prompt_the_source_is_unconditional(pipeline, family):
    prior = PRIORS[family][1](pipeline)
    text, x_t = prior.encode_text([TARGET]), randn(1, 4, 16, 12).expand(2, -1, -1, -1)
    image, uncond = prior.noise_estimate(x_t, 300, prior.condition(prior.encode(images(2))), text, ["image", "uncond"])
    torch.testing.assert_close(image, uncond, atol=1e-5, rtol=0)


def test_latents_and_condition(prior, pipeline):
    source = images(2)
    latents = prior.encode(source)
    expected = pipeline.vae.encode(2 * source - 1).latent_dist.mode() * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(latents, expected.detach(), atol=1e-6, rtol=0)
    assert prior.condition(prior.encode(source)).shape == (2, 0, 16, 12)


def test_the_target_prompt_steers_the_edit_and_the_source_prompt_cancels_it(prior):
    """With the target equal to the source prompt the residual is zero at the source: nothing moves."""

    def edited(prompt: str) -> Tensor:
        source = images(3)
        particles = LatentStack(prior.encode(source))
        edit(particles, prior, prompt, EditConfig(steps=3, batch=2, mixing="none"))
        return particles.latents.detach() - prior.encode(source)

    assert edited(TARGET).abs().max() > 1e-2
    assert edited(SOURCE).abs().max() < 1e-4


def test_a_panorama_is_edited(prior):
    image = images(1, 70, 100)[0]
    edited = edit_panorama(image, prior, [TARGET, OTHER], EditConfig(steps=2, lr=0.1))
    assert edited.shape == image.shape and edited.isfinite().all()


def test_prompt_longer_than_the_model_reads(pipeline, family):
    with pytest.raises(ValueError, match=f"the prompt is {TOKENS - 1} tokens long"):
        PRIORS[family][1](pipeline, source_prompt="a " * (TOKENS - 1)).encode_text([TARGET])


def test_other_models_are_refused():
    with pytest.raises(ValueError, match=r"not a text-to-image Stable Diffusion: its U-Net takes 8 channels, not 4 \("):
        TextToImagePrior(tiny_pipeline())
