"""Particles that share their change of colors: against slow loops, and with masks on the learned model."""

from dataclasses import replace

import pytest
import torch

from csd_2d import EditConfig, LatentStack, load_prior
from csd_2d.csd import NoisedParticles
from csd_2d.image_set import edit_images
from csd_2d.mixing import ColorConsensus, ColorLeader, cosines, per_prompt
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


def shared(**settings) -> ColorConsensus:
    """Mix with everybody, whatever the scores."""
    return ColorConsensus(**{"explained": -1.0, "alike": 2.0, **settings})


def test_the_leaders_map_replaces_each_ones_own():
    source, change, scores = example()
    direction, kernel = shared()(scores, noised(source, change))
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
        shift = colors_of(source[i]) @ (fit(leader, 0.01) - fit(i, 1e-3))
        expected = scores[i] + shift.T.view_as(scores[i])
        torch.testing.assert_close(direction[i], expected, atol=1e-4, rtol=1e-4)


def test_what_all_colors_do_alike_is_left_as_it_is():
    """One affine map of colors explains all scores: nothing has to be agreed on."""
    source, _, _ = example()
    color_map = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    scores = torch.stack([(colors_of(x) @ color_map).T.view_as(x) for x in source])
    direction, _ = shared(ridge=0.0)(scores, noised(source, torch.zeros_like(source)))
    assert (direction - scores).abs().max() < 0.01 * scores.abs().max()


def turned(factors: list[float], detail: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sources, and scores that follow one map times a factor each, and something of their own."""
    source, _, own = example()
    color_map = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    mapped = torch.stack([(colors_of(x) @ color_map).T.view_as(x) for x in source])
    return source, torch.tensor(factors)[:, None, None, None] * mapped + detail * own, mapped


def test_those_who_agree_already_keep_their_scores():
    """Three maps point one way, more or less far, the fourth points the other way: it alone follows."""
    source, scores, mapped = turned([1.0, 1.2, -1.0, 0.9], detail=0.1)
    direction, kernel = ColorConsensus()(scores, noised(source, torch.zeros_like(source)))
    assert [torch.equal(*pair) for pair in zip(direction, scores, strict=True)] == [True, True, False, True]
    assert kernel.gram.diagonal().tolist() == [1, 1, 0, 1] and kernel.gram.sum(1).tolist() == [1] * 4
    assert torch.cosine_similarity(direction[2].flatten(), mapped[2].flatten(), dim=0) > 0.95


def test_a_leader_that_is_remembered_is_followed_by_all_who_come_later():
    """Their aims point the other way, all of them; at another noise level they are as strong as it says."""
    source, scores, mapped = turned([1.0, 1.2, 0.8, 0.9], detail=0.1)
    leader = ColorLeader()
    rule = ColorConsensus(remembered=leader)
    first = noised(source, torch.zeros_like(source))
    assert torch.equal(rule(scores, first)[0], scores)
    weaker = replace(first, alpha=2 * ALPHA)
    leader.stays = True
    direction, kernel = rule(-scores, weaker)
    assert torch.equal(kernel.gram, torch.zeros(4, 4))
    for moved, map_alone, score in zip(direction, mapped, scores, strict=True):
        assert torch.cosine_similarity(moved.flatten(), map_alone.flatten(), dim=0) > 0.95
        assert 1.2 < moved.norm() / score.norm() < 3


def test_the_next_leader_is_the_one_most_like_the_last():
    """Three of four answer the other way: alone they would be followed."""
    source, scores, _ = turned([1.0, 1.0, 1.0, 1.0], detail=0.1)
    rule = ColorConsensus(remembered=ColorLeader())
    rule(scores, noised(source, torch.zeros_like(source)))
    split = scores * torch.tensor([-1.0, -1, 1, -1])[:, None, None, None]
    _, kernel = rule(split, noised(source, torch.zeros_like(source)))
    assert kernel.gram[:, 2].tolist() == [1, 1, 1, 1]


def test_nothing_is_shared_where_most_scores_are_no_change_of_colors():
    source, scores, _ = turned([0.2, 0.2, -0.2, 0.2], detail=1.0)
    direction, kernel = ColorConsensus()(scores, noised(source, torch.zeros_like(source)))
    assert torch.equal(direction, scores) and torch.equal(kernel.gram, torch.eye(4))


def test_no_shape_of_one_particle_appears_in_another():
    """What is added to a score is a function of the receiver's own colors alone."""
    source, change, scores = example()
    scores[0, :, :2, :2] += 20  # a strong local score
    direction, _ = shared()(scores, noised(source, change))
    for i in range(4):
        added = (direction[i] - scores[i]).flatten(1).T
        explained = colors_of(source[i]) @ torch.linalg.lstsq(colors_of(source[i]), added).solution
        torch.testing.assert_close(explained, added, atol=1e-3, rtol=0)


def test_maps_are_compared_on_the_colors_of_the_row():
    maps, colors = torch.randn(3, 4, 3), torch.randn(3, 20, 4)
    table = cosines(maps, colors.mT @ colors)
    for i in range(3):
        for j in range(3):
            one, other = colors[i] @ maps[i], colors[i] @ maps[j]
            expected = torch.cosine_similarity(one.flatten(), other.flatten(), dim=0)
            torch.testing.assert_close(table[i, j], expected, atol=1e-4, rtol=1e-4)


def test_each_prompt_has_a_consensus_of_its_own():
    """Rows 0 to 2 follow one prompt, row 3 another, row 4 both: the last two keep their scores."""
    source, scores, _ = turned([1.0, 1.2, -1.0, -1.0], detail=0.1)
    source, scores = torch.cat([source, source[:1]]), torch.cat([scores, -scores[:1]])
    table = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1], [0.5, 0.5]])
    rule = per_prompt(ColorConsensus(), lambda indices: table[indices][..., None, None])
    direction, kernel = rule(scores, noised(source, torch.zeros_like(source)))
    assert [torch.equal(*pair) for pair in zip(direction, scores, strict=True)] == [True, True, False, True, True]
    assert (
        kernel is not None
        and kernel.gram[2, 2] == 0
        and kernel.gram[2, :2].sum() == 1
        and torch.equal(kernel.gram[3:], torch.eye(5)[3:])
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_changes_nothing_but_the_last_digits(dtype):
    source, scores, _ = turned([1.0, 1.2, -1.0, 0.9], detail=0.1)
    source, scores = 30 * source.to(dtype), scores.to(dtype)  # sums over cells beyond the range of half precision

    class Particles(LatentStack):
        def __init__(self, dtype):
            super().__init__(source)
            self.dtype = dtype

        def source(self, indices):
            return super().source(indices).to(self.dtype)

    def mixed(dtype):
        known = noised(source, torch.zeros_like(source))
        known = replace(known, particles=Particles(dtype), x_0=source.to(dtype))
        return ColorConsensus()(scores.to(dtype), known)

    (half, kernel), (whole, expected) = mixed(dtype), mixed(torch.float32)
    assert half.dtype == dtype and torch.equal(kernel.gram, expected.gram) and kernel.gram[2, 2] == 0
    torch.testing.assert_close(half.float(), whole, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("picture", ["gray", "flat"])
def test_pictures_of_few_colors_determine_no_map_and_do_no_harm(picture):
    source = torch.randn(3, 1, 5, 6) if picture == "gray" else torch.full((3, 1, 5, 6), 0.3)
    source, scores = source.expand(3, 3, 5, 6), torch.randn(3, 3, 5, 6)
    direction, _ = shared()(scores, noised(source, torch.zeros_like(source)))
    assert direction.isfinite().all() and direction.abs().max() < 10


@pytest.mark.parametrize("open_share", [0.1, 0.5])
def test_masks_of_others_do_not_burn_out_an_open_image(open_share):
    """Were latents outside the masks held back, they would keep asking for the whole change."""
    image, prior = held_out(1, 64, seed=3).images[0], load_prior("tiny")
    masks = [torch.ones(1, 64, 64)] + [torch.zeros(1, 64, 64) for _ in range(5)]
    for mask in masks[1:]:
        mask[:, : round(64 * open_share)] = 1
    together = edit_images([image] * 6, prior, "make it autumn", masks=masks)[0]
    alone = edit_images([image], prior, "make it autumn", EditConfig(mixing="none"))[0]
    assert (together - alone).mean((1, 2)).abs().max() < 0.01
    assert (together - alone).square().mean().sqrt() < 0.02


@pytest.mark.parametrize("open_share", [0.1, 0.5])
def test_what_a_mask_lets_through_is_the_edit_of_the_whole_picture(open_share):
    """A model that saw the unedited rest would hold back beside it."""
    image, prior = held_out(1, 64, seed=3).images[0], load_prior("tiny")
    mask = torch.zeros(1, 64, 64)
    mask[:, :, : round(64 * open_share)] = 1
    whole, part = (edit_images([image], prior, "make it autumn", masks=masks)[0] for masks in (None, [mask]))
    assert torch.equal(part, torch.where(mask > 0, whole, image))
