"""Captures that cannot be trained on, as people have them: each is refused in a sentence before anything is written."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.utils.colmap_parsing_utils import rotmat2qvec
from nerfstudio.utils.eval_utils import eval_setup
from PIL import Image

from csd_2d.io.images import read_image
from csd_nerf.capture import check_capture
from csd_nerf.console import told
from csd_nerf.methods import csd_edit_tiny
from csd_nerf.views.nerfacto import NerfactoViews
from tests.csd_nerf.conftest import train_in_process
from tests.csd_nerf.test_training import edit_in_process

Change = Callable[[dict[str, Any], Path], object]


@pytest.fixture
def capture(scene_data, tmp_path) -> Callable[[Change], Path]:
    """Makes a copy of a capture, without its split, that is changed."""

    def make(change: Change) -> Path:
        folder = shutil.copytree(scene_data, tmp_path / "capture")
        meta = json.loads((folder / "transforms.json").read_text())
        for split in ("train", "val", "test"):
            meta.pop(f"{split}_filenames", None)
        change(meta, folder)
        (folder / "transforms.json").write_text(json.dumps(meta))
        return folder

    return make


def of_file(meta: dict, **values: Any) -> None:
    """Sets, or with None removes, values of the whole file."""
    for key, value in values.items():
        meta.pop(key) if value is None else meta.__setitem__(key, value)


def of_frame(meta: dict, **values: Any) -> None:
    of_file(meta["frames"][1], **values)


def resaved(meta: dict, folder: Path, change: Callable[[Image.Image], Image.Image], count: int = 8, **saving) -> None:
    """Saves the first images anew, as JPEG if they are given EXIF data."""
    for frame in meta["frames"][:count]:
        path = folder / frame["file_path"]
        with Image.open(path) as image:
            changed = change(image.convert("RGB"))
        path.unlink()
        path = path.with_suffix(".jpg") if saving or changed.mode == "CMYK" else path
        changed.save(path, **saving)
        frame["file_path"] = str(path.relative_to(folder))


def masked(meta: dict, folder: Path, mode: str = "L", size: tuple[int, int] = (32, 24), count: int = 8) -> None:
    (folder / "masks").mkdir()
    for frame in meta["frames"][:count]:
        frame["mask_path"] = f"masks/{Path(frame['file_path']).name}"
        Image.new(mode, size, "white").save(folder / frame["mask_path"])


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def to_16_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.array(image.convert("L")).astype(np.uint16) * 257)


def squeezed(image: Image.Image) -> Image.Image:
    return image.resize((24, 24))


REFUSED: dict[str, tuple[Change, str]] = {
    **{
        f"no {key}": (lambda m, d, key=key: of_file(m, **{key: None}), f"frame images/frame_0000.png has no {key}")
        for key in ("fl_x", "fl_y", "cx", "cy", "w", "h")
    },
    "text for a number": (lambda m, d: of_file(m, fl_x="wide"), "fl_x must be a positive number, got 'wide'"),
    "negative number": (lambda m, d: of_file(m, h=-24), "h must be a positive number, got -24"),
    "distortion": (lambda m, d: of_file(m, distortion_params=[0, 0]), "distortion_params must be six numbers"),
    "distortion of no number": (lambda m, d: of_file(m, k1="a"), "k1 must be a number, got 'a'"),
    "unknown lens": (lambda m, d: of_file(m, camera_model="FISH"), "camera_model is 'FISH'; expected one of SIMPLE_P"),
    "no file": (lambda m, d: of_frame(m, file_path=None), "frame 1 has no file_path"),
    "no pose": (lambda m, d: of_frame(m, transform_matrix=None), "frame_0001.png has no transform_matrix"),
    "pose of 3 rows": (lambda m, d: of_frame(m, transform_matrix=[[1, 0, 0]] * 3), "transform_matrix must be a pose"),
    "pose of NaN": (lambda m, d: of_frame(m, transform_matrix=[[float("nan")] * 4] * 4), "must be a pose"),
    "pose of zeros": (lambda m, d: of_frame(m, transform_matrix=[[0] * 4] * 4), "must be a pose"),
    "one place": (
        lambda m, d: [f.update(transform_matrix=m["frames"][0]["transform_matrix"]) for f in m["frames"]],
        "are all at one place",
    ),
    "frames of another kind": (lambda m, d: of_file(m, frames={"a": 1}), "its frames are no list of objects"),
    "split of unknown files": (
        lambda m, d: of_file(m, train_filenames=["images/frame_0000.png"], val_filenames=["x.png"]),
        "val_filenames names x.png, which is no frame's",
    ),
    "half a split": (
        lambda m, d: of_file(m, train_filenames=["images/frame_0000.png"]),
        "must then have val_filenames",
    ),
    "image missing": (lambda m, d: (d / "images/frame_0004.png").unlink(), r"frame_0004.png is missing \(1 of"),
    "image empty": (lambda m, d: (d / "images/frame_0004.png").write_bytes(b""), "cannot be read as an image"),
    "other size": (lambda m, d: resaved(m, d, squeezed, 3), r"frame_0000.png is 24x24 px, its camera 32x24; \d of"),
    "lying on its side": (
        lambda m, d: resaved(m, d, lambda i: i.transpose(Image.Transpose.ROTATE_90), exif=exif(6)),
        "is stored turned by 90 degrees, .* and its camera is upright",
    ),
    "16 bits": (lambda m, d: resaved(m, d, to_16_bits), "mode I;16.* whose colors nerfstudio reads wrongly"),
    "palette": (lambda m, d: resaved(m, d, lambda i: i.convert("P")), "mode P.* whose colors nerfstudio reads wrongly"),
    "CMYK": (lambda m, d: resaved(m, d, lambda i: i.convert("CMYK")), "mode CMYK"),
    "some transparent": (lambda m, d: resaved(m, d, lambda i: i.convert("RGBA"), 1), "frame_0000.png has transparency"),
    "some masks": (lambda m, d: masked(m, d, count=3), "5 of 8 frames have no mask_path, images/frame_0003.png first"),
    "mask in color": (lambda m, d: masked(m, d, "RGB"), "the mask .*frame_0000.png must have one channel"),
    "small mask": (lambda m, d: masked(m, d, size=(24, 24)), "the mask .* is 24x24 px, its image 32x24"),
    "mask missing": (
        lambda m, d: (masked(m, d), (d / "masks/frame_0005.png").unlink()),
        r"masks/frame_0005.png is missing \(1 of \d masks",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_captures_that_cannot_be_trained_on_are_refused(change, message, capture):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        check_capture(capture(change), NerfstudioDataParserConfig(), one_kind=True)
    assert "\n" not in str(error.value)


ACCEPTED: dict[str, Change] = {
    "as it is": lambda m, d: None,
    "masks": lambda m, d: masked(m, d),
    "gray": lambda m, d: resaved(m, d, lambda i: i.convert("L")),
    "transparent": lambda m, d: resaved(m, d, lambda i: i.convert("RGBA")),
    "lying, as its camera": lambda m, d: resaved(m, d, lambda i: i, exif=exif(6)),
}


@pytest.mark.parametrize("change", ACCEPTED.values(), ids=ACCEPTED)
def test_captures_that_can_be_trained_on_are_accepted(change, capture, capsys):
    assert len(check_capture(capture(change), NerfstudioDataParserConfig(), one_kind=True).image_filenames) >= 7
    assert capsys.readouterr().out == ""


def test_smaller_copies_must_be_complete(capture):
    def half(meta: dict, folder: Path) -> None:
        (folder / "images_2").mkdir()
        for frame in meta["frames"][:4]:
            name = Path(frame["file_path"]).name
            Image.open(folder / "images" / name).resize((16, 12)).save(folder / "images_2" / name)

    with pytest.raises(FileNotFoundError, match=r"images_2/frame_0004.png is missing \(. of . images are\)"):
        check_capture(capture(half), NerfstudioDataParserConfig(downscale_factor=2), one_kind=True)


def test_a_tag_that_may_turn_images_or_not_is_told(capture, capsys):
    check_capture(
        capture(lambda m, d: resaved(m, d, lambda i: i, exif=exif(3))), NerfstudioDataParserConfig(), one_kind=True
    )
    assert "8 of 8 images have an EXIF tag that turns them, which nerfstudio ignores" in capsys.readouterr().out


def as_colmap(source: Path, folder: Path, size: tuple[int, int]) -> Path:
    """Writes a capture as COLMAP does."""
    meta = json.loads((source / "transforms.json").read_text())
    model = folder / "colmap/sparse/0"
    model.mkdir(parents=True)
    (folder / "images").mkdir()
    scale = size[0] / meta["w"]
    lens = " ".join(str(scale * meta[key]) for key in ("fl_x", "fl_y", "cx", "cy"))
    (model / "cameras.txt").write_text(f"1 PINHOLE {size[0]} {size[1]} {lens}\n")
    lines = []
    for number, frame in enumerate(meta["frames"], 1):
        name = Path(frame["file_path"]).name
        to_camera = np.linalg.inv(np.array(frame["transform_matrix"]) @ np.diag([1, -1, -1, 1]))
        pose = [*rotmat2qvec(to_camera[:3, :3]), *to_camera[:3, 3]]
        lines += [f"{number} {' '.join(map(str, pose))} 1 {name}", "0 0 -1"]
        with Image.open(source / frame["file_path"]) as image:
            image.resize(size).save(folder / "images" / name)
    (model / "images.txt").write_text("\n".join(lines) + "\n")
    (model / "points3D.txt").write_text("1 0 0 0 10 20 30 0.1 1 0\n")
    return folder


def test_a_question_without_a_terminal_is_a_sentence(scene_data, tmp_path, monkeypatch):
    """Of nerfstudio, which offers to make smaller copies of large images."""
    data = as_colmap(scene_data, tmp_path / "large", (1632, 1224))
    with open(os.devnull) as nobody:
        monkeypatch.setattr("sys.stdin", nobody)
        with pytest.raises(ValueError, match="asks first, which takes a terminal; run this command in one"):
            check_capture(data, ColmapDataParserConfig(), one_kind=True)


def test_what_colmap_wrote_is_checked(scene_data, tmp_path):
    data = as_colmap(scene_data, tmp_path / "colmap", (32, 24))
    assert check_capture(data, ColmapDataParserConfig(), one_kind=True).image_filenames
    squeezed(Image.open(data / "images/frame_0003.png")).save(data / "images/frame_0003.png")
    with pytest.raises(ValueError, match=r"frame_0003.png is 24x24 px, its camera 32x24"):
        check_capture(data, ColmapDataParserConfig(), one_kind=True)


def test_what_nerfstudio_stumbles_over_is_a_sentence_with_a_traceback_in_a_file(scene_data, tmp_path):
    data = as_colmap(scene_data, tmp_path / "colmap", (32, 24))
    (data / "colmap/sparse/0/images.txt").write_text("1 2 3\n")
    with pytest.raises(SystemExit) as end:
        train_in_process(
            "csd-scene-tiny",
            tmp_path / "out",
            1,
            data=data,
            pipeline__datamanager__dataparser=ColmapDataParserConfig(),
        )
    message = str(end.value.code)
    assert message.startswith("csd-scene-tiny: stopped by ") and "\n" not in message
    report = Path(message.rpartition(" is in ")[2].rstrip(")."))
    assert "Traceback (most recent call last)" in report.read_text() and "colmap" in report.read_text()
    report.unlink()
    assert not (tmp_path / "out").exists()


def test_the_same_command_works_once_the_capture_is_mended(capture, tmp_path):
    data = capture(lambda m, d: of_file(m, fl_x=None))
    meta = json.loads((data / "transforms.json").read_text())
    with pytest.raises(SystemExit, match="has no fl_x"):
        train_in_process("csd-scene-tiny", tmp_path / "out", 1, data=data, timestamp="mine")
    (data / "transforms.json").write_text(json.dumps(meta | {"fl_x": meta["fl_y"]}))
    assert train_in_process("csd-scene-tiny", tmp_path / "out", 1, data=data, timestamp="mine").is_dir()


def settled(run: Path, **options: Any) -> Any:
    """The config of an edit of a run, as ns-train settles it."""
    config: Any = copy.deepcopy(csd_edit_tiny.config)
    config.load_run, config.prompt, config.pipeline.prior = run, "make it night", "analytic"
    config.pipeline.datamanager.data = options.get("data")
    config.settle()
    return config


def changed_copy(scene_data: Path, folder: Path, change: Change) -> Path:
    """A copy of a capture, with its split, that is changed."""
    shutil.copytree(scene_data, folder)
    meta = json.loads((folder / "transforms.json").read_text())
    change(meta, folder)
    (folder / "transforms.json").write_text(json.dumps(meta))
    return folder


def moved_cameras(meta: dict, folder: Path) -> None:
    for number, frame in enumerate(meta["frames"]):
        frame["transform_matrix"][number % 3][3] += 1.5


def renamed(meta: dict, folder: Path) -> None:
    for names in (meta[f"{split}_filenames"] for split in ("train", "val", "test")):
        names[:] = [name.replace("frame", "photo") for name in names]
    for frame in meta["frames"]:
        name = frame["file_path"].replace("frame", "photo")
        (folder / frame["file_path"]).rename(folder / name)
        frame["file_path"] = name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (moved_cameras, "was trained on: its cameras are elsewhere"),
        (lambda m, d: of_file(m, fl_x=2 * m["fl_x"]), "its cameras have other lenses than those in"),
        (renamed, "its views have other names, frame_0000.png for one"),
    ],
    ids=["poses", "lenses", "names"],
)
def test_data_of_another_scene_are_refused(change, message, scene_run, scene_data, tmp_path):
    data = changed_copy(scene_data, tmp_path / "other", change)
    with pytest.raises(SystemExit, match="is another capture than") as end:
        settled_or_told(scene_run, data)
    assert message in str(end.value.code)


def settled_or_told(run: Path, data: Path) -> None:
    with told("csd-edit-tiny"):
        settled(run, data=data)


def test_a_copy_of_the_data_is_accepted(scene_run, scene_data, tmp_path):
    data = changed_copy(scene_data, tmp_path / "copy", lambda m, d: None)
    assert settled(scene_run, data=data).pipeline.datamanager.data == data


def test_settings_of_the_data_manager_that_decide_what_is_seen_are_taken_over(scene_run, tmp_path):
    run = shutil.copytree(scene_run, tmp_path / "run")
    config = (run / "config.yml").read_text()
    assert settled(run).pipeline.datamanager.camera_res_scale_factor == 1.0
    (run / "config.yml").write_text(config.replace("camera_res_scale_factor: 1.0", "camera_res_scale_factor: 0.5"))
    assert settled(run).pipeline.datamanager.camera_res_scale_factor == 0.5


def test_transparent_surroundings_stay_as_they_are(scene_run, scene_data, tmp_path):
    def disk(meta: dict, folder: Path) -> None:
        for frame in meta["frames"]:
            image = Image.open(folder / frame["file_path"]).convert("RGBA")
            y, x = np.mgrid[:24, :32]
            image.putalpha(Image.fromarray(np.where((y - 12) ** 2 + (x - 16) ** 2 < 80, 255, 0).astype(np.uint8)))
            image.save(folder / frame["file_path"])

    data = changed_copy(scene_data, tmp_path / "transparent", disk)
    run = edit_in_process(tmp_path / "out", 1, load_run=scene_run, pipeline__datamanager__data=data)
    views = NerfactoViews(eval_setup(run / "config.yml")[1])
    paths = sorted((run / "edited").iterdir())
    assert paths
    for path in paths:
        index = int(path.stem[:4])
        seen = views._unedited(index)[..., 3] > 0
        edited, original = read_image(path), views.original(index)
        assert torch.equal(edited[:, ~seen], original[:, ~seen]) and not original[:, ~seen].any()
        assert (edited[:, seen] - original[:, seen]).abs().mean() > 0.05
