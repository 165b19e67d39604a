"""How well images that were edited together agree, and how close they come to what was asked for."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from csd_2d.flow import warp


def decibels(error: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """PSNR of mean squared errors, for RGB in [0, 1]; ends at 120 dB."""
    return -10 * error.clamp(min=1e-12).log10()


def agreement(
    edited: Float[Tensor, "n 3 H W"], answers: Sequence[Float[Tensor, "n 3 H W"]]
) -> tuple[float, Float[Tensor, " n"]]:
    """Share of the images on the commonest answer, and the PSNR in dB of each to the answer it took.

    An image takes the answer it is nearest to.

    Example:
        >>> dark, light = torch.zeros(3, 3, 2, 2), torch.ones(3, 3, 2, 2)
        >>> share, psnr = agreement(torch.stack([dark[0] + 0.1, dark[0] + 0.1, light[0]]), [dark, light])
        >>> round(share, 2), [round(value) for value in psnr.tolist()]
        (0.67, [20, 20, 120])
    """
    errors = torch.stack([(answer - edited).square().flatten(1).mean(1) for answer in answers])
    error, answer = errors.min(0)
    return answer.bincount().max().item() / len(edited), decibels(error)


def psnr(images: Tensor, references: Tensor) -> float:
    """PSNR in dB, of the mean over all numbers; see `decibels`.

    Example:
        >>> round(psnr(torch.full((3, 2, 2), 0.1), torch.zeros(3, 2, 2)))
        20
    """
    return decibels((images - references).square().mean()).item()


def warp_error(
    frames: Float[Tensor, "n 3 H W"], flows: Float[Tensor, "m 2 H W"], visible: Float[Tensor, "m 1 H W"]
) -> float:
    """Mean squared difference of consecutive frames in corresponding places: what flickers.

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
    """How much more the left and the right border of a 360 degree image differ than neighbouring columns near them.

    The mean absolute difference across the border over that of the columns within `reach` of it; 1: no seam.

    Example:
        >>> ramp = torch.linspace(0, 1, 50).expand(3, 4, 50)
        >>> round(wrap_seam(ramp)), round(wrap_seam(torch.cat([ramp, ramp.flip(-1)], -1)))
        (49, 0)
    """
    around = torch.cat([image[..., -reach:], image[..., :reach]], -1)
    steps = around.diff(dim=-1).abs().mean((0, 1))
    across = steps[reach - 1]
    return (across / (steps.sum() - across) * (len(steps) - 1)).item()
