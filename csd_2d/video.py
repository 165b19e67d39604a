"""Videos: frames as particles; files through PyAV, or folders of images. One frame at a time is in memory."""

import heapq
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.container import OutputContainer
from av.error import FFmpegError
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from csd_2d import ranks
from csd_2d.edit import EditConfig, StepInfo, edit
from csd_2d.files import replacing
from csd_2d.images import (
    SMALLEST,
    cell_mask,
    common_size,
    image_size,
    pad,
    read_image,
    read_mask,
    to_array,
    write_image,
)
from csd_2d.mapped import MappedStack, TensorFile
from csd_2d.priors import Prior
from csd_2d.transport import FrameFlows

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi")
TIME_BASE = Fraction(1, 90000)
"""Seconds in which frames are timed that are not evenly spaced."""

Size = tuple[int, int]


class Streamed(Sequence[Tensor]):
    """Images that are made anew, one after the other, each time they are gone through, instead of being kept."""

    def __init__(self, sizes: Sequence[Size], produce: Callable[[], Iterator[Tensor]]) -> None:
        self.sizes = list(sizes)
        """Height and width of each."""
        self._produce = produce

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Tensor]:
        return self._produce()

    def __getitem__(self, index: Any) -> Any:
        """For a look, not for a loop: makes all images before."""
        if isinstance(index, slice):
            return list(self)[index]
        wanted = range(len(self))[index]
        return next(image for i, image in enumerate(self) if i == wanted)


@dataclass(frozen=True)
class Sound:
    """Where the sound of a clip lies."""

    path: Path
    start: Fraction
    """Seconds in the file at which the clip's first frame is shown."""
    end: Fraction | None
    """Seconds at which it is cut; None: at the end of the file."""
    codec: str


@dataclass
class Clip:
    """Frames in order, with what is needed to write them back."""

    frames: Sequence[Float[Tensor, "3 _ _"]]
    """RGB in [0, 1]: a list, or `Streamed`."""
    rate: Fraction = Fraction(24)
    """Frames per second; 24 where the source does not say."""
    names: list[str] | None = None
    """File names without suffix, for clips that came from a folder."""
    times: list[Fraction] | None = None
    """Seconds at which frames are shown, the first at 0; None: evenly spaced, as `rate` says."""
    sound: Sound | None = None

    @property
    def sizes(self) -> list[Size]:
        """Height and width of each frame."""
        if isinstance(self.frames, Streamed):
            return self.frames.sizes
        return [(frame.shape[-2], frame.shape[-1]) for frame in self.frames]


def edit_video(
    clip: Clip,
    prior: Prior,
    prompt: str,
    config: EditConfig | None = None,
    masks: Sequence[Float[Tensor, "1 _ _"]] | None = None,
    on_step: Callable[[StepInfo], bool | None] | None = None,
    progress: str | None = None,
    resume: Path | None = None,
    keyframes: int = 1,
    scratch: Path | None = None,
) -> Clip:
    """Edits all frames of a clip together; sizes, times and sound stay.

    Frames are read one at a time, and latents lie in files: what a step draws, and a frame, is all that is in memory.
    Only where scores are to follow the flow of the frames (`config.transport`) all of these are.

    Args:
        masks, config, on_step, progress, resume: see `csd_2d.images.edit_images`.
        keyframes: edit only one frame in so many, and the last; those between follow the source's optical flow. See
            `csd_2d.temporal.propagate`.
        scratch: folder for the files of the latents; they have no name and vanish by themselves. Default: the system's.

    Returns:
        The clip, whose frames are decoded from the latents each time they are gone through; of several processes
        (`csd_2d.ranks`) the first's.

    Raises:
        ValueError: if there are no frames, if masks do not fit them or are all black, if frames differ in size and are
            to have keyframes, or as `edit` raises.
        ImportError: if optical flow is needed and cannot be estimated.
    """
    sizes = clip.sizes
    if not sizes:
        raise ValueError("there are no frames to edit.")
    if masks is not None and len(masks) != len(sizes):
        raise ValueError(f"there must be one mask for each frame, got {len(masks)} for {len(sizes)} frames.")
    keys = list(range(len(sizes)))
    if keyframes != 1:
        keys = _checked_keys(sizes, keyframes)
    size = common_size(sizes, prior.cell)
    flows = None
    if config is not None and config.transport != "off":
        keyed = {*keys}
        frames = [pad(frame[None], *size)[0] for index, frame in enumerate(clip.frames) if index in keyed]
        flows = FrameFlows(frames, prior.cell, prior.device)
    stack = _encoded(clip.frames, masks, keys, prior, size, progress, scratch, flows)
    edit(stack, prior, prompt, config, on_step, progress, resume)
    gathered = _gathered(stack)

    @torch.no_grad()
    def decoded() -> Iterator[Tensor]:
        for row, (height, width) in enumerate(sizes[key] for key in keys):
            latent = gathered[row][None].to(prior.device) if gathered else stack.render([row])
            yield prior.decode(latent)[0, :, :height, :width].cpu()

    def all_frames() -> Iterator[Tensor]:
        if keyframes == 1:
            return decoded()
        from csd_2d.temporal import propagate

        return propagate(clip.frames, keys, decoded(), prior.device)

    def masked() -> Iterator[Tensor]:
        if masks is None:
            return all_frames()
        return (torch.lerp(*rows) for rows in zip(clip.frames, all_frames(), masks, strict=True))

    return replace(clip, frames=Streamed(sizes, masked))


def _checked_keys(sizes: Sequence[Size], every: int) -> list[int]:
    from csd_2d.flow import optical_flow
    from csd_2d.temporal import key_indices

    if every < 1:
        raise ValueError(f"keyframes must be at least 1, got {every}.")
    if len({*sizes}) > 1:
        raise ValueError("frames differ in size, so that none can follow another; leave keyframes at 1.")
    still = torch.zeros(3, SMALLEST, SMALLEST)
    optical_flow(still, still)  # raises now what it would raise after the edit
    return key_indices(len(sizes), every)


@torch.no_grad()
def _gathered(stack: MappedStack) -> list[Tensor]:
    """The edited latents that several processes hold, on the first; none if there is one process, which holds them."""
    if ranks.size() == 1:
        return []
    mine = [stack.render([index])[0] for index in stack.held]
    return ranks.to_first(mine, [mine[0].shape] * len(stack))


@torch.no_grad()
def _encoded(
    frames: Sequence[Tensor],
    masks: Sequence[Tensor] | None,
    keys: Sequence[int],
    prior: Prior,
    size: Size,
    progress: str | None,
    scratch: Path | None,
    flows: FrameFlows | None,
) -> MappedStack:
    """Latents of some frames, padded to one size; one frame at a time is in memory. Each process holds some of them."""
    source, condition, start, allowed = (TensorFile(scratch) for _ in range(4))
    held = ranks.held(len(keys))
    keyed = set(keys[held.start : held.stop])
    changes = masks is None
    bar = tqdm(frames, "reading", disable=progress is None, leave=False, unit="frame")
    for index, (frame, mask) in enumerate(zip(bar, [None] * len(frames) if masks is None else masks, strict=True)):
        if index not in keyed:
            continue
        padded = pad(frame[None], *size).to(prior.device)
        latent = prior.encode(padded)[0].float()
        source.append(latent)
        start.append(latent)
        condition.append(prior.condition(latent[None])[0])
        if mask is not None:
            if mask.shape[1:] != frame.shape[1:]:
                raise ValueError("there must be one mask for each frame, of its size.")
            cells = cell_mask(pad(mask[None], *size), prior.cell)[0]
            allowed.append(cells)
            changes = changes or bool(cells.any())
    if not any(ranks.of_each(changes)):
        raise ValueError("the masks are black all over, which leaves nothing to edit; white is what may change.")
    return MappedStack(
        source,
        condition,
        start,
        None if masks is None else allowed,
        prior.device,
        held,
        len(keys),
        None if flows is None else flows.transport,
    )


def read_clip(path: Path, start: float = 0.0, end: float | None = None) -> Clip:
    """A video file, or a folder of images in natural order (2.png before 10.png); `Streamed`.

    Args:
        start, end: seconds from the first frame on between which the clip lies; of a folder at 24 frames a second.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        ValueError: if it holds no frames, none in that time, or frames that cannot be read.
    """
    if not 0 <= start < (math.inf if end is None else end):
        raise ValueError(f"start must be at least 0 and less than end; got {start} and {end}.")
    if path.is_dir():
        return _read_folder(path, start, end)
    if not path.is_file():
        raise FileNotFoundError(f"no such video or folder: {path}.")
    shown = [(time, _upright_size(frame)) for time, frame in _decode(path, start, end)]
    if not shown:
        raise ValueError(f"{path} holds no video frames{_between(start, end)}.")
    times, sizes = [time for time, _ in shown], [size for _, size in shown]
    if min(map(min, sizes)) < SMALLEST:
        raise ValueError(f"frames of {path} are too small; both sides must be at least {SMALLEST} px.")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or Clip.rate
        origin = (stream.start_time or 0) * (stream.time_base or 0)
        sound = None
        if container.streams.audio:
            cut = None if end is None else origin + Fraction(end)
            sound = Sound(path, origin + times[0], cut, container.streams.audio[0].codec_context.name)
    frames = Streamed(sizes, lambda: (_upright(frame) for _, frame in _decode(path, start, end)))
    return Clip(frames, rate, times=_uneven([time - times[0] for time in times], rate), sound=sound)


def _between(start: float, end: float | None) -> str:
    if start == 0 and end is None:
        return ""
    return f" from second {start:g}" + ("" if end is None else f" to {end:g}")


def _uneven(times: list[Fraction], rate: Fraction) -> list[Fraction] | None:
    """Times of frames, None if they are those of `rate`, but for what containers round, or no times at all."""
    even = all(abs(time - index / rate) < 0.002 for index, time in enumerate(times))
    rising = all(a < b for a, b in pairwise(times))
    return times if rising and not even else None


def _decode(path: Path, start: float, end: float | None) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """Frames as they come, with the seconds after the first of the file at which they are shown."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} holds no video, or one that was cut short.")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            between = 1 / (stream.average_rate or Clip.rate)
            origin, base = stream.start_time or 0, stream.time_base
            if container.format.name == "avi":  # which knows the order of frames only
                base = None
            if base is not None and start > 0:
                with suppress(FFmpegError):  # what cannot be wound is read from its beginning
                    container.seek(origin + int(start / base), stream=stream)
            time = -between
            for frame in container.decode(stream):
                time = time + between if base is None or frame.pts is None else (frame.pts - origin) * base
                if end is not None and time >= end:
                    break
                if start == 0 or time >= start:
                    yield time, frame
    except FFmpegError as error:
        raise ValueError(f"{path} cannot be read as a video ({error.strerror}).") from error


def _read_folder(path: Path, start: float, end: float | None) -> Clip:
    files = _image_files(path)
    if not files:
        raise ValueError(f"folder {path} holds no images.")
    first = math.ceil(start * Clip.rate)
    files = files[first : None if end is None else math.ceil(end * Clip.rate)]
    if not files:
        raise ValueError(f"folder {path} holds no images{_between(start, end)}, at {Clip.rate} a second.")
    names = [file.stem for file in files]
    frames = Streamed([image_size(file) for file in files], lambda: map(read_image, files))
    return Clip(frames, names=names if len({*names}) == len(names) else None)


def read_masks(path: Path, clip: Clip, feather: float) -> Sequence[Float[Tensor, "1 H W"]]:
    """One mask for all frames, or a folder with one for each, in the frames' order; see `csd_2d.images.read_mask`.

    Those of a folder are `Streamed`, and may be black for frames that do not show what is edited.

    Raises:
        ValueError: if a folder holds more or fewer masks than there are frames, or as `read_mask` raises.
    """
    sizes = clip.sizes
    if not path.is_dir():
        masks = {size: read_mask(path, size, feather) for size in {*sizes}}
        return [masks[size] for size in sizes]
    files = _image_files(path)
    if len(files) != len(sizes):
        raise ValueError(f"folder {path} holds {len(files)} masks for {len(sizes)} frames.")
    pairs = list(zip(files, sizes, strict=True))
    return Streamed(sizes, lambda: (read_mask(file, size, feather, may_be_black=True) for file, size in pairs))


def _image_files(folder: Path) -> list[Path]:
    """In natural order: 2.png before 10.png."""
    known = Image.registered_extensions()
    return sorted(
        (file for file in folder.iterdir() if file.suffix.lower() in known and not file.name.startswith(".")),
        key=lambda file: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)],
    )


def _upright(frame: av.VideoFrame) -> Float[Tensor, "3 H W"]:
    """RGB in [0, 1], turned as the camera was held."""
    array = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255


def _upright_size(frame: av.VideoFrame) -> Size:
    return (frame.width, frame.height) if round(frame.rotation / 90) % 2 else (frame.height, frame.width)


def write_clip(clip: Clip, path: Path, progress: str | None = None) -> None:
    """Writes a video file, if the name ends like one, or else a folder of PNG images. See `check_video_output`.

    Sound is copied as it is, without being encoded anew.
    """
    bar = tqdm(clip.frames, progress, disable=progress is None, leave=False, unit="frame")
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        _write_folder(bar, clip.names or [f"{i:05d}" for i in range(len(clip.frames))], path)
        return
    with replacing(path) as temporary, av.open(str(temporary), "w") as container:
        packets = [_picture(container, clip, bar)]
        if clip.sound is not None:
            packets.append(_copied_sound(container, clip.sound))
        # In the order of time, so that the container need not hold one stream back until the other is there.
        for _, packet in heapq.merge(*packets, key=lambda timed: timed[0]):
            container.mux(packet)


_TimedPackets = Iterator[tuple[Fraction, av.Packet]]


def _picture(container: OutputContainer, clip: Clip, frames: Iterable[Tensor]) -> _TimedPackets:
    """Adds a stream of pictures; returns its packets, and when they are due."""
    vp9, avi = ("webm" in container.format.name, "avi" in container.format.name)
    stream = container.add_stream("libvpx-vp9" if vp9 else "libx264", rate=clip.rate)
    height, width = clip.sizes[0]
    stream.width, stream.height = width, height
    # 4:2:0 halves colour in both directions and needs even sizes; most players want it.
    stream.pix_fmt = "yuv444p" if width % 2 or height % 2 else "yuv420p"
    stream.options = {"crf": "16"}
    # Said and done in BT.709: untagged, players take large pictures for it and small ones for BT.601.
    for name in ("colorspace", "color_primaries", "color_trc", "color_range"):
        setattr(stream.codec_context, name, 1)
    times = None if avi else clip.times  # AVI knows evenly spaced frames only
    base = 1 / clip.rate if times is None else TIME_BASE
    stream.codec_context.time_base = base

    def packets() -> Iterator[av.Packet]:
        for index, frame in enumerate(frames):
            image = av.VideoFrame.from_ndarray(to_array(frame), format="rgb24")
            image = image.reformat(format=stream.pix_fmt, dst_colorspace="ITU709")
            image.pts, image.time_base = index if times is None else round(times[index] / base), base
            yield from stream.encode(image)
        yield from stream.encode()

    return (((packet.dts or 0) * base, packet) for packet in packets())


def _copied_sound(container: OutputContainer, sound: Sound) -> _TimedPackets:
    """Adds a stream for a clip's sound; returns its packets as they are, and when they are due."""
    source = av.open(str(sound.path))
    stream = source.streams.audio[0]
    copy = container.add_stream_from_template(stream)
    base = stream.time_base
    assert base is not None
    shift = round(sound.start / base)

    def packets() -> _TimedPackets:
        with source:
            if shift > 0:
                with suppress(FFmpegError):
                    source.seek(shift, stream=stream)
            for packet in source.demux(stream):
                if packet.dts is None or packet.pts is None or packet.pts + (packet.duration or 0) < shift:
                    continue
                if sound.end is not None and packet.pts * base >= sound.end:
                    break
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = copy
                yield packet.dts * base, packet

    return packets()


def sound_fits(sound: Sound, path: Path) -> bool:
    """Whether the container that `path`'s name calls for can hold a clip's sound; a few packets are put in one."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with av.open(str(Path(folder) / f"sound{path.suffix.lower()}"), "w") as container:
                for _, (_, packet) in zip(range(4), _copied_sound(container, sound), strict=False):
                    container.mux(packet)
        except (ValueError, FFmpegError):
            return False
    return True


def _write_folder(frames: Iterable[Tensor], names: Sequence[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        folder = Path(temporary) / path.name
        for name, frame in zip(names, frames, strict=True):
            write_image(frame, folder / f"{name}.png")
        os.replace(folder, path)  # an empty folder is replaced, one with files raises


def check_video_output(path: Path, clip: Clip) -> None:
    """Raises ValueError, before any work is done, if `write_clip` could not write such a clip there."""
    if path.suffix.lower() in VIDEO_SUFFIXES:
        if path.is_dir():
            raise ValueError(f"output {path} is a folder, but its name ends like a video file's.")
        if len({*clip.sizes}) > 1:
            raise ValueError(f"frames differ in size and cannot become the video {path}; name a folder instead.")
    elif path.is_file() or path.suffix[1:].isalpha():
        raise ValueError(f"output {path} must be a folder, or end in one of {', '.join(VIDEO_SUFFIXES)}.")
    elif path.is_dir() and any(path.iterdir()):
        raise ValueError(f"output folder {path} is not empty.")
