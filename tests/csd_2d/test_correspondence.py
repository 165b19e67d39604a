"""Places that show the same thing move alike: frames by optical flow, views by their surfaces."""

import math
from collections import defaultdict
from itertools import product

import pytest
import torch

from csd_2d import EditConfig, LatentStack, Layout
from csd_2d.correspondence import surface
from csd_2d.correspondence.flow import FrameFlows, warp
from csd_2d.correspondence.surface import SurfaceCorrespondence
from csd_2d.csd import NoisedParticles
from csd_2d.edit import edit
from csd_2d.metrics.consistency import warp_error
from csd_2d.metrics.fidelity import agreement
from csd_2d.mixing import ColorConsensus, PlaceConsensus, chained
from csd_2d.priors.analytic import AnalyticPrior


def moving_frames(count: int, step: int, size: int = 48, cell: int = 1):
    """A smooth random texture that moves to the left by `step` cells a frame."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, size // 4, (size + count * step) // 4, generator=generator)
    wide = torch.nn.functional.interpolate(
        coarse, (size * cell, (size + count * step) * cell), mode="bicubic", align_corners=False
    )[0].clamp(0, 1)
    return [wide[:, :, k * step * cell : (k * step + size) * cell] for k in range(count)]


def known_flow(flows: FrameFlows, a: int, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    known = flows.between(a, b)
    assert known is not None
    return known


@pytest.mark.parametrize("cell", [1, 4])
def test_frames_follow_a_known_shift_in_latent_cells(cell):
    flows = FrameFlows(moving_frames(3, 2, cell=cell), cell)
    flow, valid = known_flow(flows, 0, 2)
    assert flow.shape == (2, 48, 48)
    inner = flow[:, 6:-6, 8:-6].flatten(1)
    torch.testing.assert_close(inner.median(1).values, torch.tensor([-4.0, 0.0]), atol=0.3, rtol=0)
    assert valid[0, 6:-6, 8:-6].mean() > 0.95
    assert valid[0, :, :3].mean() < 0.1  # what leaves the picture on the left

    values = torch.zeros(2, 1, 48, 48)
    values[0, :, 20:24, 20:24] = 1
    mean = flows.correspondence([0, 1])(values)
    row, column = divmod(int(mean[1, 0].mul(100).round().argmax()), 48)
    assert (20 <= row < 24) and (18 <= column < 22)  # two cells to the left of where it was
    torch.testing.assert_close(mean[1, 0, 21:23, 19:21], torch.full((2, 2), 0.5), atol=0.1, rtol=0)


def test_means_over_frames_are_the_slow_loop():
    """Of every frame at most eight apart that the flow table holds, in any order of the frames."""
    flows, values = FrameFlows(moving_frames(7, 1), 1), torch.randn(5, 2, 48, 48)
    indices = [6, 0, 3, 1, 2]
    mean = flows.correspondence(indices)(values)
    for row, here in enumerate(indices):
        total, weight = values[row].clone(), torch.ones(1, 48, 48)
        for other, there in enumerate(indices):
            if abs(here - there) not in (1, 2, 4, 8):
                assert flows.between(here, there) is None
                continue
            flow, seen = known_flow(flows, here, there)
            total, weight = total + seen * warp(values[other], flow), weight + seen
        torch.testing.assert_close(mean[row], total / weight)


def test_frames_are_read_once_and_few_are_in_memory_and_pairs_may_be_shared_out():
    alive, asked = [0], [0]

    def frames():
        for frame in moving_frames(14, 1):
            alive[0] += 1
            yield frame

    def map_pairs(function, pairs):
        for pair in pairs:
            asked[0] += 1
            assert torch.equal(pair[1], moving_frames(14, 1)[alive[0] - 1])  # the latest frame read: not read ahead
            yield function(pair)

    shared, alone = FrameFlows(frames(), 1, map_pairs=map_pairs), FrameFlows(moving_frames(14, 1), 1)
    known = [(a, b) for b in range(14) for a in range(b) if shared.between(a, b) is not None]
    assert alive == [14] and len(known) == asked[0]
    assert {b - a for a, b in known} == {1, 2, 4, 8}
    for pair in [(0, 2), (2, 0), (13, 5)]:
        assert all(
            torch.equal(*parts) for parts in zip(known_flow(shared, *pair), known_flow(alone, *pair), strict=True)
        )


def test_what_a_moving_object_leaves_behind_keeps_its_own_values():
    """A disk moves over still ground: the ground that it covered, and covers later, does not take its values."""
    size, cell = 96, 2
    generator = torch.Generator().manual_seed(0)
    ground, skin = (
        torch.nn.functional.interpolate(
            torch.rand(1, 3, 16, 16, generator=generator), (size, size), mode="bicubic", align_corners=False
        )[0]
        for _ in range(2)
    )
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    disks = [((y - 48) ** 2 + (x - 24 - 6 * k) ** 2 < 14**2).float() for k in range(6)]
    reds = torch.tensor([0.5, -0.2, -0.2])[:, None, None]
    frames = [
        torch.where(disk > 0, 0.3 * skin.roll(6 * k, -1) + reds, 0.3 * ground + 0.4).clamp(0, 1)
        for k, disk in enumerate(disks)
    ]
    flows = FrameFlows(frames, cell)
    share = torch.nn.functional.avg_pool2d(torch.stack(disks)[:, None], cell)
    mean = flows.correspondence(range(6))(share)
    assert mean[share == 0].max() < 0.2 and mean[share == 0].mean() < 0.002
    assert mean[share == 1].mean() > 0.97
    matched = flows.correspondence(range(6))(torch.arange(6.0)[:, None, None, None].expand_as(share))
    moved = (matched - torch.arange(6.0)[:, None, None, None]).abs() > 0.1
    assert moved[share == 1].float().mean() > 0.5  # the disk itself is followed


def test_ranks_decide_who_is_followed():
    frames = moving_frames(3, 2)
    values = torch.tensor([0.0, 1.0, 5.0])[:, None, None, None].expand(3, 1, 48, 48)
    ranks = torch.tensor([1, 2, 0])
    followed = FrameFlows(frames, 1).correspondence([0, 1, 2])(values, ranks)
    for row in range(3):
        torch.testing.assert_close(followed[row, :, 8:-8, 10:-10].median(), torch.tensor(5.0), atol=0.4, rtol=0)
    views = seen_from_above(plane(0), plane(5.3), plane(10))
    values = values[..., :32, :32]
    followed = views([0, 1, 2])(values, ranks)
    torch.testing.assert_close(followed[:2, :, 4:-4, 18:25], torch.full((2, 1, 24, 7), 5.0), atol=0.4, rtol=0)
    torch.testing.assert_close(followed[0, :, :, :3], values[0, :, :, :3])  # seen by the first view alone


def test_the_surest_of_the_lowest_ranks_is_followed_as_a_slow_loop_says():
    """However many frames there are, and however far apart their ranks."""
    flows, values = FrameFlows(moving_frames(5, 1), 1), torch.randn(5, 2, 48, 48)
    ranks = [70, 3, 40, 71, 0]
    followed = flows.correspondence(range(5))(values, torch.tensor(ranks))
    for row in range(5):
        expected, hidden = torch.zeros(2, 48, 48), torch.zeros(1, 48, 48)
        for other in sorted(range(5), key=ranks.__getitem__):
            if other == row:
                expected += (1 - hidden) * values[row]
                break
            if flows.between(row, other) is not None:
                flow, seen = known_flow(flows, row, other)
                expected += (1 - hidden) * seen * warp(values[other], flow)
                hidden += (1 - hidden) * seen
        torch.testing.assert_close(followed[row], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_of_a_leader_appears_beyond_a_cut(dtype):
    """Frames that have nothing in common: what flow finds there is unsure, and is not believed."""
    generator = torch.Generator().manual_seed(0)
    coarse = 0.5 * torch.rand(8, 3, 16, 16, generator=generator) + 0.25
    frames = torch.nn.functional.interpolate(coarse, (128, 128), mode="bicubic", align_corners=False)
    values = torch.arange(8.0, dtype=dtype)[:, None, None, None].expand(8, 1, 64, 64)
    followed = FrameFlows(frames, 2).correspondence(range(8))(values, torch.arange(8))
    assert followed.dtype == dtype
    assert ((followed - values).abs() > 0.5).float().mean() < 0.1


def test_a_single_frame_has_nothing_to_follow():
    value = torch.randn(1, 2, 48, 48)
    assert torch.equal(FrameFlows(moving_frames(1, 2), 1).correspondence([0])(value), value)


class Watched:
    """An edit of frames with flows."""

    def __init__(self, known: bool = True, start: torch.Tensor | None = None, **settings) -> None:
        frames = torch.stack(moving_frames(4, 3))
        self.flows, self.source = FrameFlows(frames, 1), AnalyticPrior().encode(frames)
        self.asked: list[list[int]] = []
        particles = LatentStack(self.source, start=start)
        config = EditConfig(steps=10, **settings)
        layout = Layout(correspondence=self.correspondence if known else None)
        edit(particles, AnalyticPrior(), "invert the colors", config, layout=layout)
        self.edited = particles.latents.detach()

    def correspondence(self, indices):
        self.asked.append(sorted(indices))
        return self.flows.correspondence(indices)


def test_places_are_matched_in_every_step_unless_it_is_switched_off():
    assert Watched().asked == [[0, 1, 2, 3]] * 10
    assert Watched(correspondence=False).asked == Watched(mixing="none").asked == Watched(mixing="svgd").asked == []
    assert Watched(known=False).asked == []


def test_frames_leave_their_deviations_from_the_others_behind():
    """What one frame alone has too much of is taken back: scores are exact here."""
    frames = torch.stack(moving_frames(4, 3))
    source = AnalyticPrior().encode(frames)
    start = source.clone()
    start[1] += 0.5
    edited = Watched(start=start).edited
    assert (edited[1] + source[1]).square().mean().sqrt() < 0.1


def noised(source: torch.Tensor, change: torch.Tensor) -> NoisedParticles:
    indices = list(range(len(source)))
    return NoisedParticles(LatentStack(source), indices, 700, 0.6, 0.8, torch.zeros_like(source), source + change)


def test_aims_are_averaged_where_places_are_known_and_nothing_else_changes():
    source, change, scores = torch.randn(3, 3, 2, 4, 5, generator=torch.Generator().manual_seed(0)).unbind()

    def top_row_of_the_first_two(values, ranks=None):
        mean = values.clone()
        mean[:2, :, 0] = values[:2, :, 0].mean(0)
        return mean

    rule = PlaceConsensus(lambda indices: top_row_of_the_first_two)
    moved, kernel = rule(scores, noised(source, change))
    assert kernel is None
    torch.testing.assert_close(moved[:, :, 1:], scores[:, :, 1:])
    torch.testing.assert_close(moved[2], scores[2])
    aims = scores + 0.6 / 0.8 * change
    mean = aims[:2, :, 0].mean(0)
    torch.testing.assert_close(moved[:2, :, 0] + 0.6 / 0.8 * change[:2, :, 0], torch.stack([mean, mean]))
    both, kernel = chained(ColorConsensus(), rule)(scores, noised(source, change))
    first, _ = ColorConsensus()(scores, noised(source, change))
    torch.testing.assert_close(both, rule(first, noised(source, change))[0])
    assert kernel is not None


def plane(shift: float, depth: float = 0.0, size: int = 32) -> torch.Tensor:
    """Points of a plane that a view sees from straight above; (3, size, size)."""
    y, x = torch.meshgrid(torch.arange(float(size)), torch.arange(float(size)), indexing="ij")
    return torch.stack([x + shift, y, torch.full_like(x, depth)])


def seen_from_above(*points: torch.Tensor, colors: torch.Tensor | None = None, height: float = 100.0):
    """Match views by their points, all seen from one place."""
    stacked = torch.stack(points)
    colors = torch.full_like(stacked, 0.5) if colors is None else colors
    return SurfaceCorrespondence(stacked, colors, torch.tensor([16.0, 16.0, height]).expand(len(stacked), 3))


def slow_surface_means(points, colors, positions, rows, values, ranks=None):
    """Match views cell by cell, corner by corner of the cubes, direction by direction."""
    points = points.double().movedim(1, -1)
    rays = points - positions[:, None, None].double()
    shown = rays.norm(dim=-1) < 1e9
    places, side = surface._places(points.where(shown[..., None], 0), rays.norm(dim=-1), shown, 3.0)
    cubes = defaultdict(lambda: [[] for _ in rows])  # of each row: share, value, color
    for row, view in enumerate(rows):
        for y, x in shown[view].nonzero().tolist():
            scaled = (places[view, y, x] / side).tolist()
            ray = torch.nn.functional.normalize(rays[view, y, x], dim=0).tolist()
            for corner in product((0, 1), repeat=3):
                cube = tuple(math.floor(a) + b for a, b in zip(scaled, corner, strict=True))
                near = math.prod(1 - abs(a - b) for a, b in zip(scaled, cube, strict=True))
                for axis in range(3):
                    entry = (near * ray[axis] ** 2, values[row, :, y, x].double(), colors[view, :, y, x].double(), y, x)
                    cubes[cube, axis, ray[axis] > 0][row].append(entry)

    def mean(entries, which):
        shares = torch.tensor([share for share, *_ in entries], dtype=torch.float64)
        return shares @ torch.stack([entry[which] for _, *entry in entries]) / shares.sum()

    result = values.double().clone()
    for of_rows in cubes.values():
        present = [row for row in range(len(rows)) if sum(share for share, *_ in of_rows[row]) > 1e-6]
        first = 0 if ranks is None or not present else min(ranks[row] for row in present)
        factors = [1 if ranks is None else 30.0 ** (first - rank) for rank in ranks or rows]
        everyone = [(factors[row] * share, *rest) for row in range(len(rows)) for share, *rest in of_rows[row]]
        for row in range(len(rows)):
            if of_rows[row] and sum(share for share, *_ in of_rows[row]):
                gap, unlike = (mean(everyone, which) - mean(of_rows[row], which) for which in (0, 1))
                gap = gap * (-unlike.square().mean() / (2 * surface.ALIKE**2)).exp()
                for share, _, _, y, x in of_rows[row]:
                    result[row, :, y, x] += share * gap
    return result.float()


@pytest.mark.parametrize(("rows", "ranks"), [([0, 1, 2, 3], None), ([1, 0], None), ([2, 0, 3], [1, 2, 0])])
def test_means_over_surfaces_are_the_slow_loop(rows, ranks):
    """Of views from all sides; one shows nothing in some cells, another is far away there."""
    generator = torch.Generator().manual_seed(0)
    points = torch.stack([plane(1.3 * k, size=5) for k in range(4)])
    points[:, 2] += 0.3 * torch.randn(4, 5, 5, generator=generator)
    points[3, :, 0], points[2, :, 1] = math.nan, 1e12
    colors = 0.5 + 0.05 * torch.randn(4, 3, 5, 5, generator=generator)
    positions = torch.tensor([[0.0, 0, 20], [5, 3, 20], [-20, 3, 5], [2, 2, -20]])
    values = torch.randn(len(rows), 2, 5, 5, generator=generator)
    expected = slow_surface_means(points, colors, positions, rows, values, ranks)
    means = SurfaceCorrespondence(points, colors, positions)(rows)(values, ranks and torch.tensor(ranks))
    assert (expected - values).abs().max() > 0.1
    torch.testing.assert_close(means, expected, atol=1e-5, rtol=0)


def test_views_of_one_surface_share_what_is_coarse_and_keep_what_is_fine():
    views = seen_from_above(plane(0), plane(5.3), plane(10))
    level = torch.tensor([0.0, 1.0, 5.0])[:, None, None, None]
    fine = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    fine = fine - torch.nn.functional.avg_pool2d(fine, 9, 1, 4)
    values = level + fine
    mean = views([0, 1, 2])(values)
    shift = (mean - values)[..., 4:-4, :]
    seen_by_all = [shift[0, 0, :, 18:26], shift[1, 0, :, 13:20], shift[2, 0, :, 8:16]]
    for amount, expected in zip(seen_by_all, (2, 1, -3), strict=True):
        torch.testing.assert_close(amount, torch.full_like(amount, expected), atol=0.6, rtol=0)
        assert abs(amount.mean() - expected) < 0.1
    assert shift[0, 0, :, :3].abs().max() < 0.01  # seen by the first view alone


def test_only_the_views_of_a_step_are_mixed_in_any_order():
    views = seen_from_above(plane(0), plane(5.3), plane(10))
    values = torch.tensor([5.0, 0.0])[:, None, None, None].expand(2, 2, 32, 32)
    mean = views([2, 0])(values)
    torch.testing.assert_close(mean[0, :, 4:-4, 8:15], torch.full((2, 24, 7), 2.5), atol=0.02, rtol=0)
    torch.testing.assert_close(mean[1, :, 4:-4, 18:25], torch.full((2, 24, 7), 2.5), atol=0.02, rtol=0)


@pytest.mark.parametrize("depth", [12.0, -1e10])
def test_what_another_surface_hides_is_not_mixed(depth):
    """The second view looks along the same lines, but another surface is before, or nothing."""
    views = seen_from_above(plane(0), plane(0, depth), plane(0))
    values = torch.tensor([0.0, 9.0, 1.0])[:, None, None, None].expand(3, 1, 32, 32)
    mean = views([0, 1, 2])(values)
    torch.testing.assert_close(mean[1], values[1])
    torch.testing.assert_close(mean[0], torch.full((1, 32, 32), 0.5))


def test_a_far_background_corresponds_by_direction():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    near = torch.stack([plane(0), plane(3)])
    sky = [1e6 * torch.stack([(x + turn).sin(), y, (x + turn).cos()]) for turn in (0.0, 0.5)]
    views = seen_from_above(*near, *sky)
    values = torch.tensor([0.0, 0.0, 2.0, 4.0])[:, None, None, None].expand(4, 1, 32, 32)
    mean = views([0, 1, 2, 3])(values)
    torch.testing.assert_close(mean[:2], values[:2])
    # Its cells lie further apart than a cube, so that not all of them find others.
    assert (mean[2, 0, 12:-12, 18:25] - 2).min() > 0.2 and (mean[2, 0, :, :2] - 2).abs().max() < 0.01


def one_object_before_much_sky(far: float) -> torch.Tensor:
    """Two views that see the two halves of one row of 8 cells, among 1,024 of which the others are far."""
    views = torch.full((2, 3, 32, 32), far)
    views[:, :2] += far * torch.rand(2, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    for view, first in enumerate((0.0, 5.0)):
        views[view, :, 0:5, 0:8] = plane(first)[:, 0:5, 0:8]
    return views


@pytest.mark.parametrize("far", [1e4, 1e10, math.nan, math.inf])
def test_cubes_measure_what_is_near_even_where_most_is_far(far):
    views = one_object_before_much_sky(far)
    values = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 1, 32, 32)
    mean = seen_from_above(*views)([0, 1])(values)
    assert mean[0, 0, :5, :2].abs().max() < 0.05  # three cells or more from what the other sees
    assert mean[0, 0, 1:4, 6:8].min() > 0.2
    if far > 1e9 or math.isnan(far):
        assert torch.equal(mean[0, 0, 5:], values[0, 0, 5:])  # nothing is shown there


def test_nothing_in_sight_is_left_alone():
    values = torch.randn(2, 1, 32, 32)
    nothing = torch.full((2, 3, 32, 32), 1e10)
    assert torch.equal(seen_from_above(*nothing)([0, 1])(values), values)


def test_a_surface_in_the_camera_itself_is_left_alone():
    at_the_camera = torch.tensor([16.0, 16.0, 100.0])[:, None, None].expand(3, 32, 32)
    values = torch.randn(2, 1, 32, 32)
    assert torch.equal(seen_from_above(at_the_camera, at_the_camera)([0, 1])(values), values)


def test_both_sides_of_a_thin_wall_stay_apart():
    above_and_below = torch.tensor([[16.0, 16.0, 100.0], [16.0, 16.0, -100.0]])
    values = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 1, 32, 32)
    gray = torch.full((2, 3, 32, 32), 0.5)
    mean = SurfaceCorrespondence(torch.stack([plane(0), plane(0)]), gray, above_and_below)([0, 1])(values)
    assert (mean - values).abs().max() < 0.05
    assert (mean - values).abs().mean() < 0.02


def test_places_of_unlike_colors_are_not_the_same():
    """Depth that is wrong puts the sky on the wall."""
    colors = torch.tensor([0.2, 0.2, 0.9])[:, None, None, None].expand(3, 3, 32, 32)
    values = torch.tensor([0.0, 1.0, 9.0])[:, None, None, None].expand(3, 1, 32, 32)
    ranks = torch.tensor([0, 1, 2])
    mean = seen_from_above(plane(0), plane(0), plane(0), colors=colors)([0, 1, 2])(values, ranks)
    torch.testing.assert_close(mean[2], values[2], atol=0.01, rtol=0)
    assert mean[1].max() < 0.4  # follows the first


def test_metrics_of_a_moving_picture():
    frames = torch.stack(moving_frames(3, 2))
    flow = torch.tensor([-2.0, 0.0])[:, None, None].expand(2, 2, 48, 48)
    seen = (torch.arange(48) > 1).float().expand(2, 1, 48, 48)
    assert warp_error(frames, flow, seen) < 1e-10
    assert warp_error(frames, 0 * flow, seen) > 1e-3
    frames[1] += 0.1  # a flash: both pairs differ by it
    assert warp_error(frames, flow, seen) == pytest.approx(0.01, rel=1e-4)
    share, psnr = agreement(frames, [frames - 0.1, frames + 0.01])
    assert share == 1 and psnr.tolist() == pytest.approx([40.0] * 3, abs=1e-3)
    assert math.isfinite(float(psnr.mean()))
