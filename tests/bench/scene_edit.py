r"""Which way of editing a scene brings it nearest to the known answer, at equal cost?

A procedural scene is learned once by csd-scene-tiny and edited by csd-edit-tiny, under an instruction with one answer
and under one with six equally likely answers. Measured on views that nothing was trained on:

* `psnr` to the exact answer; of several to the one that the scene as a whole took;
* its two parts. Paint moves each pixel in the plane in which the mean of R, G and B stays as it is, but for clipping.
  `color_psnr` is that of the differences from this mean, to the answer's: what was to change; `gray_psnr` that of the
  mean, to the unedited truth's: what was to stay;
* `agreement`: share of the views whose nearest answer is the commonest one, and `agreement_training`, the same of the
  edited training images the scene is learned from. For instructions with several answers.

The methods: `one view at a time`, the schedule of Instruct-NeRF2NeRF, which edits what the scene shows at present, view
after view, and learns a little in between (the edit of a view is ours, not their sampler); `one by one`,
every view once and for itself; `paper`, CSD as published, in rounds; `default`, csd-edit-tiny's dataset update, also
without correspondence by depth; and `distill`.

    python -m tests.bench.scene_edit --scene scene --output scene_edit.json
    python -m tests.bench.scene_edit --scene scene --output selection.json --selection
    python -m tests.bench.scene_edit --scene scene --output learned.json --prior tiny

All methods run the same code and spend as many U-Net evaluations as csd-edit-tiny does by default, give or take 3 %;
`unet_rows` counts them. By dataset update all train the NeRF for `--nerf-steps` steps of 1,024 rays; distill trains it
on every pixel of the views it edits, once for each step of the edit. The scene is made in --scene if it is not there
yet, and what --output holds already is not measured again.
"""

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal
from unittest import mock

import torch
import tyro
from jaxtyping import Float
from nerfstudio.pipelines.base_pipeline import Pipeline
from torch import Tensor

from csd_2d import EditConfig, load_preset
from csd_2d.ablate import CountingPrior
from csd_2d.closed_form import known_answers, normalized
from csd_2d.io.images import read_image, write_image
from csd_2d.metrics.fidelity import agreement, psnr
from csd_2d.priors.loading import load_prior
from csd_nerf.demo import NovelViews, edit_config, load_scene, scene_config, train
from csd_nerf.edit.distill import BATCH
from csd_nerf.edit.selection import Selection
from csd_nerf.methods import csd_edit_tiny
from csd_nerf.procedural_scene import write_scene
from tests.bench.results import Results

PROMPTS = ("paint it blue", "paint it a new color")
MEASURES = ("psnr", "color_psnr", "gray_psnr", "agreement", "agreement_training")
VIEWS, SIZE, SCENE_STEPS = 25, (48, 36), 500
"""Of the scene: its views, their width and height, and the steps it is learned in."""
PAPER_ROUNDS = 4
"""Rounds of half the views, as published but for the numbers: every view has its turn twice."""
SELECTION_ROUNDS = 6
"""Rounds of a third of the views: twice, too."""
ONE_VIEW_EVERY = 4
"""Steps of the NeRF between two views that are edited one at a time."""


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to edit a scene."""

    edit: EditConfig
    """Its `steps` are those of one round."""
    rounds: int = 1
    views_per_round: int = 0
    mode: Literal["dataset-update", "distill"] = "dataset-update"
    selection: Selection = "random"


def image_steps(edit: EditConfig, count: int) -> int:
    """Particles that the steps of an edit of `count` images draw, all together."""
    return edit.steps * min(edit.batch or count, count)


def methods(views: int, nerf_steps: int, edit: EditConfig, selection: bool) -> dict[str, Method]:
    """What is compared, on a scene of so many training views; `edit` is the default one and sets the cost."""
    budget = image_steps(edit, views)

    def rounds(edit: EditConfig, number: int, views_per_round: int, selection: Selection = "random") -> Method:
        def excess(steps: int) -> int:
            return abs(number * image_steps(dataclasses.replace(edit, steps=steps), views_per_round) - budget)

        steps = min(range(1, budget + 1), key=excess)
        return Method(dataclasses.replace(edit, steps=steps), number, views_per_round, selection=selection)

    if selection:
        names: tuple[Selection, ...] = ("random", "spread", "near")
        return {name: rounds(edit, SELECTION_ROUNDS, -(-views // 3), name) for name in names}
    alone = dataclasses.replace(edit, mixing="none")
    return {
        "one view at a time": rounds(alone, nerf_steps // ONE_VIEW_EVERY, 1),
        "one by one": Method(alone),
        "paper": rounds(load_preset("paper"), PAPER_ROUNDS, -(-views // 2)),
        "default, no correspondence": Method(dataclasses.replace(edit, correspondence=False)),
        "default": Method(edit),
        "distill": Method(dataclasses.replace(edit, steps=budget // BATCH, batch=BATCH), mode="distill"),
    }


def edit_scene(
    folder: Path, scene: Path, prior: str, prompt: str, method: Method, nerf_steps: int, seed: int
) -> tuple[Path, dict[str, int]]:
    """Edits a scene into a folder; returns the run's config.yml, and what the edit cost."""
    config = edit_config(folder, scene, prompt, seed)
    pipeline: Any = config.pipeline
    pipeline.prior, pipeline.mode = prior, method.mode
    pipeline.edit = dataclasses.replace(method.edit, seed=seed)
    pipeline.views_per_round, pipeline.view_selection = method.views_per_round, method.selection
    pipeline.steps_per_round = nerf_steps // method.rounds
    config.max_num_iterations = pipeline.steps_per_round * method.rounds
    if method.mode == "distill":
        config.max_num_iterations = method.edit.steps
    priors: list[CountingPrior] = []

    def load_counting(*args: Any, **options: Any) -> Any:
        priors.append(CountingPrior(load_prior(*args, **options)))
        return priors[-1]

    with mock.patch("csd_nerf.pipeline.load_prior", load_counting):
        run = train(config)
    return run, {"unet_rows": priors[0].rows, "nerf_steps": config.max_num_iterations}


def measure(before: Pipeline, run: Path, prompt: str) -> tuple[dict[str, float | None], NovelViews]:
    """Figures of an edited scene, and the views they are of."""
    novel = NovelViews(before, load_scene(run), prompt)
    gray, color = _parts(novel.after)
    figures: dict[str, float | None] = {
        "psnr": novel.psnr()["edited_views_to_answer"],
        "color_psnr": round(psnr(color, _parts(novel.answer)[1]), 2),
        "gray_psnr": round(psnr(gray, _parts(novel.true)[0]), 2),
        "agreement": _agreement(novel.after, novel.true, prompt),
        "agreement_training": None,
    }
    if (run.parent / "rounds").is_dir():  # distill learns from no images
        edited = sorted((run.parent / "edited").glob("*.png"))
        dataset = before.datamanager.train_dataset
        assert dataset is not None
        originals = [dataset[int(path.stem[:4])]["image"][..., :3].permute(2, 0, 1) for path in edited]
        images = torch.stack([read_image(path) for path in edited])
        figures["agreement_training"] = _agreement(images, torch.stack(originals), prompt)
    return figures, novel


def _parts(images: Float[Tensor, "n 3 H W"]) -> tuple[Float[Tensor, "n 1 H W"], Float[Tensor, "n 3 H W"]]:
    """Gray, and what the colors differ from it by."""
    gray = images.mean(1, keepdim=True)
    return gray, images - gray


def _agreement(edited: Float[Tensor, "n 3 H W"], originals: Float[Tensor, "n 3 H W"], prompt: str) -> float | None:
    answers = known_answers(prompt, originals)
    return agreement(edited, answers)[0] if len(answers) > 1 else None


def learned_scene(folder: Path) -> Path:
    """The config.yml of the scene's run; makes and learns the scene if it is not there."""
    runs = sorted((folder / "runs" / "demo" / "csd-scene-tiny").glob("*/config.yml"))
    if runs:
        return runs[-1]
    write_scene(folder / "scene", VIEWS, SIZE, progress="views")
    config = scene_config(folder, seed=0)
    config.max_num_iterations = SCENE_STEPS
    return train(config)


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return f"{'-':>16}"
    return f"{mean(known):9.2f} ±{stdev(known) if len(known) > 1 else 0:5.2f}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, of each prompt and method."""
    lines = [f"{'':50}" + "".join(f"{name:>20}" for name in (*MEASURES, "unet_rows", "seconds"))]
    for prompt, method in dict.fromkeys((row["prompt"], row["method"]) for row in rows):
        of_method = [row for row in rows if (row["prompt"], row["method"]) == (prompt, method)]
        cells = [_spread([row[name] for row in of_method]) for name in MEASURES]
        cells += [f"{mean(row[name] for row in of_method):.0f}" for name in ("unet_rows", "seconds")]
        lines.append(f"{prompt:22}{method:28}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def main(
    scene: Path,
    output: Path,
    prior: str = "analytic",
    prompts: tuple[str, ...] = PROMPTS,
    only: tuple[str, ...] = (),
    seeds: int = 5,
    nerf_steps: int = 240,
    selection: bool = False,
) -> None:
    """Edits the scene in every way, prints a table and writes JSON; pictures of seed 0 go beside it.

    Args:
        only: methods to measure; all of them if none is named.
        selection: compare ways to draw the views of a round instead, under the ambiguous instruction.
    """
    torch.set_num_threads(1)
    scene_run = learned_scene(scene.resolve())
    before = load_scene(scene_run)
    dataset = before.datamanager.train_dataset
    assert dataset is not None
    edit = csd_edit_tiny.config.pipeline.edit  # type: ignore[attr-defined]
    compared = methods(len(dataset), nerf_steps, edit, selection)
    settings = {
        "prior": prior,
        "nerf_steps": nerf_steps,
        "training_views": len(dataset),
        "methods": {name: dataclasses.asdict(method) for name, method in compared.items()},
    }
    results = Results(output, settings)
    for seed in range(seeds):
        for prompt in prompts[-1:] if selection else prompts:
            for name in only or compared:
                key = {"prompt": normalized(prompt), "method": name, "seed": seed}
                if results.holds(**key):
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    start = time.monotonic()
                    run, cost = edit_scene(Path(folder), scene_run, prior, prompt, compared[name], nerf_steps, seed)
                    seconds = round(time.monotonic() - start, 1)
                    figures, novel = measure(before, run, prompt)
                if seed == 0:
                    picture = f"{prompt}_{name}.png".replace(" ", "_")
                    write_image(novel.contact_sheet(), output.with_suffix("") / picture)
                results.add({**key, **figures, "answer": novel.answer_name, **cost, "seconds": seconds})
                print(results.rows[-1], flush=True)
    print(table(results.rows))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
