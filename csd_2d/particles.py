"""The images that are edited together, as particles, and how they belong together."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from csd_2d.correspondence import Correspondence

NoiseMode = Literal["independent", "shared", "canvas"]
"""A noise for each particle, one for all particles, or crops of one noise map of the whole canvas."""


class Particles(Protocol):
    """A set of images that are edited together."""

    def __len__(self) -> int: ...

    def render(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        """Render latents x_0 of some particles, fp32, differentiable with respect to `parameters()`.

        They must be a new tensor, not a parameter itself: the record of a step keeps them while parameters change.
        """
        ...

    def source(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        """Return the unedited latents of some particles, detached."""
        ...

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters that an edit changes."""
        ...


@dataclass(frozen=True)
class Layout:
    """How the particles of an edit belong together, as far as its task knows; every part is optional."""

    rounds: list[list[int]] | None = None
    """Sets of particles each of which covers all there is to edit, such as grids of crops. Default: one of all."""
    shares: Callable[[Sequence[int]], Float[Tensor, "n prompts _ _"]] | None = None
    """Finds the share of each of several prompts in some particles, see `edit_residual`. Default: there is one."""
    correspondence: Callable[[Sequence[int]], Correspondence] | None = None
    """Finds which places of some particles show the same thing. Default: not known, as of crops, whose common cells
    are one."""
    canvas_noise: Callable[[Sequence[int], torch.Generator], Float[Tensor, "n c h w"]] | None = None
    """Draws noise for some particles from one map of the whole canvas. Default: there is no canvas."""


def standard_normal(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    """Draw standard normal noise on the generator's device, the CPU, so that all devices get the same."""
    return torch.randn(tuple(shape), generator=generator).to(like.device)


def noise_source(
    mode: NoiseMode, layout: Layout
) -> Callable[[Sequence[int], Tensor, torch.Generator], Float[Tensor, "n c h w"]]:
    """Choose how noise is drawn for some particles, given latents of the shape wanted and a generator.

    Raises:
        ValueError: if the mode needs crops of one canvas and there is none.
    """
    if mode != "canvas":
        count = (lambda latents: 1) if mode == "shared" else len
        return lambda _, latents, generator: standard_normal(
            (count(latents), *latents.shape[1:]), generator, latents
        ).expand_as(latents)
    draw = layout.canvas_noise
    if draw is None:
        raise ValueError("noise 'canvas' needs crops of one canvas (a panorama); use 'independent' or 'shared'.")
    return lambda indices, _, generator: draw(indices, generator)
