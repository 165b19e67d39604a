"""Decode the pictures of a video file through PyAV: when each is shown, which way up, and in which colors."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream
from jaxtyping import Float
from torch import Tensor

from csd_2d.io import hdr
from csd_2d.io.images import scaled

# Codes of ITU-T H.273, which PyAV has no names for everywhere.
BT709, UNSPECIFIED = 1, 2
_TRANSFERS: dict[int, hdr.Transfer] = {16: "PQ", 18: "HLG"}
_PRIMARIES: dict[int, hdr.Primaries] = {9: "BT.2020", 12: "P3"}
_MATRICES = {0, 1, 4, 5, 6, 7, 9}
"""Ways from Y'CbCr to R'G'B' that FFmpeg's scaler knows; others it refuses, or takes for BT.601's."""
DEFAULT_RATE = Fraction(24)


@dataclass(frozen=True)
class Format:
    """How pictures are stored and shown, beside their pixels."""

    bits: int = 8
    """A color."""
    pixel_aspect: Fraction = Fraction(1)
    """Width of a pixel over its height."""
    primaries: int = BT709
    """Code of ITU-T H.273, as the next."""
    transfer: int = BT709


@dataclass(frozen=True)
class Looks:
    """What a file says of its pictures, as the first of them shows it."""

    format: Format
    """After the conversion to standard range."""
    convert: tuple[hdr.Transfer, hdr.Primaries, float] | None
    """Arguments of `hdr.to_standard`; None: colors stay."""
    notes: tuple[str, ...]
    """What is not kept: each completes a sentence that begins with the file's name."""


class Shown(NamedTuple):
    """A picture, and the seconds after the file's first from and until which it is shown."""

    time: Fraction
    until: Fraction
    frame: av.VideoFrame


class _Clock:
    """Times of a stream's frames, in seconds after its first."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self.origin = stream.start_time or 0
        # AVI knows the order of frames only.
        self.base = None if container.format.name == "avi" else stream.time_base
        self.between = 1 / usable_rates(stream)[0]
        self._time = -self.between

    @property
    def rounding(self) -> Fraction:
        """Largest difference between a frame's time and what was meant."""
        return (self.base or Fraction(0)) / 2

    def read(self, frame: av.VideoFrame) -> Shown:
        if self.base is None or frame.pts is None:
            self._time += self.between
        else:
            self._time = (frame.pts - self.origin) * self.base
        lasts = self.between if self.base is None or not frame.duration else frame.duration * self.base
        return Shown(self._time, self._time + lasts, frame)


def usable_rates(stream: VideoStream) -> list[Fraction]:
    """List what a file says its rate is, the mean first; headers also hold zeros and clock rates."""
    rates = [rate for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate) if rate]
    return [rate for rate in rates if Fraction(1, 3600) <= rate <= 1000] or [DEFAULT_RATE]


def opened(path: Path) -> InputContainer:
    """Open a file; titles of no known encoding, which old files have, do not stand in the way."""
    return av.open(str(path), metadata_errors="replace")


def video_stream(container: InputContainer, path: Path) -> VideoStream:
    """Find the pictures that are the film, not a cover or a thumbnail. ValueError if there are none."""
    films = [stream for stream in container.streams.video if not _is_picture(stream)]
    if not films:
        raise ValueError(f"{path} holds no video, or one that was cut short.")
    return films[0]


def _is_picture(stream: VideoStream) -> bool:
    return bool(stream.disposition & Disposition.attached_pic)


def shown(path: Path, start: Fraction, end: Fraction | None) -> Iterator[Shown]:
    """Decode the frames of a part in order.

    The first is that at or after `start`; but where frames last longer than the file's rate says, as a slide does, the
    one that is on screen at `start`, shown from then on.
    """
    try:
        with opened(path) as container:
            stream = video_stream(container, path)
            stream.thread_type = "AUTO"
            clock = _Clock(container, stream)
            longest = Fraction(3, 2) / max(usable_rates(stream))
            yield from _between(_sought(container, stream, clock, start), start, end, longest, clock.rounding)
    except FFmpegError as error:
        raise ValueError(f"{path} cannot be read as a video ({error.strerror}).") from error


def _sought(container: InputContainer, stream: VideoStream, clock: _Clock, start: Fraction) -> Iterator[Shown]:
    """Decode from the last place before `start` that one can seek to."""
    if clock.base is None or start <= 0:
        yield from map(clock.read, container.decode(stream))
        return
    with suppress(FFmpegError):  # a file that cannot seek is read from its beginning
        container.seek(min(clock.origin + int(start / clock.base), 2**62), stream=stream)
    frames = map(clock.read, container.decode(stream))
    first = next(frames, None)
    if first is None or first.time > start:  # files are sought by the order of decoding, or beyond their last frame
        container.seek(clock.origin, stream=stream)
        frames = map(clock.read, container.decode(stream))
    else:
        yield first
    yield from frames


def _between(
    frames: Iterator[Shown], start: Fraction, end: Fraction | None, longest: Fraction, rounding: Fraction
) -> Iterator[Shown]:
    """Cut out a part, see `shown`. A frame is held back until the next says how long it is shown."""

    def cut(one: Shown, final: bool) -> Iterator[Shown]:
        early = one.time + rounding < start
        long = one.until - one.time > longest
        on_screen = one.until - rounding > start and (long or final)
        if (early and not on_screen) or (end is not None and one.time + rounding >= end):
            return
        until = one.until if end is None or not (early or long) else min(one.until, end)
        yield Shown(max(one.time, start) if early else one.time, until, one.frame)

    last = None
    for one in frames:
        if last is not None:
            over = end is not None and one.time + rounding >= end
            yield from cut(last._replace(until=one.time), over)
            if over:
                return
        last = one
    if last is not None:
        yield from cut(last, final=True)


def looks(path: Path, container: InputContainer, frame: av.VideoFrame) -> Looks:
    """Find out what a file says of its pictures, the first of which is given.

    Raises:
        ValueError: if their colors cannot be read.
    """
    stream, others = video_stream(container, path), _others(container)
    context, said_aspect = stream.codec_context, stream.sample_aspect_ratio
    primaries, transfer = int(context.color_primaries), int(context.color_trc)
    matrix, orientation = _matrix(frame), Orientation.of(frame)
    if matrix not in _MATRICES:
        raise ValueError(f"{path} cannot be read as a video (its colors are coded by matrix {matrix} of ITU-T H.273).")
    convert = _conversion(frame, primaries, transfer)
    aspect = said_aspect if said_aspect and Fraction(1, 50) <= said_aspect <= 50 else Fraction(1)
    notes = {
        f"is HDR ({convert and convert[0]}); it is tone-mapped to standard range and BT.709's colors.": (
            convert is not None and convert[0] != "SDR"
        ),
        "has BT.2020's wide colors; they are converted to BT.709's.": convert is not None and convert[0] == "SDR",
        "asks to be shown at a slant; it is turned by the nearest quarter only.": orientation.slanted,
        f"says its pixels are {said_aspect} times as wide as high; they are taken for square.": (
            bool(said_aspect) and aspect != said_aspect
        ),
        "is transparent in parts; this is left out.": any(part.is_alpha for part in frame.format.components),
        "is interlaced; both fields of a picture are edited as one.": frame.interlaced_frame,
        f"also holds {others}, left out.": bool(others),
    }
    stored = Format(
        bits=max([8, *(component.bits for component in frame.format.components)]),
        pixel_aspect=1 / aspect if orientation.transposed else aspect,
        primaries=BT709 if convert is not None or primaries == UNSPECIFIED else primaries,
        transfer=BT709 if convert is not None or transfer == UNSPECIFIED else transfer,
    )
    return Looks(stored, convert, tuple(note for note, applies in notes.items() if applies))


def _matrix(frame: av.VideoFrame) -> int:
    """Find the way from Y'CbCr to R'G'B'. Untagged, players take large pictures for BT.709, small ones for BT.601."""
    said = int(frame.colorspace)
    if said not in (UNSPECIFIED, 3):
        return said
    return BT709 if frame.width >= 1280 or frame.height > 576 else 5


def _conversion(
    frame: av.VideoFrame, primaries: int, transfer: int
) -> tuple[hdr.Transfer, hdr.Primaries, float] | None:
    curve, wide = _TRANSFERS.get(transfer, "SDR"), _PRIMARIES.get(primaries, "BT.709")
    # P3 of standard range is near enough to what models know, and keeps its tag.
    return (curve, wide, _peak(frame)) if curve != "SDR" or wide == "BT.2020" else None


def _peak(frame: av.VideoFrame) -> float:
    """Read the nits of the brightest place, of the film or else of the display it was made on."""
    peak = 0.0
    if (light := frame.side_data.get("CONTENT_LIGHT_LEVEL")) is not None:
        peak = float(np.frombuffer(bytes(light), np.uint32)[0])
    if peak == 0 and (display := frame.side_data.get("MASTERING_DISPLAY_METADATA")) is not None:
        *_, numerator, denominator, _, has_luminance = np.frombuffer(bytes(display), np.int32)[:22].tolist()
        peak = numerator / denominator if has_luminance and denominator else 0.0
    return min(max(peak, hdr.WHITE), 10000.0) if peak > 0 else hdr.PEAK


def _others(container: InputContainer) -> str:
    """Name the streams beside the first picture and the first sound."""
    kinds = {
        "video": len(container.streams.video) - 1,
        "sound": len(container.streams.audio) - 1,
        "subtitle": len(container.streams.subtitles),
    }
    return " and ".join(
        f"{count} more {kind} track{'s' * (count > 1)}"
        if kind != "subtitle"
        else f"{count} subtitle track{'s' * (count > 1)}"
        for kind, count in kinds.items()
        if count > 0
    )


class Orientation(NamedTuple):
    """One of the eight ways to show a picture, applied in this order."""

    transposed: bool = False
    mirrored: bool = False
    """Left and right are exchanged."""
    upside_down: bool = False
    """Top and bottom are exchanged."""
    slanted: bool = False
    """The file asks for something between these ways."""

    @classmethod
    def of(cls, frame: av.VideoFrame) -> "Orientation":
        """Read a frame's display matrix, which takes a pixel (x, y) to (a x + c y, b x + d y)."""
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return cls()
        a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
        straight, across = abs(a) + abs(d), abs(b) + abs(c)
        slanted = min(straight, across) > 0.01 * max(straight, across)
        if straight >= across:
            return cls(False, a < 0, d < 0, slanted)
        return cls(True, c < 0, b < 0, slanted)

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Turn an image of shape (H, W, 3)."""
        image = image.swapaxes(0, 1) if self.transposed else image
        image = image[:, ::-1] if self.mirrored else image
        return image[::-1] if self.upside_down else image


def upright_size(frame: av.VideoFrame) -> tuple[int, int]:
    """Compute the height and width of what `to_tensor` returns."""
    return (frame.width, frame.height) if Orientation.of(frame).transposed else (frame.height, frame.width)


def to_tensor(frame: av.VideoFrame, seen: Looks) -> Float[Tensor, "3 H W"]:
    """Convert to RGB in [0, 1] of standard range, the way up in which the file is to be shown."""
    deep = seen.format.bits > 8
    matrix = None if frame.format.is_rgb else _matrix(frame)
    codes = frame.to_ndarray(format="rgb48le" if deep else "rgb24", src_colorspace=matrix)
    codes = np.ascontiguousarray(Orientation.of(frame).apply(codes))
    if seen.convert is None:
        return torch.from_numpy(scaled(codes)).permute(2, 0, 1)
    codes = codes if deep else codes.astype(np.uint16) * 257
    return hdr.to_standard(codes, *seen.convert)
