"""The analytic prior's estimates against numerical differentiation of its log-density, and its edits."""

import math

import pytest
import torch

from csd_2d.closed_form import PIXEL_EDITS
from csd_2d.priors.analytic import AnalyticPrior


def log_density(prior: AnalyticPrior, x_t: torch.Tensor, timestep: int, means: list[torch.Tensor], spread: float):
    """log of the mean over k of N(x_t; alpha mu_k, (alpha^2 spread^2 + sigma^2) I), written from the definition."""
    alpha, sigma = prior.alpha_sigma(timestep)
    gaussians = [
        torch.distributions.Normal(alpha * mean, math.sqrt(alpha**2 * spread**2 + sigma**2)).log_prob(x_t).sum()
        for mean in means
    ]
    return torch.stack(gaussians).logsumexp(0) - math.log(len(means))


@pytest.mark.parametrize("timestep", [20, 300, 900])
@pytest.mark.parametrize("branch", [0, "image", "uncond"])
def test_estimate_is_minus_sigma_times_the_numerical_score(timestep, branch):
    # A wide spread and few pixels, so that several answers keep weight and the mixture really mixes.
    prior = AnalyticPrior(spread=0.6)
    generator = torch.Generator().manual_seed(timestep)
    source = torch.rand(1, 3, 2, 2, generator=generator, dtype=torch.float64)
    condition = prior.encode(source)
    x_t = torch.randn(1, 3, 2, 2, generator=generator, dtype=torch.float64)
    text = prior.encode_text(["paint it a new color"])
    means = {
        0: [prior.encode(edit(source)) for edit in text[0]],
        "image": [condition],
        "uncond": [torch.zeros_like(condition)],
    }[branch]
    spread = prior.image_spread if branch == "uncond" else prior.spread

    numerical = torch.zeros_like(x_t)
    step = 1e-5
    for i in range(x_t.numel()):
        offset = torch.zeros_like(x_t).view(-1)
        offset[i] = step
        offset = offset.view_as(x_t)
        above = log_density(prior, x_t + offset, timestep, means, spread)
        below = log_density(prior, x_t - offset, timestep, means, spread)
        numerical.view(-1)[i] = (above - below) / (2 * step)
    estimate = prior.noise_estimate(x_t, timestep, condition, text, [branch])
    _, sigma = prior.alpha_sigma(timestep)
    torch.testing.assert_close(estimate, -sigma * numerical, rtol=1e-6, atol=1e-8)


def test_schedule_is_stable_diffusions():
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
    torch.testing.assert_close(AnalyticPrior().alphas_cumprod.float(), theirs)


@pytest.mark.parametrize("prompt", PIXEL_EDITS)
def test_the_edit_of_a_crop_is_the_crop_of_the_edit(prompt):
    image = torch.rand(2, 3, 9, 11)
    for edit in PIXEL_EDITS[prompt]:
        torch.testing.assert_close(edit(image)[..., 2:7, 3:8], edit(image[..., 2:7, 3:8]))


def test_the_answers_to_an_ambiguous_prompt_are_equally_far_from_the_source():
    prior = AnalyticPrior()
    image = torch.rand(1, 3, 16, 16)
    distances = [(edit(image) - image).square().sum().item() for edit in prior.encode_text(["paint it a new color"])[0]]
    assert len(distances) == 6
    assert distances == pytest.approx([distances[0]] * 6, rel=1e-4)


def test_edits_do_what_they_say():
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    answer = {prompt: edits[0](image) for prompt, edits in PIXEL_EDITS.items()}
    assert answer["make it night"].mean() < 0.5 * image.mean()
    assert answer["make it snowy"].mean() > image.mean()
    assert answer["make it black and white"].std(1).max() < 1e-6
    assert answer["make it foggy"].std() < 0.5 * image.std()
    torch.testing.assert_close(answer["invert the colors"], 1 - image)
    for color, channel in {"red": 0, "green": 1, "blue": 2}.items():
        gain = (answer[f"paint it {color}"] - image).mean((0, 2, 3))
        assert gain.argmax() == channel and gain[channel] > 0.2


def test_prompts_are_matched_loosely_and_unknown_ones_list_the_known():
    prior = AnalyticPrior()
    assert prior.encode_text(["Paint it a new COLOUR!"]) == [PIXEL_EDITS["paint it a new color"]]
    with pytest.raises(ValueError, match="it knows: make it night; make it sunset"):
        prior.encode_text(["make it fly"])
