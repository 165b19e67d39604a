"""Check a capture before anything is trained on it: its transforms.json, and each file against its camera."""

import dataclasses
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nerfstudio.cameras.cameras import CAMERA_MODEL_TO_TYPE
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig, DataparserOutputs
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import ExifTags, Image

from csd_2d.io.images import read_image
from csd_nerf.console import quiet_nerfstudio, warn
from csd_nerf.source_run import SourceRun

_INTRINSICS = ("fl_x", "fl_y", "cx", "cy", "w", "h")
_DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")
_COLORS = {"L": 3, "RGB": 3, "RGBA": 4}
"""Kinds of image files, PIL's modes, whose colors nerfstudio reads as they are, and the channels it makes of them."""
_MASKS = ("1", "L", "P", "I", "I;16")
"""Kinds with one channel."""


def check_data(data: Path | None, dataparser: DataParserConfig) -> None:
    """Check that there are data.

    Raises:
        FileNotFoundError: if the data or their transforms.json are missing.
        ValueError: if none are given, or transforms.json is corrupt or lacks something.
    """
    path = data if data is not None else dataparser.data
    if path == Path():
        raise ValueError("no data; set --data to a folder with images and a transforms.json.")
    if not path.exists():
        raise FileNotFoundError(f"no data at {path}; set --data.")
    if isinstance(dataparser, NerfstudioDataParserConfig):
        _check_transforms(_transforms(path))


def check_capture(data: Path | None, dataparser: DataParserConfig, one_kind: bool) -> DataparserOutputs:
    """Check data, and that each of their files is what its camera says.

    Args:
        one_kind: whether all images must have transparency, or none, as where all lie in one tensor.

    Returns:
        The training views.

    Raises:
        FileNotFoundError, ValueError: as `check_data` raises; if a file is missing, or of another size than its camera,
            or of a kind that nerfstudio reads wrongly; if poses are not finite. Whatever the data parser raises.
    """
    check_data(data, dataparser)
    views, held_out = (parse(data, dataparser, split) for split in ("train", "val"))
    headers = _check_files(views) | _check_files(held_out)
    if one_kind and views.alpha_color is None:
        _check_kinds(headers)
    _warn_of_orientation(headers)
    return views


def parse(data: Path | None, dataparser: DataParserConfig, split: str = "train") -> DataparserOutputs:
    """Read the cameras and the names of the files of a split.

    Raises:
        ValueError: if poses are not finite, there are no views, or a question would have to be asked without a
            terminal. Whatever else nerfstudio's data parser raises.
    """
    config = dataclasses.replace(dataparser, data=data if data is not None else dataparser.data)
    if isinstance(config, NerfstudioDataParserConfig | ColmapDataParserConfig):
        config.load_3D_points = False  # nothing here needs them
    asks = isinstance(config, ColmapDataParserConfig) and sys.stdin is not None and sys.stdin.isatty()
    try:
        with quiet_nerfstudio(verbose=asks):
            views: DataparserOutputs = config.setup().get_dataparser_outputs(split=split)
    except EOFError as error:
        raise ValueError(
            f"nerfstudio would make smaller copies of the images in {config.data}, of 1600 px at most, and asks first, "
            "which takes a terminal; run this command in one, or make them, or set the data parser's "
            "--downscale-factor 1."
        ) from error
    except ZeroDivisionError as error:
        raise ValueError(_AT_ONE_PLACE.format(config.data)) from error
    if not views.image_filenames and split == "train":
        raise ValueError(f"{config.data} holds no training views.")
    if not bool(views.cameras.camera_to_worlds.isfinite().all()):
        raise ValueError(_AT_ONE_PLACE.format(config.data))
    return views


_AT_ONE_PLACE = (
    "the cameras of {} are all at one place, so that their distances cannot be scaled; set the data parser's "
    "--auto-scale-poses False."
)


def _transforms(data: Path) -> Path:
    return data if data.suffix == ".json" else data / "transforms.json"


def _check_transforms(path: Path) -> None:
    """Check that a transforms.json has all that nerfstudio takes for granted. FileNotFoundError, ValueError if not."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} holds no transforms.json; set --data to a folder that ns-process-data wrote."
        )
    try:
        meta = json.loads(path.read_text(encoding="utf8"))
        frames = meta["frames"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as a nerfstudio scene ({error!r}).") from error
    if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
        raise ValueError(f"{path} cannot be read as a nerfstudio scene: its frames are no list of objects.")
    if not frames:
        raise ValueError(f"{path} names no images.")
    if meta.get("camera_model", "OPENCV") not in CAMERA_MODEL_TO_TYPE:
        known = ", ".join(CAMERA_MODEL_TO_TYPE)
        raise ValueError(f"{path}: camera_model is '{meta['camera_model']}'; expected one of {known}.")
    for number, frame in enumerate(frames):
        name = frame.get("file_path")
        if not isinstance(name, str):
            raise ValueError(f"{path}: frame {number} has no file_path.")
        _check_frame(f"{path}: frame {name}", frame, meta)
    for key in ("mask_path", "depth_file_path"):
        _check_on_all_or_none(path, frames, key)
    _check_splits(path, frames, meta)


def _check_frame(where: str, frame: dict[str, Any], meta: dict[str, Any]) -> None:
    for key in _INTRINSICS:
        source = meta if key in meta else frame
        if key not in source:
            raise ValueError(f"{where} has no {key}, and neither has the whole file.")
        low = -math.inf if key in ("cx", "cy") else 0
        if not low < _number(source[key]) < math.inf:
            raise ValueError(f"{where}: {key} must be a {'' if low else 'positive '}number, got {source[key]!r}.")
    for key in _DISTORTION:
        if not math.isfinite(_number(meta.get(key, frame.get(key, 0)))):
            raise ValueError(f"{where}: {key} must be a number, got {meta.get(key, frame.get(key))!r}.")
    several = meta.get("distortion_params", frame.get("distortion_params", [0] * 6))
    if not isinstance(several, list) or len(several) != 6 or not all(math.isfinite(_number(v)) for v in several):
        raise ValueError(f"{where}: distortion_params must be six numbers, got {several!r}.")
    if "transform_matrix" not in frame:
        raise ValueError(f"{where} has no transform_matrix, the camera's pose.")
    try:
        pose = np.array(frame["transform_matrix"], dtype=np.float64)
    except (ValueError, TypeError):
        pose = np.zeros(0)
    if pose.shape != (4, 4) or not np.isfinite(pose).all() or abs(np.linalg.det(pose[:3, :3])) < 1e-6:
        raise ValueError(f"{where}: transform_matrix must be a pose, four rows of four finite numbers.")


def _number(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def _check_on_all_or_none(path: Path, frames: list[dict[str, Any]], key: str) -> None:
    without = [frame["file_path"] for frame in frames if not isinstance(frame.get(key), str)]
    if without and any(key in frame for frame in frames):
        raise ValueError(
            f"{path}: {len(without)} of {len(frames)} frames have no {key}, {without[0]} first; give one to each "
            "frame, or to none."
        )


def _check_splits(path: Path, frames: list[dict[str, Any]], meta: dict[str, Any]) -> None:
    names = {frame["file_path"] for frame in frames}
    splits = [f"{split}_filenames" for split in ("train", "val", "test")]
    if not any(split in meta for split in splits):
        return
    for split in splits[:2]:
        if split not in meta:
            raise ValueError(
                f"{path} has {', '.join(s for s in splits if s in meta)}, and must then have {split}, too."
            )
    for split in splits:
        if unknown := sorted({*map(str, meta.get(split, []))} - names):
            raise ValueError(f"{path}: {split} names {unknown[0]}, which is no frame's file_path.")


@dataclass(frozen=True)
class _Header:
    """What a file says of its image."""

    size: tuple[int, int]
    """Width and height as they are stored."""
    mode: str
    orientation: int
    """EXIF tag; 1: upright."""


def _check_files(views: DataparserOutputs) -> dict[Path, _Header]:
    """Check the files of some views; returns what the images say. FileNotFoundError, ValueError for the first fault."""
    for files, what in ((views.image_filenames, "images"), (views.mask_filenames or [], "masks")):
        if missing := [path for path in files if not path.is_file()]:
            raise FileNotFoundError(f"{missing[0]} is missing ({len(missing)} of {len(files)} {what} are).")
    cameras = views.cameras
    sizes = list(zip(cameras.width.flatten().tolist(), cameras.height.flatten().tolist(), strict=True))
    headers = {path: _header(path) for path in views.image_filenames}
    wrong: list[str] = []
    for path, camera in zip(views.image_filenames, sizes, strict=True):
        header = headers[path]
        size = header.size
        if header.mode not in _COLORS:
            raise ValueError(
                f"{path} is of a kind (PIL's mode {header.mode}) whose colors nerfstudio reads wrongly; convert the "
                "images to RGB with 8 bits a channel."
            )
        if size == camera:
            continue
        if header.orientation > 4 and size == camera[::-1]:
            raise ValueError(
                f"{path} is stored turned by 90 degrees, with an EXIF tag that nerfstudio ignores, and its camera is "
                "upright; turn the pixels themselves (`mogrify -auto-orient`, or PIL's ImageOps.exif_transpose)."
            )
        wrong.append(f"{path} is {size[0]}x{size[1]} px, its camera {camera[0]}x{camera[1]}")
    if wrong:
        raise ValueError(f"{wrong[0]}; {len(wrong)} of {len(sizes)} images do not fit their cameras.")
    for path, camera in zip(views.mask_filenames or [], sizes, strict=False):
        header = _header(path)
        if header.mode not in _MASKS:
            raise ValueError(
                f"the mask {path} must have one channel, and it has more (PIL's mode {header.mode}); save it in gray."
            )
        if header.size != camera:
            width, height = header.size
            raise ValueError(f"the mask {path} is {width}x{height} px, its image {camera[0]}x{camera[1]}.")
    return headers


def _header(path: Path) -> _Header:
    """Read the header of an image, but no pixels. ValueError if it is none."""
    try:
        with Image.open(path) as image:
            return _Header(image.size, image.mode, image.getexif().get(ExifTags.Base.Orientation, 1))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error}).") from error


def _check_kinds(headers: dict[Path, _Header]) -> None:
    """Check that all images have transparency, or none. ValueError if not."""
    channels = {path: _COLORS[header.mode] for path, header in headers.items()}
    if len({*channels.values()}) > 1:
        (usual, _), *_ = Counter(channels.values()).most_common()
        other = next(path for path, count in channels.items() if count != usual)
        kinds = ("has transparency", "has none") if usual == 3 else ("has no transparency", "has")
        raise ValueError(
            f"{other} {kinds[0]}, most of the other images {kinds[1]}; nerfstudio takes images of one kind."
        )


def _warn_of_orientation(headers: dict[Path, _Header]) -> None:
    """Warn of EXIF tags that no camera's size speaks for or against: poses may be of turned images or not."""
    turned = [header for header in headers.values() if header.orientation > 1]
    doubtful = sum(1 for header in turned if header.orientation < 5 or header.size[0] == header.size[1])
    if doubtful:
        warn(
            f"{doubtful} of {len(headers)} images have an EXIF tag that turns them, which nerfstudio ignores; if the "
            "poses are of the turned images, turn the pixels themselves (`mogrify -auto-orient`)."
        )


def check_images(data: Path | None, dataparser: DataParserConfig) -> None:
    """Read all images of a scene, to find the one that nerfstudio failed on, which it does not name.

    Raises:
        FileNotFoundError, ValueError: for the first that is missing or no image.
    """
    for path in _files(data, dataparser):
        read_image(path)


def _files(data: Path | None, dataparser: DataParserConfig) -> Iterator[Path]:
    for split in ("train", "val"):
        views = parse(data, dataparser, split)
        yield from views.image_filenames
        yield from views.mask_filenames or []


def check_same_scene(views: DataparserOutputs, source: SourceRun, data: Path) -> None:
    """Check that the data of an edit are those that its scene was trained on.

    Args:
        views: the training views of `data`.
        source: the run of the scene; its own data need not be there any more.

    Raises:
        ValueError: if poses, lenses or names of the views differ.
    """
    run = source.checkpoints.parent
    refusal = f"{data} is another capture than the one that the run in {run} was trained on"
    saved = _saved_transform(run / "dataparser_transforms.json")
    if saved is not None and not _alike(saved, _transform(views)):
        raise ValueError(f"{refusal}: its cameras are elsewhere.")
    if not source.data.exists() or source.data.resolve() == data.resolve():
        return
    former = parse(source.data, source.dataparser)
    names, former_names = ([path.name for path in outputs.image_filenames] for outputs in (views, former))
    if names != former_names:
        raise ValueError(f"{refusal}: its views have other names, {min({*names} ^ {*former_names} or names)} for one.")
    for what, attributes in {"poses": ("camera_to_worlds",), "lenses": ("fx", "fy", "cx", "cy")}.items():
        pairs = ((getattr(outputs.cameras, name) for outputs in (views, former)) for name in attributes)
        if not all(_alike(*pair) for pair in pairs):
            raise ValueError(f"{refusal}: its cameras have other {what} than those in {source.data}.")


def _transform(views: DataparserOutputs) -> torch.Tensor:
    """Return how a data parser moved and scaled the scene, as one tensor (3, 5)."""
    scale = torch.full((3, 1), float(views.dataparser_scale))
    return torch.cat([views.dataparser_transform.float()[:3], scale], dim=1)


def _saved_transform(path: Path) -> torch.Tensor | None:
    try:
        saved = json.loads(path.read_text(encoding="utf8"))
        rows = torch.tensor(saved["transform"], dtype=torch.float32)
        return torch.cat([rows, torch.full((3, 1), float(saved["scale"]))], dim=1)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # an older version, or a run that was cut short
        return None


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-3)
