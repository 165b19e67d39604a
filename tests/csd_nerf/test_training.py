"""Whole runs within this process: what a run takes over, what it leaves, and how it fails."""

import json
import os
import shlex
import time
from pathlib import Path

import pytest
import torch
import yaml
from nerfstudio.configs.base_config import ViewerConfig
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManagerConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.engine.trainer import Trainer
from nerfstudio.utils.eval_utils import eval_setup

from csd_2d import EditConfig, load_prior
from csd_2d.io.images import read_image
from csd_nerf import pipeline as pipeline_module
from csd_nerf.edit import rounds
from csd_nerf.pipeline import CsdEditPipeline
from tests.csd_nerf.conftest import train_in_process, train_stock

# Depth of scenes that are hardly trained says nothing of what corresponds.
QUICK = EditConfig(steps=60, correspondence=False)


def edit_in_process(output: Path, iterations: int = 6, **options) -> Path:
    options = {
        "pipeline__prompt": "make it night",
        "pipeline__prior": "analytic",
        "pipeline__edit": QUICK,
        "pipeline__steps_per_round": 3,
        "pipeline__views_per_round": 4,
        "pipeline__film_frames": 2,
        **options,
    }
    return train_in_process("csd-edit-tiny", output, iterations, **options)


def checkpoint(run: Path) -> dict:
    path = sorted((run / "nerfstudio_models").glob("*.ckpt"))[-1]
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def edit_run(scene_run, tmp_path_factory) -> Path:
    return edit_in_process(tmp_path_factory.mktemp("edit"), load_run=scene_run / "config.yml")


@pytest.fixture(scope="module")
def stock_run(scene_data, tmp_path_factory) -> Path:
    """A run of stock nerfacto with tuned poses, appearance embeddings and LPIPS weights."""
    return train_stock(
        "nerfacto",
        tmp_path_factory.mktemp("stock"),
        3,
        data=scene_data,
        pipeline__datamanager=VanillaDataManagerConfig(data=scene_data, train_num_rays_per_batch=64),
        pipeline__model__implementation="torch",
        pipeline__model__num_levels=4,
        pipeline__model__max_res=64,
        pipeline__model__log2_hashmap_size=10,
        pipeline__model__num_proposal_samples_per_ray=(16, 8),
        pipeline__model__num_nerf_samples_per_ray=8,
        pipeline__datamanager__dataparser=NerfstudioDataParserConfig(orientation_method="none", scene_scale=2.0),
    )


def test_edited_views_are_written_and_the_run_can_be_evaluated(edit_run, scene_data, num_views):
    views = sorted((edit_run / "edited").iterdir())
    assert len(views) == num_views  # two rounds of four
    prior = load_prior("analytic")
    for path in views:
        original = read_image(scene_data / "images" / f"{path.stem[5:]}.png")
        (night,) = prior.answers("make it night", original[None])  # type: ignore[attr-defined]
        assert (read_image(path) - night[0]).square().mean() < 1e-3
    config, pipeline, path, step = eval_setup(edit_run / "config.yml")
    assert isinstance(pipeline, CsdEditPipeline) and step == 5
    metrics = pipeline.get_average_eval_image_metrics(get_std=True)
    assert (
        set(metrics) >= {"unedited_photographs_psnr", "unedited_photographs_ssim_std", "fps"} and "psnr" not in metrics
    )
    assert config.load_step is None


def test_steps_start_at_zero_and_optimizers_fresh(edit_run, scene_run):
    saved = checkpoint(edit_run)
    assert saved["step"] == 5
    assert saved["optimizers"]["fields"]["state"][0]["step"] == 6
    assert checkpoint(scene_run)["step"] == 29


def test_evaluation_does_not_load_the_prior(edit_run, monkeypatch):
    monkeypatch.setattr(pipeline_module, "load_prior", lambda *_, **__: pytest.fail("prior loaded"))
    _, pipeline, _, _ = eval_setup(edit_run / "config.yml")
    pipeline.get_average_eval_image_metrics()


def test_an_edited_scene_can_be_edited_again(edit_run, tmp_path):
    again = edit_in_process(tmp_path, 1, load_run=edit_run, pipeline__prompt="make it sepia")
    config = yaml.load((again / "config.yml").read_text(), Loader=yaml.Loader)
    assert config.load_checkpoint == edit_run / "nerfstudio_models" / "step-000000005.ckpt"
    assert config.pipeline.prompt == "make it sepia"


def test_the_edit_starts_from_the_scene(scene_run, scene_data, tmp_path):
    run = edit_in_process(tmp_path, 1, load_dir=scene_run / "nerfstudio_models",
                          pipeline__datamanager__data=scene_data,
                          optimizers={group: {"optimizer": AdamOptimizerConfig(lr=0), "scheduler": None}
                                      for group in ("fields", "proposal_networks")})  # fmt: skip
    before, after = checkpoint(scene_run)["pipeline"], checkpoint(run)["pipeline"]
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_stock_nerfacto_runs_can_be_edited(stock_run, tmp_path):
    run = edit_in_process(tmp_path, 2, load_run=stock_run / "config.yml")
    before, after = checkpoint(stock_run)["pipeline"], checkpoint(run)["pipeline"]
    assert before.keys() == after.keys()
    embedding = "_model.field.embedding_appearance.embedding.weight"
    for key in ("_model.camera_optimizer.pose_adjustment", embedding):
        assert before[key].any() and torch.equal(before[key], after[key])
    table = "_model.field.mlp_base.model.0.hash_table"
    assert not torch.equal(before[table], after[table])
    config, pipeline, _, _ = eval_setup(run / "config.yml")
    assert pipeline.model.has_lpips
    model, parser = config.pipeline.model, config.pipeline.datamanager.dataparser
    assert (model.num_levels, model.num_nerf_samples_per_ray, model.implementation) == (4, 8, "torch")
    assert not model.use_proposal_weight_anneal
    assert (parser.orientation_method, parser.scene_scale) == ("none", 2.0)


def test_stock_checkpoints_load_by_folder_too(stock_run, scene_data, tmp_path):
    sizes = {name: getattr(yaml.load((stock_run / "config.yml").read_text(), Loader=yaml.Loader).pipeline.model, name)
             for name in ("num_levels", "features_per_level", "base_res", "max_res", "log2_hashmap_size", "hidden_dim",
                          "hidden_dim_color", "num_proposal_iterations", "num_proposal_samples_per_ray",
                          "proposal_net_args_list", "use_appearance_embedding")}  # fmt: skip
    run = edit_in_process(
        tmp_path,
        1,
        load_dir=stock_run / "nerfstudio_models",
        pipeline__datamanager__data=scene_data,
        **{f"pipeline__model__{name}": value for name, value in sizes.items()},
    )
    pose = "_model.camera_optimizer.pose_adjustment"
    assert torch.equal(checkpoint(run)["pipeline"][pose], checkpoint(stock_run)["pipeline"][pose])


def test_a_diffusion_model_edits_a_scene(scene_run, tiny_pipeline_folder, tmp_path):
    run = edit_in_process(tmp_path, 2, load_run=scene_run, pipeline__prior=str(tiny_pipeline_folder),
                          pipeline__edit=EditConfig(steps=2), pipeline__micro_batch=3)  # fmt: skip
    assert len(list((run / "edited").iterdir())) == 4
    assert checkpoint(run)["pipeline"].keys() == checkpoint(scene_run)["pipeline"].keys()


def test_other_data_can_be_given(scene_run, scene_data, tmp_path):
    (tmp_path / "moved").symlink_to(scene_data)
    run = edit_in_process(tmp_path, 1, load_run=scene_run, pipeline__datamanager__data=tmp_path / "moved")
    assert yaml.load((run / "config.yml").read_text(), Loader=yaml.Loader).pipeline.datamanager.data.name == "moved"


def test_nerfstudios_own_prompt_option_works(scene_run, tmp_path):
    run = edit_in_process(tmp_path, 1, load_run=scene_run, prompt="make it foggy", pipeline__prompt="")
    assert yaml.load((run / "config.yml").read_text(), Loader=yaml.Loader).pipeline.prompt == "make it foggy"


def failing(output: Path, **options) -> str:
    """The message of a run that fails, after a check that it left nothing."""
    with pytest.raises(SystemExit) as end:
        edit_in_process(output / "out", **options)
    assert not (output / "out").exists(), os.listdir(output / "out")
    message = str(end.value.code)
    assert message.startswith("csd-edit-tiny: ") and "\n" not in message
    return message


@pytest.mark.parametrize("prompt", ["", "  "])
def test_empty_prompt(prompt, scene_run, tmp_path):
    message = failing(tmp_path, load_run=scene_run, pipeline__prompt=prompt)
    assert "prompt is empty; set --pipeline.prompt" in message


def test_two_prompts(scene_run, tmp_path):
    assert "differ (make it night / make it snowy)" in failing(tmp_path, load_run=scene_run, prompt="make it snowy")


def test_unknown_prompt_of_the_analytic_prior(scene_run, tmp_path):
    message = failing(tmp_path, load_run=scene_run, pipeline__prompt="make it rain")
    assert "does not know the prompt 'make it rain'; it knows: make it night" in message


def test_unknown_prior(scene_run, tmp_path):
    assert "unknown prior 'nothing'" in failing(tmp_path, load_run=scene_run, pipeline__prior="nothing")


def test_no_scene_or_two(scene_run, tmp_path):
    assert "--load-run RUN/config.yml" in failing(tmp_path)
    both = failing(tmp_path, load_run=scene_run, load_dir=scene_run / "nerfstudio_models")
    assert "got --load-run and --load-dir" in both


def test_missing_scenes(scene_run, scene_data, tmp_path):
    assert "no run at --load-run" in failing(tmp_path, load_run=tmp_path / "config.yml")
    assert "no checkpoint in" in failing(tmp_path, load_dir=tmp_path, pipeline__datamanager__data=scene_data)
    message = failing(tmp_path, load_run=scene_run, pipeline__datamanager__data=tmp_path / "gone")
    assert "are not at" in message and "set --data" in message


def test_checkpoint_of_other_sizes(stock_run, scene_data, tmp_path):
    message = failing(tmp_path, load_dir=stock_run / "nerfstudio_models", pipeline__datamanager__data=scene_data)
    assert "does not fit the model" in message and "--load-run" in message


def test_instructions_need_no_source_prompt(scene_run, tmp_path):
    message = failing(tmp_path, load_run=scene_run, pipeline__source_prompt="an island")
    assert "takes no source prompt" in message


def test_non_finite_edits(scene_run, tmp_path):
    message = failing(tmp_path, load_run=scene_run, pipeline__edit=EditConfig(steps=500, lr=1e4, lr_decay=1))
    assert "latents are not finite after step" in message and "lower lr" in message


def test_corrupt_image(scene_run, scene_data, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "transforms.json").write_text((scene_data / "transforms.json").read_text())
    (data / "images").mkdir()
    for path in (scene_data / "images").iterdir():
        (data / "images" / path.name).write_bytes(path.read_bytes()[:60])
    message = failing(tmp_path, load_run=scene_run, pipeline__datamanager__data=data)
    assert "frame_0000.png cannot be read as an image" in message


@pytest.mark.parametrize("solid", [{}, {"pipeline__sphere": (0.0, 0.0, 0.0, 100.0)}])
def test_a_run_that_cannot_have_its_model_takes_back_what_it_wrote(solid, scene_run, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("the model cannot be downloaded")

    monkeypatch.setattr(pipeline_module, "load_prior", unreachable)
    assert "cannot be downloaded" in failing(tmp_path, load_run=scene_run, pipeline__source="current", **solid)


def test_unwritable_output(scene_run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        edit_in_process(tmp_path / "file" / "out", load_run=scene_run)
    assert "file" in str(end.value.code)


def test_a_failing_run_keeps_what_is_not_its_own(scene_run, tmp_path):
    folder = tmp_path / "out" / "island" / "csd-edit-tiny" / "mine"
    folder.mkdir(parents=True)
    (folder / "notes.txt").touch()
    with pytest.raises(SystemExit):
        edit_in_process(tmp_path / "out", load_run=scene_run, timestamp="mine", pipeline__prompt="make it rain")
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_scene_without_data(tmp_path):
    with pytest.raises(SystemExit, match="csd-scene-tiny: no data; set --data"):
        train_in_process("csd-scene-tiny", tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


def test_csd_edit_takes_over_a_stock_run(stock_run, tmp_path):
    # Its own defaults are for a GPU; the sizes come from the run.
    run = train_in_process(
        "csd-edit",
        tmp_path,
        1,
        load_run=stock_run,
        pipeline__prompt="make it night",
        pipeline__prior="analytic",
        pipeline__edit=QUICK,
        pipeline__views_per_round=2,
        pipeline__datamanager__train_num_rays_per_batch=64,
    )
    assert len(list((run / "edited").iterdir())) == 2
    assert checkpoint(run)["pipeline"].keys() == checkpoint(stock_run)["pipeline"].keys()


def test_presets_replace_the_settings_of_the_edit(scene_run, tmp_path):
    run = edit_in_process(tmp_path, 1, load_run=scene_run, pipeline__preset="paper")
    edit = yaml.load((run / "config.yml").read_text(), Loader=yaml.Loader).pipeline.edit
    assert edit.kernel_input == "noisy" and edit.lr == 2.0
    assert "unknown preset" in failing(tmp_path / "other", load_run=scene_run, pipeline__preset="nope")


def test_the_cost_of_a_step_ends_when_its_loss_is_there(scene_run, tmp_path, monkeypatch):
    class Pending(torch.Tensor):
        """As on a GPU, which is waited for when a value is asked for."""

        def isfinite(self) -> torch.Tensor:
            time.sleep(1)
            return super().isfinite()

    train_iteration = Trainer.train_iteration

    def started(*args):
        loss, *rest = train_iteration(*args)
        return loss.as_subclass(Pending), *rest

    monkeypatch.setattr(Trainer, "train_iteration", started)
    run = edit_in_process(tmp_path, 1, load_run=scene_run)
    assert json.loads((run / "edit.json").read_text())["costs"]["training"]["seconds"] >= 1


def interrupting(*_, **__):
    raise KeyboardInterrupt


def test_an_interrupted_run_says_how_to_go_on_in_one_line(scene_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "train_iteration", interrupting)
    with pytest.raises(SystemExit) as ended:
        edit_in_process(tmp_path / ("a [long] name " * 8), load_run=scene_run)
    assert ended.value.code == 130
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "Interrupted" in line]
    config = Path(shlex.split(line.partition("ns-train ")[2])[-1])
    assert config.is_file()


def test_a_run_that_is_interrupted_before_it_saved_anything_says_so_and_leaves_nothing(
    scene_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(rounds, "edit_images", interrupting)
    with pytest.raises(SystemExit) as ended:
        edit_in_process(tmp_path / "out", load_run=scene_run, pipeline__source="current")
    assert ended.value.code == 130 and not (tmp_path / "out").exists()
    assert capsys.readouterr().out.splitlines()[-1] == "Interrupted. Nothing was saved yet, and nothing is kept."


def test_a_scene_that_is_interrupted_says_what_there_is(scene_data, tmp_path, monkeypatch, capsys):
    train_iteration = Trainer.train_iteration
    monkeypatch.setattr(
        Trainer, "train_iteration", lambda *args: interrupting() if args[1] == 2 else train_iteration(*args)
    )
    with pytest.raises(SystemExit) as ended:
        train_in_process("csd-scene-tiny", tmp_path / "out", 9, data=scene_data, steps_per_save=1)
    assert ended.value.code == 130
    (kept,) = tmp_path.glob("out/*/*/*/nerfstudio_models")
    assert f"Interrupted. What was learned up to the last save is in {kept}" in capsys.readouterr().out


def test_a_finished_run_whose_viewer_is_left_is_not_an_interrupted_one(scene_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "_train_complete_viewer", interrupting)  # it waits for Ctrl-C
    run = edit_in_process(tmp_path, 1, load_run=scene_run, viewer=ViewerConfig(quit_on_train_completion=False))
    assert (run / "edit.json").is_file() and "Interrupted" not in capsys.readouterr().out


def test_options_win_over_the_preset(scene_run, tmp_path):
    preset = tmp_path / "own.yaml"
    preset.write_text("{lr: 2.0, mixing: none, scene: {views_per_round: 3, film_frames: 5, max_num_iterations: 4}}")
    options = {"pipeline__edit": EditConfig(steps=20, lr=0.5), "pipeline__views_per_round": 2}
    run = edit_in_process(tmp_path, 1, load_run=scene_run, pipeline__preset=str(preset), **options)
    config = yaml.load((run / "config.yml").read_text(), Loader=yaml.Loader)
    assert config.max_num_iterations == 1 and config.pipeline.views_per_round == config.pipeline.film_frames == 2
    # What is the method's default cannot be told from what was not given.
    assert config.pipeline.edit == EditConfig(steps=20, mixing="none", lr=0.5)


def test_several_devices_are_refused(scene_run, tmp_path):
    assert "--machine.num-devices 1" in failing(tmp_path, load_run=scene_run, machine__num_devices=2)
