"""The canvas of a panorama: grids, borders that meet, regions of several prompts, tiles of an autoencoder."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from csd_2d import CanvasCrops, EditConfig, edit_residual, load_prior
from csd_2d.cli import main
from csd_2d.edit import edit
from csd_2d.io.images import read_image, write_image
from csd_2d.panorama import compose, edit_panorama, stripes
from csd_2d.priors.analytic import AnalyticPrior
from csd_2d.tiles import fading, in_tiles, window_positions


class SmallWindow(AnalyticPrior):
    window = 16


def smooth(height: int, width: int, seed: int = 0) -> torch.Tensor:
    coarse = torch.rand(1, 3, 3, 5, generator=torch.Generator().manual_seed(seed)) * 0.7 + 0.15
    return F.interpolate(coarse, (height, width), mode="bilinear")[0]


def answer(prompt: str, image: torch.Tensor) -> torch.Tensor:
    return AnalyticPrior().answers(prompt, image[None])[0][0]


# Windows


@pytest.mark.parametrize(("phase", "wrap"), itertools.product([0.0, 0.3, 0.99], [False, True]))
def test_windows_cover_every_cell_and_their_weights_add_up_to_one(phase, wrap):
    for size, window in itertools.product(range(8, 30), (4, 8)):
        for stride in range(1, window + 1):
            starts = window_positions(size, window, stride, phase, wrap)
            total = torch.zeros(size)
            for start, weights in zip(starts, fading(starts, size, window, wrap), strict=True):
                assert (weights > 0).all()
                for offset in range(window):
                    total[(start + offset) % size] += weights[offset]
            torch.testing.assert_close(total, torch.ones(size))


def test_windows_are_evenly_spaced():
    starts = window_positions(101, 16, 12)
    gaps = {b - a for a, b in itertools.pairwise(starts)}
    assert (starts[0], starts[-1]) == (0, 85) and max(gaps) <= 12 and max(gaps) - min(gaps) <= 1


# Grids


@pytest.mark.parametrize(("size", "wrap"), [((16, 61), False), ((40, 55), False), ((16, 64), True)])
def test_no_cell_is_updated_more_often_than_another(size, wrap):
    updates = torch.zeros(1, 1, *size)

    class Counting(CanvasCrops):
        def render(self, indices):
            seen = torch.zeros_like(updates, requires_grad=True)
            (gradient,) = torch.autograd.grad(self._crops(seen, indices).sum(), seen)
            updates.add_((gradient > 0).float())
            return super().render(indices)

    canvas = 2 * smooth(*size)[None] - 1
    crops = Counting(canvas, 16, 12, wrap=wrap)
    edit(crops, SmallWindow(), "make it night", EditConfig(steps=30), layout=crops.layout)
    assert updates.min() == updates.max() == 30
    # Published: one grid at a quarter of the window, of which a step draws some crops.
    updates.zero_()
    crops = Counting(canvas, 16, 4, fade=False)
    edit(crops, SmallWindow(), "make it night", EditConfig(steps=30, mixing="svgd", batch=4), layout=crops.layout)
    assert updates.max() > 1.5 * updates.min()


def test_grids_are_shifted_from_step_to_step():
    canvas = torch.zeros(1, 1, 16, 80)
    crops = CanvasCrops(canvas, 16, 12)
    borders = {crops.corners[i][1] for grid in crops.layout.rounds for i in grid}
    assert len(borders) > 40


def test_crops_reach_over_the_border_of_a_circle():
    canvas = torch.arange(40.0).view(1, 1, 1, 40).expand(1, 1, 16, 40)
    crops = CanvasCrops(canvas, 16, 16, wrap=True)
    over = next(i for i, (_, x) in enumerate(crops.corners) if x > 24)
    first = crops.corners[over][1]
    for crop in (crops.render([over]), crops.source([over])):
        assert crop[0, 0, 0].tolist() == [(first + i) % 40 for i in range(16)]


@pytest.mark.parametrize("wrap", [False, True])
def test_crops_that_count_alike_move_every_cell_they_cover_by_one(wrap):
    canvas = torch.zeros(1, 1, 8, 24)
    crops = CanvasCrops(canvas, 8, 6, wrap=wrap, fade=False)
    (moved,) = torch.autograd.grad(crops.render(crops.layout.rounds[0]).sum(), crops.canvas)
    torch.testing.assert_close(moved, torch.ones_like(canvas))


def test_a_wrapped_edit_does_not_know_where_the_picture_begins():
    """Turned by half a circle before the edit and back after it, the answer is the same, as is the seam."""
    image = smooth(16, 64)
    image = (image + image.flip(-1)) / 2  # left and right border fit together
    config = EditConfig(steps=40)
    edited = edit_panorama(image, SmallWindow(), "make it night", config, wrap=True)
    turned = edit_panorama(image.roll(32, -1), SmallWindow(), "make it night", config, wrap=True).roll(-32, -1)
    torch.testing.assert_close(edited, turned, rtol=0, atol=0.02)


def test_what_cannot_wrap_is_said():
    with pytest.raises(ValueError, match="must be at least 16 px wide, and a multiple of 1; got 12 px"):
        edit_panorama(smooth(16, 12), SmallWindow(), "make it night", wrap=True)


# Regions


def test_stripes_and_their_shares_of_the_published_crops():
    """1920x512 px, 64 cells a crop, 16 cells between crops: how much of crop k each of the stripes covers."""
    for count in (2, 3, 4):
        shares, covered = compose(stripes(count, 64, 240))
        assert (covered == 1).all()
        canvas = torch.zeros(1, 4, 64, 240)
        crops = CanvasCrops(canvas, 64, 16, regions=shares[None], fade=False)
        assert [x for _, x in crops.corners] == list(range(0, 177, 16))
        for index, (_, x) in enumerate(crops.corners):
            edges = [240 * k / count for k in range(count + 1)]
            overlaps = [max(min(right, x + 64) - max(left, x), 0) / 64 for left, right in itertools.pairwise(edges)]
            assert crops.layout.shares([index])[0, :, 0, 0].tolist() == pytest.approx(overlaps, abs=1e-5)


def test_composed_residual_equals_the_slow_sum_and_evaluates_four_plus_active_prompts():
    prior, seen = SmallWindow(spread=0.5), []
    evaluate = prior.noise_estimate

    def counting(x_t, timestep, condition, text, branches):
        seen.extend(branches)
        return evaluate(x_t, timestep, condition, text, branches)

    prior.noise_estimate = counting
    generator = torch.Generator().manual_seed(0)
    x_t, source_t, noise, condition = torch.rand(4, 2, 3, 4, 4, generator=generator, dtype=torch.float64).unbind()
    prompts = ["make it night", "make it sepia", "invert the colors"]
    shares = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.5, 0.5]], dtype=torch.float64)[..., None, None]
    arguments = (prior, x_t, source_t, noise, condition, 400)
    composed = edit_residual(*arguments, prior.encode_text(prompts), 3.0, 1.5, shares=shares)
    assert len(seen) == 2 * (4 + 2)
    alone = [edit_residual(*arguments, prior.encode_text([prompt]), 3.0, 1.5) for prompt in prompts]
    expected = sum(shares[:, k : k + 1] * alone[k] for k in range(3))
    torch.testing.assert_close(composed, expected)


@pytest.mark.parametrize("blend_regions", [False, True])
def test_each_region_gets_its_prompt(blend_regions):
    image, prompts = smooth(16, 96), ["make it night", "invert the colors"]
    config = EditConfig(steps=60)
    edited = edit_panorama(image, SmallWindow(), prompts, config, blend_regions=blend_regions)
    left, right = slice(0, 28), slice(68, 96)
    torch.testing.assert_close(edited[..., left], answer(prompts[0], image)[..., left], rtol=0, atol=0.03)
    torch.testing.assert_close(edited[..., right], answer(prompts[1], image)[..., right], rtol=0, atol=0.03)


def test_where_there_is_no_region_nothing_changes_and_soft_ones_fade():
    image, region = smooth(16, 64), torch.zeros(1, 16, 64)
    region[..., :24], region[..., 24:32] = 1, 0.5
    edited = edit_panorama(image, SmallWindow(), "invert the colors", EditConfig(steps=60), regions=[region])
    assert torch.equal(edited[..., 32:], image[..., 32:])
    torch.testing.assert_close(edited, torch.lerp(image, 1 - image, region), rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ([torch.ones(1, 16, 32)], "one region for each prompt, got 1 for 2"),
        ([torch.ones(1, 16, 31), torch.ones(1, 16, 32)], r"regions must be of the image's size, got \(1, 16, 31\)"),
    ],
)
def test_regions_that_do_not_fit(regions, message):
    with pytest.raises(ValueError, match=message):
        edit_panorama(smooth(16, 32), SmallWindow(), ["make it night", "make it sepia"], regions=regions)


def test_the_border_of_all_regions_together_is_soft_and_borders_between_them_are_not():
    left, right = torch.zeros(2, 1, 8, 40)
    left[..., 4:20], right[..., 20:] = 1, 1
    covered = compose([left, right], feather=4)[1][0, 4]
    assert (covered[:4] == 0).all() and 0 < covered[4] < 0.5 and (covered[12:] == 1).all()


def test_regions_from_the_command_line(tmp_path):
    image, region = smooth(16, 64), torch.zeros(3, 16, 64)
    region[..., :32] = 1
    paths = [tmp_path / name for name in ("in.png", "left.png", "right.png", "out.png")]
    for path, picture in zip(paths, (image, region, 1 - region), strict=False):
        write_image(picture, path)
    options = ["--prior", "analytic", "--steps", "40", "--blend-regions"]
    arguments = ["--prompt", "make it night", "invert the colors", "--regions", str(paths[1]), str(paths[2])]
    main(["panorama", str(paths[0]), str(paths[3]), *arguments, *options])
    expected = torch.cat([answer("make it night", image)[..., :32], 1 - image[..., 32:]], -1)
    assert (read_image(paths[3]) - expected).abs().max() < 0.03


# Tiles of an autoencoder


def test_tiles_put_a_function_together_again():
    """A function that treats every cell alike comes out as if it had been applied to the whole."""
    images = torch.rand(2, 3, 44, 100, generator=torch.Generator().manual_seed(0))
    pooled = in_tiles(lambda tile: F.avg_pool2d(tile, 4), images, 8, (4, 1))
    torch.testing.assert_close(pooled, F.avg_pool2d(images, 4))
    larger = in_tiles(lambda tile: F.interpolate(tile, scale_factor=4), pooled, 8, (1, 4))
    torch.testing.assert_close(larger, F.interpolate(pooled, scale_factor=4))


def test_tiles_that_differ_fade_into_each_other():
    shades = itertools.count()
    blended = in_tiles(lambda tile: torch.full_like(tile, float(next(shades))), torch.zeros(1, 1, 8, 20), 8, (1, 1))
    row = blended[0, 0, 0]
    assert row[0] == 0 and row[-1] == 2
    assert (row.diff() >= 0).all() and row.diff().max() < 0.6


def test_residuals_know_prompts_of_the_learned_model():
    """Two halves under two prompts are what each prompt alone makes of them."""
    prior = load_prior("tiny")
    x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    shares = torch.zeros(1, 2, 32, 32)
    shares[:, 0, :, :16] = shares[:, 1, :, 16:] = 1
    prompts = ["paint it red", "make it night"]
    both = edit_residual(prior, x, x, x, x, 600, prior.encode_text(prompts), 2.0, 1.0, shares=shares)
    alone = [edit_residual(prior, x, x, x, x, 600, prior.encode_text([prompt]), 2.0, 1.0) for prompt in prompts]
    torch.testing.assert_close(both, torch.where(shares[:, :1] > 0, *alone), atol=1e-4, rtol=0)
