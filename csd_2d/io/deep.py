"""PNG and TIFF files of 16 bits a channel, which Pillow reads and writes with 8."""

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from PIL import Image, TiffImagePlugin

DEEP_SUFFIXES = (".png", ".tif", ".tiff")
"""Formats that are written with 16 bits a channel."""


def is_deep(image: Image.Image) -> bool:
    """Whether an image that was opened, and not loaded yet, has 16 bits a channel; of a file that `read_deep` takes."""
    if image.format not in ("PNG", "TIFF"):
        return False
    return any(";16" in str(tile[3]) for tile in getattr(image, "tile", [])) or image.mode.startswith("I;16")


def upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Apply EXIF's orientation to (H, W, ...)."""
    if orientation > 4:
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def read_deep(path: Path, shallow: np.ndarray, orientation: int = 1) -> np.ndarray | None:
    """Read all 16 bits of each channel.

    Args:
        orientation: what Pillow has applied to `shallow`.
        shallow: what Pillow reads, (H, W, c) uint8. The upper halves of the result have to agree with it: FFmpeg gets
            some kinds of TIFF wrong (tiles, alpha that is multiplied in).

    Returns:
        (H, W, c) uint16, as it is stored; None if it cannot be read.
    """
    try:
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
            kind = "rgba64le" if frame.format.name.startswith("ya") else None  # gray with alpha; exact
            array = frame.to_ndarray(format=kind) if kind else frame.to_ndarray()
    except (FFmpegError, ValueError, IndexError, StopIteration):
        return None
    if array.dtype.itemsize != 2:
        return None
    numbers = upright(np.atleast_3d(array.astype(np.uint16)), orientation)
    return numbers if numbers.shape == shallow.shape and np.array_equal(numbers >> 8, shallow) else None


def write_deep(array: np.ndarray, path: Path, carrier: Image.Image, **options: object) -> None:
    """Write (H, W, 3 or 4) uint16 as PNG or TIFF.

    Args:
        carrier: a picture of one pixel, without or with alpha as the array; Pillow writes it with `options`, which
            brings profile, EXIF, XMP and resolution into the file.
    """
    small = io.BytesIO()
    if path.suffix.lower() == ".png":
        carrier.save(small, "PNG", **options)
        path.write_bytes(b"".join(_png(array, small.getvalue())))
    else:
        carrier.save(small, "TIFF", **options)
        _write_tiff(array, path, small)


def _png(array: np.ndarray, small: bytes) -> Iterator[bytes]:
    """Yield the parts of a small PNG file with another picture in it."""
    height, width, channels = array.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    yield small[:8]
    position = 8
    while position < len(small):
        size, name = struct.unpack_from(">I4s", small, position)
        end = position + 12 + size
        if name == b"IHDR":
            yield _chunk(name, header)
        elif name == b"IDAT":
            for part in _compressed(_differences(array)):
                yield _chunk(name, part)
        else:
            yield small[position:end]
        position = end


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _differences(array: np.ndarray) -> Iterator[bytes]:
    """Yield the rows, each as its difference to the row above, byte by byte: PNG's filter 2."""
    above = np.zeros(array[0].size * 2, np.uint8)
    for row in array:
        present = np.frombuffer(row.astype(">u2").tobytes(), np.uint8)
        yield b"\2" + (present - above).tobytes()
        above = present


def _compressed(rows: Iterator[bytes]) -> Iterator[bytes]:
    packer = zlib.compressobj(6)
    for row in rows:
        if part := packer.compress(row):
            yield part
    yield packer.flush()


def _write_tiff(array: np.ndarray, path: Path, small: io.BytesIO) -> None:
    """Write one strip, compressed, with the tags of a small TIFF file."""
    height, width, channels = array.shape
    # Differences between neighbors, TIFF's predictor 2, are small numbers.
    differences = np.diff(array.astype("<u2"), axis=1, prepend=np.zeros((height, 1, channels), "<u2"))
    data = zlib.compress(differences.tobytes(), 6)
    with Image.open(small) as image:
        assert isinstance(image, TiffImagePlugin.TiffImageFile)
        given, exif = image.tag_v2, image.getexif()
        tags = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II")
        for tag in given:
            tags.tagtype[tag] = given.tagtype[tag]
            tags[tag] = given[tag]
        for tag in (34665, 34853):  # the folders of EXIF and GPS, which are known by their place in the file
            tags.pop(tag, None)
            if folder := exif.get_ifd(tag):
                tags[tag] = dict(folder)
    tags[256], tags[257] = width, height
    tags[258] = (16,) * channels
    tags[259] = 8  # deflate
    tags[262], tags[277], tags[278] = 2, channels, height  # RGB, channels, rows in a strip
    tags[273], tags[279] = (0,), (len(data),)  # begin and size of the strip; the first is relative to what follows
    tags[284], tags[317] = 1, 2
    if channels == 4:
        tags[338] = 2  # alpha, not multiplied in
    with path.open("wb") as file:
        tags.save(file)
        file.write(data)
