"""An edit taken step by step: what a step shows, prompts that change, kernels and mixings of one's own, its state."""

import copy
import io
import re
from pathlib import Path

import pytest
import torch

from csd_2d import (
    SVGD,
    CanvasCrops,
    Edit,
    EditConfig,
    ImageStack,
    KernelMatrix,
    LatentStack,
    Layout,
    RBFKernel,
    add_noise,
    load_prior,
    svgd_direction,
)
from csd_2d.edit import edit
from csd_2d.io.images import write_image
from csd_2d.loss import EditLoss
from csd_2d.priors.analytic import AnalyticPrior
from tests.csd_2d.test_canvas import smooth

NIGHT, SEPIA = "make it night", "make it sepia"
CONFIG = EditConfig(steps=12, batch=3)


def stack() -> LatentStack:
    return LatentStack(2 * torch.stack([smooth(6, 6, seed) for seed in range(5)]) - 1)


def stepper(prompt=NIGHT, config: EditConfig = CONFIG, **options) -> Edit:
    return Edit(stack(), AnalyticPrior(), prompt, config, **options)


def latents(run: Edit) -> torch.Tensor:
    return run.particles.latents.detach().clone()


def test_steps_are_those_of_the_loop():
    run, whole = stepper(), stack()
    while not run.done:
        run.step()
    edit(whole, AnalyticPrior(), NIGHT, CONFIG)
    assert torch.equal(run.particles.latents, whole.latents)


def test_a_step_shows_what_it_computed():
    """Everything in a step follows from the rest of it by the formulas, computed here again."""
    run, prior = (
        stepper(
            config=EditConfig(steps=2, lr=0.5, mixing="svgd", bandwidth_scale=3.0, weight="noise", baseline="image")
        ),
        AnalyticPrior(),
    )
    before = latents(run)
    step = run.step()
    noised, text = step.noised, prior.encode_text([NIGHT])
    assert step.index == 0 and torch.equal(step.x_0, before[step.indices])
    alpha, sigma = prior.alpha_sigma(step.timestep)
    torch.testing.assert_close(noised.x_t, add_noise(step.x_0, noised.noise, alpha, sigma))
    torch.testing.assert_close(noised.source_t, add_noise(before[step.indices], noised.noise, alpha, sigma))
    branches = [[0] * 5, ["image"] * 5]
    pairs = zip((noised.x_t, noised.source_t), branches, strict=True)
    target, baseline = (prior.noise_estimate(x, step.timestep, noised.source, text, rows) for x, rows in pairs)
    torch.testing.assert_close(step.score, baseline - target)
    torch.testing.assert_close(step.residual_norm, (baseline - target).square().mean().sqrt().item())
    kernel = RBFKernel(bandwidth_scale=3.0)
    torch.testing.assert_close(step.kernel.gram, kernel(step.x_0.flatten(1)).gram)
    torch.testing.assert_close(step.direction, svgd_direction(step.score, step.x_0, kernel, normalize_rows=True))
    torch.testing.assert_close(latents(run)[step.indices], step.x_0 + 0.5 * sigma**2 * step.direction)


def test_the_estimate_of_an_exact_score_is_the_answer():
    run = stepper(config=EditConfig(steps=1, mixing="none", min_timestep=0.98))
    step = run.step()
    answer = AnalyticPrior().answers(NIGHT, (step.x_0 + 1) / 2)[0]
    # Of a Gaussian of spread 0.1 around the answer, under so much noise: the noise drawn has hardly any say.
    torch.testing.assert_close((step.estimate + 1) / 2, answer, atol=0.02, rtol=0)
    assert step.kernel is None


def test_the_prompt_may_change_between_steps():
    run, other = stepper(), stepper()
    for one in (run, other):
        for _ in range(6):
            one.step()
    run.prompt = SEPIA
    while not run.done:
        run.step(), other.step()
    assert run.prompts == [(0, [NIGHT]), (6, [SEPIA])] and run.prompt == [SEPIA]
    assert not torch.allclose(latents(run), latents(other), atol=0.01)


def test_a_prompt_that_changes_twice_between_steps_is_recorded_once_and_bad_ones_leave_it():
    run = stepper()
    run.step()
    run.prompt = SEPIA
    run.prompt = "invert the colors"
    for bad, message in [(" ", "prompt is empty"), ("make it nihgt", "does not know"), ([NIGHT, SEPIA], "must stay 1")]:
        with pytest.raises(ValueError, match=message):
            run.prompt = bad
    assert run.prompts == [(0, [NIGHT]), (1, ["invert the colors"])]
    run.step()


@pytest.mark.parametrize("at", [0, 5, 10, 12])
def test_a_state_brings_back_the_same_bits(at):
    whole, begun = stepper(), stepper()
    for one in (whole, begun):
        for index in range(at):
            if index == 4:
                one.prompt = SEPIA
            one.step()
    file = io.BytesIO()
    torch.save(begun.state_dict(), file)
    file.seek(0)
    resumed = stepper()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for one in (whole, resumed):
        while one.index < 15:  # more steps than configured may follow
            if one.index == 13:
                one.prompt = NIGHT
            one.step()
    assert torch.equal(resumed.particles.latents, whole.particles.latents)
    assert resumed.prompts == whole.prompts


def test_a_kernel_of_ones_own():
    """A kernel that is 1 for all pairs and does not repel: every particle moves along the mean of all scores."""
    asked = []

    def mean(particles: torch.Tensor) -> KernelMatrix:
        asked.append(particles.shape)
        ones = particles.new_ones(len(particles), len(particles))
        return KernelMatrix(ones, torch.zeros_like(ones))

    run = stepper(config=EditConfig(steps=4, batch=3), mixing=SVGD(mean))
    for _ in range(4):
        step = run.step()
        torch.testing.assert_close(step.direction, step.score.mean(0).expand_as(step.score))
    assert asked == [(3, 108)] * 4


def test_a_mixing_of_ones_own():
    def first_leads(scores, noised):
        return scores[:1].expand_as(scores), None

    step = stepper(mixing=first_leads).step()
    torch.testing.assert_close(step.direction, step.score[:1].expand_as(step.score))


def test_several_prompts_need_to_know_where_they_apply():
    with pytest.raises(ValueError, match="2 prompts need a layout"):
        stepper([NIGHT, SEPIA])


def test_a_copied_state_brings_an_edit_back_in_memory():
    run = stepper()
    run.step()
    state, before = copy.deepcopy(run.state_dict()), latents(run)
    for _ in range(3):
        run.step()
    run.load_state_dict(state)
    assert run.index == 1 and torch.equal(latents(run), before)


def test_a_state_of_other_particles_is_refused_and_changes_nothing():
    run, other = stepper(), Edit(LatentStack(torch.zeros(2, 3, 6, 6)), AnalyticPrior(), NIGHT, CONFIG)
    run.step()
    before = latents(run)
    with pytest.raises(ValueError, match="of an edit of other particles"):
        run.load_state_dict(other.state_dict())
    assert run.index == 1 and torch.equal(latents(run), before)


def test_mixings_tell_edits_apart():
    def first(scores, noised):
        return scores, None

    options = [{}, {"mixing": first}, {"mixing": SVGD()}, {"mixing": SVGD(RBFKernel(2.0))}]
    prints = [stepper(**option).fingerprint() for option in options]
    assert len({*prints}) == len(options)
    assert prints == [stepper(**option).fingerprint() for option in options]


def test_the_tiny_model_refuses_words_it_was_not_trained_on():
    prior = load_prior("tiny")
    stack = ImageStack([smooth(64, 64)], prior)
    with pytest.raises(ValueError, match="never taught the words 'unicorn'; the nearest of its"):
        Edit(stack.particles, prior, "make it a unicorn")
    run = Edit(stack.particles, prior, NIGHT)
    with pytest.raises(ValueError, match="never taught"):
        run.prompt = "make it a unicorn"
    assert run.prompt == [NIGHT]


def test_a_loss_leaves_the_stepping_to_its_caller():
    particles = stack()
    run = EditLoss(particles, AnalyticPrior(), NIGHT)
    loss, step = run.next()
    loss.backward()
    gradients = torch.stack([parameter.grad for parameter in particles.parameters()])
    torch.testing.assert_close(gradients[step.indices], -(step.noised.sigma**3 / step.noised.alpha) * step.direction)
    assert "parameters" not in run.state_dict() and run.index == 1


def test_what_a_task_does_not_know_it_need_not_say():
    """Crops without their layout are particles like others: the edit takes them as one round."""
    crops = CanvasCrops(2 * smooth(8, 20)[None] - 1, 8, 6, fade=False)
    assert sorted(Edit(crops, AnalyticPrior(), NIGHT).step().indices) == list(range(len(crops)))
    rounds = Layout(rounds=[[0, 1], [2]])
    drawn = [
        len(Edit(crops, AnalyticPrior(), NIGHT, EditConfig(seed=seed), layout=rounds).step().indices)
        for seed in range(8)
    ]
    assert {*drawn} == {1, 2}


def test_the_readme_edits_step_by_step(tmp_path, monkeypatch):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "edit.step()" in block]
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a.png", "b.png")):
        write_image(smooth(16, 16, seed), tmp_path / name)
    exec(code, {})
    assert {path.name for path in tmp_path.glob("step_*.png")} == {f"step_{count}.png" for count in range(10, 31, 10)}
