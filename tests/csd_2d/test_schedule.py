"""Steps that do not fit in memory are taken in parts, and are what they would be in one."""

import io

import pytest
import torch

from csd_2d import Edit, EditConfig, LatentStack, schedule
from csd_2d.closed_form import known_answers
from csd_2d.image_set import edit_images
from csd_2d.priors.analytic import AnalyticPrior


def test_learning_rates_decay_with_the_steps_of_the_configuration(monkeypatch):
    latents, rates = torch.rand(4, 3, 2, 2), {}
    for most in (4, 2):
        monkeypatch.setattr(schedule, "MAX_STEP_ELEMENTS", most * latents[0].numel())
        config = EditConfig(steps=6, lr=0.5, lr_decay=0.5, lr_decay_every=2)
        run = Edit(LatentStack(latents), AnalyticPrior(), "make it night", config)
        rates[most] = []
        while not run.done:
            rates[most].append(run.state_dict()["lr"])
            run.step()
    assert rates[4] == [0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    assert rates[2] == [rate for rate in rates[4] for _ in range(2)]


def test_all_parts_of_a_step_follow_one_leader(monkeypatch):
    """By themselves parts of two find answers of their own, and the most common one has three or four of eight."""
    common = 0
    for seed in range(2):
        images = 0.7 * torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) + 0.15
        monkeypatch.setattr(schedule, "MAX_STEP_ELEMENTS", 2 * images[0].numel())
        config = EditConfig(seed=seed)
        edited = torch.stack(edit_images(list(images), AnalyticPrior(), "paint it a new color", config))
        answers = torch.stack(known_answers("paint it a new color", images))
        taken = (edited - answers).square().flatten(2).mean(2).argmin(0)
        common += int(taken.bincount().max())
    assert common >= 10


def test_an_edit_that_is_interrupted_between_two_parts_of_a_step_goes_on_as_if_it_had_not_been(monkeypatch):
    latents = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(schedule, "MAX_STEP_ELEMENTS", 2 * latents[0].numel())

    def begun(steps: int) -> Edit:
        run = Edit(LatentStack(latents), AnalyticPrior(), "paint it a new color", EditConfig(steps=3))
        for _ in range(steps):
            run.step()
        return run

    file = io.BytesIO()
    torch.save(begun(1).state_dict(), file)
    file.seek(0)
    resumed = begun(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.state_dict()["schedule"]["leader"] is not None
    while not resumed.done:
        resumed.step()
    for one, other in zip(resumed.particles.parameters(), begun(9).particles.parameters(), strict=True):
        assert torch.equal(one, other)


def test_small_batches_go_as_far_as_all_particles_together():
    """By default: a particle that is drawn in one step of four moves four times as far in it."""
    latents = torch.rand(8, 3, 4, 4)

    def rate(**settings) -> float:
        return Edit(LatentStack(latents), AnalyticPrior(), "make it night", EditConfig(**settings)).state_dict()["lr"]

    assert rate(steps=80) == rate(steps=80, batch=8) == rate(steps=80, batch=100) == 0.15
    assert rate(steps=80, batch=2) == 0.6 and rate(batch=2) == 1.0
    assert rate(steps=80, batch=5) == pytest.approx(0.15 * 8 / 5)
    assert rate(steps=80, batch=2, lr=0.3) == 0.3


def test_a_new_prompt_does_not_follow_the_leader_of_the_old_one():
    run = Edit(LatentStack(torch.rand(4, 3, 4, 4)), AnalyticPrior(), "make it night", EditConfig(batch=2))
    run.step()
    assert run.state_dict()["schedule"]["leader"] is not None
    run.prompt = "invert the colors"
    assert run.state_dict()["schedule"]["leader"] is None
