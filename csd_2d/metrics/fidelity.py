"""How close images come to a known answer, and how much they changed."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def decibels(error: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Convert mean squared errors of RGB in [0, 1] to PSNR in dB, at most 120."""
    return -10 * error.clamp(min=1e-12).log10()


def agreement(
    edited: Float[Tensor, "n 3 H W"], answers: Sequence[Float[Tensor, "n 3 H W"]]
) -> tuple[float, Float[Tensor, " n"]]:
    """Compute the share of the images on the most common answer, and the PSNR in dB of each to the answer it took.

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
    """Compute the PSNR in dB over all numbers; see `decibels`.

    Example:
        >>> round(psnr(torch.full((3, 2, 2), 0.1), torch.zeros(3, 2, 2)))
        20
    """
    return decibels((images - references).square().mean()).item()


def change(before: list[Tensor], after: list[Tensor], masks: list[Tensor] | None) -> dict[str, float]:
    """Measure how much images changed.

    Returns:
        Mean absolute difference of RGB in [0, 1]; with masks, the one inside (weighted by the mask), and, if they are 0
        anywhere, the one outside and its PSNR in dB.

    Example:
        >>> black, white = torch.zeros(3, 2, 2), torch.ones(3, 2, 2)
        >>> change([black], [white], [torch.tensor([[[1.0, 1.0], [0.5, 0.0]]])])
        {'inside': 1.0, 'outside': 1.0, 'psnr_outside': 0.0}
    """
    old, new = (torch.cat([picture.flatten(1) for picture in pictures], dim=1) for pictures in (before, after))
    difference = new - old
    if masks is None:
        return {"mean": round(difference.abs().mean().item(), 4)}
    weight = torch.cat([mask.flatten() for mask in masks])
    untouched = weight == 0
    inside = (difference.abs().mean(0) * weight).sum() / weight.sum().clamp(min=1e-6)
    inner = {"inside": round(inside.item(), 4)}
    if not untouched.any():
        return inner
    return inner | {
        "outside": round(difference[:, untouched].abs().mean().item(), 4),
        "psnr_outside": round(psnr(new[:, untouched], old[:, untouched]), 2) + 0.0,
    }


def error_ghosting(errors: Float[Tensor, "n 3 H W"], changes: Float[Tensor, "n 3 H W"]) -> float:
    """Correlate each image's error with the mean change of the others, without mean colors; the mean over images.

    Errors with the shapes of other images' changes were mixed in from there.

    Args:
        errors: edited images less their known answers.
        changes: edited images less their sources; at least 2.
    """
    others = (changes.sum(0) - changes) / (len(changes) - 1)
    a, b = ((values - values.mean((2, 3), keepdim=True)).flatten(1) for values in (errors, others))
    return torch.cosine_similarity(a, b, dim=1).mean().item()
