"""Panoramas: overlapping crops of one canvas as particles."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from csd_2d.edit import EditConfig, StepInfo, edit
from csd_2d.images import cell_mask, pad, round_up
from csd_2d.particles import CanvasCrops
from csd_2d.priors import Prior


def edit_panorama(
    image: Float[Tensor, "3 H W"],
    prior: Prior,
    prompt: str,
    config: EditConfig | None = None,
    stride: int | None = None,
    mask: Float[Tensor, "1 H W"] | None = None,
    fade: bool = True,
    on_step: Callable[[StepInfo], None] | None = None,
    progress: str | None = None,
) -> Float[Tensor, "3 H W"]:
    """Edits an image of any size through overlapping crops of the prior's window.

    The image is mirrored outwards to whole latent cells and at least one window, and cropped again afterwards.

    Args:
        image: RGB in [0, 1].
        stride: distance between crops in latent cells; default: half a window (paper: a quarter).
        mask: what may change, in [0, 1]; where 0 the image stays bit for bit. Default: all.
        fade: crops fade into each other; False: they count alike, as published.
        config, on_step, progress: see `csd_2d.edit.edit`.

    Returns:
        The edited image on the CPU, RGB in [0, 1].

    Raises:
        ValueError: if the stride is under 1 or over the window, if the mask is of another size, or as `edit` raises.

    Example:
        >>> from csd_2d import EditConfig, load_prior
        >>> edited = edit_panorama(torch.rand(3, 40, 300), load_prior("analytic"), "make it night", EditConfig(steps=3))
        >>> edited.shape
        torch.Size([3, 40, 300])
    """
    height, width = image.shape[-2:]
    if mask is not None and mask.shape[1:] != image.shape[1:]:
        raise ValueError(f"the mask must be of the image's size, got {tuple(mask.shape)} for {tuple(image.shape)}.")
    smallest = prior.window * prior.cell
    height_padded, width_padded = (max(round_up(size, prior.cell), smallest) for size in (height, width))

    def padded(picture: Tensor) -> Tensor:
        return pad(picture[None], height_padded, width_padded).to(prior.device)

    with torch.no_grad():
        crops = CanvasCrops(
            prior.encode(padded(image)),
            prior.condition(padded(image)),
            prior.window,
            prior.window // 2 if stride is None else stride,
            None if mask is None else cell_mask(padded(mask), prior.cell),
            fade,
        )
    edit(crops, prior, prompt, config, on_step, progress)
    with torch.no_grad():
        edited = prior.decode(crops.edited())[0, :, :height, :width].cpu()
    return edited if mask is None else torch.lerp(image, edited, mask)
