r"""Joint edits whose answers are known, beside independent edits and diffusers' own sampler.

    python -m tests.bench.known_answers --output known_answers.json
    python -m tests.bench.known_answers --seeds 2 --tasks "scenes: make the ball blue" --variants off default \
        --output ball.json

The study is configs/studies/known-answers.yaml, which `csd ablate known-answers` runs whole; `csd_2d.tiny.tasks` says
what is edited and what is measured. Beside the output lies a folder of its name with tables, pictures, and one file for
each edit, which is not measured again.
"""

import dataclasses
import json
from pathlib import Path

import tyro

from csd_2d.ablate import Input, Variant, load_study, run_study, table
from csd_2d.io.files import replacing

STUDY = load_study("known-answers")
TASKS = tuple(one.name for one in STUDY.inputs)


def main(
    output: Path,
    seeds: int = 10,
    count: int = 8,
    steps: int | None = None,
    tasks: tuple[str, ...] = TASKS,
    variants: tuple[str, ...] = tuple(STUDY.variants),
    model: str = "tiny",
) -> None:
    """Edit, print a table and write JSON.

    Args:
        seeds: number of sets of images.
        count: images edited together.
        steps: in place of each variant's own.
        tasks: the study's inputs, or others of `csd_2d.tiny.tasks`.
        variants: some of the study's variants.
        model: prior of all but textures.
    """
    study = dataclasses.replace(
        STUDY,
        inputs=[Input(known=name) for name in tasks],
        variants={name: _in_steps(STUDY.variants[name], steps) for name in variants},
        seeds=seeds,
        count=count,
        prior=model,
    )
    rows = run_study(study, output.with_suffix(""), progress="edits")
    print(table(study, rows))
    with replacing(output) as temporary:
        temporary.write_text(json.dumps({"rows": rows}, indent=1), encoding="utf-8")


def _in_steps(variant: Variant, steps: int | None) -> Variant:
    if steps is None:
        return variant
    changed = {"steps": steps}
    if variant.editor == "sampler":
        return dataclasses.replace(variant, options=changed)
    return dataclasses.replace(variant, edit=variant.edit | changed)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
