"""Particles that share their change of colors: against slow loops, and with masks on the learned model."""

import pytest
import torch

from csd_2d import EditConfig, LatentStack, load_prior
from csd_2d.csd import NoisedParticles
from csd_2d.image_set import edit_images
from csd_2d.mixing import ColorConsensus, most_typical
from csd_2d.tiny.scenes import held_out

ALPHA, SIGMA = 0.6, 0.8


def noised(source: torch.Tensor, change: torch.Tensor) -> NoisedParticles:
    particles = LatentStack(source.float())
    indices = list(range(len(source)))
    return NoisedParticles(particles, indices, 700, ALPHA, SIGMA, torch.zeros_like(source), source + change)


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    source, change, scores = torch.randn(3, 4, 3, 5, 6, generator=generator).unbind()
    return source, change, scores


def colors_of(source: torch.Tensor) -> torch.Tensor:
    """(places, channels + 1) of one particle."""
    return torch.cat([source, torch.ones_like(source[:1])]).flatten(1).T


def test_the_leaders_map_replaces_each_ones_own():
    source, change, scores = example()
    direction, kernel = ColorConsensus()(scores, noised(source, change))
    leader = int(kernel.gram[0].argmax())
    assert kernel.gram.sum(1).tolist() == [1] * 4 and (kernel.gram[:, leader] == 1).all()
    assert torch.equal(direction[leader], scores[leader])
    average = sum(colors_of(x).T @ colors_of(x) for x in source) / 4 + 1e-3 * 30 * torch.eye(4)

    def fit(i, weight):  # least squares, its penalty as rows of their own
        aim = (scores[i] + ALPHA / SIGMA * change[i]).flatten(1).T
        penalty = torch.linalg.cholesky(weight * average).T
        rows = torch.cat([colors_of(source[i]), penalty])
        return torch.linalg.lstsq(rows, torch.cat([aim, torch.zeros(4, 3)])).solution

    for i in {0, 1, 2, 3} - {leader}:
        shift = colors_of(source[i]) @ (fit(leader, 0.05) - fit(i, 1e-3))
        expected = scores[i] + shift.T.view_as(scores[i])
        torch.testing.assert_close(direction[i], expected, atol=1e-4, rtol=1e-4)


def test_what_all_colors_do_alike_is_left_as_it_is():
    """One affine map of colors explains all scores: nothing has to be agreed on."""
    source, _, _ = example()
    color_map = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    scores = torch.stack([(colors_of(x) @ color_map).T.view_as(x) for x in source])
    direction, _ = ColorConsensus(ridge=0.0)(scores, noised(source, torch.zeros_like(source)))
    assert (direction - scores).abs().max() < 0.01 * scores.abs().max()


def test_no_shape_of_one_particle_appears_in_another():
    """What is added to a score is a function of the receiver's own colors alone."""
    source, change, scores = example()
    scores[0, :, :2, :2] += 20  # a strong local score
    direction, _ = ColorConsensus()(scores, noised(source, change))
    for i in range(4):
        added = (direction[i] - scores[i]).flatten(1).T
        explained = colors_of(source[i]) @ torch.linalg.lstsq(colors_of(source[i]), added).solution
        torch.testing.assert_close(explained, added, atol=1e-3, rtol=0)


@pytest.mark.parametrize("picture", ["gray", "flat"])
def test_pictures_of_few_colors_determine_no_map_and_do_no_harm(picture):
    source = torch.randn(3, 1, 5, 6) if picture == "gray" else torch.full((3, 1, 5, 6), 0.3)
    source, scores = source.expand(3, 3, 5, 6), torch.randn(3, 3, 5, 6)
    direction, _ = ColorConsensus()(scores, noised(source, torch.zeros_like(source)))
    assert direction.isfinite().all() and direction.abs().max() < 10


def test_the_most_typical_map_is_of_the_largest_group():
    up, down = torch.ones(2, 3), -torch.ones(2, 3)
    side = torch.tensor([[1.0, -1.0, 0.0], [1.0, -1.0, 0.0]])
    assert most_typical(torch.stack([down, up, side, up * 0.5]), torch.eye(2)) in (1, 3)


@pytest.mark.parametrize("open_share", [0.1, 0.5])
def test_masks_of_others_do_not_burn_out_an_open_image(open_share):
    """Cells that may not change keep asking for the whole change; an average of scores would add it up."""
    image, prior = held_out(1, 64, seed=3).images[0], load_prior("tiny")
    masks = [torch.ones(1, 64, 64)] + [torch.zeros(1, 64, 64) for _ in range(5)]
    for mask in masks[1:]:
        mask[:, : round(64 * open_share)] = 1
    together = edit_images([image] * 6, prior, "make it autumn", masks=masks)[0]
    alone = edit_images([image], prior, "make it autumn", EditConfig(mixing="none"))[0]
    assert (together - alone).mean((1, 2)).abs().max() < 0.01
    assert (together - alone).square().mean().sqrt() < 0.02
