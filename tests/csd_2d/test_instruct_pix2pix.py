"""The InstructPix2Pix prior against diffusers' own pipeline, on tiny random weights."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionInstructPix2PixPipeline
from torch import Tensor

from csd_2d import EditConfig, LatentStack, edit_residual, load_prior
from csd_2d.edit import edit
from csd_2d.errors import NonFiniteError
from csd_2d.image_set import edit_images
from csd_2d.priors.analytic import AnalyticPrior
from csd_2d.priors.instruct_pix2pix import InstructPix2PixPrior
from csd_2d.priors.schedules import VariancePreservingSchedule
from tests.tiny_pipeline import TOKENS, save_tiny_pipeline, tiny_pipeline

PROMPT = "make it night"
SCALES = {(7.5, 1.5): 5, (3.0, 3.0): 4, (7.5, 1.0): 3, (1.0, 1.0): 2}
"""Guidance scales (text, image) and the U-Net rows a particle then costs."""


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline_folder: Path) -> StableDiffusionInstructPix2PixPipeline:
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(tiny_pipeline_folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def prior(tiny_pipeline_folder: Path) -> InstructPix2PixPrior:
    return InstructPix2PixPrior.from_pretrained(tiny_pipeline_folder)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def images(n: int = 1, height: int = 64, width: int = 64) -> Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(1))


def run_diffusers(pipeline: StableDiffusionInstructPix2PixPipeline, source: Tensor) -> list[dict]:
    """Arguments and output of every U-Net call of one edit, and the guided noise given to the scheduler."""
    calls: list[dict] = []

    def unet_called(module, args, kwargs, output):
        calls.append(
            {"input": args[0], "timestep": args[1], "text": kwargs["encoder_hidden_states"], "output": output[0]}
        )

    step = pipeline.scheduler.step

    def scheduler_called(model_output, *args, **kwargs):
        calls[-1]["guided"] = model_output
        return step(model_output, *args, **kwargs)

    handle = pipeline.unet.register_forward_hook(unet_called, with_kwargs=True)
    pipeline.scheduler.step = scheduler_called
    try:
        pipeline([PROMPT] * len(source), source, num_inference_steps=4, generator=torch.Generator().manual_seed(0))
    finally:
        handle.remove()
        pipeline.scheduler.step = step
    return calls


@pytest.mark.parametrize("shape", [(1, 64, 64), (2, 64, 48)])
def test_condition_is_what_diffusers_feeds(pipeline, prior, shape):
    source = images(*shape)
    seen = run_diffusers(pipeline, source)[0]["input"][: len(source), 4:]
    # Not to the bit: on some processors a convolution rounds differently from one call to the next.
    torch.testing.assert_close(prior.condition(prior.encode(source)), seen, atol=1e-6, rtol=0)
    torch.testing.assert_close(prior.encode(source), 0.18215 * seen, atol=1e-6, rtol=0)


def test_condition_of_half_precision_weights_is_what_diffusers_feeds_too(tiny_pipeline_folder):
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(tiny_pipeline_folder, safety_checker=None)
    pipeline.to(torch.bfloat16).set_progress_bar_config(disable=True)
    half = InstructPix2PixPrior.from_pretrained(tiny_pipeline_folder, dtype=torch.bfloat16)
    seen = run_diffusers(pipeline, images())[0]["input"][:1, 4:]
    torch.testing.assert_close(half.condition(half.encode(images())), seen.float(), atol=1e-6, rtol=0)


def test_decoded_images_are_those_of_diffusers(pipeline, prior):
    latents = randn(2, 4, 16, 16)
    expected = pipeline.image_processor.postprocess(pipeline.vae.decode(latents / 0.18215).sample, output_type="pt")
    decoded = prior.decode(latents)
    torch.testing.assert_close(decoded, expected.detach(), atol=1e-6, rtol=0)
    assert prior.decode(100 * latents).min() >= 0 and prior.decode(100 * latents).max() <= 1


def test_branches_and_text_are_those_of_diffusers(pipeline, prior):
    text = prior.encode_text([PROMPT])
    for call in run_diffusers(pipeline, images()):
        x_t, condition = call["input"][:, :4], prior.condition(prior.encode(images())).expand(3, -1, -1, -1)
        torch.testing.assert_close(text[[0, 1, 1]], call["text"], atol=1e-5, rtol=0)
        estimates = prior.noise_estimate(x_t, int(call["timestep"]), condition, text, [0, "image", "uncond"])
        torch.testing.assert_close(estimates, call["output"], atol=1e-5, rtol=0)
        assert not torch.allclose(estimates[0], estimates[1], atol=1e-3), "the text makes no difference"
        assert not torch.allclose(estimates[1], estimates[2], atol=1e-3), "the image makes no difference"


def test_guided_noise_is_that_of_diffusers(pipeline, prior):
    text, condition = prior.encode_text([PROMPT]), prior.condition(prior.encode(images()))
    for call in run_diffusers(pipeline, images()):
        x_t = call["input"][:1, :4]
        guided = edit_residual(prior, x_t, x_t, x_t, condition, int(call["timestep"]), text, 7.5, 1.5, baseline="none")
        torch.testing.assert_close(guided, call["guided"], atol=1e-4, rtol=0)


def test_schedule_is_the_models_own(pipeline, prior):
    alpha, sigma = prior.alpha_sigma(300)
    assert prior.num_timesteps == 1000
    assert alpha**2 == pytest.approx(pipeline.scheduler.alphas_cumprod[300].item(), rel=1e-6)
    assert alpha**2 + sigma**2 == pytest.approx(1, abs=1e-12)
    assert (prior.window, prior.cell) == (16, 4)


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
def test_estimates_do_not_depend_on_the_micro_batch(tiny_pipeline_folder, prior, micro_batch):
    other = InstructPix2PixPrior.from_pretrained(tiny_pipeline_folder, micro_batch=micro_batch)
    branches = ["uncond", 0, "image", 0, "uncond", "image", "image"]
    x_t, condition, text = randn(7, 4, 16, 16), randn(7, 4, 16, 16, seed=1), prior.encode_text([PROMPT])
    expected = torch.cat(
        [
            prior.noise_estimate(x_t[i : i + 1], 300, condition[i : i + 1], text, [branch])
            for i, branch in enumerate(branches)
        ]
    )
    torch.testing.assert_close(
        other.noise_estimate(x_t, 300, condition, text, branches),
        expected,
        atol=1e-5,
        rtol=0,
    )


def double_prior() -> InstructPix2PixPrior:
    return InstructPix2PixPrior(tiny_pipeline().to(torch.float64))


@pytest.mark.parametrize(("guidance_scale", "image_guidance_scale"), SCALES)
@pytest.mark.parametrize("make_prior", [AnalyticPrior, double_prior])
def test_residual_equals_the_six_branch_formula(make_prior, guidance_scale, image_guidance_scale):
    prior = make_prior()
    n, text = 3, prior.encode_text([PROMPT])
    condition = prior.condition(prior.encode(images(n, 32, 32).double()))
    x_t, source_t, noise = (randn(*condition.shape, seed=i, dtype=torch.float64) for i in range(3))

    def estimate(x: Tensor, branch: str) -> Tensor:
        return prior.noise_estimate(x, 300, condition, text, [branch] * n)

    # eq. 3 and eq. 9 as printed, each estimate on its own, whatever its coefficient.
    uncond, image, full = (estimate(x_t, branch) for branch in ("uncond", "image", 0))
    target = uncond + image_guidance_scale * (image - uncond) + guidance_scale * (full - image)
    uncond, image, _ = (estimate(source_t, branch) for branch in ("uncond", "image", 0))
    baseline = uncond + image_guidance_scale * (image - uncond)

    residual = edit_residual(prior, x_t, source_t, noise, condition, 300, text, guidance_scale, image_guidance_scale)
    assert residual.dtype == torch.float64
    torch.testing.assert_close(residual, target - baseline, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("scales", "rows"), SCALES.items())
def test_unet_rows_per_particle(prior, scales, rows):
    batches = []
    handle = prior.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    latents = randn(4, 4, 16, 16)
    try:
        edit_residual(prior, latents, latents, latents, latents, 300, prior.encode_text([PROMPT]), *scales)
    finally:
        handle.remove()
    assert sum(batches) == 4 * rows
    assert max(batches) <= prior.micro_batch


def test_no_graph_through_the_unet(prior):
    x_t = randn(1, 4, 16, 16).requires_grad_()
    estimate = prior.noise_estimate(x_t, 300, x_t, prior.encode_text([PROMPT]), [0])
    assert not estimate.requires_grad
    networks = (prior.unet, prior.vae, prior.text_encoder)
    assert not any(weight.requires_grad for network in networks for weight in network.parameters())


@pytest.mark.parametrize("offload", [False, True])
def test_gradient_flows_through_encode(tiny_pipeline_folder, offload):
    prior = InstructPix2PixPrior.from_pretrained(tiny_pipeline_folder, offload=offload)
    source = images().requires_grad_()
    latents = prior.encode(source)
    prior.noise_estimate(latents, 300, latents, prior.encode_text([PROMPT]), [0])
    latents.square().sum().backward()
    assert source.grad is not None and source.grad.isfinite().all() and source.grad.abs().max() > 0
    with torch.no_grad():
        assert not prior.encode(source).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_give_fp32(tiny_pipeline_folder, prior, dtype):
    half = InstructPix2PixPrior.from_pretrained(tiny_pipeline_folder, dtype=dtype)
    assert half.unet.dtype == half.vae.dtype == half.text_encoder.dtype == dtype
    x_t, text = randn(2, 4, 16, 16), half.encode_text([PROMPT])
    estimate = half.noise_estimate(x_t, 300, half.condition(half.encode(images(2))), text, [0, "uncond"])
    expected = prior.noise_estimate(
        x_t, 300, prior.condition(prior.encode(images(2))), prior.encode_text([PROMPT]), [0, "uncond"]
    )
    assert estimate.dtype == half.encode(images()).dtype == half.decode(x_t).dtype == torch.float32
    # bfloat16 keeps 8 bits: 0.4 % a rounding, a few dozen of them one after the other.
    torch.testing.assert_close(estimate, expected, atol=0.05, rtol=0)


def test_offload_changes_nothing_and_keeps_one_network_on_the_device(tiny_pipeline_folder, prior, monkeypatch):
    offloaded = InstructPix2PixPrior.from_pretrained(tiny_pipeline_folder, offload=True)
    assert torch.equal(offloaded.encode(images()), prior.encode(images()))
    assert torch.equal(offloaded.decode(randn(1, 4, 16, 16)), prior.decode(randn(1, 4, 16, 16)))

    # There is no second device here: what counts as being on it is kept by hand.
    present: set[str] = set()
    device = offloaded.device
    for name in ("text_encoder", "vae", "unet"):
        network = getattr(offloaded, name)

        def to(target, name=name, network=network):
            (present.add if target is device else present.discard)(name)
            return network

        monkeypatch.setattr(network, "to", to)
        network.register_forward_pre_hook(lambda module, args, name=name: seen.append(set(present)))
    monkeypatch.setattr(offloaded.vae, "encode", recorded(offloaded.vae.encode, lambda: seen.append(set(present))))
    seen: list[set[str]] = []

    with torch.no_grad():
        text = offloaded.encode_text([PROMPT])
        latents = offloaded.encode(images())
        for _ in range(2):
            offloaded.noise_estimate(latents, 300, latents, text, [0])
        assert present == {"unet"}
        offloaded.decode(latents)
    assert seen == [{"text_encoder"}, {"vae"}, {"unet"}, {"unet"}]
    assert present == set()


def recorded(function, note):
    def call(*args, **kwargs):
        note()
        return function(*args, **kwargs)

    return call


def test_an_autoencoder_that_overflows_is_named(tiny_pipeline_folder):
    prior = load_prior(str(tiny_pipeline_folder))
    images = torch.rand(1, 3, 16, 16)
    latents = prior.encode(images)
    with torch.no_grad():
        for convolution in (prior.vae.encoder.conv_in, prior.vae.decoder.conv_in):
            convolution.bias.fill_(float("inf"))
    for code, values in ((prior.encode, images), (prior.decode, latents)):
        with pytest.raises(NonFiniteError, match=r"autoencoder overflows in torch\.float32; use float32 or bfloat16"):
            code(values)


def test_v_prediction_is_converted_to_noise():
    prior = InstructPix2PixPrior(tiny_pipeline(prediction_type="v_prediction"))
    x_0, noise = randn(1, 4, 16, 16), randn(1, 4, 16, 16, seed=1)
    alpha, sigma = prior.alpha_sigma(300)

    class Exact(torch.nn.Module):
        """A network that knows the answer."""

        dtype = torch.float32

        def forward(self, *args, **kwargs):
            return type("Output", (), {"sample": alpha * noise - sigma * x_0})

    prior.unet = Exact()
    estimate = prior.noise_estimate(alpha * x_0 + sigma * noise, 300, x_0, prior.encode_text([PROMPT]), [0])
    torch.testing.assert_close(estimate, noise, atol=1e-6, rtol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_conversion_agrees_with_the_scheduler_of_diffusers(prediction_type):
    pipeline = tiny_pipeline(prediction_type=prediction_type)
    prior = InstructPix2PixPrior(pipeline)
    x_t, text = randn(1, 4, 16, 16), prior.encode_text([PROMPT])
    rows = torch.cat([x_t, x_t], 1)
    output = prior.unet(rows, 300, encoder_hidden_states=text[:1]).sample.detach()
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(1000)
    alpha, sigma = prior.alpha_sigma(300)
    x_0 = scheduler.step(output, 300, x_t).pred_original_sample
    estimate = prior.noise_estimate(x_t, 300, x_t, text, [0])
    torch.testing.assert_close((x_t - sigma * estimate) / alpha, x_0, atol=1e-5, rtol=0)


def test_timesteps_that_are_all_noise_are_not_drawn():
    def schedule(**options) -> VariancePreservingSchedule:
        stable_diffusions = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        return VariancePreservingSchedule(DDIMScheduler(**stable_diffusions, **options))

    whole, stretched = schedule(), schedule(rescale_betas_zero_snr=True)
    assert whole.num_timesteps == 1000 and stretched.alphas_cumprod[-1] == 0
    end = whole.alpha_sigma(999)
    assert stretched.alpha_sigma(stretched.num_timesteps - 1) == pytest.approx(end, abs=1e-3)


@pytest.mark.parametrize("cells", [13, 16, 17, 25, 37, 48])
def test_tiles_are_never_narrower_than_their_overlap(prior, cells):
    widths = []
    handle = prior.vae.encoder.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[-1] // 4))
    try:
        latents = prior.encode(images(1, 16, 4 * cells))
    finally:
        handle.remove()
    assert latents.shape == (1, 4, 4, cells)
    assert prior.decode(latents).shape == (1, 3, 16, 4 * cells)
    assert widths == [cells] if cells <= 16 else min(widths) >= 4 and max(widths) == 16


def test_an_edit_runs_and_repeats_bit_for_bit(prior):
    def edited() -> Tensor:
        source = images(3)
        particles = LatentStack(prior.encode(source))
        edit(particles, prior, PROMPT, EditConfig(steps=3, batch=2))
        return particles.latents.detach()

    assert torch.equal(edited(), edited())
    assert not torch.allclose(edited(), prior.encode(images(3)), atol=1e-3)


def test_loading_by_name_passes_options_on(tiny_pipeline_folder):
    prior = load_prior(str(tiny_pipeline_folder), micro_batch=2, dtype=torch.bfloat16)
    assert isinstance(prior, InstructPix2PixPrior)
    assert (prior.micro_batch, prior.unet.dtype) == (2, torch.bfloat16)


def test_prompt_longer_than_the_model_reads(prior):
    assert prior.encode_text(["a " * (TOKENS - 2)]).shape[1] == TOKENS
    with pytest.raises(
        ValueError, match=f"the prompt is {TOKENS - 1} tokens long, the model reads at most {TOKENS - 2}"
    ):
        prior.encode_text(["a " * (TOKENS - 1)])


def test_micro_batch_must_be_positive(tiny_pipeline_folder):
    with pytest.raises(ValueError, match="micro_batch must be at least 1, got 0"):
        InstructPix2PixPrior.from_pretrained(tiny_pipeline_folder, micro_batch=0)


def remove(name: str):
    def damage(folder: Path) -> None:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    return damage


def cut_short(name: str):
    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:500])

    return damage


def pickled(folder: Path) -> None:
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet/diffusion_pytorch_model.bin")


@pytest.mark.parametrize(
    "damage",
    [
        remove("model_index.json"),
        remove("unet"),
        remove("scheduler"),
        cut_short("model_index.json"),
        cut_short("unet/diffusion_pytorch_model.safetensors"),
        cut_short("text_encoder/model.safetensors"),
        cut_short("vae/config.json"),
        pickled,
    ],
)
def test_damaged_folder(tiny_pipeline_folder, tmp_path, damage):
    folder = shutil.copytree(tiny_pipeline_folder, tmp_path / "model")
    damage(folder)
    with pytest.raises(OSError, match="does not hold an InstructPix2Pix") as raised:
        InstructPix2PixPrior.from_pretrained(folder)
    assert_one_sentence_with_ways_out(str(raised.value), str(folder))


def assert_one_sentence_with_ways_out(message: str, tried: str) -> None:
    assert tried in message
    assert "--prior tiny" in message and "a folder" in message
    assert "\n" not in message and message.endswith(".")


def set_config(name: str, key: str, value: object):
    def change(folder: Path) -> None:
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**config, key: value}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_config("scheduler/scheduler_config.json", "prediction_type", "sample"), "prediction_type is 'sample'"),
        (
            set_config("model_index.json", "scheduler", ["diffusers", "FlowMatchEulerDiscreteScheduler"]),
            "FlowMatchEulerDiscreteScheduler, has no alphas_cumprod",
        ),
        (remove("tokenizer"), "its tokenizer knows 2 tokens"),
    ],
)
def test_pipeline_that_is_no_instruct_pix2pix(tiny_pipeline_folder, tmp_path, change, message):
    folder = shutil.copytree(tiny_pipeline_folder, tmp_path / "model")
    change(folder)
    with pytest.raises(ValueError, match=message):
        InstructPix2PixPrior.from_pretrained(folder)


def test_text_to_image_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not an InstructPix2Pix: its U-Net takes 4 channels, not 8"):
        InstructPix2PixPrior.from_pretrained(save_tiny_pipeline(tmp_path, unet_channels=4))


@pytest.mark.parametrize("local_files_only", [False, True])
def test_model_that_cannot_be_had(monkeypatch, local_files_only):
    def no_network(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.model_info", no_network)
    with pytest.raises(OSError, match="in its cache" if not local_files_only else "not in the cache") as raised:
        load_prior("nobody/no-such-model", local_files_only=local_files_only)
    assert_one_sentence_with_ways_out(str(raised.value), "nobody/no-such-model")
    assert ("no route to host" in str(raised.value)) is not local_files_only


def test_silent_hub_is_given_up(monkeypatch):
    """A firewall that drops packets: the connection opens, no answer comes."""
    monkeypatch.setattr("csd_2d.hub.HUB_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(OSError, match="ReadTimeout"):
            load_prior("nobody/no-such-model")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("offload", [False, True])
def test_half_precision_and_offload_on_a_gpu_edit_as_the_cpu_does(tiny_pipeline_folder, offload):
    images = [torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    config = EditConfig(steps=2, guidance_scale=1.5, lr=0.1)
    expected = edit_images(images, load_prior(str(tiny_pipeline_folder)), PROMPT, config)
    prior = load_prior(str(tiny_pipeline_folder), "cuda", offload=offload)
    for ours, theirs in zip(edit_images(images, prior, PROMPT, config), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0)  # fp16 through a VAE of random weights
