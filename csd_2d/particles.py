"""What is edited, seen as particles: frames or views with latents of their own, or crops of one canvas."""

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

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

    def noise(self, indices: Sequence[int], mode: NoiseMode, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
        """Standard normal noise for these particles; `generator` lives on the CPU so that devices agree."""
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


class LatentStack:
    """Particles with a latent of their own: the frames of a video, the views of a scene.

    Args:
        source: latents of the unedited images.
        condition: what the prior takes as source images (`Prior.condition`).
        start: latents to start from; default: `source`.
        mask: which cells may change; the others stay the source's. Default: all.
    """

    def __init__(
        self,
        source: Float[Tensor, "n c h w"],
        condition: Float[Tensor, "n c h w"],
        start: Float[Tensor, "n c h w"] | None = None,
        mask: Bool[Tensor, "n 1 h w"] | None = None,
    ) -> None:
        self._source = source.detach().float()
        self._condition = condition.detach()
        self._mask = mask
        # Master latents stay fp32 whatever the model computes in: fp16 loses updates below 1e-3.
        self.latents = nn.Parameter((source if start is None else start).detach().float().clone())

    def __len__(self) -> int:
        return len(self.latents)

    def render(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        latents = self.latents[list(indices)]
        return latents if self._mask is None else torch.where(self._mask[list(indices)], latents, self.source(indices))

    def source(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        return self._source[list(indices)]

    def condition(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        return self._condition[list(indices)]

    def noise(self, indices: Sequence[int], mode: NoiseMode, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
        return stack_noise(self.latents[list(indices)], mode, generator)

    def parameters(self) -> Iterable[nn.Parameter]:
        return [self.latents]


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


def window_positions(size: int, window: int, stride: int) -> list[int]:
    """Left edges of windows that cover 0..size: every `stride` cells, and one flush with the end.

    Example:
        >>> window_positions(10, 4, 4)
        [0, 4, 6]
    """
    last = size - window
    if last < 0:
        raise ValueError(f"window of {window} cells does not fit in {size} cells; pad the canvas first.")
    return [*range(0, last, stride), last]


class CanvasCrops:
    """Particles that are overlapping windows of one canvas of latents: the crops of a panorama.

    Every cell is covered whatever the stride. Crops fade into each other: what a crop says of a cell counts the less
    the nearer the cell is to the crop's border, where the model sees least around it. The weights of all crops add up
    to 1 in every cell, borders of the canvas included, so that no cell is moved more than another.

    Args:
        source: latents of the whole unedited image.
        condition: the whole unedited image as the prior wants it.
        window: side of a square crop, in cells.
        stride: distance between crops, in cells, at most `window`.
        mask: which cells may change; the others stay the source's. Default: all.
        fade: False: as published, crops count alike, and the gradient of a cell is divided by the number of rendered
            crops that cover it. Cells near the canvas's border then move less often, and crops leave seams.

    Raises:
        ValueError: if the window does not fit or the stride would leave cells uncovered.
    """

    def __init__(
        self,
        source: Float[Tensor, "1 c h w"],
        condition: Float[Tensor, "1 c h w"],
        window: int,
        stride: int,
        mask: Bool[Tensor, "1 1 h w"] | None = None,
        fade: bool = True,
    ) -> None:
        if not 1 <= stride <= window:
            raise ValueError(f"stride must be from 1 to the window of {window} cells, got {stride}.")
        self.window = window
        self._source = source.detach().float()
        self._condition = condition.detach()
        self._mask = mask
        self.canvas = nn.Parameter(self._source.clone())
        height, width = source.shape[-2:]
        self.corners = [
            (y, x) for y in window_positions(height, window, stride) for x in window_positions(width, window, stride)
        ]
        self._weights = self._faded() if fade else None

    def __len__(self) -> int:
        return len(self.corners)

    def _crops(self, canvas: Tensor, indices: Sequence[int]) -> Tensor:
        corners = (self.corners[i] for i in indices)
        return torch.cat([canvas[..., y : y + self.window, x : x + self.window] for y, x in corners])

    def _faded(self) -> Float[Tensor, "crops 1 window window"]:
        """Pyramids, flat towards the canvas's border, divided by their sum over all crops."""
        height, width = self._source.shape[-2:]
        distance = torch.arange(self.window) + 0.5
        rising = (distance / (self.window / 2)).clamp(max=1)

        def ramp(start: int, size: int) -> Tensor:
            left = torch.ones_like(rising) if start == 0 else rising
            right = torch.ones_like(rising) if start + self.window == size else rising.flip(0)
            return left * right

        pyramids = torch.stack([ramp(y, height)[:, None] * ramp(x, width) for y, x in self.corners])[:, None]
        pyramids = pyramids.to(self._source.device)
        return pyramids / self._crops(self._sum(pyramids, range(len(self))), range(len(self)))

    def _sum(self, crops: Tensor, indices: Sequence[int]) -> Float[Tensor, "1 1 h w"]:
        """Crops put back in their places and added up."""
        total = torch.zeros_like(self._source[:, :1])
        for crop, (y, x) in zip(crops, (self.corners[i] for i in indices), strict=True):
            total[..., y : y + self.window, x : x + self.window] += crop
        return total

    def render(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        if self._weights is not None:
            return _ScaleGradient.apply(self._crops(self.edited(), indices), self._weights[list(indices)])  # type: ignore[return-value]
        coverage = self._sum(self._source.new_ones(len(indices), 1, 1, 1), indices).clamp(min=1)
        return self._crops(_ScaleGradient.apply(self.edited(), 1 / coverage), indices)  # type: ignore[arg-type]

    def edited(self) -> Float[Tensor, "1 c h w"]:
        """The canvas with what the mask keeps of the source."""
        return self.canvas if self._mask is None else torch.where(self._mask, self.canvas, self._source)

    def source(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        return self._crops(self._source, indices)

    def condition(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        return self._crops(self._condition, indices)

    def noise(self, indices: Sequence[int], mode: NoiseMode, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
        if mode == "canvas":
            return self._crops(_standard_normal(self.canvas.shape, generator, self.canvas), indices)
        shape = (1 if mode == "shared" else len(indices), self.canvas.shape[1], self.window, self.window)
        return _standard_normal(shape, generator, self.canvas).expand(len(indices), -1, -1, -1)

    def parameters(self) -> Iterable[nn.Parameter]:
        return [self.canvas]
