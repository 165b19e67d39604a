"""What a page of viser shows of an edit: thumbnails, a heat map and curves, all of them drawn here.

viser's plots need 5 MB of code in each browser, and get a wrong width where they are drawn in a tab that is not shown.
"""

import base64
import getpass
import io
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from csd_2d.observer import Observation, Thumbnails

EDITED, ORIGINAL, SPLIT = SCENES = ("edited", "original", "original | edited")
"""What a page can show of the result."""
AMPLIFIED = 3
"""Factor on a change, to be seen."""
_TEXT = (222, 226, 230)
_GRAY = (37, 38, 43)


def ssh_line(port: int) -> str:
    """Return the command that reaches a port of this machine from another one, as far as names are known here."""
    return f"ssh -L {port}:localhost:{port} {getpass.getuser()}@{socket.gethostname()}"


def as_markdown(image: Image.Image | np.ndarray, alt: str) -> str:
    """Embed an image in markdown, as wide as the panel: viser 0.2.7 has no other element for one."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    # Not ![](): viser makes that at most 240 pixels wide.
    return f'<img src="data:image/jpeg;base64,{data}" alt="{alt}" style={{{{width: "100%"}}}} />'


@cache
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """Load the font of all pictures here, in pixels."""
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))


Row = tuple[str, Sequence[np.ndarray | None]]
"""A title, and images."""


def grid(columns: Sequence[str], rows: Sequence[Row], width: int = 160) -> Image.Image:
    """Draw images in rows and columns, with titles.

    Args:
        rows: a title, and an image for each column; None leaves its place empty.
        width: of a column, in pixels.
    """
    font = font_of(26)
    line, gap = 34, 4
    heights = [
        max((round(width * image.shape[0] / image.shape[1]) for image in images if image is not None), default=line)
        for _, images in rows
    ]
    sheet = Image.new("RGB", (len(columns) * (width + gap), line + sum(heights) + len(rows) * (line + gap)), _GRAY)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(columns):
        draw.text((column * (width + gap) + width // 2, 2), title, _TEXT, font, anchor="ma")
    top = line
    for (title, images), height in zip(rows, heights, strict=True):
        draw.text((2, top + 2), title, _TEXT, font)
        for column, image in enumerate(images):
            if image is not None:
                scaled = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
                sheet.paste(scaled, (column * (width + gap), top + line))
        top += line + height + gap
    return sheet


def side_by_side(before: np.ndarray, after: np.ndarray, share: float) -> np.ndarray:
    """Show one picture in a share of another from its left border, with a line between them."""
    column = round(share * after.shape[1])
    joined = np.concatenate([before[:, :column], after[:, column:]], 1)
    if 0 < column < after.shape[1]:
        joined[:, max(column - 1, 0) : column + 1] = 255
    return joined


def amplified(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Show a change around gray, `AMPLIFIED` times as large."""
    change = after.astype(np.int16) - before.astype(np.int16)
    return (128 + AMPLIFIED * change).clip(0, 255).astype(np.uint8)


def _row(name: str, seen: Thumbnails) -> Row:
    change = amplified(seen.source, seen.current)
    return f"{name} (step {seen.step})" if seen.step else name, [seen.source, seen.current, seen.estimate, change]


SHEET = 600
"""Width of charts, in pixels; a panel shows them at about half of it."""
_COLORS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])
_LINE = (255, 211, 105)


def _canvas(height: int, title: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (SHEET, height), _GRAY)
    draw = ImageDraw.Draw(image)
    draw.text((4, 4), title, _TEXT, font_of(24))
    return image, draw


def short(name: str) -> str:
    """Shorten a name to its end, which tells numbered files apart."""
    return name if len(name) <= 16 else f"…{name[-15:]}"


def heat_map(title: str, matrix: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Draw a matrix over pairs of particles, from dark (smallest) to yellow (largest)."""
    count, font = len(matrix), font_of(21)
    numbers = [f"{number}" for number in range(1, count + 1)]
    labels = [f"{short(name)} · {number}" for name, number in zip(names, numbers, strict=True)]
    left = int(max(map(font.getlength, labels))) + 10
    width = (SHEET - left - 4) // max(count, 4)
    height, bottom = max(width, 24), 34 + count * max(width, 24)
    image, draw = _canvas(bottom + 58, title)
    low, high = float(matrix.min()), float(matrix.max())
    shares = (matrix - low) / max(high - low, 1e-12) * (len(_COLORS) - 1)
    for row in range(count):
        top = 34 + row * height
        draw.text((left - 6, top + height // 2), labels[row], _TEXT, font, anchor="rm")
        across = left + row * width + width // 2
        draw.text((across, bottom + 4), numbers[row], _TEXT, font_of(min(width, 21)), anchor="ma")
        for column in range(count):
            color = [round(np.interp(shares[row, column], range(len(_COLORS)), band)) for band in _COLORS.T]
            edge = left + column * width
            draw.rectangle((edge, top, edge + width - 2, top + height - 2), tuple(color))
    draw.text((left, bottom + 30), f"dark {low:.2g}, yellow {high:.2g}", _TEXT, font)
    return image


def curve(title: str, x: Sequence[float], y: Sequence[float]) -> Image.Image:
    """Draw a curve over the steps of an edit, with its last value."""
    image, draw = _canvas(180, f"{title}: {y[-1]:.3g}")
    font, (left, right, top, bottom) = font_of(20), (84, SHEET - 12, 42, 152)
    low, high = min(y), max(y)
    first, last = min(x), max(max(x), min(x) + 1)
    points = [
        (
            left + (right - left) * (step - first) / (last - first),
            bottom - (bottom - top) * ((value - low) / (high - low) if high > low else 0.5),
        )
        for step, value in zip(x, y, strict=True)
    ]
    draw.line((left, top, left, bottom, right, bottom), (90, 92, 98))
    for value, height in ((high, top), (low, bottom)):
        draw.text((left - 6, height), f"{value:.3g}", _TEXT, font, anchor="rm")
    for step, place in ((first, left), (last, right)):
        draw.text((place, bottom + 6), f"step {step:.0f}", _TEXT, font, anchor="la" if place == left else "ra")
    draw.line(points, _LINE, 3, joint="curve")
    for across, down in points:
        draw.ellipse((across - 4, down - 4, across + 4, down + 4), _LINE)
    return image


def bars(title: str, values: Mapping[str, float]) -> Image.Image:
    """Draw a bar for each of several values, from left to right."""
    font = font_of(20)
    image, draw = _canvas(36 + 26 * len(values), title)
    for row, (name, value) in enumerate(values.items()):
        top, width = 36 + 26 * row, 320 * value / max(*values.values(), 1e-12)
        draw.text((150, top), name, _TEXT, font, anchor="ra")
        draw.rectangle((160, top, 160 + width, top + 18), _LINE)
        draw.text((168 + width, top), f"{value:.3g}", _TEXT, font)
    return image


CURVES = (
    "size of the change",
    "agreement in same places",
    "likeness of changes",
    "warp error",
    "residual",
    "seconds per step",
)
PAUSE = 0.3
"""Seconds between two looks at whether anything is to be shown."""
RECOVERY = 5.0
"""Seconds after an update that failed."""


def keep_updated(update: Callable[[], None], watched: Callable[[], bool], over: threading.Event) -> None:
    """Update a page while somebody watches it, until the end. What fails is printed, and ends neither page nor edit."""
    while not over.wait(PAUSE):
        try:
            if watched():
                update()
        except Exception as error:
            print(f"csd: the page could not be updated: {type(error).__name__}: {error}", file=sys.stderr)
            over.wait(RECOVERY)


class Panel:
    """Elements that show what an `Observer` saw.

    Args:
        gui: viser's; the elements go into the container that is open at the moment.
    """

    def __init__(self, gui: Any) -> None:
        self._gui = gui

    def add_thumbnails(self) -> None:
        """Add the images of particles here."""
        self._trouble = self._gui.add_markdown("")
        self._thumbnails = self._gui.add_markdown("*Images appear here with the next steps of an edit.*")

    def add_charts(self) -> None:
        """Add the heat map and the curves here."""
        self._matrix = self._gui.add_markdown("*Charts appear here with the next steps of an edit.*")
        self._curves = self._gui.add_markdown("")
        self._seconds = self._gui.add_markdown("")

    def show_images(self, sheet: Image.Image) -> None:
        """Show a picture in place of the images of particles."""
        self._thumbnails.content = as_markdown(sheet, "images")

    def show_seconds(self, seconds: Mapping[str, float]) -> None:
        """Show how long the stages of a run took."""
        self._seconds.content = as_markdown(bars("Seconds per stage", seconds), "seconds per stage")

    def show(self, seen: Observation, images: bool = True) -> None:
        """Show an observation, with or without its images."""
        if seen.trouble:
            self._trouble.content = f"⚠️ {seen.trouble}"
        if images and seen.thumbnails:
            rows = [
                _row(seen.names.get(index, str(index)), seen.thumbnails[index]) for index in sorted(seen.thumbnails)
            ]
            self.show_images(grid(("source", "now", "aim (x_0)", f"change x{AMPLIFIED}"), rows))
        if seen.matrix is not None:
            chart = heat_map(seen.matrix_title, seen.matrix, seen.matrix_names)
            self._matrix.content = as_markdown(chart, "heat map")
        curves = [
            as_markdown(curve(name, seen.curves["step"][-len(seen.curves[name]) :], seen.curves[name]), name)
            for name in CURVES
            if seen.curves.get(name)
        ]
        if curves:
            self._curves.content = "\n\n".join(curves)
