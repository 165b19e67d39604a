"""Joint edits of unrelated scenes whose answers are known, beside independent edits and diffusers' own sampler.

    python -m tests.bench.known_answers --output known_answers.json
    python -m tests.bench.known_answers --seeds 2 --tasks "make the ball blue" --variants default --output ball.json

The scenes are of the kind the tiny model was trained on, but never drawn in training; the object that an instruction
names lies in another place in each. Reported, as means over seeds:

* agreement: share of the images on the most common answer;
* PSNR to the answer that an image took; inside, where that answer differs from the source, and outside;
* ghosting: correlation of an image's error with the mean change of the *other* images, both without their mean colors.
  Errors that have the shapes of other images' changes were mixed in from there;
* evaluations: rows of the U-Net for each image.
"""

import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers import StableDiffusionInstructPix2PixPipeline
from jaxtyping import Float
from torch import Tensor

from csd_2d import EditConfig, load_preset, load_prior, tiny
from csd_2d.image_set import edit_images
from csd_2d.metrics.fidelity import decibels
from csd_2d.prior import Prior
from csd_2d.tiny.instructions import INSTRUCTIONS
from csd_2d.tiny.scenes import held_out
from csd_2d.tiny.train import edit_with_diffusers

TASKS = (
    "paint it a new color",  # ambiguous, whole image
    *("make it night", "make it snowy", "turn it into a pencil sketch"),  # one answer, whole image
    *("make the ball blue", "make the cone yellow"),  # one answer, local
)
DEFAULT = EditConfig(steps=60, guidance_scale=1.0)
COLOR = dataclasses.replace(load_preset("color"), guidance_scale=1.0)
VARIANTS: dict[str, EditConfig | None] = {
    "unedited": None,
    "sampler": None,
    "SVGD off": dataclasses.replace(DEFAULT, svgd=False),
    "paper": dataclasses.replace(load_preset("paper"), steps=60, guidance_scale=1.0),
    "consensus 0.4": dataclasses.replace(DEFAULT, consensus_fraction=0.4),
    "default": DEFAULT,
    "default, guidance 2": dataclasses.replace(DEFAULT, guidance_scale=2.0),
    "color": COLOR,
    "color, SVGD off": dataclasses.replace(COLOR, svgd=False),
    "color, 4x the steps": dataclasses.replace(COLOR, steps=4 * COLOR.steps),
}
LEAST_VISIBLE = 0.04
"""Share of the image that an object must cover to be a task."""
CHANGED = 0.04
"""Largest difference of a pixel's channels, in [0, 1], from which on an answer counts as a change."""


class CountedPrior:
    """A prior that counts the rows of noise estimates it is asked for."""

    def __init__(self, prior: Prior) -> None:
        self._prior, self.rows = prior, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._prior, name)

    def noise_estimate(self, x_t: Tensor, *arguments: Any) -> Tensor:
        self.rows += len(x_t)
        return self._prior.noise_estimate(x_t, *arguments)


def scenes_of(task: str, seed: int, count: int) -> tuple[Float[Tensor, "n 3 s s"], list[Float[Tensor, "n 3 s s"]]]:
    """Draw scenes that fit an instruction, and the answers of each."""
    instruction = INSTRUCTIONS[task]
    scenes = held_out(8 * count, 64, seed=1000 + seed)
    shown = (
        torch.ones(len(scenes.images))
        if instruction.object is None
        else scenes.visible[instruction.object].mean((1, 2, 3))
    )
    rows = (shown >= LEAST_VISIBLE).nonzero()[:count, 0]
    return scenes.images[rows], [instruction.answer(scenes, rows, mode) for mode in range(len(instruction.answers))]


def measure(
    edited: Float[Tensor, "n 3 s s"], sources: Float[Tensor, "n 3 s s"], answers: list[Float[Tensor, "n 3 s s"]]
) -> dict[str, float]:
    """Compute the figures of one edit."""
    errors = torch.stack([(edited - answer).square().flatten(1).mean(1) for answer in answers])
    taken = errors.argmin(0)
    answer = torch.stack(answers)[taken, torch.arange(len(taken))]
    changed = ((answer - sources).abs().amax(1, keepdim=True) > CHANGED).expand_as(answer)
    square = (edited - answer).square()
    figures = {
        "agreement": taken.bincount().max().item() / len(taken),
        "psnr": decibels(errors.min(0).values).mean().item(),
        "inside": decibels(square[changed].mean()).item(),
        "ghosting": ghosting(edited - answer, edited - sources),
    }
    return figures if changed.all() else figures | {"outside": decibels(square[~changed].mean()).item()}


def ghosting(errors: Float[Tensor, "n 3 s s"], changes: Float[Tensor, "n 3 s s"]) -> float:
    """Correlate each image's error with the mean change of the others, without mean colors; the mean over images."""
    others = (changes.sum(0) - changes) / (len(changes) - 1)
    a, b = ((values - values.mean((2, 3), keepdim=True)).flatten(1) for values in (errors, others))
    return torch.cosine_similarity(a, b, dim=1).mean().item()


def main(
    output: Path,
    seeds: int = 10,
    count: int = 8,
    steps: int | None = None,
    tasks: tuple[str, ...] = TASKS,
    variants: tuple[str, ...] = tuple(VARIANTS),
) -> None:
    """Edit, print a table and write JSON.

    Args:
        output: file to write.
        seeds: number of sets of scenes.
        count: images edited together.
        steps: in place of each variant's own.
        tasks: instructions of the tiny model.
        variants: rows of the tables.
    """
    prior = load_prior("tiny")
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(tiny.MODEL, local_files_only=True)
    rows: list[dict[str, Any]] = []
    for task in tasks:
        print(
            f"\n{task}\n{'':22}{'agreement':>11}{'PSNR':>14}{'inside':>8}{'outside':>9}{'ghosting':>10}{'evaluations':>13}"
        )
        for variant in variants:
            edit = _editor(variant, steps, prior, pipeline)
            results = [_one(edit, task, seed, count) for seed in range(seeds)]
            rows.append({"task": task, "variant": variant, **_summary(results)})
            print(_line(rows[-1]), flush=True)
    output.write_text(json.dumps({"seeds": seeds, "count": count, "rows": rows}, indent=1), encoding="utf-8")


Editor = Callable[[Tensor, str, int], tuple[Tensor, float]]
"""(images, instruction, seed) -> edited images, evaluations for each of them."""


def _editor(variant: str, steps: int | None, prior: Prior, pipeline: StableDiffusionInstructPix2PixPipeline) -> Editor:
    if variant == "unedited":
        return lambda images, task, seed: (images, 0.0)
    if variant == "sampler":
        inference_steps = steps or 15
        return lambda images, task, seed: (
            edit_with_diffusers(pipeline, images, [task] * len(images), num_inference_steps=inference_steps, seed=seed),
            float(inference_steps),
        )
    config = VARIANTS[variant]
    assert config is not None
    config = config if steps is None else dataclasses.replace(config, steps=steps)

    def edit(images: Tensor, task: str, seed: int) -> tuple[Tensor, float]:
        counted = CountedPrior(prior)
        edited = edit_images(list(images), counted, task, dataclasses.replace(config, seed=seed))  # type: ignore[arg-type]
        return torch.stack(edited), counted.rows / len(images)

    return edit


def _one(edit: Editor, task: str, seed: int, count: int) -> dict[str, float]:
    sources, answers = scenes_of(task, seed, count)
    edited, evaluations = edit(sources, task, seed)
    return measure(edited, sources, answers) | {"evaluations": evaluations}


def _summary(results: list[dict[str, float]]) -> dict[str, Any]:
    means = {name: statistics.fmean(result[name] for result in results if name in result) for name in results[0]}
    return {**means, "psnr_deviation": statistics.pstdev(result["psnr"] for result in results), "results": results}


def _line(row: dict[str, Any]) -> str:
    psnr = f"{row['psnr']:.1f} +- {row['psnr_deviation']:.1f}"
    outside = f"{row['outside']:.1f}" if "outside" in row else ""
    return (
        f"{row['variant']:22}{row['agreement']:11.2f}{psnr:>14}{row['inside']:8.1f}{outside:>9}"
        f"{row['ghosting']:10.2f}{row['evaluations']:13.0f}"
    )


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
