"""What an image file carries beside its pixels: color profile, EXIF, XMP, resolution."""

import math
import re
import warnings
from dataclasses import dataclass
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

from csd_2d.io.color import Profile, converted_by_tables, read_profile
from csd_2d.io.deep import DEEP_SUFFIXES, is_deep

ALPHA_SUFFIXES = (".png", ".webp", ".tif", ".tiff")
PROFILE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
_RESOLUTION = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
_SEGMENT = 65_000
"""Bytes of EXIF or XMP that a JPEG file can hold, with what it says around them."""
_XMP = 700
_OF_STORAGE = {
    *(*range(254, 269), *range(273, 282), 284, *range(286, 296), *range(297, 305)),
    *(*range(317, 348), *range(512, 533), _XMP, 33723, 34377, 34675, *range(50706, 52600)),
}
"""EXIF tags that say how pixels are stored, which differs in another file, or hold what is kept in another way."""
_FOLDERS = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)


@dataclass(frozen=True)
class Carried:
    """What a file carries beside its colors."""

    size: tuple[int, int] = (0, 0)
    """Height and width, upright."""
    orientation: int = 1
    """How the pixels that Pillow reads are to be turned, see EXIF; it has been applied to `size`."""
    alpha: bool = False
    deep: bool = False
    """16 bits a channel, in a file that `read_deep` takes."""
    profile: bytes | None = None
    """ICC profile that an edited image gets, too."""
    colors: Profile | bytes | None = None
    """What turns colors to sRGB: that profile, or one that an edited image does not get. None: they are in sRGB."""
    exif: bytes | None = None
    """Without orientation, thumbnail, and what says how pixels are stored."""
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    lost: tuple[str, ...] = ()
    """What cannot be kept in any file."""

    def lost_in(self, suffix: str) -> list[str]:
        """Say what a file with that suffix cannot keep, in words that follow "OUT does not keep all of IN:"."""
        suffix, lost = suffix.lower(), list(self.lost)
        if self.alpha and suffix not in ALPHA_SUFFIXES:
            lost.append("transparency is put on white")
        if self.deep and suffix not in DEEP_SUFFIXES:
            lost.append("16 bits a channel become 8")
        if self.profile and self.colors and suffix not in PROFILE_SUFFIXES:
            lost.append("colors are converted to sRGB")
        for name, data in (("EXIF", self.exif), ("XMP", self.xmp)):
            if data and suffix not in PROFILE_SUFFIXES:
                lost.append(f"{name} is left out")
            elif data and suffix in (".jpg", ".jpeg") and len(data) > _SEGMENT:
                lost.append(f"{name} of {len(data):,} bytes is left out")
        if self.dpi and suffix not in _RESOLUTION:
            lost.append(f"{self.dpi[0]:.0f} dpi are left out")
        return lost

    def options(self, suffix: str) -> dict[str, Any]:
        """Return the options with which Pillow writes all this, as far as such a file can hold it."""
        suffix, options = suffix.lower(), {}
        if self.dpi and suffix in _RESOLUTION:
            options["dpi"] = self.dpi
        if suffix not in PROFILE_SUFFIXES:
            return options
        if self.profile:
            options["icc_profile"] = self.profile
        fits = _SEGMENT if suffix in (".jpg", ".jpeg") else math.inf
        exif = self.exif if self.exif and len(self.exif) <= fits else None
        xmp = self.xmp if self.xmp and len(self.xmp) <= fits else None
        if exif:
            options["exif"] = exif
        if xmp and suffix == ".png":
            options["pnginfo"] = info = PngImagePlugin.PngInfo()
            info.add_itxt("XML:com.adobe.xmp", xmp.decode(errors="replace"))
        elif xmp and suffix in (".tif", ".tiff"):
            tags = Image.Exif()
            tags.load(exif or b"")
            tags[_XMP] = xmp
            options["exif"] = tags
        elif xmp:
            options["xmp"] = xmp
        return options


def read_carried(image: Image.Image) -> Carried:
    """Collect what an image that was opened carries; only the head of most files is read."""
    deep = is_deep(image)  # first: to look for EXIF, Pillow loads some files
    lost = _further_pictures(image)
    orientation, exif, damaged = _exif(image)
    if damaged:
        lost.append("parts of its EXIF data are damaged and left out")
    if _has_iptc(image):
        lost.append("IPTC captions are left out")
    profile, colors, converted = _colors(image)
    if converted:
        lost.append(converted)
    if deep and isinstance(colors, bytes):
        deep = False
        lost.append("16 bits a channel become 8")
    size = image.size if orientation > 4 else (image.height, image.width)
    return Carried(
        size,
        orientation,
        has_alpha(image),
        deep,
        profile,
        colors,
        exif,
        _kept_xmp(image),
        _resolution(image),
        tuple(lost),
    )


def _exif(image: Image.Image) -> tuple[int, bytes | None, bool]:
    """Return how pixels are to be turned, EXIF data to keep, and whether they are damaged."""
    with warnings.catch_warnings(record=True) as damages:
        warnings.simplefilter("always")
        try:
            tags = image.getexif()
            orientation, exif = tags.get(ExifTags.Base.Orientation, 1), _kept_exif(tags)
            unread = bool(image.info.get("exif")) and not len(tags)
        except Exception:  # Pillow raises whatever the broken bytes lead to
            return 1, None, True
    # Pillow turns TIFF files when it loads them.
    turns = orientation in range(1, 9) and image.format != "TIFF"
    return orientation if turns else 1, exif, unread or bool(damages)


def _colors(image: Image.Image) -> tuple[bytes | None, Profile | bytes | None, str | None]:
    """Return the profile to keep, what turns colors to sRGB, and what is to be said of it."""
    data = image.info.get("icc_profile")
    inks = image.mode == "CMYK"
    if not data:
        return None, None, "CMYK becomes sRGB" if inks else None
    try:
        profile, space = read_profile(data), data[16:20]
        if (space == b"CMYK") != inks or (
            space == b"GRAY" and image.mode not in ("1", "L", "LA", "I", "I;16", "I;16B")
        ):
            raise ValueError("the color profile is one of another kind of image")
        if profile is None:
            converted_by_tables(Image.new(image.mode if inks else "RGB", (1, 1)), data)
    except ValueError as error:
        return None, None, f"{error}, and left out"
    if profile is None:
        return None, data, "CMYK becomes sRGB" if inks else "colors, described by tables, become sRGB"
    if space == b"GRAY":
        return None, profile, None if profile.is_srgb else "gray levels become sRGB's"
    return data, None if profile.is_srgb else profile, None


def has_alpha(image: Image.Image) -> bool:
    """Whether an image has transparency."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _further_pictures(image: Image.Image) -> list[str]:
    count = getattr(image, "n_frames", 1)
    if count < 2:
        return []
    if image.format == "MPO":
        return ["the other pictures in it (a gain map, a preview or a second eye) are left out"]
    return [f"only the first of its {count} {'pages' if image.format == 'TIFF' else 'frames'} is edited"]


def _has_iptc(image: Image.Image) -> bool:
    blocks = image.info.get("photoshop")  # JPEG files keep it in a block of Photoshop's
    return (isinstance(blocks, dict) and 0x0404 in blocks) or 33723 in getattr(image, "tag_v2", {})


def _kept_exif(given: Image.Exif) -> bytes | None:
    kept = Image.Exif()
    for tag, value in given.items():
        if tag not in _FOLDERS and tag not in _OF_STORAGE:
            kept[tag] = value
    for folder in _FOLDERS:
        if content := dict(given.get_ifd(folder)):
            if ExifTags.Base.ExifInteroperabilityOffset in content:
                content[ExifTags.Base.ExifInteroperabilityOffset] = dict(given.get_ifd(ExifTags.IFD.Interop))
            kept[folder] = content
    return kept.tobytes() if len(kept) else None


def _kept_xmp(image: Image.Image) -> bytes | None:
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    if not xmp:
        return None
    xmp = xmp.encode() if isinstance(xmp, str) else bytes(xmp)
    # The orientation is applied to the pixels, and would be applied again.
    return re.sub(rb'\s*tiff:Orientation="\d"|<tiff:Orientation>\d</tiff:Orientation>', b"", xmp)


def _resolution(image: Image.Image) -> tuple[float, float] | None:
    try:
        across, down = (float(value) for value in image.info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    # 1 stands for unknown: Pillow writes it into TIFF files that are given none.
    return (across, down) if 1 < across < 1e6 and 1 < down < 1e6 else None
