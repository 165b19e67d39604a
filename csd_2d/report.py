"""The report of an edit: a table for the terminal, report.json, and report.html, one file that opens offline."""

import base64
import io
import json
import math
import platform
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from csd_2d.evaluate import Evaluation, Subject
from csd_2d.io.files import replacing
from csd_2d.io.images import to_array

SHOWN = 12
"""Largest number of images in the report, evenly spread."""
SIDE, PANORAMA_SIDE = 800, 1920
"""Longest sides of pictures in the report, in pixels."""
VERSIONS = ("csd-edit", "torch", "transformers", "torchmetrics", "torchvision", "opencv-python-headless", "nerfstudio")


def number(value: float | None) -> str:
    """Format a metric's value; a hyphen if there is none."""
    if value is None:
        return "-"
    if math.isfinite(value) and value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.4g}"


def terminal_table(evaluation: Evaluation) -> str:
    """Write metrics as lines: name, edit, source, which values are good; below, what is not available, and why."""
    lines = [f"{'':24}{'edit':>10}{'source':>10}  good"]
    missing: dict[str, list[str]] = {}
    for row in evaluation.rows:
        if row.missing is None:
            lines.append(f"{row.name:24}{number(row.value):>10}{number(row.source):>10}  {row.good}".rstrip())
        else:
            missing.setdefault(row.missing, []).append(row.name)
    return "\n".join([*lines, *(f"{', '.join(names)} not available: {why}" for why, names in missing.items())])


def write_report(
    evaluation: Evaluation, subject: Subject, folder: str | Path, title: str, settings: dict[str, Any]
) -> None:
    """Write report.json and report.html into a folder, each whole or not at all.

    Args:
        subject: what was measured; its images are shown.
        title: of the page, such as the instruction.
        settings: what else is worth knowing: files, options.
    """
    content = {
        "title": title,
        "kind": evaluation.kind,
        "images": evaluation.images,
        "metrics": [asdict(row) for row in evaluation.rows],
        "settings": {name: value for name, value in settings.items() if value is not None},
        "versions": _versions(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "seconds": evaluation.seconds,
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    folder = Path(folder)
    with replacing(folder / "report.json") as temporary:
        # Plain JSON knows neither NaN nor infinity.
        temporary.write_text(json.dumps(_finite(content), indent=1, default=str), encoding="utf-8")
    pictures = _pictures(subject)
    # In a script element, only "</" could end the data.
    data = json.dumps(_finite({**content, "pictures": pictures}), default=str).replace("</", "<\\/")
    template = files("csd_2d").joinpath("report.html").read_text(encoding="utf-8")
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(template.replace("{{DATA}}", data), encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _pictures(subject: Subject) -> list[dict[str, Any]]:
    count = len(subject.before)
    shown = {*torch.linspace(0, count - 1, min(SHOWN, count)).round().int().tolist()}
    side = PANORAMA_SIDE if subject.kind == "panorama" else SIDE
    name = {"images": "image", "panorama": "panorama", "video": "frame", "scene": "view"}[subject.kind]
    masks = [None] * count if subject.masks is None else subject.masks
    pictures = []
    for index, (before, after, mask) in enumerate(zip(subject.before, subject.after, masks, strict=True)):
        if index not in shown:
            continue
        label = name if count == 1 else f"{name} {index + 1} of {count}"
        pictures.append(_pair(label, index, before, after, side))
        if mask is not None and index == min(shown):
            pictures.append(_pair(f"mask of {label}, beside the edit", index, mask.expand(3, -1, -1), after, side))
        if subject.wrap:
            half = before.shape[-1] // 2
            rolled = [image.roll(half, -1)[..., half // 2 : half // 2 + half] for image in (before, after)]
            pictures.append(_pair("left and right border, joined in the middle", index, rolled[0], rolled[1], side))
    return pictures


def _pair(label: str, index: int, before: Tensor, after: Tensor, side: int) -> dict[str, Any]:
    pair = [_scaled(image, side) for image in (before, after)]
    height, width = pair[0].shape[-2:]
    urls = dict(zip(("before", "after"), map(_data_url, pair), strict=True))
    return {"label": label, "index": index, "width": width, "height": height, **urls}


def _scaled(image: Float[Tensor, "3 H W"], side: int) -> Float[Tensor, "3 h w"]:
    scale = side / max(image.shape[-2:])
    if scale >= 1:
        return image
    size = [max(1, round(scale * length)) for length in image.shape[-2:]]
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def _data_url(image: Float[Tensor, "3 h w"]) -> str:
    data = io.BytesIO()
    Image.fromarray(to_array(image)).save(data, "JPEG", quality=92, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
