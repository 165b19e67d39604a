"""Color profiles (ICC): between the colors of a file and sRGB, which models see."""

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from PIL import Image, ImageCms

_SRGB = np.array(
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
)
"""Colors of sRGB's primaries as columns, XYZ relative to D50, which profiles use."""
_POINTS = 2**16
"""Places at which tone curves are tabulated."""
_NUMBERS = np.linspace(0, 1, _POINTS)
_ROWS = 256
"""Rows of an image that are converted at once: temporary numbers are few."""

_Curve = Callable[[np.ndarray], np.ndarray]


def _decoded(values: np.ndarray) -> np.ndarray:
    """Compute light from sRGB's numbers (IEC 61966-2-1)."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _encoded(light: np.ndarray) -> np.ndarray:
    """Compute sRGB's numbers from light."""
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light.clip(1e-9) ** (1 / 2.4) - 0.055)


@dataclass(frozen=True, eq=False)
class Profile:
    """Colors as three primaries and three tone curves, which is how cameras, monitors and working spaces are described.

    Conversions are colorimetric, relative to white; colors outside of the other space are clipped.
    """

    data: bytes
    """The profile as it is in a file."""
    primaries: np.ndarray
    """(3, 3), XYZ relative to D50 as columns."""
    curves: np.ndarray
    """(3, 65536), light for numbers evenly spaced from 0 to 1."""

    def to_srgb(self, image: np.ndarray) -> np.ndarray:
        """Convert (..., 3) in [0, 1] to sRGB, float32 in [0, 1]."""
        matrix = np.linalg.inv(_SRGB) @ self.primaries

        def convert(part: np.ndarray) -> np.ndarray:
            light = np.stack([np.interp(part[..., i], _NUMBERS, self.curves[i]) for i in range(3)], -1)
            return _encoded((light @ matrix.T).clip(0, 1))

        return _by_rows(convert, image)

    def from_srgb(self, image: np.ndarray) -> np.ndarray:
        """Convert sRGB, (..., 3) in [0, 1], to this profile's numbers, float32 in [0, 1]."""
        matrix = np.linalg.inv(self.primaries) @ _SRGB

        def convert(part: np.ndarray) -> np.ndarray:
            light = (_decoded(part.astype(float)) @ matrix.T).clip(0, 1)
            return np.stack([np.interp(light[..., i], self.curves[i], _NUMBERS) for i in range(3)], -1)

        return _by_rows(convert, image)

    @cached_property
    def is_srgb(self) -> bool:
        """Whether numbers mean the same in sRGB, up to one of 255 levels."""
        grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 9)] * 3), -1)
        return bool(np.abs(self.to_srgb(grid) - grid).max() < 1 / 255)


def _by_rows(convert: _Curve, image: np.ndarray) -> np.ndarray:
    result = np.empty(image.shape, np.float32)
    for first in range(0, len(image), _ROWS):
        result[first : first + _ROWS] = convert(image[first : first + _ROWS])
    return result


@lru_cache(8)
def read_profile(data: bytes) -> Profile | None:
    """Read the bytes of an ICC profile. One of gray gets sRGB's primaries.

    Returns:
        The profile, or None if it describes colors in another way: by inks, or by tables of several dimensions.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        tags = _tags(data)
        space = data[16:20]
        if space == b"GRAY":
            return Profile(data, _SRGB, np.stack([_curve(tags[b"kTRC"])] * 3))
        if space != b"RGB " or data[20:24] != b"XYZ " or b"A2B0" in tags or b"rXYZ" not in tags:
            return None
        primaries = np.stack([_fixed(tags[name], 8, 3) for name in (b"rXYZ", b"gXYZ", b"bXYZ")], -1)
        curves = np.stack([_curve(tags[name]) for name in (b"rTRC", b"gTRC", b"bTRC")])
    except (struct.error, KeyError, ValueError, ZeroDivisionError) as error:
        raise ValueError("the color profile is damaged") from error
    if not (
        np.isfinite(curves).all() and (curves[:, -1] > curves[:, 0]).all() and abs(np.linalg.det(primaries)) > 1e-4
    ):
        raise ValueError("the color profile is damaged")
    return Profile(data, primaries, np.maximum.accumulate(curves, axis=1))


def _tags(data: bytes) -> dict[bytes, bytes]:
    (count,) = struct.unpack_from(">I", data, 128)
    entries = [struct.unpack_from(">4sII", data, 132 + 12 * index) for index in range(min(count, 100))]
    return {name: data[offset : offset + size] for name, offset, size in entries}


def _fixed(tag: bytes, offset: int, count: int) -> np.ndarray:
    """Read s15Fixed16 numbers."""
    return np.array(struct.unpack_from(f">{count}i", tag, offset)) / 65536


def _curve(tag: bytes) -> np.ndarray:
    """Tabulate a tone curve (ICC.1:2022, 10.6 and 10.18)."""
    x = _NUMBERS
    if tag[:4] == b"para":
        return _parametric(x, tag)
    if tag[:4] != b"curv":
        raise ValueError(f"unknown tone curve {tag[:4]!r}")
    count = struct.unpack_from(">I", tag, 8)[0]
    if count == 0:
        return x
    if count == 1:
        return x ** (struct.unpack_from(">H", tag, 12)[0] / 256)
    table = np.frombuffer(tag, ">u2", count, 12) / 65535
    return np.interp(x, np.linspace(0, 1, count), table)


def _parametric(x: np.ndarray, tag: bytes) -> np.ndarray:
    kind = struct.unpack_from(">H", tag, 8)[0]
    counts = {0: 1, 1: 3, 2: 4, 3: 5, 4: 7}
    given = _fixed(tag, 12, counts[kind])
    # Y = (a X + b)^g + e from d on, c X + f below it: the most general kind, of which the others leave something out.
    g, a, b, c, d, e, f = 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0
    if kind == 0:
        (g,) = given
    elif kind in (1, 2):
        g, a, b = given[:3]
        d = -b / a
        e = f = given[3] if kind == 2 else 0.0
    elif kind == 3:
        g, a, b, c, d = given
    else:
        g, a, b, c, d, e, f = given
    return np.where(x >= d, (a * x + b).clip(0) ** g + e, c * x + f).clip(0, 1)


def converted_by_tables(image: Image.Image, data: bytes) -> Image.Image:
    """Convert an image whose profile is no `Profile` to sRGB, with 8 bits a channel.

    Raises:
        ValueError: if the profile does not fit the image, or is damaged.
    """
    try:
        source, target = ImageCms.ImageCmsProfile(io.BytesIO(data)), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(
            image, source, target, ImageCms.Intent.RELATIVE_COLORIMETRIC, outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        raise ValueError("the color profile is damaged") from error
    assert converted is not None
    return converted
