"""Optical flow against motions that are known exactly."""

import math

import pytest
import torch
import torch.nn.functional as F

from csd_2d.correspondence import flow as flow_module
from csd_2d.correspondence.flow import optical_flow, visible, warp


def textured(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Texture of several scales, smooth enough to be moved by parts of a pixel."""
    generator = torch.Generator().manual_seed(seed)
    layers = [
        F.interpolate(
            torch.rand(1, 3, height // n + 2, width // n + 2, generator=generator), (height, width), mode="bicubic"
        )
        for n in (6, 12, 24)
    ]
    return (sum(layers)[0] / 3).clamp(0, 1)


def rotation(height: int, width: int, degrees: float) -> torch.Tensor:
    """Flow of a picture that turns about its middle."""
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.stack([c * x - s * y - x, s * x + c * y - y])


def inner(picture: torch.Tensor, margin: int) -> torch.Tensor:
    return picture[..., margin:-margin, margin:-margin]


@pytest.mark.parametrize(("height", "width"), [(96, 144), (27, 48), (160, 160)])
def test_a_known_shift_is_found(height, width):
    large = textured(height + 10, width + 10)
    a, b = large[:, 4:-6, 4:-6], large[:, 2:-8, 7:-3]  # what is at p in a is at p + (-3, 2) in b
    found = optical_flow(a, b)
    assert found.shape == (2, height, width)
    error = (found - torch.tensor([-3.0, 2.0])[:, None, None]).norm(dim=0)
    assert inner(error, 6).quantile(0.9) < 0.35
    assert error.median() < 0.15


def test_a_known_rotation_is_found_and_undone():
    a = textured(128, 128)
    b = warp(a, rotation(128, 128, -4))  # b(p) = a(turned back p): a turned by 4 degrees
    truth = rotation(128, 128, 4)
    found = optical_flow(a, b)
    assert inner((found - truth).norm(dim=0), 12).quantile(0.95) < 0.4
    brought_back = warp(b, found)
    assert inner((brought_back - a).abs(), 12).mean() < 0.25 * inner((b - a).abs(), 12).mean()


def test_warp_of_a_whole_shift_copies_pixels_and_repeats_the_border():
    values = torch.rand(2, 5, 6, 7)
    shift = torch.tensor([2.0, -1.0])[:, None, None].expand(2, 2, 6, 7)
    moved = warp(values, shift)
    torch.testing.assert_close(moved[..., 1:, :5], values[..., :5, 2:])
    torch.testing.assert_close(moved[..., 0, :5], values[..., 0, 2:])
    torch.testing.assert_close(moved[..., 1:, 6], values[..., :5, 6])
    torch.testing.assert_close(warp(values[0], shift[0]), moved[0])


def test_what_is_covered_or_leaves_the_picture_is_not_visible():
    """A square before a still background moves right by 4: it covers the four columns before it."""
    square = torch.zeros(20, 30)
    square[6:14, 8:16] = 4
    back = torch.zeros(20, 30)
    back[6:14, 12:20] = -4
    still = torch.zeros(20, 30)
    seen = visible(torch.stack([square, still]), torch.stack([back, still]))[0]
    expected = torch.ones(20, 30)
    expected[6:14, 16:20] = 0
    assert torch.equal(seen, expected)

    away = torch.stack([torch.full((20, 30), 5.0), torch.zeros(20, 30)])
    assert torch.equal(visible(away, -away)[0], (torch.arange(30) < 25).float().expand(20, 30))


def test_raft_is_taken_when_its_weights_are_cached(tmp_path, monkeypatch):
    """The small one with random weights: what it says is meaningless, that it says it is the point."""
    models = pytest.importorskip("torchvision.models.optical_flow", reason="torchvision is not installed")
    (tmp_path / "checkpoints").mkdir()
    name = models.Raft_Small_Weights.DEFAULT.url.rpartition("/")[2]
    torch.manual_seed(0)
    model = models.raft_small().eval()
    torch.save(model.state_dict(), tmp_path / "checkpoints" / name)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    flow_module._raft.cache_clear()
    try:
        a, b = textured(128, 136, 1), textured(128, 136, 2)
        with torch.no_grad():
            expected = model(2 * a[None] - 1, 2 * b[None] - 1)[-1][0]
        torch.testing.assert_close(optical_flow(a, b), expected, rtol=1e-4, atol=1e-4)
    finally:
        flow_module._raft.cache_clear()


def test_images_of_two_sizes_are_named():
    with pytest.raises(ValueError, match=r"\(3, 8, 8\) and \(3, 8, 9\)"):
        optical_flow(torch.zeros(3, 8, 8), torch.zeros(3, 8, 9))


def test_without_opencv_the_command_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    monkeypatch.setattr(flow_module, "_raft", lambda device: None)
    with pytest.raises(ImportError, match=r"pip install \"csd-edit\[flow\]\""):
        optical_flow(torch.rand(3, 32, 32), torch.rand(3, 32, 32))
