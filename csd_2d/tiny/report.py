r"""Measure the quality of the tiny model with diffusers' own pipeline, without this package's algorithm.

    python -m csd_2d.tiny.report OUT --photos FOLDER FOLDER ...

The report covers held-out scenes and, if folders are given, photographs. It measures the PSNR to the closed-form edit,
how often the instructed edit is the nearest of all known edits (and of no edit at all), and how many answers ambiguous
instructions reach over 64 seeds. OUT receives `report.json` and sample sheets.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro
from diffusers import StableDiffusionInstructPix2PixPipeline  # pyright: ignore[reportPrivateImportUsage]
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from csd_2d.errors import one_sentence
from csd_2d.io.files import replacing
from csd_2d.io.images import IMAGE_SUFFIXES, read_image, write_image
from csd_2d.metrics.fidelity import decibels
from csd_2d.tiny import GUIDANCE_SCALE, IMAGE_GUIDANCE_SCALE, MODEL
from csd_2d.tiny.instructions import INSTRUCTIONS
from csd_2d.tiny.scenes import OBJECTS, Scenes, held_out
from csd_2d.tiny.train import edit_with_diffusers, sheet

SEEDS = 64
"""Number of samples for each ambiguous instruction."""
SHOWN = 3
"""Number of scenes on the sample sheet for each other instruction."""


@dataclass(frozen=True)
class ReportConfig:
    """Settings of the report."""

    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder for report.json and the sample sheets."""
    photos: tuple[Path, ...] = ()
    """Folders with photographs, searched recursively."""
    model: Path = MODEL
    """Folder of the diffusers pipeline."""
    count: int = 24
    """Number of scenes, or crops of photographs, for each instruction."""
    guidance_scale: float = GUIDANCE_SCALE
    image_guidance_scale: float = IMAGE_GUIDANCE_SCALE
    num_inference_steps: int = 20


def cut_outs(folders: Sequence[Path], count: int, size: int) -> Float[Tensor, "count 3 size size"]:
    """Crop random squares of various sizes from photographs and scale them to the model's window.

    The photographs are spread evenly over all files in the folders.

    Raises:
        ValueError: if there are no photographs.
    """
    paths = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"there are no images in {', '.join(map(str, folders))}.")
    generator = torch.Generator().manual_seed(0)
    squares = []
    for i in range(count):
        image = read_image(paths[i * len(paths) // count])
        height, width = image.shape[-2:]
        side = max(int(min(height, width) * (0.5 + 0.5 * torch.rand((), generator=generator))), size)
        top, left = (
            int(torch.randint(max(extent - side, 0) + 1, (), generator=generator)) for extent in (height, width)
        )
        square = image[:, top : top + side, left : left + side]
        squares.append(F.interpolate(square[None], (size, size), mode="bilinear", antialias=True)[0].clamp(0, 1))
    return torch.stack(squares)


def _psnr(images: Tensor, references: Tensor) -> Tensor:
    """Compute the PSNR of each image, in dB."""
    return decibels((images - references).square().flatten(1).mean(1))


def measure_deterministic(
    pipeline: StableDiffusionInstructPix2PixPipeline, scenes: Scenes, config: ReportConfig, names: Sequence[str]
) -> list[dict]:
    """Measure, for each instruction with one answer, the PSNR to it and whether it is the nearest of all answers.

    "strip" contains source, edit and answer of the first scenes, side by side.
    """
    certain = [instruction for instruction in INSTRUCTIONS.values() if instruction.modes == 1]
    results = []
    for name in tqdm(names, unit="instruction"):
        instruction = INSTRUCTIONS[name]
        rows = instruction.fits(scenes).nonzero()[: config.count, 0]
        edited = _edit(pipeline, scenes.images[rows], [name] * len(rows), config)
        nearest, right = _psnr(edited, scenes.images[rows]), torch.zeros(len(rows), dtype=torch.bool)
        for other in certain:
            # Exclude paints of objects that are not in the scene: their answer would be the unchanged image.
            fits = other.fits(scenes)[rows]
            if not fits.any():
                continue
            score = _psnr(edited, other.answer(scenes, rows)).masked_fill(~fits, -1)
            right = torch.where(score > nearest, other.name == name, right)
            nearest = nearest.maximum(score)
        psnr = _psnr(edited, instruction.answer(scenes, rows))
        strip = torch.stack([scenes.images[rows], edited, instruction.answer(scenes, rows)], 1)[:SHOWN].flatten(0, 1)
        results.append({"instruction": name, "psnr": psnr.tolist(), "nearest": right.tolist(), "strip": strip})
    return results


def measure_ambiguous(
    pipeline: StableDiffusionInstructPix2PixPipeline, scenes: Scenes, name: str, config: ReportConfig
) -> tuple[dict, Float[Tensor, "n 3 s s"]]:
    """Count the answers that `SEEDS` samples of an instruction reach on the first scene it fits, and return them."""
    instruction = INSTRUCTIONS[name]
    rows = instruction.fits(scenes).nonzero()[:1, 0].expand(SEEDS)
    edited = _edit(pipeline, scenes.images[rows], [name] * SEEDS, config)
    distances = torch.stack(
        [_psnr(edited, instruction.answer(scenes, rows, mode)) for mode in range(instruction.modes)]
    )
    psnr, taken = distances.max(0)
    counts = taken.bincount(minlength=len(distances))
    return {
        "instruction": name,
        "counts": counts.tolist(),
        "modes": int((counts > 0).sum()),
        "largest_share": counts.max().item() / SEEDS,
        "psnr": round(psnr.median().item(), 2),
    }, edited


def _edit(
    pipeline: StableDiffusionInstructPix2PixPipeline, images: Tensor, prompts: list[str], config: ReportConfig
) -> Tensor:
    return edit_with_diffusers(
        pipeline, images, prompts, config.guidance_scale, config.image_guidance_scale, config.num_inference_steps
    )


def _summary(results: list[dict]) -> dict:
    """Summarize the results over all images of all instructions, and for each instruction."""
    images = [psnr for result in results for psnr in result["psnr"]]
    right = [nearest for result in results for nearest in result["nearest"]]
    return {
        "psnr_median": round(median(images), 2),
        "nearest_share": round(sum(right) / len(right), 3),
        "images": len(images),
        "instructions": {
            result["instruction"]: {
                "psnr_median": round(median(result["psnr"]), 2),
                "nearest_share": round(sum(result["nearest"]) / len(result["nearest"]), 3),
            }
            for result in results
        },
    }


@torch.no_grad()
def run_report(config: ReportConfig) -> dict:
    """Measure the model, write the report and the sample sheets, and return the content of report.json.

    Raises:
        ValueError: if there are no photographs in the given folders.
    """
    start = time.monotonic()
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(str(config.model), local_files_only=True)
    size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    # Four times `count`, so that enough scenes contain each object.
    subjects = {"held_out_scenes": held_out(4 * config.count, size)}
    if config.photos:
        no_object = torch.zeros(config.count, 1, size, size)
        photos = cut_outs(config.photos, config.count, size)
        subjects["photographs"] = Scenes(photos, dict.fromkeys(OBJECTS, no_object))
    report: dict = {
        "guidance_scale": config.guidance_scale,
        "image_guidance_scale": config.image_guidance_scale,
        "num_inference_steps": config.num_inference_steps,
    }
    for subject, scenes in subjects.items():
        fitting = {
            name: instruction for name, instruction in INSTRUCTIONS.items() if bool(instruction.fits(scenes).any())
        }
        certain = [name for name, instruction in fitting.items() if instruction.modes == 1]
        ambiguous = [name for name, instruction in fitting.items() if instruction.modes > 1]
        results = measure_deterministic(pipeline, scenes, config, certain)
        report[subject] = _summary(results)
        encoded = pipeline.vae.encode(2 * scenes.images - 1).latent_dist.mode()
        report[subject]["autoencoder_psnr"] = round(
            _psnr(pipeline.vae.decode(encoded).sample / 2 + 0.5, scenes.images).median().item(), 2
        )
        report[subject]["ambiguous"] = []
        _write(_sheet_of_edits(results), config.output / f"{subject}.png")
        for name in ambiguous:
            figures, edited = measure_ambiguous(pipeline, scenes, name, config)
            report[subject]["ambiguous"].append(figures)
            rows = edited.unflatten(0, (8, SEEDS // 8))
            _write(sheet(rows), config.output / f"{subject}_{name.replace(' ', '_')}.png")
    report["seconds"] = round(time.monotonic() - start, 1)
    with replacing(config.output / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report


def _sheet_of_edits(results: list[dict]) -> Tensor:
    """Draw a sheet with one row per instruction, all padded to the widest row."""
    strips = [result["strip"] for result in results]
    widest = max(map(len, strips))
    return sheet(F.pad(strip, (0, 0, 0, 0, 0, 0, 0, widest - len(strip))) for strip in strips)


def _write(image: Tensor, path: Path) -> None:
    write_image(image, path)
    print(f"wrote {path}")


def main() -> None:
    with one_sentence("csd_2d.tiny.report"):
        report = run_report(tyro.cli(ReportConfig, description=__doc__))
        for subject, figures in report.items():
            if isinstance(figures, dict):
                print(
                    f"{subject}: median PSNR {figures['psnr_median']} dB, nearest right {figures['nearest_share']:.0%}"
                )
                for ambiguous in figures["ambiguous"]:
                    print(f"  {ambiguous['instruction']}: {ambiguous['counts']}")


if __name__ == "__main__":
    main()
