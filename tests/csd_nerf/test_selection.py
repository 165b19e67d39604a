"""Which views share a round."""

import pytest
import torch

from csd_nerf.edit.selection import ViewRounds

CIRCLE = torch.stack([torch.tensor([a.cos(), a.sin(), 0.0]) for a in torch.arange(20) * (2 * torch.pi / 20)])


def rounds(selection: str, size: int, seed: int = 0) -> ViewRounds:
    return ViewRounds(CIRCLE, size, selection, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("selection", ["random", "spread", "near"])
@pytest.mark.parametrize("size", [1, 6, 20, 0, 30])
def test_every_view_is_drawn_equally_often_and_never_twice_at_once(selection, size):
    drawing = rounds(selection, size)
    batches = [next(drawing) for _ in range(20)]
    assert all(len({*batch}) == len(batch) == (min(size, 20) or 20) for batch in batches)
    counts = torch.tensor([view for batch in batches for view in batch]).bincount(minlength=20)
    assert counts.min() == counts.max()


def gaps(batch: list[int]) -> list[int]:
    """Steps along the circle from each view of a batch to the next."""
    order = sorted(batch)
    return [(b - a) % 20 for a, b in zip(order, order[1:] + order[:1], strict=True)]


def test_near_views_are_neighbors_and_spread_ones_surround_the_scene():
    near, spread = next(rounds("near", 5)), next(rounds("spread", 5))
    assert sorted(gaps(near))[:-1] == [1] * 4
    assert max(gaps(spread)) <= 6


def test_seeds_decide():
    for selection in ("random", "spread", "near"):
        assert next(rounds(selection, 5, 1)) == next(rounds(selection, 5, 1))
        assert len({tuple(sorted(next(rounds(selection, 5, seed)))) for seed in range(6)}) > 1
