"""Panoramas: overlapping crops of one canvas as particles."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from csd_2d.edit import EditConfig, StepInfo, edit
from csd_2d.images import pad, round_up
from csd_2d.particles import CanvasCrops
from csd_2d.priors import Prior


def edit_panorama(
    image: Float[Tensor, "3 H W"],
    prior: Prior,
    prompt: str,
    config: EditConfig | None = None,
    stride: int | None = None,
    on_step: Callable[[StepInfo], None] | None = None,
    progress: str | None = None,
) -> Float[Tensor, "3 H W"]:
    """Edits an image of any size through overlapping crops of the prior's window.

    The image is mirrored outwards to whole latent cells and at least one window, and cropped again afterwards.

    Args:
        image: RGB in [0, 1].
        stride: distance between crops in latent cells; default: half a window (paper: a quarter).
        config, on_step, progress: see `csd_2d.edit.edit`.

    Returns:
        The edited image on the CPU, RGB in [0, 1].

    Raises:
        ValueError: if the stride is under 1 or over the window, or as `edit` raises.

    Example:
        >>> from csd_2d import EditConfig, load_prior
        >>> edited = edit_panorama(torch.rand(3, 40, 300), load_prior("analytic"), "make it night", EditConfig(steps=3))
        >>> edited.shape
        torch.Size([3, 40, 300])
    """
    height, width = image.shape[-2:]
    smallest = prior.window * prior.cell
    padded = pad(image[None], *(max(round_up(size, prior.cell), smallest) for size in (height, width))).to(prior.device)
    with torch.no_grad():
        crops = CanvasCrops(
            prior.encode(padded), prior.condition(padded), prior.window, prior.window // 2 if stride is None else stride
        )
    edit(crops, prior, prompt, config, on_step, progress)
    with torch.no_grad():
        return prior.decode(crops.canvas.detach())[0, :, :height, :width].cpu()
