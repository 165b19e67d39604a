"""Studies: variants of an edit, over inputs and seeds, measured. `csd ablate` runs one.

A study is a YAML file in configs/studies, or one of your own. Each edit is measured once; what lies in the output
folder is not measured again, so that the same command goes on after a kill.
"""

import csv
import dataclasses
import hashlib
import io
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points, version
from importlib.resources import files
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal, TypeVar, get_args

import torch
import yaml
from torch import Tensor
from tqdm.auto import tqdm

from csd_2d.config import EditConfig
from csd_2d.evaluate import Learned, Subject, evaluate
from csd_2d.io.files import replacing
from csd_2d.io.images import read_image, write_image
from csd_2d.io.masks import read_mask
from csd_2d.presets import load_preset, scene_preset
from csd_2d.prior import Prior

Kind = Literal["known", "panorama", "video", "scene"]
Editor = Literal["csd", "sampler", "unedited"]


@dataclass(frozen=True)
class Input:
    """What is edited, and how."""

    prompt: str = ""
    """Instruction. Of images with a known answer it is part of `known`."""
    path: str | None = None
    """Image, video, or config.yml of a nerfstudio run; relative to the folder of the study's data."""
    known: str | None = None
    """In place of a path: images whose edited versions are known, such as "scenes: make it night"; see
    `csd_2d.tiny.tasks`."""
    source_caption: str | None = None
    """Describes the images before the edit, for CLIP's directional similarity."""
    target_caption: str | None = None
    """Describes them after it."""
    mask: str | None = None
    """Image with what may change in white, of a panorama."""
    wrap: bool = False
    """The panorama is of 360 degrees."""

    @property
    def name(self) -> str:
        """What the tables call it."""
        return self.known or f"{Path(self.path or '').stem}: {self.prompt}"


@dataclass(frozen=True)
class Variant:
    """One way to edit."""

    preset: str = "default"
    """See `csd_2d.load_preset`."""
    edit: dict[str, Any] = field(default_factory=dict)
    """Settings of `csd_2d.EditConfig` that differ from the preset's."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options: of a panorama those of `csd_2d.panorama.PanoramaCanvas` (stride, fade), of a video keyframes, of
    a scene those of `ns-train csd-edit`'s pipeline (views_per_round), and max_num_iterations, where they differ from
    the preset's."""
    editor: Editor = "csd"
    """In place of csd: nothing at all, or diffusers' own sampler, both for images with known answers."""


@dataclass(frozen=True)
class Study:
    """Variants of an edit, over inputs and seeds."""

    kind: Kind
    inputs: list[Input]
    variants: dict[str, Variant]
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Settings of `csd_2d.EditConfig`, and the values each of them takes with every variant."""
    seeds: int = 3
    """Number of repetitions, with seeds from 0 on."""
    prior: str = "ip2p"
    """Diffusion model, see `csd_2d.load_prior`."""
    count: int = 8
    """Images with known answers that are edited together."""
    clip: str = "paper"
    """CLIP model, see `csd_2d.metrics.learned.CLIP_MODELS`; "none" leaves it out."""
    method: str = "csd-edit"
    """For a scene: the method of ns-train."""
    plot: list[str] | None = None
    """Names of the two metrics of the trade-off plot: fidelity across, consistency upwards."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}; got {self.kind}.")
        if not self.inputs or not self.variants or self.seeds < 1:
            raise ValueError("a study needs inputs, variants, and at least one seed.")
        for one in self.inputs:
            if (one.known if self.kind == "known" else one.path) is None:
                raise ValueError(f"inputs of kind {self.kind} need {'known' if self.kind == 'known' else 'a path'}.")
        if self.plot is not None and len(self.plot) != 2:
            raise ValueError(f"plot names two metrics, fidelity and consistency; got {self.plot}.")
        for name, variant in self.variants.items():
            if variant.editor != "csd" and self.kind != "known":
                raise ValueError(f"variant {name}: the editor {variant.editor} is for images with known answers.")
            for values in product(*self.grid.values()):
                variant_config(variant, dict(zip(self.grid, values, strict=True)), 0)  # raises
        if self.kind == "known":
            from csd_2d.tiny.tasks import check_task

            for one in self.inputs:
                check_task(one.known or "")


def study_names() -> list[str]:
    """List the studies that `load_study` knows by name."""
    shipped = (entry.name for entry in (files("csd_presets") / "studies").iterdir())
    return sorted(name.removesuffix(".yaml") for name in shipped if name.endswith(".yaml"))


def load_study(name: str | Path) -> Study:
    """Load a study in configs/studies, by its name, or a YAML file.

    Raises:
        ValueError: if there is none, or it holds an unknown setting or a value out of range.

    Example:
        >>> load_study("known-answers-tiny").kind
        'known'
    """
    own = str(name).endswith((".yaml", ".yml"))
    source = Path(name) if own else files("csd_presets") / "studies" / f"{name}.yaml"
    if not source.is_file():
        raise ValueError(f"unknown study '{name}'; expected {', '.join(study_names())} or a .yaml file.")
    try:
        values = yaml.safe_load(source.read_text(encoding="utf-8"))
        inputs = [_strict(Input, one, "input") for one in values.get("inputs") or []]
        variants = {str(key): _strict(Variant, one or {}, key) for key, one in (values.get("variants") or {}).items()}
        return _strict(Study, {**values, "inputs": inputs, "variants": variants}, "the study")
    except (TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"study {name} cannot be used: {error}") from error


Settings = TypeVar("Settings")


def _strict(kind: type[Settings], values: Any, where: str) -> Settings:
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ValueError(f"{where} has no setting {key}; expected one of {', '.join(known)}.")
    return kind(**values)


def variant_config(variant: Variant, grid: dict[str, Any], seed: int) -> EditConfig:
    """Compute the settings of one edit of a study. ValueError if a name or a value cannot be."""
    try:
        return dataclasses.replace(load_preset(variant.preset), **{**variant.edit, **grid, "seed": seed})
    except TypeError as error:
        raise ValueError(str(error).removeprefix("EditConfig.__init__() got an ")) from error


class CountingPrior:
    """Counts the rows a prior estimates the noise of; everything else is the prior's own."""

    def __init__(self, prior: Prior) -> None:
        self._prior, self.rows = prior, 0

    def noise_estimate(self, x_t: Tensor, *args: Any) -> Tensor:
        self.rows += len(x_t)
        return self._prior.noise_estimate(x_t, *args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._prior, name)


@dataclass(frozen=True)
class Cell:
    """One edit of a study."""

    study: Study
    input: Input
    label: str
    grid: dict[str, Any]
    seed: int

    @property
    def variant(self) -> Variant:
        return self.study.variants[self.label]

    @property
    def config(self) -> EditConfig:
        return variant_config(self.variant, self.grid, self.seed)

    @property
    def options(self) -> dict[str, Any]:
        """The variant's further options; of a scene also those in the preset's section `scene`."""
        if self.study.kind != "scene":
            return self.variant.options
        return scene_preset(self.variant.preset) | self.variant.options

    @property
    def prior(self) -> str | None:
        """Name of the diffusion model that this process loads for it; a scene's run loads its own."""
        if self.study.kind == "scene" or self.variant.editor != "csd":
            return None
        return "analytic" if (self.input.known or "").startswith("textures") else self.study.prior

    @property
    def key(self) -> str:
        """Name of the file that holds its figures: a digest of all that they depend on."""
        shared = {name: getattr(self.study, name) for name in ("kind", "prior", "count", "clip", "method")}
        variant = {**dataclasses.asdict(self.variant), "options": self.options}
        parts = [shared, dataclasses.asdict(self.input), variant, vars(self.config)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def cells(study: Study) -> list[Cell]:
    """List the edits of a study: all variants of a seed before the next seed, so that a part of it is of use."""
    grids = [dict(zip(study.grid, values, strict=True)) for values in product(*study.grid.values())]
    order = product(range(study.seeds), study.inputs, study.variants, grids)
    return [Cell(study, one, label, grid, seed) for seed, one, label, grid in order if _can(study, one, label)]


def _can(study: Study, one: Input, label: str) -> bool:
    """Tell whether an editor can edit an input: diffusers has no sampler of exact scores."""
    return study.variants[label].editor != "sampler" or not (one.known or "").startswith("textures")


Row = dict[str, Any]
"""input, variant, the settings of the grid, seed, seconds, figures: {metric: number}, missing: {metric: why}."""


def run_study(
    study: Study,
    output: str | Path,
    data: str | Path = ".",
    jobs: int = 1,
    device: str = "cpu",
    local_files_only: bool = False,
    progress: str | None = None,
) -> list[Row]:
    """Edit and measure what is not measured yet, and write the tables.

    Args:
        output: folder for rows/ with one file for each edit, rows.csv, table.md, tradeoff.png, study.json, and
            pictures/ with the edits of the first seed.
        data: folder that the inputs' paths are relative to.
        jobs: processes that share the edits out; each loads the models.

    Returns:
        The rows, in the order of `cells`.

    Raises:
        ValueError, OSError, ImportError: for inputs, models or libraries that cannot be had; what was measured before
            stays.
    """
    folder = Path(output)
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    with replacing(folder / "study.json") as temporary:
        versions = {name: version(name) for name in ("csd-edit", "diffusers", "torch")}
        content = {"study": dataclasses.asdict(study), "versions": versions}
        temporary.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
    todo = [cell for cell in cells(study) if not _row_file(folder, cell).is_file()]
    arguments = [(cell, folder, Path(data), device, local_files_only) for cell in todo]
    with tqdm(total=len(todo), desc=progress, disable=progress is None, unit="edit") as bar:
        if jobs == 1:
            for one in arguments:
                _measure(*one)
                bar.update()
        elif todo:
            threads = max(1, torch.get_num_threads() // jobs)
            # Spawned: a forked process could not use a GPU.
            with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
                for done in [pool.submit(_measure, *one) for one in arguments]:
                    done.result()
                    bar.update()
    rows = [json.loads(_row_file(folder, cell).read_text(encoding="utf-8")) for cell in cells(study)]
    _write_tables(study, rows, folder)
    return rows


def _row_file(folder: Path, cell: Cell) -> Path:
    return folder / "rows" / f"{cell.key}.json"


def _measure(cell: Cell, folder: Path, data: Path, device: str, local_files_only: bool) -> None:
    """Edit, measure, and write the row of one cell."""
    place = Place(folder, data, device, local_files_only)
    if cell.prior is not None:
        _counting(cell, place)  # loading the model is no part of the time
    start = time.monotonic()
    run = {"known": _known, "panorama": _panorama, "video": _video, "scene": _scene}[cell.study.kind]
    figures, missing = run(cell, place)
    row = {
        "input": cell.input.name,
        "variant": cell.label,
        **cell.grid,
        "seed": cell.seed,
        "seconds": round(time.monotonic() - start, 2),
        "figures": figures,
        "missing": missing,
    }
    with replacing(_row_file(folder, cell)) as temporary:
        temporary.write_text(json.dumps(row, indent=1), encoding="utf-8")


@dataclass(frozen=True)
class Place:
    """Where a study runs."""

    folder: Path
    data: Path
    device: str
    local_files_only: bool

    def picture(self, cell: Cell, suffix: str) -> Path | None:
        """Name the file for a cell's edit; None if it is not kept."""
        if cell.seed:
            return None
        words = [cell.input.name, cell.label, *(f"{name}={value}" for name, value in cell.grid.items())]
        safe = "_".join("".join(c if c.isalnum() or c in ".=-" else "-" for c in word) for word in words)
        return self.folder / "pictures" / f"{safe}{suffix}"


@cache
def _prior(name: str, device: str, local_files_only: bool) -> Prior:
    from csd_2d.priors.loading import load_prior

    return load_prior(name, device, local_files_only=local_files_only)


@cache
def _learned(clip: str, device: str, local_files_only: bool) -> Learned:
    return Learned(None if clip == "none" else clip, device, local_files_only)


def _counting(cell: Cell, place: Place) -> Any:
    assert cell.prior is not None
    return CountingPrior(_prior(cell.prior, place.device, place.local_files_only))


Figures = tuple[dict[str, float], dict[str, str]]
"""Numbers by the metrics' names; and why others are missing."""


def _measured(cell: Cell, place: Place, subject: Subject) -> Figures:
    rows = evaluate(subject, _learned(cell.study.clip, place.device, place.local_files_only)).rows
    figures = {row.name: row.value for row in rows if row.value is not None}
    return figures, {row.name: row.missing for row in rows if row.missing is not None}


def _captions(one: Input) -> tuple[str, str] | None:
    return (one.source_caption, one.target_caption) if one.source_caption and one.target_caption else None


def _known(cell: Cell, place: Place) -> Figures:
    from csd_2d.image_set import edit_images
    from csd_2d.tiny.tasks import load_task, measure

    task = load_task(cell.input.known or "", cell.seed, cell.study.count)
    if cell.variant.editor == "csd":
        prior = _counting(cell, place)
        find = task.find(prior.cell)
        edited = torch.stack(edit_images(list(task.images), prior, task.prompt, cell.config, correspondence=find))
        evaluations = prior.rows / len(task.images)
    elif cell.variant.editor == "unedited":
        edited, evaluations = task.images, 0.0
    else:
        edited, evaluations = _sampled(cell, task.images, task.prompt)
    if (path := place.picture(cell, ".png")) is not None:
        write_image(torch.cat([torch.cat(list(row), -1) for row in (task.images, edited, task.answers[0])], -2), path)
    return {**measure(edited, task), "evaluations": evaluations}, {}


def _sampled(cell: Cell, images: Tensor, prompt: str) -> tuple[Tensor, float]:
    from csd_2d.tiny.train import edit_with_diffusers

    steps = cell.variant.options.get("steps", 15)
    prompts = [prompt] * len(images)
    pipeline = _sampler(cell.study.prior)
    return edit_with_diffusers(pipeline, images, prompts, num_inference_steps=steps, seed=cell.seed), float(steps)


@cache
def _sampler(prior: str) -> Any:
    from diffusers import StableDiffusionInstructPix2PixPipeline  # pyright: ignore[reportPrivateImportUsage]

    from csd_2d.tiny import MODEL

    folder = str(MODEL) if prior == "tiny" else prior
    return StableDiffusionInstructPix2PixPipeline.from_pretrained(folder, local_files_only=True)


def _panorama(cell: Cell, place: Place) -> Figures:
    from csd_2d.panorama import edit_panorama

    one, prior = cell.input, _counting(cell, place)
    image = read_image(place.data / str(one.path))
    mask = None if one.mask is None else read_mask(place.data / one.mask, (image.shape[-2], image.shape[-1]))
    edited = edit_panorama(image, prior, one.prompt, cell.config, mask=mask, wrap=one.wrap, **cell.variant.options)
    if (path := place.picture(cell, ".png")) is not None:
        write_image(edited, path)
    masks = None if mask is None else [mask]
    subject = Subject("panorama", [image], [edited], captions=_captions(one), masks=masks, wrap=one.wrap)
    return _with_evaluations(_measured(cell, place, subject), prior.rows)


def _video(cell: Cell, place: Place) -> Figures:
    from csd_2d.io.video import read_clip, write_clip
    from csd_2d.video import edit_video

    one, prior = cell.input, _counting(cell, place)
    clip = read_clip(place.data / str(one.path))
    edited = edit_video(clip, prior, one.prompt, cell.config, **cell.variant.options)
    if (path := place.picture(cell, ".mp4")) is not None:
        clip.sound = None
        write_clip(edited, path)
    # Decoded once, not in every pass of a metric.
    subject = Subject("video", list(clip.frames), list(edited.frames), captions=_captions(one))
    figures = _measured(cell, place, subject)
    return _with_evaluations(figures, prior.rows / len(clip.frames))


def _with_evaluations(figures: Figures, evaluations: float) -> Figures:
    return {**figures[0], "evaluations": evaluations}, figures[1]


EditScene = Callable[..., Subject]
"""(run, prompt, config, options, method, prior, folder, device) -> novel views before and after."""


def _scene(cell: Cell, place: Place) -> Figures:
    # Scenes build on this package, which does not know them: it finds them as it would a plug-in.
    found = list(entry_points(group="csd.commands", name="edit-scene"))
    if not found:
        raise ImportError('scenes need nerfstudio: pip install "csd-edit[nerf]".')
    edit_scene: EditScene = found[0].load()
    one, study = cell.input, cell.study
    subject = edit_scene(
        place.data / str(one.path), one.prompt, cell.config, cell.options, study.method, study.prior,
        place.folder / "runs" / cell.key, place.device,
    )  # fmt: skip
    subject = dataclasses.replace(subject, captions=_captions(one))
    if (path := place.picture(cell, ".png")) is not None:
        rows = [torch.cat(list(pictures), -1) for pictures in (subject.before, subject.after)]
        write_image(torch.cat(rows, -2), path)
    return _measured(cell, place, subject)


def _write_tables(study: Study, rows: Sequence[Row], folder: Path) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    keys = ["input", "variant", *study.grid, "seed", "seconds"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*keys, *names])
    writer.writerows([[*(row[key] for key in keys), *(row["figures"].get(name, "") for name in names)] for row in rows])
    for name, content in (("rows.csv", text.getvalue()), ("table.md", table(study, rows))):
        with replacing(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    if (axes := _plotted(study, rows)) is not None:
        with replacing(folder / "tradeoff.png") as temporary:
            plot(study, rows, axes, temporary)


def _groups(study: Study, rows: Sequence[Row], by_input: bool = True) -> dict[tuple[Any, ...], list[Row]]:
    """Group rows that differ in their seed only: {(input or None, variant, *grid values): rows}."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (row["input"] if by_input else None, row["variant"], *(row[name] for name in study.grid))
        groups.setdefault(key, []).append(row)
    return groups


def _spread(rows: Sequence[Row], name: str) -> tuple[float, float] | None:
    values = [row["figures"][name] for row in rows if name in row["figures"]]
    return (fmean(values), stdev(values) if len(values) > 1 else 0.0) if values else None


def table(study: Study, rows: Sequence[Row]) -> str:
    """Write the rows as Markdown: for each input a table of its variants, mean ± standard deviation over seeds."""
    lines = []
    for one in dict.fromkeys(row["input"] for row in rows):
        own = [row for row in rows if row["input"] == one]
        names = list(dict.fromkeys(name for row in own for name in row["figures"]))
        lines += [f"**{one}**, {study.seeds} seeds", ""]
        lines += [
            _line(["variant", *study.grid, *names, "seconds"]),
            _line(["---"] * (len(names) + len(study.grid) + 2)),
        ]
        for (_, variant, *values), group in _groups(study, own).items():
            spreads = [_spread(group, name) for name in names]
            shown = ["" if s is None else f"{s[0]:.3g} ± {s[1]:.2g}" for s in spreads]
            seconds = f"{fmean(row['seconds'] for row in group):.1f}"
            lines.append(_line([variant, *map(str, values), *shown, seconds]))
        missing = {name: why for row in own for name, why in row["missing"].items()}
        lines += ["", *(f"* {name} is not available: {why}" for name, why in missing.items()), ""]
    return "\n".join(lines)


def _line(parts: Sequence[str]) -> str:
    return f"| {' | '.join(parts)} |"


def _plotted(study: Study, rows: Sequence[Row]) -> tuple[str, str] | None:
    """Choose the metrics of the trade-off plot: the study's, or the paper's where CLIP was there; else what was."""
    names = {name for row in rows for name in row["figures"]}
    wanted = [tuple(study.plot or ()), ("CLIP directional", "CLIP image similarity"), ("change", "SSIM to the source")]
    return next(((one[0], one[1]) for one in wanted if len(one) == 2 and names.issuperset(one)), None)


def plot(study: Study, rows: Sequence[Row], axes: tuple[str, str], path: Path) -> None:
    """Draw fidelity against consistency: a line for each variant, its points the settings of the grid.

    Points are means over inputs and seeds, bars standard deviations of the mean over seeds.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the trade-off plot needs matplotlib: pip install "csd-edit[metrics]".') from error
    figure = Figure(figsize=(7, 5), layout="constrained")
    drawn = figure.add_subplot(xlabel=axes[0], ylabel=axes[1])
    lines: dict[str, list[tuple[tuple[float, float], tuple[float, float], str]]] = {}
    for (_, variant, *values), group in _groups(study, rows, by_input=False).items():
        seeds = [[row for row in group if row["seed"] == seed] for seed in range(study.seeds)]
        means = [[s[0] for one in seeds if (s := _spread(one, name)) is not None] for name in axes]
        if all(means):
            x, y = ((fmean(v), stdev(v) / len(v) ** 0.5 if len(v) > 1 else 0.0) for v in means)
            lines.setdefault(variant, []).append((x, y, ", ".join(map(str, values))))
    for variant, points in lines.items():
        (x, x_bar), (y, y_bar) = (zip(*(point[i] for point in points), strict=True) for i in (0, 1))
        drawn.errorbar(x, y, y_bar, x_bar, fmt="o-", capsize=2, linewidth=1, label=variant)
        for a, b, note in zip(x, y, (point[2] for point in points), strict=True):
            drawn.annotate(note, (a, b), textcoords="offset points", xytext=(4, 4), fontsize=7)
    drawn.grid(alpha=0.3)
    drawn.legend(fontsize=8)
    figure.savefig(path, dpi=150, format="png")
