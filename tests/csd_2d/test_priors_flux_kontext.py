"""The FLUX.1 Kontext prior against diffusers' own pipeline, on tiny random weights."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import FluxKontextPipeline
from torch import Tensor

from csd_2d import EditConfig, edit_residual
from csd_2d.image_set import edit_images
from csd_2d.panorama import edit_panorama
from csd_2d.priors.flux_kontext import FluxKontextPrior
from tests.tiny_pipeline import tiny_kontext, tiny_pipeline

PROMPT = "make it night"
TIMES = {999: 1.0, 749: 0.75, 499: 0.5, 249: 0.25}
"""Timesteps of an unshifted schedule, and the flow times of four inference steps."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kontext")
    tiny_kontext(shifted=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder) -> FluxKontextPipeline:
    pipeline = FluxKontextPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def prior(folder) -> FluxKontextPrior:
    return FluxKontextPrior.from_pretrained(folder)


def images(n: int = 1, height: int = 64, width: int = 48) -> Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(1))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run_diffusers(pipeline: FluxKontextPipeline, source: Tensor | None) -> list[dict]:
    """Arguments and output of every transformer call, and, with the step they belong to, what the scheduler is given.

    Text guidance of 2 on top of the distilled one of 2.5: two calls a step, with the prompt and with the empty one.
    """
    calls: list[dict] = []
    step = pipeline.scheduler.step

    def scheduler_called(model_output, t, sample, **kwargs):
        calls[-1] |= {"guided": model_output}
        return step(model_output, t, sample, **kwargs)

    handle = pipeline.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append({**kwargs, "output": output[0]}), with_kwargs=True
    )
    pipeline.scheduler.step = scheduler_called
    try:
        pipeline(
            image=source,
            prompt=PROMPT,
            negative_prompt="",
            true_cfg_scale=2.0,
            guidance_scale=2.5,
            height=64,
            width=48,
            max_area=64 * 48,
            _auto_resize=False,
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(0),
        )
    finally:
        handle.remove()
        pipeline.scheduler.step = step
    return calls


def unpacked(pipeline: FluxKontextPipeline, tokens: Tensor) -> Tensor:
    """Tokens of a 64x48 image as diffusers lays them out in the VAE's cells."""
    return pipeline._unpack_latents(tokens, 64, 48, pipeline.vae_scale_factor)


def as_cells(pipeline: FluxKontextPipeline, tokens: Tensor) -> Tensor:
    """The same in the prior's cells, 2x2 of the VAE's in one: channel, row and column in this order."""
    latents = unpacked(pipeline, tokens)
    corners = [latents[..., y::2, x::2] for y in (0, 1) for x in (0, 1)]
    return torch.stack(corners, 2).flatten(1, 2)


@pytest.fixture(scope="module")
def calls(pipeline) -> list[dict]:
    return run_diffusers(pipeline, images())


def test_condition_is_what_diffusers_feeds(pipeline, prior, calls):
    image_tokens = calls[0]["hidden_states"][:, 48:]
    torch.testing.assert_close(
        prior.condition(prior.encode(images())), as_cells(pipeline, image_tokens), atol=1e-6, rtol=0
    )
    assert prior.encode(images()).shape == (1, 16, 8, 6) and prior.cell == 8


def test_decoded_images_are_those_of_diffusers(pipeline, prior):
    tokens = randn(1, 48, 16)
    latents = unpacked(pipeline, tokens) / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
    expected = pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample, output_type="pt")
    torch.testing.assert_close(prior.decode(as_cells(pipeline, tokens)), expected.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("with_image", [True, False])
def test_branches_are_those_of_diffusers(pipeline, prior, with_image):
    source = images() if with_image else None
    branches = [(0, "image") if with_image else ("uncond",)] * 4
    text, condition = prior.encode_text([PROMPT]), prior.condition(prior.encode(images()))
    per_step = run_diffusers(pipeline, source)
    for (timestep, time), seen, pair in zip(
        TIMES.items(), branches, zip(per_step[::2], per_step[1::2], strict=True), strict=True
    ):
        # Without an image the prior asks for the empty prompt alone, diffusers' second call.
        for branch, call in zip(seen, pair if with_image else pair[1:], strict=True):
            assert call["timestep"].tolist() == pytest.approx([time])
            x_t, velocity = (as_cells(pipeline, call[name][:, :48]) for name in ("hidden_states", "output"))
            estimate = prior.noise_estimate(x_t, timestep, condition, text, [branch])
            torch.testing.assert_close(estimate, x_t + (1 - time) * velocity, atol=1e-5, rtol=0)


def test_mixed_branches_keep_their_order(prior):
    text, branches = prior.encode_text([PROMPT, "make it day"]), ["uncond", 1, "image", "uncond", 0]
    x_t, condition = randn(5, 16, 8, 6), randn(5, 16, 8, 6, seed=1)
    together = prior.noise_estimate(x_t, 499, condition, text, branches)
    alone = [
        prior.noise_estimate(x_t[i : i + 1], 499, condition[i : i + 1], text, [branch])
        for i, branch in enumerate(branches)
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
    same = prior.noise_estimate(x_t[:1].expand(4, -1, -1, -1), 499, condition[:4], text, [0, 1, "image", "uncond"])
    for i in range(4):
        assert not any(torch.allclose(same[i], other, atol=1e-4) for other in same[:i])


def test_guidance_above_one_is_diffusers_true_guidance(pipeline, prior, calls):
    text, condition = prior.encode_text([PROMPT]), prior.condition(prior.encode(images()))
    for (timestep, time), call in zip(TIMES.items(), calls[1::2], strict=True):
        x_t = as_cells(pipeline, call["hidden_states"][:, :48])
        guided = edit_residual(prior, x_t, x_t, x_t, condition, timestep, text, 2.0, 1.0, baseline="none")
        expected = x_t + (1 - time) * as_cells(pipeline, call["guided"])
        torch.testing.assert_close(guided, expected, atol=1e-5, rtol=0)


def test_transformer_is_told_the_distilled_guidance(pipeline, prior):
    text, x_t = prior.encode_text([PROMPT]), randn(1, 16, 8, 6)
    other = FluxKontextPrior(pipeline, distilled_guidance=5.0)
    estimates = [p.noise_estimate(x_t, 499, x_t, text, [0]) for p in (prior, other)]
    assert not torch.allclose(*estimates, atol=1e-4)


def test_exact_velocity_gives_the_noise_back(prior, monkeypatch):
    x_0, noise = randn(1, 16, 8, 6), randn(1, 16, 8, 6, seed=1)
    velocity = noise - x_0
    tokens = velocity.flatten(2).mT
    monkeypatch.setattr(
        prior.transformer,
        "forward",
        lambda hidden_states, **kwargs: type("Output", (), {"sample": hidden_states * 0 + tokens.repeat(1, 2, 1)}),
    )
    for timestep in (0, 300, 999):
        alpha, sigma = prior.alpha_sigma(timestep)
        assert alpha + sigma == pytest.approx(1)
        estimate = prior.noise_estimate(
            alpha * x_0 + sigma * noise, timestep, x_0, prior.encode_text([PROMPT]), ["image"]
        )
        torch.testing.assert_close(estimate, noise, atol=1e-6, rtol=0)


def test_schedule_is_shifted_as_the_model_samples():
    """s' = e^mu / (e^mu + 1/s - 1), with the scheduler's mu = 1.15 for the 4,096 tokens of a window."""
    prior = FluxKontextPrior(tiny_kontext())
    assert prior.window == 64
    for timestep in (0, 249, 499, 999):
        unshifted = (timestep + 1) / 1000
        expected = math.exp(1.15) / (math.exp(1.15) + 1 / unshifted - 1)
        alpha, sigma = prior.alpha_sigma(timestep)
        assert (alpha, sigma) == pytest.approx((1 - expected, expected), abs=1e-6)


def test_offload_and_micro_batch_change_nothing(folder, prior):
    other = FluxKontextPrior.from_pretrained(folder, offload=True, micro_batch=1)
    x_t, condition = randn(4, 16, 8, 6), prior.condition(prior.encode(images(4)))
    branches = [0, "uncond", "image", "uncond"]
    estimates = [p.noise_estimate(x_t, 300, condition, p.encode_text([PROMPT]), branches) for p in (prior, other)]
    torch.testing.assert_close(*estimates, atol=1e-5, rtol=0)
    assert torch.equal(other.encode(images()), prior.encode(images()))


def test_half_precision_weights_give_fp32(folder, prior):
    half = FluxKontextPrior.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.transformer.dtype == torch.bfloat16 and FluxKontextPrior.cuda_dtype == torch.bfloat16
    x_t = randn(1, 16, 8, 6)
    estimates = [
        p.noise_estimate(x_t, 499, p.condition(p.encode(images())), p.encode_text([PROMPT]), [0]) for p in (half, prior)
    ]
    assert estimates[0].dtype == torch.float32
    assert (estimates[0] - estimates[1]).abs().mean() < 0.02  # bfloat16 keeps 8 bits; a prompt makes 0.1


def test_images_of_an_odd_number_of_cells_are_edited(prior):
    source = [torch.rand(3, 56, 41, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    edited, again = (edit_images(source, prior, PROMPT, EditConfig(steps=2, lr=0.2)) for _ in range(2))
    assert [image.shape for image in edited] == [image.shape for image in source]
    assert torch.equal(edited[0], again[0]) and not torch.allclose(edited[0], source[0], atol=1e-2)


def test_a_panorama_is_edited_in_crops(folder):
    pipeline = FluxKontextPipeline.from_pretrained(folder)
    pipeline.default_sample_size = 16  # of the VAE's cells, 128 in the real one
    prior = FluxKontextPrior(pipeline)
    assert prior.window == 8
    rows: list[int] = []
    prior.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    edited = edit_panorama(images(1, 60, 100)[0], prior, PROMPT, EditConfig(steps=2, lr=0.2))
    assert edited.shape == (3, 60, 100) and edited.isfinite().all()
    assert set(rows) == {2 * 8 * 8}  # a crop and its image, and nothing else by default


def test_prompt_longer_than_the_model_reads(prior):
    with pytest.raises(ValueError, match="the prompt is 600 tokens long, the model reads at most 511"):
        prior.encode_text(["a " * 600])


def test_other_models_are_refused():
    pipeline = tiny_kontext()
    pipeline.scheduler = tiny_pipeline().scheduler
    with pytest.raises(ValueError, match=r"not a FLUX\.1 Kontext: its scheduler, EulerAncestral\w+, is none for flow"):
        FluxKontextPrior(pipeline)
