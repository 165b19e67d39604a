r"""Joint edits whose answers are known, beside independent edits and diffusers' own sampler.

    python -m tests.bench.known_answers --output known_answers.json
    python -m tests.bench.known_answers --seeds 2 --tasks "scenes: make the ball blue" --variants off default \
        --output ball.json

Images edited together:

* scenes: unrelated scenes of the kind the tiny model was trained on, but never drawn in training; the object that an
  instruction names lies in another place in each;
* views: crops of one such scene, a flat one that several cameras see, so that the object lies at another pixel in each.
  Where views show the same place is known;
* video: crops of such a scene along a path, two pixels apart; where they show the same is estimated by optical flow;
* textures: smooth random images, for the exact scores of the analytic prior.

Reported, as means over seeds, with the standard deviation of PSNR:

* agreement: share of the images on the most common answer;
* PSNR to the answer that an image took; inside, where that answer differs from the source, and outside;
* right: share of the images that are nearer to an answer than to the unedited image;
* warp error of views: mean squared difference in corresponding places, times 10,000, over all pairs;
* ghosting: correlation of an image's error with the mean change of the *other* images, both without their mean colors.
  Errors that have the shapes of other images' changes were mixed in from there;
* evaluations: rows of the U-Net for each image.
"""

import dataclasses
import statistics
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from diffusers import StableDiffusionInstructPix2PixPipeline
from jaxtyping import Float
from torch import Tensor

from csd_2d import EditConfig, load_preset, load_prior, tiny
from csd_2d.closed_form import known_answers
from csd_2d.correspondence.flow import FrameFlows
from csd_2d.correspondence.surface import SurfaceCorrespondence
from csd_2d.image_set import edit_images
from csd_2d.metrics.fidelity import decibels
from csd_2d.mixing import FindCorrespondence
from csd_2d.prior import Prior
from csd_2d.tiny.instructions import INSTRUCTIONS
from csd_2d.tiny.scenes import held_out
from csd_2d.tiny.train import edit_with_diffusers
from tests.bench.results import CountingPrior, Results

SIZE = 64
"""Side of the images: the tiny model's window."""
LEAST_VISIBLE = 0.04
"""Share of the image that an object must cover to be a task."""
CHANGED = 0.04
"""Largest difference of a pixel's channels, in [0, 1], from which on an answer counts as a change."""

TASKS = (
    "scenes: paint it a new color",  # (a) ambiguous, whole image
    *(f"scenes: {name}" for name in ("make it night", "make it snowy", "turn it into a pencil sketch")),  # (b)
    *(f"scenes: {name}" for name in ("make the ball blue", "make the cone yellow")),  # (c) local
    "views: paint the ball a new color",  # (d) ambiguous and local
    *(f"{kind}: {name}" for kind in ("views", "video") for name in ("paint it a new color", "make it night")),
    *(  # (e) structure
        f"scenes: {name}"
        for name in ("turn the ball into a box", "put a hat on the ball", "remove the cone", "let the sun shine")
    ),
    "textures: paint it a new color",
    "textures: make it night",
)
DEFAULT = EditConfig()
VARIANTS: dict[str, EditConfig | None] = {
    "unedited": None,
    "sampler": None,
    "off": dataclasses.replace(DEFAULT, mixing="none"),
    "paper": load_preset("paper"),
    "paper without SVGD": load_preset("paper-without-svgd"),
    "paper, random noise": load_preset("paper-random-noise"),
    "default": DEFAULT,
    "default, no correspondence": dataclasses.replace(DEFAULT, correspondence=False),
    "default, image baseline": dataclasses.replace(DEFAULT, baseline="image"),
    "default, guidance 2": dataclasses.replace(DEFAULT, guidance_scale=2.0),
    "default, half the steps": dataclasses.replace(DEFAULT, steps=DEFAULT.steps // 2),
    "default, 4x the steps": dataclasses.replace(DEFAULT, steps=4 * DEFAULT.steps),
}


@dataclasses.dataclass
class Task:
    """Images to edit together, and what is known of them."""

    prompt: str
    images: Float[Tensor, "n 3 s s"]
    answers: list[Float[Tensor, "n 3 s s"]]
    """Of each image, one tensor for each answer of an ambiguous instruction."""
    points: Float[Tensor, "n 3 s s"] | None = None
    """Place that each pixel shows, if images show the same places: whole numbers of pixels."""
    is_video: bool = False

    def find(self, cell: int) -> FindCorrespondence | None:
        """Find corresponding places, in latent cells of so many pixels, as the task itself would."""
        if self.points is None:
            return None
        if self.is_video:
            return FrameFlows(self.images, cell).correspondence
        above = torch.tensor([0.0, 0.0, 1e4]).expand(len(self.images), 3)
        return SurfaceCorrespondence(F.avg_pool2d(self.points, cell), F.avg_pool2d(self.images, cell), above)


def load_task(name: str, seed: int, count: int) -> Task:
    """Draw the images of a task, one of `TASKS`, and their answers."""
    kind, prompt = name.split(": ")
    return {"scenes": _scenes, "views": _views, "video": _video, "textures": _textures}[kind](prompt, seed, count)


def _drawn(prompt: str, seed: int, count: int, size: int) -> tuple[Tensor, list[Tensor]]:
    """Draw scenes that an instruction fits, and their answers."""
    instruction = INSTRUCTIONS[prompt]
    scenes = held_out(8 * count, size, seed=1000 + seed)
    noun = instruction.object
    shown = torch.ones(len(scenes.images)) if noun is None else scenes.visible[noun].mean((1, 2, 3))
    rows = (shown >= LEAST_VISIBLE).nonzero()[:count, 0]
    return scenes.images[rows], [instruction.answer(scenes, rows, mode) for mode in range(instruction.modes)]


def _scenes(prompt: str, seed: int, count: int) -> Task:
    return Task(prompt, *_drawn(prompt, seed, count, SIZE))


def _views(prompt: str, seed: int, count: int) -> Task:
    """Crop views of one scene, each at a random place."""
    places = torch.randint(SIZE // 3 + 1, (count, 2), generator=torch.Generator().manual_seed(seed))
    return _crops(prompt, seed, places.tolist())


def _video(prompt: str, seed: int, count: int) -> Task:
    """Crop frames of one scene along a path."""
    task = _crops(prompt, seed, [[k, 2 * k] for k in range(count)])
    return dataclasses.replace(task, is_video=True)


def _crops(prompt: str, seed: int, corners: list[list[int]]) -> Task:
    """Crop images of one scene, at the given top and left pixels."""
    wide = SIZE + SIZE // 3
    scenes, answers = _drawn(prompt, seed, 1, wide)
    y, x = torch.meshgrid(torch.arange(float(wide)), torch.arange(float(wide)), indexing="ij")
    points = torch.stack([x, y, torch.zeros_like(x)])[None]

    def crops(picture: Tensor) -> Tensor:
        return torch.cat([picture[..., top : top + SIZE, left : left + SIZE] for top, left in corners])

    return Task(prompt, crops(scenes), [crops(answer) for answer in answers], crops(points))


def _textures(prompt: str, seed: int, count: int) -> Task:
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    images = 0.7 * F.interpolate(coarse, (SIZE, SIZE), mode="bilinear", align_corners=True) + 0.15
    return Task(prompt, images, known_answers(prompt, images))


def measure(edited: Float[Tensor, "n 3 s s"], task: Task) -> dict[str, float]:
    """Compute the figures of one edit."""
    sources, answers = task.images, torch.stack(task.answers)
    errors = (edited - answers).square().flatten(2).mean(2)
    taken = errors.argmin(0)
    answer = answers[taken, torch.arange(len(taken))]
    changed = ((answer - sources).abs().amax(1, keepdim=True) > CHANGED).expand_as(answer)
    square = (edited - answer).square()
    figures = {
        "agreement": taken.bincount().max().item() / len(taken),
        "psnr": decibels(errors.amin(0)).mean().item(),
        "inside": decibels(square[changed].mean()).item(),
        "right": (errors.amin(0) < (edited - sources).square().flatten(1).mean(1)).float().mean().item(),
        "ghosting": ghosting(edited - answer, edited - sources),
    }
    if not changed.all():
        figures["outside"] = decibels(square[~changed].mean()).item()
    if task.points is not None:
        figures["warp_error"] = 1e4 * warp_error(edited, task.points)
    return figures


def ghosting(errors: Float[Tensor, "n 3 s s"], changes: Float[Tensor, "n 3 s s"]) -> float:
    """Correlate each image's error with the mean change of the others, without mean colors; the mean over images."""
    others = (changes.sum(0) - changes) / (len(changes) - 1)
    a, b = ((values - values.mean((2, 3), keepdim=True)).flatten(1) for values in (errors, others))
    return torch.cosine_similarity(a, b, dim=1).mean().item()


def warp_error(images: Float[Tensor, "n 3 s s"], points: Float[Tensor, "n 3 s s"]) -> float:
    """Compute the mean squared difference of places that two views show, over all pairs."""
    gaps = []
    for one, other in permutations(range(len(images)), 2):
        right, down = (points[one, :2, 0, 0] - points[other, :2, 0, 0]).long().tolist()
        if right >= 0 and down >= 0:
            shown = images[one][:, : SIZE - down, : SIZE - right]
            gaps.append((shown - images[other][:, down:, right:]).square().mean())
        elif right >= 0:
            shown = images[one][:, -down:, : SIZE - right]
            gaps.append((shown - images[other][:, : SIZE + down, right:]).square().mean())
    return torch.stack(gaps).mean().item()


def main(
    output: Path,
    seeds: int = 10,
    count: int = 8,
    steps: int | None = None,
    tasks: tuple[str, ...] = TASKS,
    variants: tuple[str, ...] = tuple(VARIANTS),
    model: str = "tiny",
) -> None:
    """Edit, print a table and write JSON.

    Args:
        output: file to write; it is written after every row, and rows that it holds are not measured again.
        seeds: number of sets of images.
        count: images edited together.
        steps: in place of each variant's own.
        tasks: see `TASKS`; the part after the colon is an instruction.
        variants: rows of the tables.
        model: prior of scenes and views.
    """
    priors = {"textures": load_prior("analytic"), "": load_prior(model)}
    folder = tiny.MODEL if model == "tiny" else model
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder, local_files_only=True)
    settings = {"seeds": seeds, "count": count, "steps": steps, "model": model}
    results = Results(output, settings)
    for task in tasks:
        print(f"\n{task}\n{_HEAD}")
        exact = task.startswith("textures")
        for variant in variants:
            if exact and variant == "sampler":
                continue  # diffusers has no pipeline of exact scores
            key = {"task": task, "variant": variant}
            if not results.holds(**key):
                edit = _editor(variant, steps, priors["textures" if exact else ""], pipeline)
                results.add({**key, **_summary([_one(edit, task, seed, count) for seed in range(seeds)])})
            print(_line(results.find(**key)), flush=True)


Editor = Callable[[Task, int], tuple[Tensor, float]]
"""(task, seed) -> edited images, evaluations for each of them."""


def _editor(variant: str, steps: int | None, prior: Prior, pipeline: StableDiffusionInstructPix2PixPipeline) -> Editor:
    if variant == "unedited":
        return lambda task, seed: (task.images, 0.0)
    if variant == "sampler":
        number = steps or 15

        def sample(task: Task, seed: int) -> tuple[Tensor, float]:
            prompts = [task.prompt] * len(task.images)
            edited = edit_with_diffusers(pipeline, task.images, prompts, num_inference_steps=number, seed=seed)
            return edited, float(number)

        return sample
    config = VARIANTS[variant]
    assert config is not None
    config = config if steps is None else dataclasses.replace(config, steps=steps)

    def edit(task: Task, seed: int) -> tuple[Tensor, float]:
        counted: Any = CountingPrior(prior)
        seeded = dataclasses.replace(config, seed=seed)
        edited = edit_images(list(task.images), counted, task.prompt, seeded, correspondence=task.find(prior.cell))
        return torch.stack(edited), counted.rows / len(task.images)

    return edit


def _one(edit: Editor, name: str, seed: int, count: int) -> dict[str, float]:
    task = load_task(name, seed, count)
    edited, evaluations = edit(task, seed)
    return measure(edited, task) | {"evaluations": evaluations}


def _summary(results: list[dict[str, float]]) -> dict[str, Any]:
    means = {name: statistics.fmean(result[name] for result in results if name in result) for name in results[0]}
    return {**means, "psnr_deviation": statistics.pstdev(result["psnr"] for result in results), "results": results}


_HEAD = (
    f"{'':28}{'agreement':>10}{'PSNR':>14}{'inside':>8}{'outside':>9}{'right':>7}{'warp error':>12}{'ghosting':>10}"
    f"{'evaluations':>13}"
)


def _line(row: dict[str, Any]) -> str:
    def cell(name: str, width: int, digits: int = 1) -> str:
        return f"{row[name]:{width}.{digits}f}" if name in row else " " * width

    psnr = f"{row['psnr']:.1f} +- {row['psnr_deviation']:.1f}"
    return (
        f"{row['variant']:28}{cell('agreement', 10, 2)}{psnr:>14}{cell('inside', 8)}{cell('outside', 9)}"
        f"{cell('right', 7, 2)}{cell('warp_error', 12)}{cell('ghosting', 10, 2)}{cell('evaluations', 13, 0)}"
    )


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
