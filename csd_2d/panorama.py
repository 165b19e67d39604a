"""Panoramas: overlapping crops of one canvas as particles."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from csd_2d.edit import EditConfig, Prompt, StepInfo, check_prompt, edit
from csd_2d.images import cell_mask, pad, round_up
from csd_2d.particles import CanvasCrops
from csd_2d.priors import Prior


def stripes(count: int, height: int, width: int) -> list[Float[Tensor, "1 height width"]]:
    """Vertical stripes of one width, from left to right, as masks; a pixel between two belongs to both in parts."""
    edges = torch.linspace(0, width, count + 1, dtype=torch.float64)
    pixels = torch.arange(width, dtype=torch.float64)
    spans = itertools.pairwise(edges)
    parts = [((pixels + 1).clamp(max=right) - pixels.clamp(min=left)).clamp(0, 1) for left, right in spans]
    return [part.float().expand(1, height, width) for part in parts]


def compose(
    regions: Sequence[Float[Tensor, "1 H W"]],
) -> tuple[Float[Tensor, "prompts H W"], Float[Tensor, "1 H W"]]:
    """Each region's share of every pixel, all together 1, and how much of the pixel they cover, in [0, 1].

    Where there is no region the shares are equal, and the pixel is not covered.
    """
    stacked = torch.cat(list(regions))
    total = stacked.sum(0, keepdim=True)
    return torch.where(total > 0, stacked / total.clamp(min=1e-6), 1 / len(stacked)), total.clamp(max=1)


def _around(canvas: Float[Tensor, "1 c h w"], margin: int) -> Float[Tensor, "1 c h _"]:
    """With what lies beyond the left and the right border of a circle."""
    return F.pad(canvas, (margin, margin, 0, 0), mode="circular")


def _inner(canvas: Float[Tensor, "1 c h _"], margin: int) -> Float[Tensor, "1 c h w"]:
    """Takes away what `_around` added."""
    return canvas[..., margin : canvas.shape[-1] - margin]


def edit_panorama(
    image: Float[Tensor, "3 H W"],
    prior: Prior,
    prompt: Prompt,
    config: EditConfig | None = None,
    stride: int | None = None,
    mask: Float[Tensor, "1 H W"] | None = None,
    regions: Sequence[Float[Tensor, "1 H W"]] | None = None,
    blend_regions: bool = False,
    wrap: bool = False,
    fade: bool = True,
    on_step: Callable[[StepInfo], bool | None] | None = None,
    progress: str | None = None,
    resume: Path | None = None,
) -> Float[Tensor, "3 H W"]:
    """Edits an image of any size through overlapping crops of the prior's window.

    The image is mirrored outwards to whole latent cells and at least one window, and cropped again afterwards.

    Args:
        image: RGB in [0, 1].
        prompt: one instruction, or several that each have a region.
        stride: largest distance between crops in latent cells; default: three quarters of a window (paper: a quarter).
        mask: what may change, in [0, 1]; where 0 the image stays bit for bit. Default: all.
        regions: one mask for each of several prompts, in [0, 1]; where they overlap they share, where there is none the
            image stays. Default: vertical stripes of one width.
        blend_regions, wrap, fade: see `CanvasCrops`; `wrap` is for 360 degree images.
        config, on_step, progress, resume: see `csd_2d.edit.edit`.

    Returns:
        The edited image on the CPU, RGB in [0, 1].

    Raises:
        ValueError: if the stride is under 1 or over the window, if the mask or a region is of another size, if prompts
            and regions differ in number, if a wrapped image is narrower than the window or its width is no multiple of
            a latent cell, or as `edit` raises.

    Example:
        >>> from csd_2d import EditConfig, load_prior
        >>> edited = edit_panorama(torch.rand(3, 40, 300), load_prior("analytic"), "make it night", EditConfig(steps=3))
        >>> edited.shape
        torch.Size([3, 40, 300])
    """
    height, width = image.shape[-2:]
    prompts = check_prompt(prompt)
    if regions is None:
        regions = stripes(len(prompts), height, width)
    if len(regions) != len(prompts):
        raise ValueError(f"there must be one region for each prompt, got {len(regions)} for {len(prompts)}.")
    for name, picture in [("mask", mask), *(("regions", region) for region in regions)]:
        if picture is not None and picture.shape[1:] != image.shape[1:]:
            raise ValueError(
                f"{name} must be of the image's size, got {tuple(picture.shape)} for {tuple(image.shape)}."
            )
    shares, covered = compose(regions)
    if not bool((covered == 1).all()):
        mask = covered if mask is None else mask * covered
    smallest = prior.window * prior.cell
    if wrap and (width % prior.cell or width < smallest):
        raise ValueError(
            f"an image that wraps must be at least {smallest} px wide, and a multiple of {prior.cell}; got {width} px."
        )
    height_padded, width_padded = (max(round_up(size, prior.cell), smallest) for size in (height, width))
    margin = smallest // 2 if wrap else 0

    def padded(picture: Tensor) -> Tensor:
        return pad(picture[None], height_padded, width_padded).to(prior.device)

    with torch.no_grad():
        around = _around(padded(image), margin)
        crops = CanvasCrops(
            _inner(prior.encode(around), margin // prior.cell),
            _inner(prior.condition(around), margin // prior.cell),
            prior.window,
            max(3 * prior.window // 4, 1) if stride is None else stride,
            None if mask is None else cell_mask(padded(mask), prior.cell),
            F.avg_pool2d(padded(shares), prior.cell) if len(prompts) > 1 else None,
            blend_regions,
            wrap,
            fade,
        )
    edit(crops, prior, prompts, config, on_step, progress, resume)
    with torch.no_grad():
        decoded = prior.decode(_around(crops.edited(), margin // prior.cell))
    edited = _inner(decoded, margin)[0, :, :height, :width].cpu()
    return edited if mask is None else torch.lerp(image, edited, mask)
