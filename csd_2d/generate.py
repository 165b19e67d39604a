"""Images of any width from text alone: overlapping crops of one canvas that starts as noise."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from csd_2d.canvas import CanvasCrops
from csd_2d.cells import round_up
from csd_2d.config import EditConfig
from csd_2d.csd import Step
from csd_2d.edit import edit
from csd_2d.loss import Prompt, check_prompt
from csd_2d.panorama import check_wrap, crop_circular, pad_circular, stripes
from csd_2d.prior import Prior

GENERATE = EditConfig(
    steps=500, lr=1.0, lr_decay=0.9, schedule="random", mixing="svgd", weight="noise", baseline="noise"
)
"""Defaults of `generate`: SVGD with the median bandwidth (arXiv 2307.04787, eq. 8), over the whole noise schedule.

There is no consensus: crops of one picture should fit together, not look alike.
"""


def generate(
    prior: Prior,
    prompt: Prompt,
    height: int | None = None,
    width: int | None = None,
    config: EditConfig = GENERATE,
    stride: int | None = None,
    wrap: bool = False,
    on_step: Callable[[Step], object] | None = None,
    progress: str | None = None,
    resume: str | Path | None = None,
) -> Float[Tensor, "3 height width"]:
    """Generate a picture, typically a wide one, by Collaborative Score Distillation (arXiv 2307.04787, eq. 8).

    Crops of a canvas of latents are the particles; their scores are s = -(e^w(x_t; y) - noise), w the guidance scale.
    The canvas starts standard normal. Of `config`, the baseline is always the noise and the image guidance scale always
    the text's, with which a source has no part in s.

    Args:
        prior: a text-to-image model. One that edits images is asked to edit plain gray.
        prompt: what the picture shows; several share it in vertical stripes of one width, from left to right.
        height, width: in pixels; default: one of the prior's windows high, four wide. A picture smaller than a window
            is cut out of one.
        stride: largest distance between crops in latent cells; default: three quarters of a window.
        wrap: the left and the right border fit together, as in 360 degree images.
        on_step, progress, resume: see `csd_2d.edit.edit`.

    Returns:
        The picture on the CPU, RGB in [0, 1].

    Raises:
        ValueError: if height or width is under 1, the stride is under 1 or over the window, a picture that wraps is
            narrower than the window or its width is no multiple of a latent cell, or as `edit` raises.

    Example:
        >>> from csd_2d import load_prior
        >>> night = generate(load_prior("analytic"), "make it night", 40, 300, replace(GENERATE, steps=3))
        >>> night.shape
        torch.Size([3, 40, 300])
    """
    prompts, window, cell = check_prompt(prompt), prior.window, prior.cell
    height = window * cell if height is None else height
    width = 4 * window * cell if width is None else width
    if min(height, width) < 1:
        raise ValueError(f"height and width must be at least 1 px, got {height} and {width}.")
    if wrap:
        check_wrap(width, prior)
    rows, columns = (max(round_up(size, cell) // cell, window) for size in (height, width))
    # A seed of its own: the run below draws its noise from config.seed.
    noise = torch.Generator().manual_seed(config.seed + 1)
    with torch.no_grad():
        gray = prior.encode(torch.full((1, 3, rows * cell, columns * cell), 0.5, device=prior.device))
        crops = CanvasCrops(
            gray,
            window,
            stride,
            start=torch.randn(gray.shape, generator=noise).to(prior.device),
            regions=torch.cat(stripes(len(prompts), rows, columns))[None].to(prior.device)
            if len(prompts) > 1
            else None,
            wrap=wrap,
        )
    scale = prior.guidance_scale if config.guidance_scale is None else config.guidance_scale
    config = replace(config, baseline="noise", guidance_scale=scale, image_guidance_scale=scale)
    edit(crops, prior, prompts, config, on_step, progress, resume, layout=crops.layout)
    margin = window // 2 if wrap else 0
    with torch.no_grad():
        picture = crop_circular(prior.decode(pad_circular(crops.canvas, margin)), margin * cell)
    return picture[0, :, :height, :width].cpu()
