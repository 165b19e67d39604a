"""Whether an edit left things where they were: similarity, outlines, and by how much the picture moved."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from csd_2d.blur import gaussian_blur


def luma(image: Float[Tensor, "*n 3 H W"]) -> Float[Tensor, "*n 1 H W"]:
    """Compute the Rec. 601 luma."""
    return (image * image.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(-3, keepdim=True)


def ssim(source: Float[Tensor, "3 H W"], edited: Float[Tensor, "3 H W"]) -> float:
    """Compute the structural similarity of two images' luma, 1 for equal ones.

    Wang et al., IEEE TIP 2004, eq. 13, with their Gaussian window of 11 px and deviation 1.5; the mean over places
    whose window lies in the picture, or over all if it is smaller than that. Written out here because importing the
    library that has it takes longer than measuring a video.

    Example:
        >>> image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> round(ssim(image, image), 4), ssim(image, 1 - image) < 0
        (1.0, True)
    """
    x, y = luma(torch.stack([source, edited])).double()[:, None]
    means = gaussian_blur(torch.cat([x, y, x * x, y * y, x * y]), deviation=1.5, reach=5)[:, 0]
    if min(means.shape[-2:]) > 10:
        means = means[:, 5:-5, 5:-5]
    mean_x, mean_y, square_x, square_y, product = means
    variances = square_x - mean_x.square() + square_y - mean_y.square()
    covariance = product - mean_x * mean_y
    alike = (2 * mean_x * mean_y + 0.01**2) * (2 * covariance + 0.03**2)
    return (alike / ((mean_x.square() + mean_y.square() + 0.01**2) * (variances + 0.03**2))).mean().item()


def outlines(image: Float[Tensor, "*n 3 H W"]) -> Float[Tensor, "*n H W"]:
    """Compute how steep luma is, by the differences of neighbors on both sides; the border's is 0."""
    gray = F.pad(luma(image), (1, 1, 1, 1), mode="replicate").squeeze(-3)
    right = (gray[..., 1:-1, 2:] - gray[..., 1:-1, :-2]) / 2
    down = (gray[..., 2:, 1:-1] - gray[..., :-2, 1:-1]) / 2
    return (right.square() + down.square()).sqrt()


def edge_similarity(source: Float[Tensor, "3 H W"], edited: Float[Tensor, "3 H W"]) -> float:
    """Correlate the outlines of two images, see `outlines`: 1 for the same ones, at any contrast; 0 for unrelated ones.

    NaN if an image has none.

    Example:
        >>> image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> round(edge_similarity(image, 1 - image / 2), 4)
        1.0
    """
    a, b = (outlines(image).flatten() for image in (source, edited))
    if not (a.any() and b.any()):
        return math.nan
    return torch.cosine_similarity(a - a.mean(), b - b.mean(), dim=0).item()


@dataclass(frozen=True)
class Shift:
    """How far an edit moved the picture."""

    right: float
    """In pixels."""
    down: float
    """In pixels."""
    zoom: float
    """Factor on sizes; 1: none."""
    windows: int
    """Number of windows that this is an estimate of; 0: too few show enough to tell, and nothing is known."""

    @property
    def length(self) -> float:
        """Distance that the middle of the picture moved, in pixels."""
        return (self.right**2 + self.down**2) ** 0.5


LEAST_SIDE = 32
"""Least side of a window in pixels."""
LEAST_PEAK = 4.0
"""Height of a window's correlation peak over its largest value elsewhere from which the window counts; noise has 1."""
LEAST_SHARE = 0.05
"""Share of the windows that must count: of fifty, one has such a peak by chance."""
SPREAD = 1.5
"""Radius in pixels of what belongs to a peak."""


def shift(source: Float[Tensor, "3 H W"], edited: Float[Tensor, "3 H W"]) -> Shift:
    """Estimate how far an edit moved the picture and zoomed it, by phase correlation in windows.

    In each of the overlapping windows the displacement is the peak of the inverse Fourier transform of E S* / |E S*|
    (Kuglin & Hines, 1975), with S and E the spectra of the outlines, which survive a change of colors, of source and
    edit. A parabola gives fractions of a pixel. Windows vote with d = t + (z - 1) (p - c): translation t of the
    picture's middle c, and zoom z about it; those that disagree with the median are left out. Of pictures of less than
    32 px nothing is known.

    Example:
        >>> image = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
        >>> image = F.interpolate(image, (96, 96), mode="bicubic")[0]
        >>> moved = shift(image, image.roll((2, -3), (1, 2)))
        >>> round(moved.right), round(moved.down), round(moved.zoom, 2)
        (-3, 2, 1.0)
    """
    height, width = source.shape[-2:]
    if min(height, width) < LEAST_SIDE:
        return Shift(0.0, 0.0, 1.0, 0)
    side = max(LEAST_SIDE, min(height, width) // 3)
    corners = [_starts(length, side) for length in (height, width)]
    places = [(top, left) for top in corners[0] for left in corners[1]]
    pictures = outlines(torch.stack([source, edited]))
    windows = torch.stack([pictures[:, top : top + side, left : left + side] for top, left in places])
    moves, heights = _phase_correlation(windows[:, 0], windows[:, 1])
    middle = torch.tensor([(height - side) / 2, (width - side) / 2])
    offsets = torch.tensor(places) - middle
    found = heights >= LEAST_PEAK
    moves, offsets = moves[found], offsets[found].float()
    if len(moves):
        near = (moves - moves.median(0).values).abs().amax(1) <= side / 8
        moves, offsets = moves[near], offsets[near]
    if len(moves) < max(1, LEAST_SHARE * len(places)):
        return Shift(0.0, 0.0, 1.0, 0)
    centered = offsets - offsets.mean(0)
    spread = centered.square().sum()
    zoom = (centered * (moves - moves.mean(0))).sum() / spread if spread > 0 else torch.zeros(())
    down, right = (moves.mean(0) - zoom * offsets.mean(0)).tolist()
    return Shift(right, down, 1 + zoom.item(), len(moves))


def _starts(length: int, side: int) -> list[int]:
    """Spread windows of a side evenly over a length, overlapping by half or more."""
    count = 1 + -(-2 * (length - side) // side)
    return [round(start) for start in torch.linspace(0, length - side, count).tolist()]


def _phase_correlation(
    source: Float[Tensor, "n s s"], edited: Float[Tensor, "n s s"]
) -> tuple[Float[Tensor, "n 2"], Float[Tensor, " n"]]:
    """Correlate windows; returns their displacements (down, right), and how much higher than all else each peak is."""
    side = source.shape[-1]
    taper = torch.hann_window(side, periodic=False)
    spectra = [torch.fft.fft2((w - w.mean((1, 2), keepdim=True)) * taper[:, None] * taper) for w in (source, edited)]
    cross = spectra[1] * spectra[0].conj()
    # High frequencies of an edit are noise: whitened, they would count as much as what the picture shows.
    f = torch.fft.fftfreq(side)
    soft = (-(f[:, None] ** 2 + f**2) / (2 * 0.15**2)).exp()
    weight = torch.where(cross.abs() > 1e-12, soft / cross.abs().clamp(min=1e-12), 0.0)
    surface = torch.fft.ifft2(cross * weight).real
    top, place = surface.flatten(1).max(1)
    y, x = place // side, place % side
    line = torch.arange(side)
    away = (
        ((line - y[:, None] + side // 2) % side - side // 2)
        .abs()[:, :, None]
        .maximum(((line - x[:, None] + side // 2) % side - side // 2).abs()[:, None])
    )
    others = surface.abs().masked_fill(away <= 2 * SPREAD, 0).amax((1, 2))
    rows = torch.arange(len(surface))

    def fraction(before: Tensor, after: Tensor) -> Tensor:
        bend = (before - 2 * top + after).clamp(max=-1e-12)
        return ((before - after) / (2 * bend)).clamp(-0.5, 0.5)

    down = y + fraction(surface[rows, (y - 1) % side, x], surface[rows, (y + 1) % side, x])
    right = x + fraction(surface[rows, y, (x - 1) % side], surface[rows, y, (x + 1) % side])
    moves = torch.stack([down, right], 1)
    return torch.where(moves > side / 2, moves - side, moves), top / others.clamp(min=1e-12)
