"""Videos: frames as particles. One frame at a time is in memory."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from csd_2d import ranks
from csd_2d.cells import common_size, pad
from csd_2d.config import EditConfig
from csd_2d.correspondence.flow import FrameFlows, check_flow, flow_is_available
from csd_2d.csd import Step
from csd_2d.edit import edit
from csd_2d.io.video import Clip, Size, Streamed
from csd_2d.keyframes import key_indices, propagate
from csd_2d.latents import MappedStack, TensorFile
from csd_2d.loss import check_prompt
from csd_2d.mixing import FindCorrespondence
from csd_2d.particles import Layout
from csd_2d.prior import Prior


def edit_video(
    clip: Clip,
    prior: Prior,
    prompt: str,
    config: EditConfig | None = None,
    masks: Sequence[Float[Tensor, "1 _ _"]] | None = None,
    on_step: Callable[[Step], object] | None = None,
    progress: str | None = None,
    resume: str | Path | None = None,
    keyframes: int = 1,
    scratch: Path | None = None,
) -> Clip:
    """Edit all frames of a clip together; sizes, times and sound stay.

    Frames are read one at a time, and latents and optical flow lie in files: in memory are the latents of one step, and
    a few frames.

    Args:
        masks, config, on_step, progress, resume: see `csd_2d.image_set.edit_images`.
        keyframes: edit only one frame in so many, and the last; those between follow the source's optical flow. See
            `csd_2d.keyframes.propagate`.
        scratch: folder for the files of the latents; they have no name and vanish by themselves. Default: the system's.

    Returns:
        The clip, whose frames are decoded from the latents on every iteration.

    Raises:
        ValueError: if there are no frames, if masks do not fit them or are all black, if frames differ in size and are
            to have keyframes, or as `edit` raises.
        ImportError: if optical flow is needed and cannot be estimated.
    """
    sizes = clip.sizes
    prior.encode_text(check_prompt(prompt))  # refuses what the model cannot follow, before minutes are spent
    if not sizes:
        raise ValueError("there are no frames to edit.")
    keys = list(range(len(sizes))) if keyframes == 1 else _checked_keys(sizes, keyframes)
    size = common_size(sizes, prior.cell)
    config = config or EditConfig()
    if masks is not None:
        _check_masks(masks, sizes)
    stack = _encoded(clip.frames, keys, prior, size, progress, scratch)
    find = followed(_keyed(clip.frames, keys, "optical flow", progress), sizes, prior, config, TensorFile(scratch))
    edit(stack, prior, prompt, config, on_step, progress, resume, layout=Layout(correspondence=find))

    @torch.no_grad()
    def decoded() -> Iterator[Tensor]:
        for row, (height, width) in enumerate(sizes[key] for key in keys):
            yield prior.decode(stack.render([row]))[0, :, :height, :width].cpu()

    def all_frames() -> Iterator[Tensor]:
        return decoded() if keyframes == 1 else propagate(clip.frames, keys, decoded(), prior.device)

    def masked() -> Iterator[Tensor]:
        if masks is None:
            return all_frames()
        return (torch.lerp(*rows) for rows in zip(clip.frames, all_frames(), masks, strict=True))

    return replace(clip, frames=Streamed(sizes, masked))


def _keyed(frames: Sequence[Tensor], keys: Sequence[int], label: str, progress: str | None) -> Iterator[Tensor]:
    """Read some frames, with a progress bar."""
    chosen, silent = {*keys}, progress is None or ranks.rank() > 0
    bar = tqdm(frames, label, disable=silent, leave=False, unit="frame")
    yield from (frame for index, frame in enumerate(bar) if index in chosen)


def followed(
    frames: Iterable[Float[Tensor, "3 _ _"]],
    sizes: Sequence[Size],
    prior: Prior,
    config: EditConfig,
    file: TensorFile | None = None,
) -> FindCorrespondence | None:
    """Estimate the optical flow of a video's frames, if an edit wants any and it can be had: frames are of one size.

    Args:
        frames: read once, and not at all if no flow is estimated.
        sizes: of all frames of the video.
        file: where the flow is kept.
    """
    if len({*sizes}) > 1 or not (config.matches_places and flow_is_available()):
        return None
    size = common_size(sizes, prior.cell)
    padded = (pad(frame[None], *size)[0] for frame in frames)
    return FrameFlows(padded, prior.cell, prior.device, ranks.shared_map, file).correspondence


def _checked_keys(sizes: Sequence[Size], every: int) -> list[int]:
    if every < 1:
        raise ValueError(f"keyframes must be at least 1, got {every}.")
    if len({*sizes}) > 1:
        raise ValueError("frames differ in size, so that none can follow another; leave keyframes at 1.")
    check_flow()
    return key_indices(len(sizes), every)


@torch.no_grad()
def _encoded(
    frames: Sequence[Tensor],
    keys: Sequence[int],
    prior: Prior,
    size: Size,
    progress: str | None,
    scratch: Path | None,
) -> MappedStack:
    """Encode some frames, padded to one size; one frame at a time is in memory."""
    source, start = TensorFile(scratch), TensorFile(scratch)
    padded = (pad(frame[None], *size).to(prior.device) for frame in _keyed(frames, keys, "reading", progress))
    for latents in ranks.shared_map(prior.encode, padded):
        for file in (source, start):
            file.append(latents[0].float())
    return MappedStack(source, start, prior.device)


def _check_masks(masks: Sequence[Float[Tensor, "1 _ _"]], sizes: Sequence[Size]) -> None:
    if len(masks) != len(sizes):
        raise ValueError(f"there must be one mask for each frame, got {len(masks)} for {len(sizes)} frames.")
    changeable = False
    for mask, size in zip(masks, sizes, strict=True):
        if tuple(mask.shape[1:]) != tuple(size):
            raise ValueError("there must be one mask for each frame, of its size.")
        changeable = changeable or bool(mask.any())
    if not changeable:
        raise ValueError("the masks are black all over, which leaves nothing to edit; white is what may change.")
