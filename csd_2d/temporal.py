"""What holds frames of a video together in time: the source's optical flow."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from csd_2d.flow import optical_flow, visible, warp
from csd_2d.metrics import warp_error

Image = Float[Tensor, "3 H W"]
ALIKE = 0.04
"""Difference in colour, in [0, 1], by which two pixels are no longer taken for the same thing."""


def key_indices(count: int, every: int) -> list[int]:
    """One in so many of some frames, and the last.

    Example:
        >>> key_indices(8, 3), key_indices(7, 3)
        ([0, 3, 6, 7], [0, 3, 6])
    """
    return sorted({*range(0, count, every), count - 1})


class _Key(NamedTuple):
    at: int
    source: Image
    change: Image
    recoloring: Float[Tensor, "4 3"]
    """The affine map from the source's colours to their change that fits best."""

    @classmethod
    def of(cls, at: int, source: Image, edited: Image) -> "_Key":
        change = edited - source
        colors = _affine(source)
        # Least squares; the pseudoinverse, for a picture of few colours does not determine the map.
        recoloring = torch.linalg.pinv(colors.T @ colors, hermitian=True) @ colors.T @ change.flatten(1).T
        return cls(at, source, change, recoloring)


def _affine(image: Image) -> Float[Tensor, "pixels 4"]:
    return torch.cat([image, torch.ones_like(image[:1])]).flatten(1).T


def propagate(
    frames: Iterable[Image], keys: Sequence[int], edited: Iterable[Image], device: str | torch.device = "cpu"
) -> Iterator[Image]:
    """The edit of some frames, carried to those between them along the optical flow of the source.

    A frame gets the *change* of its two neighbouring keys, edited minus source, so that its own detail stays. Each
    counts the more the nearer it is, and not at all where it does not show what the frame shows: where flow there and
    back does not come home, or colours differ. What neither of them shows changes as its colour changes in them on the
    whole. Two keys and one frame are in memory.

    Args:
        frames: all frames of the source, RGB in [0, 1]; gone through twice at a time.
        keys: which of them were edited, in order, the first and the last among them.
        edited: these, after the edit.
        device: where the flow is estimated.
    """
    keyed = set(keys)
    sources = (frame for index, frame in enumerate(frames) if index in keyed)
    pairs = zip(keys, sources, edited, strict=True)
    anchors = (_Key.of(index, source.to(device), image.to(device)) for index, source, image in pairs)
    before = after = next(anchors)
    for index, frame in enumerate(frames):
        if index > after.at:
            before, after = after, next(anchors)
        change = after.change if index == after.at else _change_between(index, frame.to(device), before, after)
        yield (frame + change.cpu()).clamp(0, 1)


def _change_between(index: int, frame: Image, before: _Key, after: _Key) -> Image:
    share = (index - before.at) / (after.at - before.at)
    recoloring = torch.lerp(before.recoloring, after.recoloring, share)
    unseen = 0.02  # so little that it hardly shows where anything else does
    total = unseen * (_affine(frame) @ recoloring).T.view_as(frame)
    weights = torch.full_like(frame[:1], unseen)
    for key, nearness in ((before, 1 - share), (after, share)):
        flow = optical_flow(frame, key.source)
        seen = visible(flow, optical_flow(key.source, frame))
        difference = (frame - warp(key.source, flow)).square().mean(0)
        weight = nearness * seen * (-difference / (2 * ALIKE**2)).exp()
        total += weight * warp(key.change, flow)
        weights += weight
    return total / weights


def flicker(
    source: Iterable[Image],
    edited: Iterable[Image],
    count: int,
    longest_side: int = 256,
    most_pairs: int = 100,
    device: str | torch.device = "cpu",
) -> tuple[float, float]:
    """How much frames differ from the next ones where they show the same: in the source, and after an edit.

    The root of `csd_2d.metrics.warp_error` over all pairs, with flow and visibility from the source alone, in grey
    levels of 255.

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
