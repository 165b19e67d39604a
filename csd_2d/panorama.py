"""Panoramas: overlapping crops of one canvas as particles."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from csd_2d.canvas import CanvasCrops
from csd_2d.cells import pad, round_up
from csd_2d.config import EditConfig
from csd_2d.csd import Step
from csd_2d.edit import edit
from csd_2d.io.masks import feathered
from csd_2d.loss import Prompt, check_prompt
from csd_2d.prior import Prior


def stripes(count: int, height: int, width: int) -> list[Float[Tensor, "1 height width"]]:
    """Make masks of vertical stripes of equal width, from left to right; pixels between two belong to both in part."""
    edges = torch.linspace(0, width, count + 1, dtype=torch.float64)
    pixels = torch.arange(width, dtype=torch.float64)
    spans = itertools.pairwise(edges)
    parts = [((pixels + 1).clamp(max=right) - pixels.clamp(min=left)).clamp(0, 1) for left, right in spans]
    return [part.float().expand(1, height, width) for part in parts]


def compose(
    regions: Sequence[Float[Tensor, "1 H W"]], feather: float = 0.0
) -> tuple[Float[Tensor, "prompts H W"], Float[Tensor, "1 H W"]]:
    """Compute each region's share of every pixel, which add up to 1, and how much of the pixel they cover, in [0, 1].

    Where there is no region the shares are equal, and the pixel is not covered.

    Args:
        feather: width in pixels of the soft border of all regions together, see `feathered`.
    """
    stacked = torch.cat(list(regions))
    total = stacked.sum(0, keepdim=True)
    shares = torch.where(total > 0, stacked / total.clamp(min=1e-6), 1 / len(stacked))
    return shares, feathered(total.clamp(max=1), feather)


def check_wrap(width: int, prior: Prior) -> None:
    """Check that an image of that width can be wrapped around. ValueError if not."""
    smallest = prior.window * prior.cell
    if width % prior.cell or width < smallest:
        raise ValueError(
            f"an image that wraps must be at least {smallest} px wide, and a multiple of {prior.cell}; got {width} px."
        )


def pad_circular(canvas: Float[Tensor, "1 c h w"], margin: int) -> Float[Tensor, "1 c h _"]:
    """Continue a canvas that wraps around beyond its left and right border."""
    return F.pad(canvas, (margin, margin, 0, 0), mode="circular")


def crop_circular(canvas: Float[Tensor, "1 c h _"], margin: int) -> Float[Tensor, "1 c h w"]:
    """Remove the margin that `pad_circular` added."""
    return canvas[..., margin : canvas.shape[-1] - margin]


class PanoramaCanvas:
    """An image of any size as crops of one canvas of latents, and the way back.

    The image is mirrored outwards to whole latent cells and at least one window, and cropped again afterwards.

    Args:
        image: RGB in [0, 1].
        prompts: how many there are.
        stride: largest distance between crops in latent cells; default: three quarters of a window (paper: a quarter).
        mask: what may change, in [0, 1]; where 0 the image stays bit for bit. Default: all.
        regions: one mask for each of several prompts, in [0, 1]; where they overlap prompts mix, where there is none
            the image stays. Default: vertical stripes of one width.
        feather: width in pixels over which the border of all regions together falls off, inwards.
        blend_regions, wrap, fade: see `CanvasCrops`; `wrap` is for 360 degree images.

    Raises:
        ValueError: if the stride is under 1 or over the window, if the mask or a region is of another size, if prompts
            and regions differ in number, or if a wrapped image is narrower than the window or its width is no multiple
            of a latent cell.
    """

    def __init__(
        self,
        image: Float[Tensor, "3 H W"],
        prior: Prior,
        prompts: int = 1,
        stride: int | None = None,
        mask: Float[Tensor, "1 H W"] | None = None,
        regions: Sequence[Float[Tensor, "1 H W"]] | None = None,
        feather: float = 0.0,
        blend_regions: bool = False,
        wrap: bool = False,
        fade: bool = True,
    ) -> None:
        height, width = image.shape[-2:]
        image, mask = image.cpu(), None if mask is None else mask.cpu()
        regions = stripes(prompts, height, width) if regions is None else [region.cpu() for region in regions]
        if len(regions) != prompts:
            raise ValueError(f"there must be one region for each prompt, got {len(regions)} for {prompts}.")
        for name, picture in [("mask", mask), *(("regions", region) for region in regions)]:
            if picture is not None and picture.shape[1:] != image.shape[1:]:
                raise ValueError(
                    f"{name} must be of the image's size, got {tuple(picture.shape)} for {tuple(image.shape)}."
                )
        smallest = prior.window * prior.cell
        if wrap:
            check_wrap(width, prior)
        shares, covered = compose(regions, feather)
        if not bool((covered == 1).all()):
            mask = covered if mask is None else mask * covered
        self._image, self._prior, self._mask = image, prior, mask
        self._padded_size = [max(round_up(size, prior.cell), smallest) for size in (height, width)]
        # In cells: the encoder and the decoder get what continues an image that wraps around.
        self._margin = prior.window // 2 if wrap else 0
        with torch.no_grad():
            around = pad_circular(self._padded(image), self._margin * prior.cell)
            source = crop_circular(prior.encode(around), self._margin)
            self.crops = CanvasCrops(
                source,
                prior.window,
                stride,
                regions=F.avg_pool2d(self._padded(shares), prior.cell) if prompts > 1 else None,
                blend_regions=blend_regions,
                wrap=wrap,
                fade=fade,
            )

    def _padded(self, picture: Float[Tensor, "c H W"]) -> Float[Tensor, "1 c _ _"]:
        return pad(picture[None], *self._padded_size).to(self._prior.device)

    @torch.no_grad()
    def decode(self) -> Float[Tensor, "3 H W"]:
        """Decode the edited image, on the CPU, RGB in [0, 1]."""
        height, width = self._image.shape[-2:]
        decoded = self._prior.decode(pad_circular(self.crops.canvas, self._margin))
        edited = crop_circular(decoded, self._margin * self._prior.cell)[0, :, :height, :width].cpu()
        return edited if self._mask is None else torch.lerp(self._image, edited, self._mask)


def edit_panorama(
    image: Float[Tensor, "3 H W"],
    prior: Prior,
    prompt: Prompt,
    config: EditConfig | None = None,
    on_step: Callable[[Step], object] | None = None,
    progress: str | None = None,
    resume: str | Path | None = None,
    **canvas: Any,
) -> Float[Tensor, "3 H W"]:
    """Edit an image of any size through overlapping crops of the prior's window.

    Args:
        image: RGB in [0, 1].
        prompt: one instruction, or several that each have a region.
        config, on_step, progress, resume: see `csd_2d.edit.edit`.
        canvas: stride, mask, regions, ...; see `PanoramaCanvas`.

    Returns:
        The edited image on the CPU, RGB in [0, 1].

    Raises:
        ValueError: as `PanoramaCanvas` and `edit` raise.

    Example:
        >>> from csd_2d import EditConfig, load_prior
        >>> edited = edit_panorama(torch.rand(3, 40, 300), load_prior("analytic"), "make it night", EditConfig(steps=3))
        >>> edited.shape
        torch.Size([3, 40, 300])
    """
    prompts = check_prompt(prompt)
    panorama = PanoramaCanvas(image, prior, len(prompts), **canvas)
    crops = panorama.crops
    edit(crops, prior, prompts, config, on_step, progress, resume, layout=crops.layout)
    return panorama.decode()
