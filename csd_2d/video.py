"""Videos: frames as particles; files through PyAV, or folders of images."""

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.error import FFmpegError
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from csd_2d.edit import EditConfig, StepInfo
from csd_2d.files import replacing
from csd_2d.images import SMALLEST, edit_images, read_image, read_mask, to_array, write_image
from csd_2d.priors import Prior

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi")


@dataclass
class Clip:
    """Frames in order, with what is needed to write them back."""

    frames: list[Float[Tensor, "3 _ _"]]
    """RGB in [0, 1]."""
    rate: Fraction = Fraction(24)
    """Frames per second; 24 where the source does not say."""
    names: list[str] | None = None
    """File names without suffix, for clips that came from a folder."""


def edit_video(
    clip: Clip,
    prior: Prior,
    prompt: str,
    config: EditConfig | None = None,
    masks: Sequence[Float[Tensor, "1 _ _"]] | None = None,
    on_step: Callable[[StepInfo], bool | None] | None = None,
    progress: str | None = None,
    resume: Path | None = None,
) -> Clip:
    """Edits all frames of a clip together; sizes and frame rate stay. See `csd_2d.images.edit_images`."""
    frames = edit_images(clip.frames, prior, prompt, config, None, masks, on_step, progress, resume, follow=True)
    return Clip(frames, clip.rate, clip.names)


def read_clip(path: Path) -> Clip:
    """A video file, or a folder of images in natural order (2.png before 10.png).

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        ValueError: if it holds no frames, or frames that cannot be read.
    """
    if path.is_dir():
        files = _image_files(path)
        if not files:
            raise ValueError(f"folder {path} holds no images.")
        names = [file.stem for file in files]
        return Clip([read_image(file) for file in files], names=names if len({*names}) == len(names) else None)
    if not path.is_file():
        raise FileNotFoundError(f"no such video or folder: {path}.")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} holds no video.")
            stream = container.streams.video[0]
            frames = [_upright(frame) for frame in container.decode(stream)]
            rate = stream.average_rate or Clip.rate
    except FFmpegError as error:
        raise ValueError(f"{path} cannot be read as a video ({error.strerror}).") from error
    if not frames:
        raise ValueError(f"{path} holds no video frames.")
    if min(frames[0].shape[-2:]) < SMALLEST:
        raise ValueError(f"frames of {path} are too small; both sides must be at least {SMALLEST} px.")
    return Clip(frames, rate)


def read_masks(path: Path, clip: Clip, feather: float) -> list[Float[Tensor, "1 H W"]]:
    """One mask for all frames, or a folder with one for each, in the frames' order; see `csd_2d.images.read_mask`.

    Raises:
        ValueError: if a folder holds more or fewer masks than there are frames, or as `read_mask` raises.
    """
    files = _image_files(path) if path.is_dir() else [path] * len(clip.frames)
    if len(files) != len(clip.frames):
        raise ValueError(f"folder {path} holds {len(files)} masks for {len(clip.frames)} frames.")
    return [
        read_mask(file, (frame.shape[-2], frame.shape[-1]), feather)
        for file, frame in zip(files, clip.frames, strict=True)
    ]


def _image_files(folder: Path) -> list[Path]:
    """In natural order: 2.png before 10.png."""
    known = Image.registered_extensions()
    return sorted(
        (file for file in folder.iterdir() if file.suffix.lower() in known),
        key=lambda file: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)],
    )


def _upright(frame: av.VideoFrame) -> Float[Tensor, "3 H W"]:
    """RGB in [0, 1], turned as the camera was held."""
    array = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255


def write_clip(clip: Clip, path: Path) -> None:
    """Writes a video file, if the name ends like one, or else a folder of PNG images. See `check_video_output`."""
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        _write_folder(clip, path)
        return
    height, width = clip.frames[0].shape[-2:]
    with replacing(path) as temporary, av.open(str(temporary), "w") as container:
        stream = container.add_stream("libvpx-vp9" if path.suffix.lower() == ".webm" else "libx264", rate=clip.rate)
        stream.width, stream.height = width, height
        # 4:2:0 halves colour in both directions and needs even sizes; most players want it.
        stream.pix_fmt = "yuv444p" if width % 2 or height % 2 else "yuv420p"
        stream.options = {"crf": "16"}
        # Said and done in BT.709: untagged, players take large pictures for it and small ones for BT.601.
        for name in ("colorspace", "color_primaries", "color_trc", "color_range"):
            setattr(stream.codec_context, name, 1)
        for frame in clip.frames:
            rgb = av.VideoFrame.from_ndarray(to_array(frame), format="rgb24")
            container.mux(stream.encode(rgb.reformat(format=stream.pix_fmt, dst_colorspace="ITU709")))
        container.mux(stream.encode())


def _write_folder(clip: Clip, path: Path) -> None:
    names: Sequence[str] = clip.names or [f"{i:05d}" for i in range(len(clip.frames))]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        folder = Path(temporary) / path.name
        for name, frame in zip(names, clip.frames, strict=True):
            write_image(frame, folder / f"{name}.png")
        os.replace(folder, path)  # an empty folder is replaced, one with files raises


def check_video_output(path: Path, clip: Clip) -> None:
    """Raises ValueError, before any work is done, if `write_clip` could not write such a clip there."""
    if path.suffix.lower() in VIDEO_SUFFIXES:
        if path.is_dir():
            raise ValueError(f"output {path} is a folder, but its name ends like a video file's.")
        if len({frame.shape for frame in clip.frames}) > 1:
            raise ValueError(f"frames differ in size and cannot become the video {path}; name a folder instead.")
    elif path.is_file() or path.suffix[1:].isalpha():
        raise ValueError(f"output {path} must be a folder, or end in one of {', '.join(VIDEO_SUFFIXES)}.")
    elif path.is_dir() and any(path.iterdir()):
        raise ValueError(f"output folder {path} is not empty.")
