"""Kernels and the SVGD direction against slow loops, autograd and closed forms."""

import math

import numpy as np
import pytest
import torch

from csd_2d import RBFKernel, svgd_direction


def slow_direction(scores: torch.Tensor, x: torch.Tensor, h: float) -> torch.Tensor:
    """Liu & Wang 2016, eq. 8, term by term, with autograd for the kernel's gradient."""
    n = len(x)
    phi = torch.zeros_like(x)
    for i in range(n):
        for j in range(n):
            x_j = x[j].clone().requires_grad_()
            k = torch.exp(-(x_j - x[i]).square().sum() / h)
            (gradient,) = torch.autograd.grad(k, x_j)
            phi[i] += k.detach() * scores[j] + gradient
    return phi / n


def median_h(x: torch.Tensor) -> float:
    n = len(x)
    pairs = [float((x[i] - x[j]).square().sum()) for i in range(n) for j in range(i + 1, n)]
    return float(np.median(pairs)) / math.log(n + 1)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_direction_is_the_textbook_sum(n):
    generator = torch.Generator().manual_seed(n)
    x, s = torch.randn(2, n, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(svgd_direction(s, x), slow_direction(s, x, median_h(x)), rtol=1e-10, atol=1e-12)


def test_explicit_and_scaled_bandwidth():
    x, s = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(svgd_direction(s, x, RBFKernel(2.5)), slow_direction(s, x, 2.5))
    scaled = svgd_direction(s, x, RBFKernel(bandwidth_scale=10))
    torch.testing.assert_close(scaled, slow_direction(s, x, 10 * median_h(x)))


def test_one_particle_returns_its_score_bit_for_bit():
    score = torch.randn(1, 4, 8, 8)
    assert torch.equal(svgd_direction(score, torch.randn(1, 4, 8, 8)), score)
    assert torch.equal(svgd_direction(score, torch.randn(1, 4, 8, 8), normalize_rows=True), score)


def test_any_trailing_shape_and_permutation_equivariance():
    x, s = torch.randn(2, 5, 4, 3, 2, dtype=torch.float64)
    order = torch.tensor([3, 0, 4, 1, 2])
    phi = svgd_direction(s, x)
    assert phi.shape == s.shape
    torch.testing.assert_close(svgd_direction(s[order], x[order]), phi[order])


def test_normalized_rows_keep_the_length_of_equal_scores_whatever_n():
    for n in (1, 2, 4, 16):
        x = torch.randn(n, 300, dtype=torch.float64)
        score = torch.randn(300, dtype=torch.float64).expand(n, -1)
        phi = svgd_direction(score, x, normalize_rows=True)
        # The repulsion remains; it is a small part, and cancels in the mean only by chance.
        assert phi.mean(0) @ score[0] / (score[0] @ score[0]) == pytest.approx(1, abs=0.05)
    plain = svgd_direction(score, x)
    assert plain.mean(0) @ score[0] / (score[0] @ score[0]) < 0.2  # the published form shrinks with N


def test_two_particles_in_the_plane_repel_each_other():
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    phi = svgd_direction(torch.zeros_like(x), x)
    # h = 1 / log 3, so K_01 = 1/3 and the pull on each is (2 / h) K / N = log(3) / 3 away from the other.
    torch.testing.assert_close(phi, torch.tensor([[-math.log(3) / 3, 0.0], [math.log(3) / 3, 0.0]]))


def test_svgd_in_the_plane_reaches_mean_and_spread_of_a_gaussian():
    """The whole point of the repulsion: with it particles spread over the target, without it they collapse."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([3.0, -1.0])
    x = 0.1 * torch.randn(60, 2, generator=generator)
    for _ in range(1500):
        x = x + 0.3 * svgd_direction(mean - x, x)
    torch.testing.assert_close(x.mean(0), mean, atol=0.05, rtol=0)
    torch.testing.assert_close(x.var(0), torch.ones(2), atol=0.25, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("identical", [True, False])
def test_small_sets_identical_particles_and_half_precision_stay_finite(dtype, n, identical):
    x = (10 * torch.randn(1 if identical else n, 16384)).expand(n, -1).to(dtype)
    s = torch.randn(n, 16384).to(dtype)
    phi = svgd_direction(s, x)
    assert phi.dtype == dtype
    assert phi.isfinite().all()
    if identical:  # k = 1 everywhere: all move by the mean score
        torch.testing.assert_close(phi, s.float().mean(0).expand(n, -1).to(dtype), rtol=2e-2, atol=2e-2)


def test_a_zero_median_falls_back_to_the_mean():
    x = torch.tensor([[0.0], [0.0], [0.0], [1.0]])  # 3 of 6 pairs coincide
    gram, repulsion_weight = RBFKernel()(x)
    assert gram.isfinite().all() and repulsion_weight.isfinite().all()
    assert 0 < gram[0, 3] < 1


def test_memory_is_linear_in_the_number_of_particles():
    """N = 100 at d = 16,384: an N x N x d tensor would be 655 MB, N x d is 6.6 MB."""
    from torch.profiler import ProfilerActivity, profile

    s, x = torch.randn(2, 100, 16384)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        svgd_direction(s, x)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profiler.events())
    assert allocated < 10 * x.nbytes


@pytest.mark.parametrize("field", ["bandwidth", "bandwidth_scale"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_bad_bandwidths_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} must be positive"):
        RBFKernel(**{field: value})


def test_mismatched_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        svgd_direction(torch.zeros(2, 3), torch.zeros(2, 4))
