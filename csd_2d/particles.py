"""What is edited, seen as particles: frames or views with latents of their own, or crops of one canvas."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from csd_2d.tiles import fading, window_positions
from csd_2d.transport import Transport, window_transport

NoiseMode = Literal["independent", "shared", "canvas"]
"""A noise for each particle, one for all particles, or crops of one noise map of the whole canvas."""


class Particles(Protocol):
    """A set of images that are edited together."""

    def __len__(self) -> int: ...

    def render(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        """Latents x_0 of some particles, fp32, differentiable with respect to `parameters()`."""
        ...

    def source(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        """Latents of the same particles before any edit, detached."""
        ...

    def condition(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        """The same particles before any edit, as the prior wants its source image."""
        ...

    @property
    def default_batch(self) -> int:
        """How many a step takes where nobody says; 0: a whole round."""
        ...

    def rounds(self) -> list[list[int]]:
        """Sets of particles each of which is all there is to edit: grids of crops, or simply all frames."""
        ...

    def shares(self, indices: Sequence[int]) -> Float[Tensor, "n prompts _ _"] | None:
        """What share each of several prompts has in these particles, see `edit_residual`; None: there is one prompt."""
        ...

    def noise(self, indices: Sequence[int], mode: NoiseMode, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
        """Standard normal noise for these particles; `generator` lives on the CPU so that devices agree."""
        ...

    def transport(self, indices: Sequence[int]) -> Transport | None:
        """Where these particles show the same things; None: nothing is known of it."""
        ...

    def parameters(self) -> Iterable[nn.Parameter]: ...


def _standard_normal(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randn(tuple(shape), generator=generator).to(like.device)


def stack_noise(
    latents: Float[Tensor, "n c h w"], mode: NoiseMode, generator: torch.Generator
) -> Float[Tensor, "n c h w"]:
    """Noise for images of their own: one map each, or one for all.

    Raises:
        ValueError: for a mode that needs crops of one canvas.
    """
    if mode == "canvas":
        raise ValueError("noise 'canvas' needs crops of one canvas (a panorama); use 'independent' or 'shared'.")
    count = 1 if mode == "shared" else len(latents)
    return _standard_normal((count, *latents.shape[1:]), generator, latents).expand_as(latents)


def stack_batch(count: int) -> int:
    """Images of their own that a step takes: a third (paper: 4 of 12), but 8 at least."""
    return max(8, -(-count // 3))


class LatentStack:
    """Particles with a latent of their own: the frames of a video, the views of a scene.

    Args:
        source: latents of the unedited images.
        condition: what the prior takes as source images (`Prior.condition`).
        start: latents to start from, which the edit changes in place if they are fp32. Default: a copy of `source`.
        mask: which cells may change; the others stay the source's. Default: all.
        shares: where each of several prompts applies, see `edit_residual`. Default: there is one prompt.
        transport: see `Particles.transport`. Default: nothing is known of it.
        device: where the particles that are drawn go. Default: where `source` lies.
        held, count: which particles these are, of how many, where other processes hold the others (`csd_2d.ranks`);
            indices are those of the whole. Default: all.
    """

    def __init__(
        self,
        source: Float[Tensor, "n c h w"],
        condition: Float[Tensor, "n c h w"],
        start: Float[Tensor, "n c h w"] | None = None,
        mask: Bool[Tensor, "n 1 h w"] | None = None,
        shares: Float[Tensor, "n prompts _ _"] | None = None,
        transport: Callable[[Sequence[int]], Transport] | None = None,
        device: str | torch.device | None = None,
        held: range | None = None,
        count: int | None = None,
    ) -> None:
        self._device = source.device if device is None else device
        self.held = range(len(source)) if held is None else held
        self._count = len(self.held) if count is None else count
        self._source = source.detach().float()
        self._condition = condition.detach()
        self._mask = mask
        self._shares = shares
        self._transport = transport
        # Master latents stay fp32 whatever the model computes in: fp16 loses updates below 1e-3.
        self.latents = self._source.clone() if start is None else start.detach().float()
        # One parameter for each particle, so that a step has gradients of those alone that it drew.
        self._parameters = [nn.Parameter(latent) for latent in self.latents]

    def __len__(self) -> int:
        return self._count

    @property
    def default_batch(self) -> int:
        return stack_batch(len(self))

    def rounds(self) -> list[list[int]]:
        return [list(range(len(self)))]

    def _drawn(self, stack: Tensor, indices: Sequence[int]) -> Tensor:
        return stack[[self.held.index(index) for index in indices]].to(self._device)

    def render(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        latents: list[Tensor] = [self._parameters[self.held.index(index)] for index in indices]
        # A process that holds none of those drawn still takes part in the backward pass.
        drawn = (torch.stack(latents) if latents else self._parameters[0][None][:0]).to(self._device)
        if self._mask is None:
            return drawn
        return torch.where(self._drawn(self._mask, indices), drawn, self.source(indices))

    def source(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        return self._drawn(self._source, indices)

    def condition(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        return self._drawn(self._condition, indices)

    def shares(self, indices: Sequence[int]) -> Float[Tensor, "n prompts _ _"] | None:
        return None if self._shares is None else self._drawn(self._shares, indices)

    def noise(self, indices: Sequence[int], mode: NoiseMode, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
        # Drawn for those that other processes hold, too, so that all draw the same.
        return stack_noise(self._drawn(self._source, self.held[:1]).expand(len(indices), -1, -1, -1), mode, generator)

    def transport(self, indices: Sequence[int]) -> Transport | None:
        return None if self._transport is None else self._transport(indices)

    def parameters(self) -> Iterable[nn.Parameter]:
        return self._parameters


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
    """Particles that are overlapping windows of one canvas of latents: the crops of a panorama.

    Crops form grids, each of which covers every cell; a step takes a whole grid, the next step another, a little
    shifted, so that no border of a crop stays in one place. Crops of a grid fade into each other: what a crop says of a
    cell counts the less the nearer the cell is to the crop's border, where the model sees least around it. The weights
    of a grid add up to 1 in every cell, borders of the canvas included, so that no cell is moved more than another.

    Args:
        source: latents of the whole unedited image.
        condition: the whole unedited image as the prior wants it.
        window: side of a square crop, in cells.
        stride: largest distance between crops of a grid, in cells, at most `window`. Default: three quarters of it.
        mask: which cells may change; the others stay the source's. Default: all.
        regions: where each of several prompts applies; adds up to 1 in every cell. Default: there is one prompt.
        blend_regions: False: as published, a prompt's share of a crop is the part of the crop its region covers
            (arXiv 2307.04787, appendix B.1). True: each cell has its own shares.
        wrap: the left and the right border are neighbours.
        fade: False: as published, there is one grid, of which a step takes a third; crops count alike, and the gradient
            of a cell is divided by the number of rendered crops that cover it. Cells near the canvas's border then move
            less often, and crops leave seams.

    Raises:
        ValueError: if the window does not fit or the stride would leave cells uncovered.
    """

    GRIDS = 16

    def __init__(
        self,
        source: Float[Tensor, "1 c h w"],
        condition: Float[Tensor, "1 c h w"],
        window: int,
        stride: int | None = None,
        mask: Bool[Tensor, "1 1 h w"] | None = None,
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
        self._condition = condition.detach()
        self._mask, self._regions, self._blend_regions = mask, regions, blend_regions
        self._wrap, self._fade = wrap, fade
        self.canvas = nn.Parameter(self._source.clone())
        self.corners: list[tuple[int, int]] = []
        """Top and left cell of each crop."""
        self._ramps: list[tuple[Tensor, Tensor]] = []
        self._rounds: list[list[int]] = []
        for grid in range(self.GRIDS if fade else 1):
            self._add_grid(*_phases(grid), stride)
        self.default_batch = 0 if fade else -(-len(self) // 3)

    def _add_grid(self, down: float, across: float, stride: int) -> None:
        height, width = self._source.shape[-2:]
        rows = window_positions(height, self.window, stride, down)
        columns = window_positions(width, self.window, stride, across, self._wrap)
        first = len(self.corners)
        self.corners += itertools.product(rows, columns)
        self._rounds.append(list(range(first, len(self.corners))))
        self._ramps += itertools.product(
            fading(rows, height, self.window).to(self._source.device),
            fading(columns, width, self.window, self._wrap).to(self._source.device),
        )

    def __len__(self) -> int:
        return len(self.corners)

    def rounds(self) -> list[list[int]]:
        return self._rounds

    def _crops(self, canvas: Tensor, indices: Sequence[int]) -> Tensor:
        return torch.cat([self._crop(canvas, *self.corners[i]) for i in indices])

    def _crop(self, canvas: Tensor, y: int, x: int) -> Tensor:
        rows = canvas[..., y : y + self.window, :]
        beyond = x + self.window - canvas.shape[-1]
        if beyond <= 0:
            return rows[..., x : x + self.window]
        return torch.cat([rows[..., x:], rows[..., :beyond]], -1)

    def _coverage(self, indices: Sequence[int]) -> Float[Tensor, "1 1 h w"]:
        """How many of some crops cover each cell."""
        total = torch.zeros_like(self._source[:, :1])
        for y, x in (self.corners[i] for i in indices):
            total[..., y : y + self.window, torch.arange(x, x + self.window) % total.shape[-1]] += 1
        return total

    def render(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        if self._fade:
            weights = torch.stack([down[:, None] * across for down, across in (self._ramps[i] for i in indices)])
            return _ScaleGradient.apply(self._crops(self.edited(), indices), weights[:, None])  # type: ignore[return-value]
        scale = 1 / self._coverage(indices).clamp(min=1)
        return self._crops(_ScaleGradient.apply(self.edited(), scale), indices)  # type: ignore[arg-type]

    def edited(self) -> Float[Tensor, "1 c h w"]:
        """The canvas with what the mask keeps of the source."""
        return self.canvas if self._mask is None else torch.where(self._mask, self.canvas, self._source)

    def source(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        return self._crops(self._source, indices)

    def condition(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        return self._crops(self._condition, indices)

    def shares(self, indices: Sequence[int]) -> Float[Tensor, "n prompts _ _"] | None:
        if self._regions is None:
            return None
        shares = self._crops(self._regions, indices)
        return shares if self._blend_regions else shares.mean((2, 3), keepdim=True)

    def noise(self, indices: Sequence[int], mode: NoiseMode, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
        if mode == "canvas":
            return self._crops(_standard_normal(self.canvas.shape, generator, self.canvas), indices)
        shape = (1 if mode == "shared" else len(indices), self.canvas.shape[1], self.window, self.window)
        return _standard_normal(shape, generator, self.canvas).expand(len(indices), -1, -1, -1)

    def transport(self, indices: Sequence[int]) -> Transport | None:
        return window_transport([self.corners[i] for i in indices], self.canvas.shape[-1] if self._wrap else None)

    def parameters(self) -> Iterable[nn.Parameter]:
        return [self.canvas]


def _phases(grid: int) -> tuple[float, float]:
    """Shifts of a grid, the first one's none: points that fill a square evenly (Roberts's R2 sequence)."""
    plastic = 1.32471795724474602596
    return grid / plastic % 1, grid / plastic**2 % 1
