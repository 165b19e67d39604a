"""Video files through PyAV, and folders of frames. One frame at a time is in memory."""

import heapq
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
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

from csd_2d.io.files import replacing
from csd_2d.io.images import SMALLEST, image_size, read_image, to_array, write_image
from csd_2d.io.masks import read_mask

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi")
TIME_BASE = Fraction(1, 90000)
"""Seconds in which frames are timed that are not evenly spaced."""

Size = tuple[int, int]


class Streamed(Sequence[Tensor]):
    """Images that are produced again, one after the other, on every iteration, instead of being kept in memory."""

    def __init__(self, sizes: Sequence[Size], produce: Callable[[], Iterator[Tensor]]) -> None:
        self.sizes = list(sizes)
        """Height and width of each."""
        self._produce = produce

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Tensor]:
        return self._produce()

    def __getitem__(self, index: Any) -> Any:
        """Produce one image, or some; slow, because all images before it are produced, too."""
        if isinstance(index, slice):
            return list(self)[index]
        wanted = range(len(self))[index]
        return next(image for i, image in enumerate(self) if i == wanted)


@dataclass(frozen=True)
class Sound:
    """The sound of a clip, as a part of a file."""

    path: Path
    start: Fraction
    """Seconds in the file at which the clip's first frame is shown."""
    end: Fraction | None
    """Seconds at which it is cut; None: at the end of the file."""
    codec: str


@dataclass
class Clip:
    """Frames in order, with the times, names and sound needed to write them back."""

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


def read_clip(path: str | Path, start: float = 0.0, end: float | None = None) -> Clip:
    """Open a video file, or a folder of images in natural order (2.png before 10.png); frames are `Streamed`.

    Args:
        start, end: seconds from the first frame on between which the clip lies; of a folder at 24 frames a second.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        ValueError: if it holds no frames, none in that time, or frames that cannot be read.
    """
    path = Path(path)
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
    """Return the times of frames, or None if they are evenly spaced up to rounding, or no usable times."""
    even = all(abs(time - index / rate) < 0.002 for index, time in enumerate(times))
    rising = all(a < b for a, b in pairwise(times))
    return times if rising and not even else None


def _decode(path: Path, start: float, end: float | None) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """Decode frames in order, with the seconds after the first of the file at which they are shown."""
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
                with suppress(FFmpegError):  # a file that cannot seek is read from its beginning
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
    """Read one mask for all frames, or a folder with one for each, in the frames' order; see `read_mask`.

    Masks of a folder are `Streamed`, and may be black for frames that do not show what is edited.

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
    """List image files in natural order: 2.png before 10.png."""
    known = Image.registered_extensions()
    return sorted(
        (file for file in folder.iterdir() if file.suffix.lower() in known and not file.name.startswith(".")),
        key=lambda file: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)],
    )


def _upright(frame: av.VideoFrame) -> Float[Tensor, "3 H W"]:
    """Convert to RGB in [0, 1], rotated to the orientation in which the camera was held."""
    array = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255


def _upright_size(frame: av.VideoFrame) -> Size:
    return (frame.width, frame.height) if round(frame.rotation / 90) % 2 else (frame.height, frame.width)


def write_clip(clip: Clip, path: str | Path, progress: str | None = None) -> None:
    """Write a video file, if the name ends like one, or else a folder of PNG images. See `check_video_output`.

    Sound is copied without encoding it again.
    """
    path = Path(path)
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
    """Add a stream of pictures; returns its packets, and when they are due."""
    vp9, avi = ("webm" in container.format.name, "avi" in container.format.name)
    stream = container.add_stream("libvpx-vp9" if vp9 else "libx264", rate=clip.rate)
    height, width = clip.sizes[0]
    stream.width, stream.height = width, height
    # 4:2:0 halves color in both directions and needs even sizes; most players want it.
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
    """Add a stream for a clip's sound; returns its packets, unchanged, and when they are due."""
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
    """Try whether the container that `path`'s name calls for can hold a clip's sound, with a few packets."""
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
    """Check, before any work is done, that `write_clip` can write such a clip there. ValueError if not."""
    if path.suffix.lower() in VIDEO_SUFFIXES:
        if path.is_dir():
            raise ValueError(f"output {path} is a folder, but its name ends like a video file's.")
        if len({*clip.sizes}) > 1:
            raise ValueError(f"frames differ in size and cannot become the video {path}; name a folder instead.")
    elif path.is_file() or path.suffix[1:].isalpha():
        raise ValueError(f"output {path} must be a folder, or end in one of {', '.join(VIDEO_SUFFIXES)}.")
    elif path.is_dir() and any(path.iterdir()):
        raise ValueError(f"output folder {path} is not empty.")
