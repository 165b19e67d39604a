"""Scores that are moved to corresponding places before they are mixed."""

import math
from itertools import product

import pytest
import torch

from csd_2d import CanvasCrops, EditConfig, LatentStack, Layout, RBFKernel, svgd_direction
from csd_2d.correspondence import everywhere
from csd_2d.correspondence.flow import FrameFlows, warp
from csd_2d.correspondence.windows import window_correspondence
from csd_2d.edit import edit
from csd_2d.kernels import low_pass
from csd_2d.metrics.consistency import warp_error
from csd_2d.metrics.fidelity import agreement
from csd_2d.mixing import corresponding_direction
from csd_2d.priors.analytic import AnalyticPrior


class Tables:
    """A transport from tables: where each cell of the receiver is in the sender, and whether it is seen there."""

    def __init__(self, n: int, height: int, width: int, generator: torch.Generator) -> None:
        self.cells = torch.randint(height * width, (n, n, height * width), generator=generator)
        self.seen = torch.rand(n, n, height * width, generator=generator) > 0.3
        everyone = torch.arange(n)
        self.cells[everyone, everyone], self.seen[everyone, everyone] = torch.arange(height * width), True

    def __call__(self, values, receiver):
        rows = values.flatten(2)
        moved = rows.gather(2, self.cells[receiver, :, None].expand_as(rows)).view_as(values)
        return moved, self.seen[receiver].view(len(values), 1, *values.shape[-2:]).to(values)


def direction(scores, x, kernel=None, normalize_rows=False, transport=None, changes=None):
    changes = torch.zeros_like(scores) if changes is None else changes
    matrix = (kernel or RBFKernel())(x.flatten(1))
    return corresponding_direction(scores, x, changes, matrix, transport, normalize_rows)


def slow_direction(scores, x, changes, h, transport, normalize_rows):
    """Place by place and pair by pair."""
    n, channels, height, width = x.shape
    phi = torch.zeros_like(x)
    for i, c, p in product(range(n), range(channels), range(height * width)):
        total, norm = 0.0, 0.0
        for j in range(n):
            if not transport.seen[i, j, p]:
                continue
            k = math.exp(-float((x[i] - x[j]).square().sum()) / h)
            place = divmod(int(transport.cells[i, j, p]), width)
            here = divmod(p, width)
            aim = float(scores[j, c][place] + changes[j, c][place] - changes[i, c][here])
            total += k * aim + 2 / h * k * float(x[i, c][here] - x[j, c][place])
            norm += k if normalize_rows else 1
        phi[i, c][divmod(p, width)] = total / norm
    return phi


@pytest.mark.parametrize("normalize_rows", [True, False])
def test_direction_is_the_slow_loop(normalize_rows):
    generator = torch.Generator().manual_seed(0)
    x, s, changes = torch.randn(3, 4, 2, 3, 5, generator=generator, dtype=torch.float64)
    transport = Tables(4, 3, 5, generator)
    for given, known in ((None, torch.zeros_like(s)), (changes, changes)):
        phi = direction(s, x, RBFKernel(30.0), normalize_rows, transport, given)
        expected = slow_direction(s, x, known, 30.0, transport, normalize_rows)
        torch.testing.assert_close(phi, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("normalize_rows", [True, False])
def test_where_nothing_moves_it_is_the_ordinary_direction(normalize_rows):
    x, s = torch.randn(2, 5, 3, 4, 6, dtype=torch.float64)
    still = window_correspondence([(2, 3)] * 5)
    ordinary = svgd_direction(s, x, None, normalize_rows)
    torch.testing.assert_close(direction(s, x, None, normalize_rows, still), ordinary, rtol=1e-12, atol=1e-12)


def test_one_particle_keeps_its_score():
    s = torch.randn(1, 3, 4, 4)
    assert torch.equal(direction(s, torch.randn(1, 3, 4, 4), transport=window_correspondence([(0, 0)])), s)


def test_windows_mix_scores_of_the_same_cell():
    """Scores that are crops of one map stay what they are; without transport they are mixed into something else."""
    canvas = torch.randn(3, 9, 20, dtype=torch.float64)
    corners = [(0, 0), (1, 4), (1, 9), (0, 14)]
    scores = torch.stack([canvas[:, y : y + 8, x : x + 6] for y, x in corners])
    still = torch.zeros_like(scores)
    followed = direction(scores, still, normalize_rows=True, transport=window_correspondence(corners))
    torch.testing.assert_close(followed, scores)
    assert (svgd_direction(scores, still, normalize_rows=True) - scores).abs().mean() > 0.5


def test_windows_overlap_across_the_borders_of_a_circle():
    canvas = torch.arange(10.0).expand(1, 1, 4, 10)
    crops = CanvasCrops(canvas, window=4, stride=3, wrap=True, fade=False)
    indices = range(len(crops))
    values = crops.source(indices)
    transport = crops.layout.correspondence(indices)
    for receiver in indices:
        moved, valid = transport(values, receiver)
        shared = {x: {(x + k) % 10 for k in range(4)} for _, x in crops.corners}
        for sender in indices:
            common = shared[crops.corners[receiver][1]] & shared[crops.corners[sender][1]]
            assert valid[sender].sum() == 4 * len(common)
            assert torch.equal(moved[sender] * valid[sender], values[receiver] * valid[sender])
    assert transport(values, 0)[1][-1].any()  # the last window reaches over the border to the first


def moving_frames(count: int, step: int, size: int = 48, cell: int = 1):
    """A smooth random texture that moves to the left by `step` cells a frame."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, size // 4, (size + count * step) // 4, generator=generator)
    wide = torch.nn.functional.interpolate(
        coarse, (size * cell, (size + count * step) * cell), mode="bicubic", align_corners=False
    )[0].clamp(0, 1)
    return [wide[:, :, k * step * cell : (k * step + size) * cell] for k in range(count)]


@pytest.mark.parametrize("cell", [1, 4])
def test_frames_follow_a_known_shift_in_latent_cells(cell):
    flows = FrameFlows(moving_frames(3, 2, cell=cell), cell)
    flow, valid = flows.between(0, 2)
    assert flow.shape == (2, 48, 48)
    inner = flow[:, 6:-6, 8:-6].flatten(1)
    torch.testing.assert_close(inner.median(1).values, torch.tensor([-4.0, 0.0]), atol=0.3, rtol=0)
    assert valid[0, 6:-6, 8:-6].mean() > 0.95
    assert valid[0, :, :3].mean() < 0.1  # what leaves the picture on the left

    values = torch.zeros(2, 1, 48, 48)
    values[0, :, 20:24, 20:24] = 1
    moved, valid = flows.correspondence([0, 1])(values, 1)
    assert torch.equal(moved[1], values[1]) and valid[1].all()
    row, column = divmod(int(moved[0, 0].mul(100).round().argmax()), 48)
    assert (20 <= row < 24) and (18 <= column < 22)  # two cells to the left of where it was
    assert moved[0, 0, 21:23, 19:21].min() > 0.8


def test_pairs_of_frames_are_estimated_once_and_may_be_shared_out():
    asked = []

    def map_pairs(function, pairs):
        asked.append(list(pairs))
        return map(function, pairs)

    frames = moving_frames(4, 2)
    shared, alone = FrameFlows(frames, 1, map_pairs=map_pairs), FrameFlows(frames, 1)
    shared.correspondence([2, 0, 1])
    shared.correspondence([0, 1, 3])
    assert asked == [[(0, 2), (1, 2), (0, 1)], [(0, 3), (1, 3)]]
    for pair in [(0, 2), (2, 0), (3, 1)]:
        assert all(torch.equal(*parts) for parts in zip(shared.between(*pair), alone.between(*pair), strict=True))


def test_distant_frames_are_not_compared():
    still = [torch.rand(3, 16, 16)] * (FrameFlows.REACH + 2)
    flows = FrameFlows(still, 1)
    values = torch.randn(3, 2, 16, 16)
    _, valid = flows.correspondence([0, FrameFlows.REACH, FrameFlows.REACH + 1])(values, 0)
    assert valid[0].all() and valid[1].all() and not valid[2].any()


def test_low_pass_is_a_projection_and_its_repulsion_is_the_gradient():
    """Q x in place of x is all SVGD needs: the kernel's gradient by autograd through Q says the same."""
    x = torch.randn(3, 2, 7, 10, dtype=torch.float64)
    smooth = low_pass(x, 4)
    torch.testing.assert_close(low_pass(smooth, 4), smooth)
    torch.testing.assert_close(smooth[..., :4, :4], x[..., :4, :4].mean((2, 3), keepdim=True).expand(3, 2, 4, 4))
    still = torch.zeros_like(x)
    phi = svgd_direction(still, smooth, RBFKernel(20.0))
    for i in range(3):
        moving = x.clone().requires_grad_()
        gaps = (low_pass(moving, 4) - smooth[i]).square().flatten(1).sum(1)
        (gradient,) = torch.autograd.grad((-gaps / 20.0).exp().sum(), moving)
        torch.testing.assert_close(phi[i], gradient.sum(0) / 3)


def test_everywhere_leaves_nobody_out():
    corners = [(0, 0), (0, 3), (0, 40)]
    values = torch.randn(3, 2, 4, 6)
    known, valid = window_correspondence(corners)(values, 0)
    moved, everyone = everywhere(window_correspondence(corners))(values, 0)
    assert everyone.all() and not valid[2].any()
    assert torch.equal(moved[2], values[2])
    assert torch.equal(moved[1][..., 3:], known[1][..., 3:])
    assert torch.equal(moved[1][..., :3], values[1][..., :3])


class Watched:
    """Frames with flows, and what their edit asked of them."""

    def __init__(self, transport: str, known: bool = True, **settings) -> None:
        self.frames = torch.stack(moving_frames(4, 3))
        self.flows = FrameFlows(list(self.frames), 1)
        latents = AnalyticPrior().encode(self.frames)
        self.asked = 0
        particles = LatentStack(latents)
        config = EditConfig(steps=10, transport=transport, **settings)
        layout = Layout(correspondence=self.correspondence if known else None)
        edit(particles, AnalyticPrior(), "invert the colors", config, layout=layout)
        self.edited = particles.latents.detach()

    def correspondence(self, indices):
        self.asked += 1
        return self.flows.correspondence(indices)

    def flicker(self) -> float:
        flow, valid = self.flows.between(0, 3)
        return float(((warp(self.edited[3], flow) - self.edited[0]).square() * valid).mean())


def test_an_edit_follows_content():
    """Scores that say the same of the same thing leave a moving picture consistent; mixed in place they blur it."""
    followed, in_place = Watched("both", consensus_fraction=1.0), Watched("off", consensus_fraction=1.0)
    assert followed.flicker() < 0.3 * in_place.flicker()


def test_frames_leave_their_deviations_from_the_others_behind():
    """What one frame alone has too much of is taken back as surely as what all have: scores are exact here."""
    frames = torch.stack(moving_frames(4, 3))
    flows = FrameFlows(list(frames), 1)
    source = AnalyticPrior().encode(frames)
    start = source.clone()
    start[1] += 0.5
    particles = LatentStack(source, start=start)
    config = EditConfig(steps=30, consensus_fraction=0.0, transport="both", bandwidth_scale=1e6)
    layout = Layout(correspondence=flows.correspondence)
    edit(particles, AnalyticPrior(), "invert the colors", config, layout=layout)
    assert (particles.latents[1] + source[1]).square().mean().sqrt() < 0.05


@pytest.mark.parametrize(("transport", "asked"), [("off", 0), ("first", 4), ("second", 6), ("both", 10)])
def test_phases_in_which_scores_are_moved(transport, asked):
    assert Watched(transport, consensus_fraction=0.4).asked == asked


def test_the_second_phase_mixes_widely_only_where_places_are_known():
    """Without transport each follows its own score; an explicit bandwidth is obeyed in any case."""
    own = Watched("both", known=False, consensus_fraction=0.0)
    torch.testing.assert_close(own.edited, Watched("off", consensus_fraction=0.0, svgd=False).edited)
    narrow = Watched("both", consensus_fraction=0.0, bandwidth_scale=0.01)
    torch.testing.assert_close(narrow.edited, own.edited)
    wide = Watched("both", consensus_fraction=0.0)
    assert (wide.edited - own.edited).abs().max() > 1e-3
    torch.testing.assert_close(wide.edited, Watched("both", consensus_fraction=0.0, bandwidth_scale=10.0).edited)


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
