"""Write clips to video files through PyAV, or to folders of frames, and read them. One frame at a time is in memory."""

import heapq
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import av
from av.codec.codec import UnknownCodecError
from av.container import OutputContainer
from av.error import FFmpegError
from av.video.stream import VideoStream
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from csd_2d.io.decode import (
    DEFAULT_RATE,
    Format,
    looks,
    opened,
    shown,
    to_tensor,
    upright_size,
    usable_rates,
    video_stream,
)
from csd_2d.io.files import replacing
from csd_2d.io.images import SMALLEST, Picture, read_header, read_picture, to_array, write_image
from csd_2d.io.masks import read_mask
from csd_2d.io.metadata import Carried

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi")
KEPT_TAGS = ("title", "artist", "comment", "copyright", "creation_time", "date", "description", "location")
"""What a file says of itself and of its edit, too."""

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
    rate: Fraction = DEFAULT_RATE
    """Frames per second; 24 where the source does not say."""
    names: list[str] | None = None
    """File names without suffix, for clips that came from a folder."""
    times: list[Fraction] | None = None
    """Seconds at which frames are shown, the first at 0; None: evenly spaced, as `rate` says."""
    last: Fraction | None = None
    """Seconds the last frame is shown, where there are times; None: as `rate` says."""
    sound: Sound | None = None
    format: Format = field(default_factory=Format)
    tags: dict[str, str] = field(default_factory=dict)
    """What the file says of itself: title, date, place."""
    notes: tuple[str, ...] = ()
    """Sentences on what of the source is changed or not read."""
    files: list[Path] | None = None
    """Images that the frames are read from, of clips that came from a folder."""
    carried: list[Carried] | None = None
    """What each of these carries beside its colors."""

    def lost_in(self, suffix: str) -> list[str]:
        """Say what files with that suffix cannot keep of the images that the frames are read from."""
        counts = Counter(loss for carried in self.carried or [] for loss in {*carried.lost_in(suffix)})
        return [f"{loss} (of {count} frames)" if count > 1 else loss for loss, count in counts.items()]

    @property
    def sizes(self) -> list[Size]:
        """Height and width of each frame."""
        if isinstance(self.frames, Streamed):
            return self.frames.sizes
        return [(frame.shape[-2], frame.shape[-1]) for frame in self.frames]


Seconds = Fraction | float
"""A float stands for the shortest decimal number that rounds to it: 0.2 for 1/5."""


def read_clip(path: str | Path, start: Seconds = 0, end: Seconds | None = None, fps: Seconds | None = None) -> Clip:
    """Open a video file, or a folder of images in natural order (2.png before 10.png); frames are `Streamed`.

    Args:
        start, end: seconds from the first frame on between which the clip lies, see `csd_2d.io.decode.shown`.
        fps: frames a second of a folder; default: 24.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        ValueError: if it holds no frames, none in that time, or frames that cannot be read.
    """
    path = Path(path)
    if not 0 <= start < (math.inf if end is None else end):
        raise ValueError(f"start must be at least 0 and less than end; got {start} and {end}.")
    begin, stop = _exact(start), None if end is None or math.isinf(end) else _exact(end)
    if path.is_dir():
        if fps is not None and not 1 / 3600 <= fps <= 1000:
            raise ValueError(f"fps must be from 1/3600 to 1000, got {fps}.")
        return _read_folder(path, begin, stop, DEFAULT_RATE if fps is None else _exact(fps))
    if not path.is_file():
        raise FileNotFoundError(f"no such video or folder: {path}.")
    if fps is not None:
        raise ValueError(f"fps is for folders of frames; {path} says itself when they are shown.")
    return _read_file(path, begin, stop)


def _exact(seconds: Seconds) -> Fraction:
    return seconds if isinstance(seconds, Fraction) else Fraction(str(seconds))


def _read_file(path: Path, start: Fraction, end: Fraction | None) -> Clip:
    spans, sizes, first = [], [], None
    for time, until, frame in shown(path, start, end):
        first = first or frame
        spans.append((time, until))
        sizes.append(upright_size(frame))
    if first is None:
        raise ValueError(f"{path} holds no video frames{_between(start, end)}.")
    if min(map(min, sizes)) < SMALLEST:
        raise ValueError(f"frames of {path} are too small; both sides must be at least {SMALLEST} px.")
    with opened(path) as container:
        stream, seen = video_stream(container, path), looks(path, container, first)
        rates = usable_rates(stream)
        origin = (stream.start_time or 0) * (stream.time_base or 0)
        tags = {name: text for name, text in container.metadata.items() if name in KEPT_TAGS}
        sound = None
        if container.streams.audio:
            cut = None if end is None else origin + end
            sound = Sound(path, origin + spans[0][0], cut, container.streams.audio[0].codec_context.name)
    begin, (latest, until) = spans[0][0], spans[-1]
    spacing = _spacing([time - begin for time, _ in spans], until - latest, rates)
    frames = Streamed(sizes, lambda: (to_tensor(frame, seen) for _, _, frame in shown(path, start, end)))
    notes = tuple(f"{path} {note}" for note in seen.notes)
    return Clip(frames, **spacing, sound=sound, format=seen.format, tags=tags, notes=notes)


def _between(start: Fraction, end: Fraction | None) -> str:
    if start == 0 and end is None:
        return ""
    return f" from second {float(start):g}" + ("" if end is None else f" to {float(end):g}")


def _spacing(times: list[Fraction], last: Fraction, rates: list[Fraction]) -> dict[str, Any]:
    """Describe when frames are shown: by a rate if they are evenly spaced up to rounding, or have no usable times."""
    rising = all(a < b for a, b in pairwise(times))
    even = (rate for rate in rates if all(abs(time - index / rate) < 0.002 for index, time in enumerate(times)))
    rate = next(even, None)
    if not rising or (rate is not None and abs(last - 1 / rate) < 0.002):
        return {"rate": rate or rates[0]}
    return {"rate": rate or rates[0], "times": times, "last": last if last > 0 else None}


def _read_folder(path: Path, start: Fraction, end: Fraction | None, rate: Fraction) -> Clip:
    files, others = _image_files(path)
    if not files:
        raise ValueError(f"folder {path} holds no images.")
    files = files[math.ceil(start * rate) : None if end is None else math.ceil(end * rate)]
    if not files:
        raise ValueError(f"folder {path} holds no images{_between(start, end)}, at {float(rate):g} a second.")
    names = [file.stem for file in files]
    carried = [read_header(file) for file in files]
    frames = Streamed([one.size for one in carried], lambda: (read_picture(file).rgb for file in files))
    notes = ()
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        notes = (f"{path} also holds {others[0]}{more}, no image that can be read: left out.",)
    names = names if len({*names}) == len(names) else None
    return Clip(frames, rate, names, notes=notes, files=files, carried=carried)


def read_masks(path: str | Path, clip: Clip, feather: float) -> Sequence[Float[Tensor, "1 H W"]]:
    """Read one mask for all frames, or a folder with one for each, in the frames' order; see `read_mask`.

    Masks of a folder are `Streamed`, and may be black for frames that do not show what is edited.

    Raises:
        ValueError: if a folder holds more or fewer masks than there are frames, or as `read_mask` raises.
    """
    path, sizes = Path(path), clip.sizes
    if not path.is_dir():
        masks = {size: read_mask(path, size, feather) for size in {*sizes}}
        return [masks[size] for size in sizes]
    files, _ = _image_files(path)
    if len(files) != len(sizes):
        raise ValueError(f"folder {path} holds {len(files)} masks for {len(sizes)} frames.")
    pairs = list(zip(files, sizes, strict=True))
    return Streamed(sizes, lambda: (read_mask(file, size, feather, may_be_black=True) for file, size in pairs))


def _image_files(folder: Path) -> tuple[list[Path], list[str]]:
    """List image files in natural order, 2.png before 10.png whatever their case, and the names of other files."""
    # Formats that PIL opens, but not documents and data it only recognizes: PDF, EPS, MPEG, HDF5.
    known = {
        suffix
        for suffix, name in Image.registered_extensions().items()
        if name in Image.OPEN and Image.MIME.get(name, "").startswith("image/")
    } | {".heic", ".heif"}  # which a package adds that is found when one is read
    files = [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]

    def natural(file: Path) -> tuple[list[str | int], str]:
        parts = re.split(r"(\d+)", file.name.casefold())
        return [int(part) if index % 2 else part for index, part in enumerate(parts)], file.name

    images = sorted((file for file in files if file.suffix.lower() in known), key=natural)
    return images, sorted(file.name for file in files if file.suffix.lower() not in known)


def write_clip(clip: Clip, path: str | Path, progress: str | None = None) -> None:
    """Write a video file, if the name ends like one, or else a folder of PNG images. See `check_video_output`.

    Sound is copied without encoding it again.
    """
    path = Path(path)
    bar = tqdm(clip.frames, progress, disable=progress is None, leave=False, unit="frame")
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        _write_folder(bar, clip, path)
        return
    if any(one.alpha for one in clip.carried or []):
        bar = map(_on_white, bar, clip.files or [])
    with replacing(path) as temporary, av.open(str(temporary), "w") as container:
        container.metadata.update(clip.tags)
        packets = [_picture(container, clip, _Encoding.of(clip, path), bar)]
        if clip.sound is not None:
            packets.append(_copied_sound(container, clip.sound))
        # In the order of time, so that the container need not hold one stream back until the other is there.
        for _, packet in heapq.merge(*packets, key=lambda timed: timed[0]):
            container.mux(packet)


class _Encoding(NamedTuple):
    """The encoder for a clip's pictures, and how it is given them."""

    codec: str
    pixels: str
    """FFmpeg's name of the pixel format."""
    bits: int

    @classmethod
    def of(cls, clip: Clip, path: Path) -> "_Encoding":
        """Choose the most that the container, and the encoders of this FFmpeg, can keep."""
        suffix, (height, width) = path.suffix.lower(), clip.sizes[0]
        vp9 = suffix == ".webm"
        # 4:2:0 halves color in both directions; H.264 and H.265 take it in even sizes only. Most players want it.
        sampling = "444" if not vp9 and (width % 2 or height % 2) else "420"
        if clip.format.bits > 8:
            # More players take H.265 in 10 bits than H.264; but AVI does not hold it, and it begins at 16 px.
            h265 = suffix != ".avi" and min(height, width) >= 16
            for codec in ("libvpx-vp9",) if vp9 else ("libx265", "libx264") if h265 else ("libx264",):
                if _encodes(codec, f"yuv{sampling}p10le"):
                    return cls(codec, f"yuv{sampling}p10le", 10)
        return cls("libvpx-vp9" if vp9 else "libx264", f"yuv{sampling}p", 8)

    def frame(self, image: Float[Tensor, "3 H W"]) -> av.VideoFrame:
        deep = self.bits > 8
        picture = av.VideoFrame.from_ndarray(to_array(image, deep), format="rgb48le" if deep else "rgb24")
        return picture.reformat(format=self.pixels, dst_colorspace="ITU709")


def _encodes(codec: str, pixels: str) -> bool:
    """Find out whether this FFmpeg has an encoder, and it takes a pixel format."""
    try:
        return pixels in [known.name for known in av.Codec(codec, "w").video_formats or ()]
    except UnknownCodecError:
        return False


def _time_base(clip: Clip) -> tuple[Fraction, list[int]]:
    """Choose the fraction of a second to count in, and count when frames are shown, and the last one ends.

    Raises:
        ValueError: if no file can tell such times.
    """
    if clip.times is None:
        return 1 / clip.rate, [*range(len(clip.frames) + 1)]
    times = [*clip.times, clip.times[-1] + (clip.last or 1 / clip.rate)]
    exact = math.lcm(*(time.denominator for time in times))
    for ticks in (*([exact] if exact <= 1_000_000 else []), 90_000, 10_000):
        counts = [round(time * ticks) for time in times]
        steps = [b - a for a, b in pairwise(counts)]
        # MP4 counts in 32 bits, and FFmpeg doubles its ticks until there are 10,000 a second.
        if min(steps) > 0 and max(steps) * (1 if ticks >= 10_000 else 20_000 / ticks) < 2**31:
            return Fraction(1, ticks), counts
    raise ValueError("a frame is shown for too long, or too short a time, to be written.")


_TimedPackets = Iterator[tuple[Fraction, av.Packet]]


def _picture(container: OutputContainer, clip: Clip, encoding: _Encoding, frames: Iterable[Tensor]) -> _TimedPackets:
    """Add a stream of pictures; returns its packets, and when they are due."""
    stream = cast(VideoStream, container.add_stream(encoding.codec, rate=clip.rate))
    context = stream.codec_context
    stream.height, stream.width = clip.sizes[0]
    stream.pix_fmt = encoding.pixels
    if "avi" in container.format.name:  # AVI knows evenly spaced frames only
        clip = replace(clip, times=None)
    # MP4 adds up how long a film is in the order of decoding, which is right for uneven times only if that is theirs.
    ordered = {} if clip.times is None or encoding.codec == "libvpx-vp9" else {"bf": "0"}
    stream.options = {"crf": "16", **ordered}
    if encoding.codec == "libx265":
        # With B-frames, times of decoding in a film of two frames are whatever lay in memory (x265 4.2).
        stream.options["x265-params"] = "log-level=error:bframes=0"
        if container.format.name in ("mp4", "mov"):
            context.codec_tag = "hvc1"  # the only name by which Apple's players take it
    # Said and done in BT.709: untagged, players take large pictures for it and small ones for BT.601.
    context.colorspace = context.color_range = 1
    context.color_primaries, context.color_trc = clip.format.primaries, clip.format.transfer
    if clip.format.pixel_aspect != 1:
        context.sample_aspect_ratio = clip.format.pixel_aspect
    base, counts = _time_base(clip)
    context.time_base = base
    lasting = {begin: end - begin for begin, end in pairwise(counts)}

    def packets() -> Iterator[av.Packet]:
        for count, frame in zip(counts[:-1], frames, strict=True):
            image = encoding.frame(frame)
            image.pts, image.time_base = count, base
            yield from stream.encode(image)
        yield from stream.encode()

    def timed() -> _TimedPackets:
        for packet in packets():
            if clip.times is not None and packet.pts is not None:  # encoders do not tell how long pictures are shown
                packet.duration = lasting[packet.pts]
            yield (packet.dts or 0) * base, packet

    return timed()


def _copied_sound(container: OutputContainer, sound: Sound) -> _TimedPackets:
    """Add a stream for a clip's sound; returns its packets, unchanged, and when they are due."""
    source = opened(sound.path)
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


def _write_folder(frames: Iterable[Tensor], clip: Clip, path: Path) -> None:
    names = clip.names or [f"{i:05d}" for i in range(len(clip.frames))]
    origins = zip(clip.files or [None] * len(names), clip.carried or [None] * len(names), strict=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        folder = Path(temporary) / path.name
        for name, frame, (file, carried) in zip(names, frames, origins, strict=True):
            write_image(frame, folder / f"{name}.png", _source(file, carried, frame))
        os.replace(folder, path)  # an empty folder is replaced, one with files raises


def _on_white(frame: Float[Tensor, "3 H W"], file: Path) -> Float[Tensor, "3 H W"]:
    return replace(read_picture(file), rgb=frame).on_white()


def _source(file: Path | None, carried: Carried | None, frame: Tensor) -> Picture | None:
    """Return what an edited frame takes over from its file, which is read again only if its pixels are needed."""
    if file is None or carried is None:
        return None
    return read_picture(file) if carried.alpha or carried.colors else Picture(frame, carried)


def check_video_output(path: Path, clip: Clip) -> None:
    """Check, before any work is done, that `write_clip` can write such a clip there. ValueError if not."""
    if path.suffix.lower() in VIDEO_SUFFIXES:
        if path.is_dir():
            raise ValueError(f"output {path} is a folder, but its name ends like a video file's.")
        if len({*clip.sizes}) > 1:
            raise ValueError(f"frames differ in size and cannot become the video {path}; name a folder instead.")
        if path.suffix.lower() != ".avi":
            _time_base(clip)
    elif path.is_file() or path.suffix[1:].isalpha():
        raise ValueError(f"output {path} must be a folder, or end in one of {', '.join(VIDEO_SUFFIXES)}.")
    elif path.is_dir() and any(path.iterdir()):
        raise ValueError(f"output folder {path} is not empty.")


def what_is_lost(clip: Clip, path: Path) -> list[str]:
    """Find out, before any work is done, what of a clip an output cannot hold; a sentence for each."""
    bits, aspect, uneven = clip.format.bits, clip.format.pixel_aspect, clip.times is not None
    suffix = path.suffix.lower()
    images = clip.lost_in(".png" if suffix not in VIDEO_SUFFIXES else ".bmp")  # a video holds as little as that
    if suffix not in VIDEO_SUFFIXES:
        lost = {
            f"{path} will not keep all of the input's images: {'; '.join(images)}.": bool(images),
            f"the PNG images of {path} have 8 bits a color, the input {bits}.": bits > 8,
            f"the PNG images of {path} do not say that their pixels are {aspect} times as wide as high.": aspect != 1,
            f"the PNG images of {path} do not say when they are shown, unevenly as in the input.": uneven,
        }
        return [sentence for sentence, applies in lost.items() if applies]
    encoding = _Encoding.of(clip, path)
    size = "{1}x{0} px".format(*clip.sizes[0])
    mute = clip.sound is not None and not sound_fits(clip.sound, path)
    lost = {
        f"{path} will not keep all of the input's images: {'; '.join(images)}.": bool(images),
        f"{suffix} cannot hold the input's {clip.sound and clip.sound.codec} sound; {path} will be silent.": mute,
        f"{suffix} shows frames evenly; the times of the input's are not kept.": uneven and suffix == ".avi",
        # H.264 and H.265 tell it themselves; VP9 leaves it to the container, which PyAV cannot tell.
        f"{suffix} is not told that the input's pixels are {aspect} times as wide as high; it will look squeezed.": (
            aspect != 1 and suffix == ".webm"
        ),
        f"{path} will have {encoding.bits} bits a color, the input has {bits}.": encoding.bits < bits,
        f"{size} is odd: {suffix} keeps that as 4:4:4, which many players refuse; .webm is shown by more.": (
            "444" in encoding.pixels
        ),
    }
    return [sentence for sentence, applies in lost.items() if applies]
