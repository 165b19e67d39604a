"""InstructPix2Pix XL and CosXL-Edit against diffusers' own pipeline, on tiny random weights."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLInstructPix2PixPipeline
from torch import Tensor

from csd_2d import EditConfig, LatentStack, edit_residual
from csd_2d.edit import edit
from csd_2d.priors.instruct_pix2pix import InstructPix2PixXLPrior
from tests.tiny_pipeline import tiny_xl

PROMPT = "make it night"
TIMESTEPS = (999, 666, 333, 0)
"""What four inference steps run through, of a thousand: first and last, evenly spaced."""


@pytest.fixture(scope="module", params=["xl", "cosxl"])
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_xl(cosxl=request.param == "cosxl").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cosxl(folder: Path) -> bool:
    return folder.name.startswith("cosxl")


@pytest.fixture(scope="module")
def pipeline(folder: Path, cosxl: bool) -> StableDiffusionXLInstructPix2PixPipeline:
    pipeline = StableDiffusionXLInstructPix2PixPipeline.from_pretrained(
        folder, is_cosxl_edit=cosxl, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def prior(folder: Path) -> InstructPix2PixXLPrior:
    return InstructPix2PixXLPrior.from_pretrained(folder)


def images(n: int = 1, height: int = 64, width: int = 48) -> Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def calls(pipeline) -> list[dict]:
    """What the U-Net is given and answers in each step of diffusers' edit, and what the scheduler makes of it."""
    calls: list[dict] = []
    step = pipeline.scheduler.step

    def scheduler_called(model_output, t, sample, *args, **kwargs):
        output = step(model_output, t, sample, *args, **{**kwargs, "return_dict": True})
        calls[-1] |= {"guided": model_output, "x_0": output.pred_original_sample}
        return (output.prev_sample,)

    handle = pipeline.unet.register_forward_hook(
        lambda module, args, kwargs, output: calls.append({"input": args[0], "output": output[0], **kwargs}),
        with_kwargs=True,
    )
    pipeline.scheduler.step = scheduler_called
    try:
        source = images()
        pipeline(
            PROMPT,
            image=source,
            height=source.shape[-2],
            width=source.shape[-1],
            guidance_scale=5.0,
            image_guidance_scale=1.5,
            num_inference_steps=len(TIMESTEPS),
            generator=torch.Generator().manual_seed(0),
        )
    finally:
        handle.remove()
        pipeline.scheduler.step = step
    return calls


def test_condition_is_what_diffusers_feeds(prior, calls, cosxl):
    torch.testing.assert_close(prior.condition(prior.encode(images())), calls[0]["input"][:1, 4:], atol=1e-6, rtol=0)
    # CosXL-Edit's is the latent itself, the other's is larger by 1 / 0.13025.
    ratio = prior.encode(images()) / prior.condition(prior.encode(images()))
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1.0 if cosxl else 0.13025))


def test_text_is_what_diffusers_feeds(prior, calls, cosxl):
    text = prior.encode_text([PROMPT])
    rows = [0, 1, 1]
    assert bool(text.embeddings[1].any()) is cosxl, "the other model was trained on zeros for the empty prompt"
    torch.testing.assert_close(text.embeddings[rows], calls[0]["encoder_hidden_states"], atol=1e-5, rtol=0)
    torch.testing.assert_close(text.pooled[rows], calls[0]["added_cond_kwargs"]["text_embeds"], atol=1e-5, rtol=0)


def test_guided_noise_leads_to_the_clean_image_of_diffusers_scheduler(prior, calls):
    text, condition = prior.encode_text([PROMPT]), prior.condition(prior.encode(images()))
    for call, timestep in zip(calls, TIMESTEPS, strict=True):
        x_t = call["input"][:1, :4]  # diffusers scales the input to variance preserving, too, as sigma_data is 1
        guided = edit_residual(prior, x_t, x_t, x_t, condition, timestep, text, 5.0, 1.5, baseline="none")
        alpha, sigma = prior.alpha_sigma(timestep)
        # Divided by alpha, 0.008 at the noisiest, the last bits of a guided estimate of 5 come to a few 1e-4.
        torch.testing.assert_close((x_t - sigma * guided) / alpha, call["x_0"], atol=1e-3, rtol=0)


def test_branches_are_those_of_diffusers(prior, calls, cosxl):
    text, condition = prior.encode_text([PROMPT]), prior.condition(prior.encode(images())).expand(3, -1, -1, -1)
    for call, timestep in zip(calls, TIMESTEPS, strict=True):
        x_t = call["input"][:, :4]
        estimates = prior.noise_estimate(x_t, timestep, condition, text, [0, "image", "uncond"])
        alpha, sigma = prior.alpha_sigma(timestep)
        expected = alpha * call["output"] + sigma * x_t if cosxl else call["output"]
        torch.testing.assert_close(estimates, expected, atol=2e-4, rtol=0)
        assert not torch.allclose(call["output"][0], call["output"][1], atol=1e-3), "the text makes no difference"
        assert not torch.allclose(call["output"][1], call["output"][2], atol=1e-3), "the image makes no difference"


def test_sizes_and_pooled_text_reach_the_network(prior):
    seen: list[dict] = []
    handle = prior.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["added_cond_kwargs"]), with_kwargs=True
    )
    text = prior.encode_text([PROMPT])
    x_t = torch.zeros(2, 4, 16, 12)
    try:
        prior.noise_estimate(x_t, 300, x_t, text, ["image", 0])
    finally:
        handle.remove()
    assert seen[0]["time_ids"].tolist() == [[64, 48, 0, 0, 64, 48]] * 2
    assert torch.equal(seen[0]["text_embeds"], text.pooled[[1, 0]])


def test_schedule(prior, cosxl):
    alphas, sigmas = zip(*map(prior.alpha_sigma, range(prior.num_timesteps)), strict=True)
    assert prior.num_timesteps == 1000
    assert list(sigmas) == sorted(sigmas) and list(alphas) == sorted(alphas, reverse=True)
    for alpha, sigma in zip(alphas, sigmas, strict=True):
        assert alpha**2 + sigma**2 == pytest.approx(1)
    # Noise per signal: from 0.002 to 120 in equal ratios, or what Stable Diffusion's betas come to.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    table = ((1 / (1 - betas).cumprod(0) - 1) ** 0.5).tolist()
    for t in (0, 333, 999):
        expected = 0.002 * 60000 ** (t / 999) if cosxl else table[t]
        assert sigmas[t] / alphas[t] == pytest.approx(expected, rel=1e-4)


def test_exact_network_of_cosxl_gives_the_noise_back():
    """A network trained to EDM's target says which noise was added.

    The target is arXiv 2206.00364, eq. 7, solved for F with D = x_0; under v prediction diffusers turns its sign.
    """
    prior = InstructPix2PixXLPrior(tiny_xl(cosxl=True))
    generator = torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn(1, 4, 16, 16, generator=generator) for _ in range(2))
    for timestep in (100, 500, 900):
        alpha, sigma = prior.alpha_sigma(timestep)
        level = sigma / alpha
        target = ((x_0 + level * noise) / (1 + level**2) - x_0) * (1 + level**2) ** 0.5 / level
        prior.unet.forward = lambda *args, target=target, **kwargs: type("Output", (), {"sample": target})
        x_t = alpha * x_0 + sigma * noise
        estimate = prior.noise_estimate(x_t, timestep, x_0, prior.encode_text([PROMPT]), ["image"])
        # x - x_0 is divided by the level, 0.006 at the lowest of these.
        torch.testing.assert_close(estimate, noise, atol=1e-3, rtol=0)


def test_offload_and_micro_batch_change_nothing(folder, prior):
    other = InstructPix2PixXLPrior.from_pretrained(folder, offload=True, micro_batch=1)
    x_t, condition = (
        torch.randn(3, 4, 16, 12, generator=torch.Generator().manual_seed(0)),
        prior.condition(prior.encode(images(3))),
    )
    branches = [0, "uncond", "image"]
    estimates = [p.noise_estimate(x_t, 300, condition, p.encode_text([PROMPT]), branches) for p in (prior, other)]
    torch.testing.assert_close(*estimates, atol=1e-4, rtol=0)
    assert torch.equal(other.encode(images()), prior.encode(images()))


def test_vae_that_overflows_in_half_precision_stays_in_single(folder):
    half = InstructPix2PixXLPrior.from_pretrained(folder, dtype=torch.float16)
    assert half.vae.config.force_upcast
    assert (half.unet.dtype, half.vae.dtype) == (torch.float16, torch.float32)
    assert half.encode(images()).dtype == torch.float32


def test_an_edit_runs_and_repeats_bit_for_bit(prior):
    def edited() -> Tensor:
        source = images(3)
        particles = LatentStack(prior.encode(source))
        edit(particles, prior, PROMPT, EditConfig(steps=3, batch=2))
        return particles.latents.detach()

    assert torch.equal(edited(), edited())
    assert not torch.allclose(edited(), prior.encode(images(3)), atol=1e-3)
