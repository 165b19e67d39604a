"""How consistent images are: over the frames of a video, and across the border of a 360 degree image."""

from collections.abc import Iterable
from itertools import islice, pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from csd_2d.correspondence.flow import optical_flow, visible, warp


def warp_error(
    frames: Float[Tensor, "n 3 H W"], flows: Float[Tensor, "m 2 H W"], visible: Float[Tensor, "m 1 H W"]
) -> float:
    """Compute the mean squared difference of consecutive frames in corresponding places.

    Each frame is compared with the next one, warped by the flow of the *source* (Lai et al., ECCV 2018, section 4).

    Args:
        frames: RGB in [0, 1], n = m + 1.
        flows: from each frame to the next one, in pixels.
        visible: places that are seen in the next frame too; others do not count.

    Example:
        >>> still, seen = torch.zeros(1, 2, 4, 4), torch.ones(1, 1, 4, 4)
        >>> round(warp_error(torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.1)]), still, seen), 4)
        0.01
    """
    gaps = (warp(frames[1:], flows) - frames[:-1]).square().mean(1, keepdim=True)
    return ((gaps * visible).sum() / visible.sum().clamp(min=1)).item()


def wrap_seam(image: Float[Tensor, "3 H W"], reach: int = 16) -> float:
    """Compare the seam of a 360 degree image with the columns near it.

    The mean absolute difference across the border over that of neighboring columns within `reach` of it; 1: no seam.

    Example:
        >>> ramp = torch.linspace(0, 1, 50).expand(3, 4, 50)
        >>> round(wrap_seam(ramp)), round(wrap_seam(torch.cat([ramp, ramp.flip(-1)], -1)))
        (49, 0)
    """
    around = torch.cat([image[..., -reach:], image[..., :reach]], -1)
    steps = around.diff(dim=-1).abs().mean((0, 1))
    across = steps[reach - 1]
    return (across / (steps.sum() - across) * (len(steps) - 1)).item()


def flicker(
    source: Iterable[Tensor],
    edited: Iterable[Tensor],
    count: int,
    longest_side: int = 256,
    most_pairs: int = 100,
    device: str | torch.device = "cpu",
) -> tuple[float, float]:
    """Measure how much consecutive frames differ where they show the same: in the source, and after an edit.

    The root of `warp_error` over all pairs, with flow and visibility from the source alone, in gray levels of 255.

    Args:
        count: how many frames there are, at least 2.
        longest_side: larger frames are reduced to this, in pixels.
        most_pairs: of more, as many are looked at, evenly spaced.
    """
    every = -(-(count - 1) // most_pairs)
    errors, pixels = torch.zeros(2), 0.0
    pairs = zip(pairwise(source), pairwise(edited), strict=True)
    for (a, b), after in islice(pairs, 0, None, every):
        height, width = a.shape[-2:]
        scale = min(1.0, longest_side / max(height, width))
        size = (max(1, round(scale * height)), max(1, round(scale * width)))
        frames = torch.stack([a, b, *after]).to(device)
        frames = F.interpolate(frames, size, mode="bilinear", antialias=True)
        flow = optical_flow(frames[0], frames[1])
        seen = visible(flow, optical_flow(frames[1], frames[0]))
        shown = seen.sum().item()
        for row, pair in enumerate((frames[:2], frames[2:])):
            errors[row] += shown * warp_error(pair, flow[None], seen[None])
        pixels += shown
    before, after = (255 * (errors / max(pixels, 1)).sqrt()).tolist()
    return before, after
