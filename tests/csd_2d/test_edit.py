"""Residual, surrogate loss, particles and the loop against independent derivations and known answers."""

import dataclasses
import itertools
from collections import Counter

import pytest
import torch

from csd_2d import (
    CanvasCrops,
    Edit,
    EditConfig,
    LatentStack,
    NonFiniteError,
    add_noise,
    edit_residual,
    guidance_weights,
    load_preset,
    load_prior,
    schedule,
    surrogate_loss,
)
from csd_2d.edit import edit
from csd_2d.image_set import edit_images
from csd_2d.particles import noise_source
from csd_2d.presets import preset_names
from csd_2d.priors.analytic import AnalyticPrior
from csd_2d.schedule import Batches
from csd_2d.tiles import window_positions
from csd_2d.tiny.scenes import held_out

AMBIGUOUS = "paint it a new color"


@pytest.fixture
def stack():
    images = torch.rand(4, 3, 12, 10, generator=torch.Generator().manual_seed(3)) * 0.7 + 0.15
    latents = AnalyticPrior().encode(images)
    return images, LatentStack(latents)


class CountingPrior(AnalyticPrior):
    """Counts the rows evaluated."""

    rows = 0

    def noise_estimate(self, x_t, timestep, condition, text, branches):
        assert not torch.is_grad_enabled()
        self.rows += len(x_t)
        return super().noise_estimate(x_t, timestep, condition, text, branches)


@pytest.mark.parametrize(
    ("guidance_scale", "image_guidance_scale", "rows"), [(7.5, 1.5, 5), (1.5, 1.5, 4), (7.5, 1.0, 3), (1.0, 1.0, 2)]
)
def test_residual_equals_the_six_branch_formula_with_fewer_evaluations(guidance_scale, image_guidance_scale, rows):
    prior = CountingPrior(spread=0.5)
    generator = torch.Generator().manual_seed(0)
    x_0, source, noise = torch.randn(3, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    alpha, sigma = prior.alpha_sigma(400)
    x_t, source_t = add_noise(x_0, noise, alpha, sigma), add_noise(source, noise, alpha, sigma)
    text = prior.encode_text([AMBIGUOUS])

    def estimate(x, branch):
        return AnalyticPrior.noise_estimate(prior, x, 400, source, text, [branch, branch])

    def guided(x, text_scale):  # eq. 3 as printed
        uncond, image, full = (estimate(x, branch) for branch in ("uncond", "image", 0))
        return uncond + image_guidance_scale * (image - uncond) + text_scale * (full - image)

    expected = guided(x_t, guidance_scale) - guided(source_t, 0.0)
    scales = (guidance_scale, image_guidance_scale)
    with torch.no_grad():
        residual = edit_residual(prior, x_t, source_t, noise, source, 400, text, *scales)
    torch.testing.assert_close(residual, expected, rtol=1e-12, atol=1e-12)
    assert prior.rows == rows * len(x_0)


def test_other_baselines(stack):
    prior = AnalyticPrior()
    x = torch.randn(2, 3, 4, 4)
    noise = torch.randn(2, 3, 4, 4)
    arguments = (prior, x, x, noise, x, 300, prior.encode_text(["make it sepia"]), 1.0, 1.0)
    plain = edit_residual(*arguments, baseline="none")
    torch.testing.assert_close(edit_residual(*arguments, baseline="noise"), plain - noise)
    torch.testing.assert_close(plain, prior.noise_estimate(x, 300, x, arguments[6], [0, 0]))


def test_guidance_weights_sum_to_one_for_the_target():
    for scales in itertools.product((0.0, 1.0, 3.0), repeat=2):
        assert sum(guidance_weights(*scales).values()) == pytest.approx(1)
        assert 0 not in guidance_weights(*scales).values()


def test_surrogate_gradient_is_minus_weighted_direction():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    direction = torch.randn(2, 3, 4, 4, requires_grad=True)
    surrogate_loss(x, direction, weight=0.3).backward()
    torch.testing.assert_close(x.grad, -0.3 * direction.detach())
    assert direction.grad is None


def test_one_particle_is_the_delta_denoising_score(stack):
    """With N = 1 a step of the loop is x -= lr w(t) (target estimate - source estimate), computed here by hand."""
    images, _ = stack
    prior = AnalyticPrior()
    latents = prior.encode(images[:1])
    particles = LatentStack(latents)
    config = EditConfig(steps=1, lr=0.7, seed=5, schedule="random", weight="noise", baseline="image", max_timestep=0.5)
    edit(particles, prior, "make it night", config)

    generator = torch.Generator().manual_seed(5)
    timestep = int(torch.randint(20, 501, (), generator=generator))
    alpha, sigma = prior.alpha_sigma(timestep)
    noised = alpha * latents + sigma * torch.randn(latents.shape, generator=generator)
    text = prior.encode_text(["make it night"])
    target = prior.noise_estimate(noised, timestep, latents, text, [0])
    baseline = prior.noise_estimate(noised, timestep, latents, text, ["image"])
    expected = latents - 0.7 * sigma**2 * (target - baseline)
    torch.testing.assert_close(particles.latents.detach(), expected)


@pytest.mark.parametrize("prompt", ["make it night", "make it sepia", "invert the colors", "paint it blue"])
@pytest.mark.parametrize("preset", preset_names())
def test_edits_reach_the_known_answer(stack, prompt, preset):
    images, particles = stack
    prior = AnalyticPrior()
    edit(particles, prior, prompt, dataclasses.replace(load_preset(preset), steps=80))
    error = (prior.decode(particles.latents.detach()) - prior.answers(prompt, images)[0]).square().mean()
    noisy = load_preset(preset).baseline == "noise"  # SDS's noise does not cancel: it stays near, never on, the answer
    assert -10 * error.log10() > (15 if noisy else 35)


def test_particles_agree_by_consensus_and_not_alone():
    """One answer of six for all eight images by default; alone they take several."""
    prior = AnalyticPrior()
    most_common = {"consensus": [], "none": []}
    for seed, mixing in itertools.product(range(5), most_common):
        images = held_out(8, 32, seed).images
        config = EditConfig(steps=60, mixing=mixing, seed=seed)
        edited = torch.stack(edit_images(list(images), prior, AMBIGUOUS, config))
        errors = torch.stack([(a - edited).square().flatten(1).mean(1) for a in prior.answers(AMBIGUOUS, images)])
        if mixing == "consensus":
            assert -10 * errors.min(0).values.max().log10() > 35  # agreement costs no fidelity
        most_common[mixing].append(errors.argmin(0).bincount().max().item())
    assert sum(most_common["consensus"]) >= 5 * 7.5
    assert sum(most_common["none"]) < 5 * 6


def test_same_seed_same_bits_and_another_seed_differs(stack):
    images, _ = stack
    config = EditConfig(steps=5, batch=2)
    runs = [
        torch.stack(edit_images(list(images), AnalyticPrior(), AMBIGUOUS, dataclasses.replace(config, seed=seed)))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_batches_draw_every_particle_equally_often_and_never_twice_at_once():
    batches = Batches([list(range(7))], 3, torch.Generator().manual_seed(0))
    drawn = [next(batches) for _ in range(70)]
    assert all(len({*batch}) == 3 for batch in drawn)
    counts = Counter(index for batch in drawn for index in batch)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len(next(Batches([[0, 1, 2]], 8, torch.Generator()))) == 3


def test_all_particles_take_part_in_every_step_and_timesteps_descend_slowly_at_first(stack):
    steps = []
    edit(stack[1], AnalyticPrior(), "make it night", EditConfig(steps=20), on_step=steps.append)
    timesteps = [step.timestep for step in steps]
    assert all(sorted(step.indices) == [0, 1, 2, 3] for step in steps)
    assert (timesteps[0], timesteps[-1]) == (979, 20) and timesteps == sorted(timesteps, reverse=True)
    assert timesteps[0] - timesteps[1] < timesteps[-2] - timesteps[-1]
    assert [step.kernel is not None for step in steps] == [timestep >= 500 for timestep in timesteps]


def test_a_step_that_does_not_fit_in_memory_is_taken_in_parts_at_one_timestep(monkeypatch):
    latents = torch.rand(7, 3, 2, 2)
    monkeypatch.setattr(schedule, "MAX_STEP_ELEMENTS", 3 * latents[0].numel())
    seen = []
    edit(LatentStack(latents), AnalyticPrior(), "make it night", EditConfig(steps=4), seen.append)
    assert len(seen) == 4 * 3
    for parts in (seen[:3], seen[3:6], seen[6:9], seen[9:]):
        assert len({step.timestep for step in parts}) == 1
        assert {index for step in parts for index in step.indices} == {*range(7)}
        assert all(len(step.indices) == 3 for step in parts)


def test_random_timesteps_stay_in_their_range_and_a_batch_takes_its_size(stack):
    seen = []
    config = EditConfig(steps=50, schedule="random", batch=2, min_timestep=0.3, max_timestep=0.6)
    edit(stack[1], AnalyticPrior(), "make it night", config, on_step=seen.append)
    assert {len(step.indices) for step in seen} == {2}
    timesteps = [step.timestep for step in seen]
    assert 300 <= min(timesteps) < 380 and 520 < max(timesteps) <= 600 and timesteps != sorted(timesteps)


def test_the_prior_never_sees_more_particles_at_once_than_a_batch(stack):
    sizes = []

    class Watching(AnalyticPrior):
        def noise_estimate(self, x_t, timestep, condition, text, branches):
            sizes.append(len(x_t))
            return super().noise_estimate(x_t, timestep, condition, text, branches)

    config = EditConfig(steps=3, batch=2, image_guidance_scale=1.5, baseline="image")
    edit(stack[1], Watching(), "make it night", config)
    assert max(sizes) == 2 * 5


def test_window_positions_cover_every_cell_whatever_the_stride():
    for size, window in itertools.product(range(8, 40), (4, 8)):
        for stride in range(1, window + 1):
            starts = window_positions(size, window, stride)
            covered = {cell for start in starts for cell in range(start, start + window)}
            assert covered == set(range(size)) and starts == sorted({*starts})


def test_overlapping_gradients_are_averaged():
    canvas = torch.zeros(1, 2, 4, 10)
    crops = CanvasCrops(canvas, window=4, stride=3, fade=False)
    assert [x for _, x in crops.corners] == [0, 3, 6]
    crops.render([0, 1, 2]).sum().backward()
    assert torch.equal(crops.canvas.grad, torch.ones_like(canvas))
    crops.canvas.grad = None
    crops.render([0]).sum().backward()  # cells outside the drawn crops stay untouched
    assert torch.equal(crops.canvas.grad[0, 0, 0], torch.tensor([1.0] * 4 + [0.0] * 6))


@pytest.mark.parametrize(("size", "stride"), [((4, 10), 3), ((9, 13), 2), ((4, 4), 1), ((11, 8), 4)])
def test_crops_that_fade_move_every_cell_alike(size, stride):
    canvas = torch.zeros(1, 1, *size)
    crops = CanvasCrops(canvas, window=4, stride=stride)
    for grid in crops.layout.rounds:
        crops.canvas.grad = None
        crops.render(grid).sum().backward()
        torch.testing.assert_close(crops.canvas.grad, torch.ones(1, 1, *size))


def test_a_crop_says_most_about_its_middle_and_nothing_is_lost_at_the_canvas_border():
    canvas = torch.zeros(1, 1, 8, 16)
    crops = CanvasCrops(canvas, window=8, stride=4)
    crops.render([1]).sum().backward()
    weights = crops.canvas.grad[0, 0]
    assert weights[0].tolist() == weights[7].tolist() == [0] * 4 + [0.125, 0.375, 0.625, 0.875] * 1 + [
        0.875, 0.625, 0.375, 0.125] + [0] * 4  # fmt: skip
    crops.canvas.grad = None
    crops.render([0]).sum().backward()
    assert crops.canvas.grad[0, 0, 3].tolist() == [1, 1, 1, 1, 0.875, 0.625, 0.375, 0.125] + [0] * 8


def test_noise_modes():
    canvas = torch.zeros(1, 2, 4, 10)
    crops = CanvasCrops(canvas, window=4, stride=3)
    independent, shared, mapped = (
        noise_source(mode, crops.layout)([0, 1], crops.source([0, 1]), torch.Generator().manual_seed(0))
        for mode in ("independent", "shared", "canvas")
    )
    assert not torch.equal(independent[0], independent[1])
    assert torch.equal(shared[0], shared[1])
    assert torch.equal(mapped[0][..., 3:], mapped[1][..., :1])  # the cell both crops cover
    assert not torch.equal(mapped[0], mapped[1])
    with pytest.raises(ValueError, match="'canvas' needs crops"):
        Edit(LatentStack(torch.zeros(2, 3, 4, 4)), AnalyticPrior(), AMBIGUOUS, EditConfig(noise="canvas"))


def test_master_latents_are_float32():
    half = torch.rand(2, 3, 4, 4).half()
    particles = LatentStack(half)
    assert particles.latents.dtype == torch.float32
    assert particles.source([0]).dtype == torch.float32


def test_divergence_names_the_step(stack):
    with pytest.raises(NonFiniteError, match=r"after step \d+ of 30"):
        edit(stack[1], AnalyticPrior(), "make it night", EditConfig(lr=1e4, guidance_scale=1000))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("steps", 0),
        ("lr", -1.0),
        ("lr", float("nan")),
        ("lr_decay", 1.5),
        ("batch", 0),
        ("guidance_scale", -1.0),
        ("max_timestep", 1.2),
        ("max_timestep", 1.0),
        ("steps", 1.5),
        ("steps", None),
        ("seed", -1),
        ("bandwidth_scale", 0.0),
    ],
)
def test_settings_out_of_range_are_named(setting, value):
    with pytest.raises(ValueError, match=rf"{setting} must be (a whole number )?from"):
        EditConfig(**{setting: value})


@pytest.mark.parametrize("setting", ["kernel_input", "mixing", "baseline", "noise", "correspondence"])
def test_misspelled_choices_are_named(setting):
    with pytest.raises(ValueError, match=f"{setting} must be one of .*; got of"):
        EditConfig(**{setting: "of"})


def test_presets(tmp_path):
    assert {"default", "paper"} <= {*preset_names()}
    for name in preset_names():
        load_preset(name)
    assert load_preset("paper") == EditConfig(
        steps=200,
        lr=2.0,
        lr_decay=0.9,
        batch=4,
        schedule="random",
        max_timestep=0.5,
        weight="noise",
        mixing="svgd",
        kernel_input="noisy",
        normalize_rows=False,
        baseline="image",
    )
    mine = tmp_path / "mine.yaml"
    mine.write_text("steps: 7\n")
    assert load_preset(str(mine)) == EditConfig(steps=7)
    for text in ("setps: 7\n", "- 1\n", "steps: [\n", "steps: many\n"):
        mine.write_text(text)
        with pytest.raises(ValueError, match=r"mine\.yaml"):
            load_preset(str(mine))
    with pytest.raises(ValueError, match="expected default, low-memory, paper"):
        load_preset("nope")


def test_empty_prompt_and_unknown_prior():
    with pytest.raises(ValueError, match="prompt is empty"):
        edit_images([torch.rand(3, 8, 8)], AnalyticPrior(), " ")
    with pytest.raises(ValueError, match="there are no images"):
        edit_images([], AnalyticPrior(), "make it night")
    with pytest.raises(ValueError, match="unknown prior 'nope'; expected 'tiny', 'analytic'"):
        load_prior("nope")
