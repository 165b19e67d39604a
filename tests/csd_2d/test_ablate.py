"""Studies: what is run, what is kept after a kill, what is written."""

import csv
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from csd_2d import EditConfig, ablate
from csd_2d.ablate import Input, Study, Variant, cells, load_study, run_study, study_names, table
from csd_2d.io.images import write_image
from csd_2d.io.video import Clip, write_clip
from tests.forked import context

TINY = [name for name in study_names() if name.endswith("-tiny")]


@pytest.fixture
def quick():
    """A study of exact scores, which takes a moment."""
    return Study(
        kind="known",
        inputs=[Input(known="textures: make it night"), Input(known="textures: paint it a new color")],
        variants={"unedited": Variant(editor="unedited"), "default": Variant(edit={"steps": 3})},
        grid={"guidance_scale": [1.0, 2.0]},
        seeds=2,
        count=2,
        plot=["psnr", "agreement"],
    )


@pytest.mark.parametrize("name", study_names())
def test_shipped_studies_load(name):
    study = load_study(name)
    assert len({cell.key for cell in cells(study)}) > 1


def test_rows_tables_and_plot(quick, tmp_path):
    rows = run_study(quick, tmp_path)
    assert len(rows) == 2 * 2 * 2 * 2
    best = [row for row in rows if row["variant"] == "default" and row["guidance_scale"] == 1.0]
    worst = [row for row in rows if row["variant"] == "unedited"]
    assert min(row["figures"]["psnr"] for row in best) > max(row["figures"]["psnr"] for row in worst)
    with (tmp_path / "rows.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [float(row["psnr"]) for row in read] == [row["figures"]["psnr"] for row in rows]
    assert {row["seed"] for row in read} == {"0", "1"}
    text = (tmp_path / "table.md").read_text()
    numbers = [row["figures"]["psnr"] for row in best if "night" in row["input"]]
    mean, spread = sum(numbers) / 2, abs(numbers[0] - numbers[1]) / 2**0.5
    assert "| default | 1.0 | " in text and f"{mean:.3g} ± {spread:.2g}" in text
    assert Image.open(tmp_path / "tradeoff.png").size == (1050, 750)
    assert len(list((tmp_path / "pictures").iterdir())) == 8
    assert json.loads((tmp_path / "study.json").read_text())["study"]["seeds"] == 2


def test_a_preset_of_scenes_sets_their_rounds():
    variants = {"paper": Variant(preset="paper"), "short": Variant(preset="paper", options={"max_num_iterations": 6})}
    paper, short = cells(Study("scene", [Input(path="config.yml", prompt="x")], variants, seeds=1))
    assert paper.options == {"views_per_round": 16, "steps_per_round": 2000, "max_num_iterations": 30000}
    assert short.options == {**paper.options, "max_num_iterations": 6} and short.key != paper.key
    panorama = Study("panorama", [Input(path="a.png", prompt="x")], variants, seeds=1)
    assert cells(panorama)[0].options == {}


def test_what_is_measured_is_not_measured_again(quick, tmp_path, monkeypatch):
    measured, measure = [], ablate._measure

    def killed(cell, *rest):
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(cell.key)
        measure(cell, *rest)

    monkeypatch.setattr(ablate, "_measure", killed)
    with pytest.raises(KeyboardInterrupt):
        run_study(quick, tmp_path)
    assert len(list((tmp_path / "rows").iterdir())) == 5
    monkeypatch.setattr(ablate, "_measure", lambda cell, *rest: measured.append(cell.key) or measure(cell, *rest))
    rows = run_study(quick, tmp_path)
    assert len(measured) == len(rows) == len({*measured})
    again = run_study(quick, tmp_path)
    assert again == rows and len(measured) == 16
    # A variant that is changed is another one; the others stay.
    changed = dataclasses.replace(quick, variants={**quick.variants, "default": Variant(edit={"steps": 2})})
    run_study(changed, tmp_path)
    assert len(measured) == 24


@pytest.mark.slow
def test_processes_share_the_edits_and_change_nothing(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "get_context", lambda _: context())  # they have imported everything
    one, two = (run_study(quick, tmp_path / str(jobs), jobs=jobs) for jobs in (1, 2))
    assert [row["figures"] for row in one] == [row["figures"] for row in two]


def smooth(count, height, width):
    coarse = torch.rand(count, 3, 4, 6, generator=torch.Generator().manual_seed(0)) * 0.7 + 0.15
    return F.interpolate(coarse, (height, width), mode="bilinear")


def quickly(study):
    """The study with exact scores in place of a network."""
    return dataclasses.replace(study, prior="analytic")


def test_the_tiny_panorama_study(tmp_path):
    write_image(smooth(1, 64, 160)[0], tmp_path / "panorama.png")
    rows = run_study(quickly(load_study("paper-panorama-tiny")), tmp_path / "out", data=tmp_path)
    assert all(row["figures"]["change"] > 0.05 and row["figures"]["evaluations"] > 0 for row in rows)
    assert all("CLIP directional" in row["missing"] for row in rows)
    assert "CLIP directional is not available: left out" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "tradeoff.png").is_file()
    assert list((tmp_path / "out" / "pictures").glob("*.png"))


def test_the_tiny_video_study(tmp_path):
    write_clip(Clip(list(smooth(3, 64, 80))), tmp_path / "clip.mp4")
    rows = run_study(quickly(load_study("paper-video-tiny")), tmp_path / "out", data=tmp_path)
    assert all(row["figures"]["warp error"] > 0 for row in rows)
    assert list((tmp_path / "out" / "pictures").glob("*.mp4"))


def test_the_same_variant_of_other_settings_has_another_key(quick):
    one = cells(quick)[0]
    for other in (
        dataclasses.replace(one, seed=1),
        dataclasses.replace(one, label="default"),
        dataclasses.replace(one, study=dataclasses.replace(quick, count=3)),
    ):
        assert other.key != one.key
    assert cells(dataclasses.replace(quick, seeds=9))[0].key == one.key


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{kind: known}", "missing 2 required|a study needs inputs"),
        ("{kind: known, inputs: [{known: x}], variants: {a: {}}, sedes: 3}", "the study has no setting sedes"),
        ("{kind: known, inputs: [{know: x}], variants: {a: {}}}", "input has no setting know"),
        ("{kind: known, inputs: [{known: x}], variants: {a: {presets: paper}}}", "a has no setting presets"),
        ("{kind: known, inputs: [{known: x}], variants: {a: {edit: {step: 3}}}}", "unexpected keyword argument 'step'"),
        ("{kind: known, inputs: [{known: x}], variants: {a: {edit: {steps: 0}}}}", "steps must be"),
        ("{kind: known, inputs: [{known: x}], variants: {a: {preset: nope}}}", "unknown preset 'nope'"),
        ("{kind: panorama, inputs: [{prompt: x}], variants: {a: {}}}", "need a path"),
        ("{kind: panorama, inputs: [{path: x}], variants: {a: {editor: sampler}}}", "known answers"),
        ("{kind: tree, inputs: [{path: x}], variants: {a: {}}}", "kind must be one of known, panorama"),
        ("{kind: known, inputs: [{known: x}], variants: {a: {}}, plot: [x]}", "plot names two metrics"),
        ("7", "cannot be used"),
    ],
)
def test_what_is_wrong_with_a_study(text, message, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_study(path)


def test_unknown_studies_and_tasks():
    with pytest.raises(ValueError, match="unknown study 'nope'; expected known-answers"):
        load_study("nope")
    for known, message in (("trees: make it night", "kind of scenes"), ("scenes: make it fly", "expected one of")):
        with pytest.raises(ValueError, match=message):
            Study("known", [Input(known=known)], {"a": Variant()})


def test_a_row_without_a_metric_leaves_its_cell_empty():
    rows = [
        {"input": "x", "variant": "a", "seed": 0, "seconds": 1.0, "figures": {"psnr": 20.0}, "missing": {}},
        {"input": "x", "variant": "b", "seed": 0, "seconds": 1.0, "figures": {}, "missing": {"psnr": "no answer."}},
    ]
    study = Study(
        "known",
        [Input(known="scenes: make it night")],
        {"a": Variant(), "b": Variant(edit=vars(EditConfig()))},
        seeds=1,
    )
    lines = table(study, rows).splitlines()
    assert "| a | 20 ± 0 | 1.0 |" in lines and "| b |  | 1.0 |" in lines
    assert "* psnr is not available: no answer." in lines
