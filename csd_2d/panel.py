"""What a page of viser shows of an edit: thumbnails, a heat map and curves. Needs viser and plotly."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from csd_2d.observer import Observation, Thumbnails

AMPLIFIED = 3
"""Factor on a change, to be seen."""
_TEXT = (222, 226, 230)
_GRAY = (37, 38, 43)


def as_markdown(image: Image.Image | np.ndarray, alt: str) -> str:
    """Embed an image in markdown: viser 0.2.7 has no other element for one."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"![{alt}](data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()})"


Row = tuple[str, Sequence[np.ndarray | None]]
"""A title, and images."""


def grid(columns: Sequence[str], rows: Sequence[Row], width: int = 160) -> Image.Image:
    """Draw images in rows and columns, with titles.

    Args:
        rows: a title, and an image for each column; None leaves its place empty.
        width: of a column, in pixels.
    """
    font = ImageFont.load_default(size=19)
    line, gap = 26, 4
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


def amplified(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Show a change around gray, `AMPLIFIED` times as large."""
    change = after.astype(np.int16) - before.astype(np.int16)
    return (128 + AMPLIFIED * change).clip(0, 255).astype(np.uint8)


def _row(name: str, seen: Thumbnails) -> Row:
    change = amplified(seen.source, seen.current)
    return f"{name} (step {seen.step})", [seen.source, seen.current, seen.estimate, change]


def _figure(**layout: Any) -> Any:
    import plotly.graph_objects as go

    return go.Figure(
        layout={
            "template": "plotly_dark",
            "paper_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 40, "r": 8, "t": 34, "b": 30},
            "title_font_size": 13,
            "showlegend": False,
            **layout,
        }
    )


def heat_map(title: str, matrix: np.ndarray, names: Sequence[str]) -> Any:
    """Draw a matrix over pairs of particles; rows and columns have the particles' names."""
    figure = _figure(title=title, yaxis={"autorange": "reversed", "tickfont": {"size": 9}})
    figure.update_layout(margin={"l": 70, "b": 60}, xaxis={"tickfont": {"size": 9}})
    figure.add_heatmap(
        z=np.round(matrix, 3).tolist(),
        x=list(names),
        y=list(names),
        colorscale="Viridis",
        colorbar={"thickness": 8},
        hovertemplate="%{y} from %{x}: %{z}<extra></extra>",
    )
    return figure


def curve(title: str, x: Sequence[float], y: Sequence[float]) -> Any:
    """Draw a curve over the steps of an edit."""
    figure = _figure(title=title, xaxis={"title": {"text": "step", "font": {"size": 10}}})
    figure.add_scatter(x=list(x), y=[float(f"{value:.4g}") for value in y], mode="lines+markers", marker={"size": 4})
    return figure


def bars(title: str, names: Sequence[str], values: Sequence[float]) -> Any:
    """Draw a bar for each of several values."""
    figure = _figure(title=title)
    figure.add_bar(x=list(names), y=[round(value, 2) for value in values])
    return figure


CURVES = ("size of the change", "agreement in same places", "warp error", "residual", "seconds per step")


class Panel:
    """Elements that show what an `Observer` saw.

    Args:
        gui: viser's; the elements go into the container that is open at the moment.
    """

    def __init__(self, gui: Any) -> None:
        self._gui = gui

    def add_thumbnails(self) -> None:
        """Add the images of particles here."""
        self._thumbnails = self._gui.add_markdown("*Images appear here with the next steps of an edit.*")

    def add_charts(self) -> None:
        """Add the heat map and the curves here."""
        self._matrix = self._gui.add_plotly(_figure(title="What images share: no step yet"), aspect=4.0)
        self._curves = {name: self._gui.add_plotly(_figure(), aspect=2.2, visible=False) for name in CURVES}
        self._seconds = self._gui.add_plotly(_figure(), aspect=2.2, visible=False)

    def show_images(self, sheet: Image.Image) -> None:
        """Show a picture in place of the images of particles."""
        self._thumbnails.content = as_markdown(sheet, "images")

    def show_seconds(self, seconds: Mapping[str, float]) -> None:
        """Show how long the stages of a run took."""
        self._seconds.figure = bars("seconds per stage", [*seconds], [*seconds.values()])
        self._seconds.visible = True

    def show(self, seen: Observation) -> None:
        """Show an observation."""
        if seen.thumbnails:
            rows = [
                _row(seen.names.get(index, str(index)), seen.thumbnails[index]) for index in sorted(seen.thumbnails)
            ]
            sheet = grid(("source", "now", "aim (x_0)", f"change x{AMPLIFIED}"), rows)
            self.show_images(sheet)
        if seen.matrix is not None:
            self._matrix.figure = heat_map(seen.matrix_title, seen.matrix, seen.matrix_names)
            self._matrix.aspect = 1.0
        for name, element in self._curves.items():
            if seen.curves.get(name):
                element.figure = curve(name, seen.curves["step"][-len(seen.curves[name]) :], seen.curves[name])
                element.visible = True
