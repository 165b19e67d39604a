"""Checksums of what a few edits write, to compare two versions of the code on one machine.

    python -m tests.bench.checksums --output before.json    # in the one checkout
    python -m tests.bench.checksums --output after.json --compare before.json    # in the other

Panoramas, videos, an image from text, and scenes in both modes, through the command line and `ns-train`. Sums are of
decoded pixels and of the scenes' tensors. They hold for one machine and one version of torch only.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image

from csd_2d import EditConfig
from csd_2d.cli import main as csd

NIGHT, COLOR = "make it night", "paint it a new color"
STEPS = ("--prior", "tiny", "--steps", "8")
COMMANDS: dict[str, tuple[str, ...]] = {
    "panorama, exact scores": ("panorama", "wide", "--prompt", NIGHT, "--prior", "analytic", "--steps", "30"),
    "panorama, mask": ("panorama", "wide", "--prompt", NIGHT, "--mask", "mask", *STEPS),
    "panorama, two prompts, wrapped": ("panorama", "circle", "--prompt", NIGHT, "make it snowy", "--wrap", *STEPS),
    "panorama, paper": (
        "panorama",
        "wide",
        "--prompt",
        COLOR,
        "--preset",
        "paper",
        "--no-fade",
        "--stride",
        "4",
        *STEPS,
    ),
    "panorama, noise of the canvas": ("panorama", "wide", "--prompt", COLOR, "--noise", "canvas", *STEPS),
    "panorama, svgd": ("panorama", "wide", "--prompt", NIGHT, "--mixing", "svgd", *STEPS),
    "video": ("video", "frames", "--prompt", "make it snowy", *STEPS),
    "video, svgd": ("video", "frames", "--prompt", COLOR, "--mixing", "svgd", *STEPS),
    "video, keyframes": ("video", "frames", "--prompt", NIGHT, "--keyframes", "3", *STEPS),
    "video, small batches": ("video", "frames", "--prompt", NIGHT, "--batch", "2", "--seed", "3", *STEPS),
    "video, no SVGD": ("video", "frames", "--prompt", NIGHT, "--no-svgd", *STEPS),
    "video, noise as the baseline": ("video", "frames", "--prompt", NIGHT, "--preset", "paper-random-noise", *STEPS),
}
SCENES: dict[str, dict] = {
    "scene, dataset update": {"edit": {"steps": 6, "batch": 2}, "steps_per_round": 3, "views_per_round": 3},
    "scene, sphere": {"edit": {"steps": 5}, "views_per_round": 0, "sphere": (0.0, 0.0, 0.0, 0.7)},
    "scene, distill": {"edit": {"batch": 2}, "mode": "distill"},
}


def _smooth(height: int, width: int, seed: int) -> Image.Image:
    coarse = torch.rand(1, 3, 4, 6, generator=torch.Generator().manual_seed(seed)) * 0.8 + 0.1
    pixels = F.interpolate(coarse, (height, width), mode="bicubic")[0].clamp(0, 1).permute(1, 2, 0)
    return Image.fromarray((255 * pixels).round().byte().numpy())


def _write_inputs(folder: Path) -> None:
    _smooth(90, 210, 0).save(folder / "wide.png")
    _smooth(64, 256, 1).save(folder / "circle.png")
    mask = np.zeros((90, 210), np.uint8)
    mask[10:70, 40:150] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    (folder / "frames").mkdir()
    background = _smooth(72, 110, 2)
    for index in range(6):
        background.crop((3 * index, 0, 3 * index + 90, 72)).save(folder / "frames" / f"{index}.png")


def _digest(arrays: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _pictures(folder: Path) -> list[np.ndarray]:
    return [np.array(Image.open(path)) for path in sorted(folder.rglob("*.png")) if "before_after" not in path.parts]


def _of_command(folder: Path, command: tuple[str, ...]) -> str:
    output = folder / "out"
    output.mkdir()
    path = output / ("frames" if command[0] == "video" else "image.png")
    inputs = {
        name: str(folder / name) + ("" if name == "frames" else ".png") for name in ("wide", "circle", "mask", "frames")
    }
    name, source, *options = (inputs.get(word, word) for word in command)
    csd([name, source, str(path), *options])
    return _digest(_pictures(output))


def _of_generate(folder: Path) -> str:
    from tests.tiny_pipeline import tiny_text_to_image

    torch.manual_seed(0)  # of the model's random weights
    tiny_text_to_image().save_pretrained(folder / "model")
    options = ["--prior", str(folder / "model"), "--steps", "6", "--height", "48", "--width", "150"]
    csd(["generate", str(folder / "out.png"), "--prompt", "it", "make it", *options])
    return _digest([np.array(Image.open(folder / "out.png"))])


def _of_scene(folder: Path, settings: dict) -> str:
    from csd_nerf.procedural_scene import write_scene
    from tests.csd_nerf.conftest import train_in_process

    write_scene(folder / "data", num_views=8, size=(64, 48))
    scene = train_in_process("csd-scene-tiny", folder / "scene", 60, data=folder / "data")
    options = {f"pipeline__{name}": value for name, value in settings.items()} | {
        "pipeline__edit": EditConfig(**settings["edit"]),
        "pipeline__prompt": NIGHT,
        "pipeline__film_frames": 0,
    }
    run = train_in_process("csd-edit-tiny", folder / "edit", 7, load_run=scene, **options)
    (*_, checkpoint) = sorted((run / "nerfstudio_models").glob("*.ckpt"))
    tensors = torch.load(checkpoint, weights_only=True)["pipeline"]
    return _digest([*(tensors[name].numpy() for name in sorted(tensors)), *_pictures(run)])


def main(output: Path, compare: Path | None = None) -> None:
    """Run all edits, print and write their checksums; with `compare` end with 1 if any differs from those of a file."""
    torch.set_num_threads(1)
    edits: dict[str, Callable[[Path], str]] = {
        **{name: lambda folder, command=command: _of_command(folder, command) for name, command in COMMANDS.items()},
        "generate": _of_generate,
        **{name: lambda folder, settings=settings: _of_scene(folder, settings) for name, settings in SCENES.items()},
    }
    before = {} if compare is None else json.loads(compare.read_text(encoding="utf-8"))
    sums: dict[str, str] = {}
    for name, run in edits.items():
        with tempfile.TemporaryDirectory() as folder:
            _write_inputs(Path(folder))
            sums[name] = run(Path(folder))
        verdict = "" if compare is None else "same" if sums[name] == before.get(name) else "DIFFERENT"
        print(f"{name:32} {sums[name]} {verdict}", flush=True)
    output.write_text(json.dumps(sums, indent=1), encoding="utf-8")
    if compare is not None and sums != before:
        raise SystemExit(1)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
