"""Carry the edit of keyframes to the frames between them along the source's optical flow."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from csd_2d.correspondence.flow import likeness, optical_flow, visible, warp

Image = Float[Tensor, "3 H W"]


def key_indices(count: int, every: int) -> list[int]:
    """Pick one in `every` of some frames, and the last.

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
    """The affine map from the source's colors to their change that fits best."""

    @classmethod
    def of(cls, at: int, source: Image, edited: Image) -> "_Key":
        change = edited - source
        colors = _affine(source)
        # Least squares; the pseudoinverse, for a picture of few colors does not determine the map.
        recoloring = torch.linalg.pinv(colors.T @ colors, hermitian=True) @ colors.T @ change.flatten(1).T
        return cls(at, source, change, recoloring)


def _affine(image: Image) -> Float[Tensor, "pixels 4"]:
    return torch.cat([image, torch.ones_like(image[:1])]).flatten(1).T


def propagate(
    frames: Iterable[Image], keys: Sequence[int], edited: Iterable[Image], device: str | torch.device = "cpu"
) -> Iterator[Image]:
    """Carry the edit of some frames to those between them along the optical flow of the source.

    A frame gets the *change* of its two neighboring keys, edited minus source, so that its own detail stays. A nearer
    key has more weight, and none where it does not show the same thing: where the flow forth and back does not return,
    or colors differ. Places that neither key shows are recolored as their color changes in the keys on the whole. Two
    keys and one frame are in memory.

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
        weight = nearness * seen * likeness(frame, warp(key.source, flow))
        total += weight * warp(key.change, flow)
        weights += weight
    return total / weights
