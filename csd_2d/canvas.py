"""Particles that are overlapping windows of one canvas of latents: the crops of a panorama."""

import itertools
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from csd_2d.particles import Layout, standard_normal
from csd_2d.tiles import fading, window_positions


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (factor,) = ctx.saved_tensors
        return grad * factor, None


class CanvasCrops:
    """Overlapping square windows of one canvas of latents, as particles.

    Crops form grids, each of which covers every cell. A step takes a whole grid, the next step another, slightly
    shifted one, so that no border of a crop stays in one place. Crops of a grid fade into each other: the weight of a
    crop in a cell falls off towards the crop's border, where the model has least context. The weights of a grid add up
    to 1 in every cell, borders of the canvas included, so that every cell moves at the same rate.

    Args:
        source: latents of the whole unedited image.
        window: side of a square crop, in cells.
        stride: largest distance between crops of a grid, in cells, at most `window`. Default: three quarters of it.
        start: latents to start from. Default: a copy of `source`.
        regions: where each of several prompts applies; adds up to 1 in every cell. Default: there is one prompt.
        blend_regions: False: as published, a prompt's share of a crop is the part of the crop its region covers
            (arXiv 2307.04787, appendix B.1). True: each cell has its own shares.
        wrap: the left and the right border are neighbors.
        fade: False: as published, there is one grid; crops count alike, and the gradient of a cell is divided by the
            number of rendered crops that cover it. Cells near the canvas's border then move less often, where a step
            takes some of the crops, and crops leave seams.

    Raises:
        ValueError: if the window does not fit or the stride would leave cells uncovered.
    """

    GRIDS = 16

    def __init__(
        self,
        source: Float[Tensor, "1 c h w"],
        window: int,
        stride: int | None = None,
        *,
        start: Float[Tensor, "1 c h w"] | None = None,
        regions: Float[Tensor, "1 prompts h w"] | None = None,
        blend_regions: bool = False,
        wrap: bool = False,
        fade: bool = True,
    ) -> None:
        stride = max(3 * window // 4, 1) if stride is None else stride
        if not 1 <= stride <= window:
            raise ValueError(f"stride must be from 1 to the window of {window} cells, got {stride}.")
        self.window = window
        self._source = source.detach().float()
        self._regions, self._blend_regions = regions, blend_regions
        self._wrap, self._fade = wrap, fade
        self.canvas = nn.Parameter((self._source if start is None else start.detach().float()).clone())
        self.corners: list[tuple[int, int]] = []
        """Top and left cell of each crop."""
        self._ramps: list[tuple[Tensor, Tensor]] = []
        self._grids: list[list[int]] = []
        for grid in range(self.GRIDS if fade else 1):
            self._add_grid(*_grid_shift(grid), stride)

    def _add_grid(self, down: float, across: float, stride: int) -> None:
        height, width = self._source.shape[-2:]
        rows = window_positions(height, self.window, stride, down)
        columns = window_positions(width, self.window, stride, across, self._wrap)
        first = len(self.corners)
        self.corners += itertools.product(rows, columns)
        self._grids.append(list(range(first, len(self.corners))))
        self._ramps += itertools.product(
            fading(rows, height, self.window).to(self._source.device),
            fading(columns, width, self.window, self._wrap).to(self._source.device),
        )

    def __len__(self) -> int:
        return len(self.corners)

    @property
    def layout(self) -> Layout:
        """How the crops belong together."""
        return Layout(
            rounds=self._grids,
            shares=None if self._regions is None else self._shares,
            canvas_noise=self._canvas_noise,
        )

    def _crops(self, canvas: Tensor, indices: Sequence[int]) -> Tensor:
        return torch.cat([self._crop(canvas, *self.corners[i]) for i in indices])

    def _crop(self, canvas: Tensor, y: int, x: int) -> Tensor:
        rows = canvas[..., y : y + self.window, :]
        beyond = x + self.window - canvas.shape[-1]
        if beyond <= 0:
            return rows[..., x : x + self.window]
        return torch.cat([rows[..., x:], rows[..., :beyond]], -1)

    def _coverage(self, indices: Sequence[int]) -> Float[Tensor, "1 1 h w"]:
        """Count how many of some crops cover each cell."""
        total = torch.zeros_like(self._source[:, :1])
        for y, x in (self.corners[i] for i in indices):
            total[..., y : y + self.window, torch.arange(x, x + self.window) % total.shape[-1]] += 1
        return total

    def render(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        if self._fade:
            weights = torch.stack([down[:, None] * across for down, across in (self._ramps[i] for i in indices)])
            return _ScaleGradient.apply(self._crops(self.canvas, indices), weights[:, None])  # type: ignore[return-value]
        scale = 1 / self._coverage(indices).clamp(min=1)
        return self._crops(_ScaleGradient.apply(self.canvas, scale), indices)  # type: ignore[arg-type]

    def source(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        return self._crops(self._source, indices)

    def _shares(self, indices: Sequence[int]) -> Float[Tensor, "n prompts _ _"]:
        assert self._regions is not None
        shares = self._crops(self._regions, indices)
        return shares if self._blend_regions else shares.mean((2, 3), keepdim=True)

    def _canvas_noise(self, indices: Sequence[int], generator: torch.Generator) -> Float[Tensor, "n c h w"]:
        return self._crops(standard_normal(self.canvas.shape, generator, self.canvas), indices)

    def parameters(self) -> Iterable[nn.Parameter]:
        return [self.canvas]


def _grid_shift(grid: int) -> tuple[float, float]:
    """Compute how far a grid is shifted, in shares of its spacing: points of Roberts's R2 sequence, from (0, 0)."""
    plastic = 1.32471795724474602596
    return grid / plastic % 1, grid / plastic**2 % 1
