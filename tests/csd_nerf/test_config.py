"""The methods that ns-train finds, and what its command line makes of them."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import tyro
import yaml
from nerfstudio.configs.base_config import ViewerConfig
from nerfstudio.configs.method_configs import all_methods

from csd_nerf.methods import csd_edit, csd_edit_splat, csd_edit_tiny, csd_scene_tiny

METHODS = ("csd-edit", "csd-edit-splat", "csd-edit-tiny", "csd-scene-tiny")


def parse(*args: str, config=csd_edit_tiny.config):
    return tyro.cli(tyro.conf.SuppressFixed[type(config)], default=config, args=args)  # type: ignore[misc]


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_registered_and_their_configs_survive_yaml(name):
    config = all_methods[name]
    assert config.method_name == name
    assert yaml.load(yaml.dump(config), Loader=yaml.Loader) == config


@pytest.mark.parametrize("specification", [csd_edit, csd_edit_splat, csd_edit_tiny, csd_scene_tiny])
def test_viewer_listens_on_loopback_and_nothing_is_sent_to_wandb(specification):
    assert specification.config.viewer.websocket_host == "127.0.0.1"
    assert specification.config.vis == "viewer"


def test_what_ns_viewer_opens_stays_on_this_machine(tmp_path):
    """It loads a run's config and then gives it a viewer of its own, which nerfstudio opens to all."""
    config = yaml.load(yaml.dump(csd_edit.config), Loader=yaml.Loader)
    config.viewer = ViewerConfig(jpeg_quality=50)
    assert (config.viewer.websocket_host, config.viewer.jpeg_quality) == ("127.0.0.1", 50)
    config.viewer = ViewerConfig(websocket_host="192.168.1.7")
    assert config.viewer.websocket_host == "192.168.1.7"
    assert parse("--viewer.websocket-host", "0.0.0.0").viewer.websocket_host == "0.0.0.0"  # of ns-train: as asked for


def test_what_matters_is_first_in_the_help(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    lines = [line for line in capsys.readouterr().out.splitlines() if "--" in line]
    options = ("--load-run", "--pipeline.prompt", "--pipeline.edit.steps", "--viewer.", "--optimizers.")
    first = [next(i for i, line in enumerate(lines) if option in line) for option in options]
    assert first == sorted(first) and first[0] < 4 and first[1] < 50


def test_a_misspelt_option_is_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit):
        parse("--pipeline.promt", "make it night")
    said = capsys.readouterr().err
    assert said.index("Unrecognized options") < said.index("--pipeline.prompt STR")


def test_entry_point_does_not_load_a_diffusion_model():
    code = "import csd_nerf.methods, sys; print(sorted({'diffusers', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("scalar", [np.float64(1.5), np.float32(1.5), np.int64(3)])
def test_checkpoints_with_numpy_scalars_load_without_trusting_anything_else(scalar, tmp_path):
    torch.save({"scalar": scalar}, tmp_path / "a.ckpt")
    loaded = torch.load(tmp_path / "a.ckpt", weights_only=True)["scalar"]
    assert loaded == scalar and type(loaded) is type(scalar)


def test_options_reach_the_nested_configs():
    config = parse("--pipeline.prompt", "make it night", "--pipeline.edit.steps", "7", "--load-run", "run/config.yml")
    assert (config.pipeline.prompt, config.pipeline.edit.steps, str(config.load_run)) == (
        "make it night",
        7,
        "run/config.yml",
    )


def test_gaussians_are_split_on_demand_and_not_in_distill(capsys):
    assert csd_edit_splat.config.pipeline.model.stop_split_at == 0  # type: ignore[attr-defined]
    split = ("--pipeline.model.stop-split-at", "5000")
    config = parse("--pipeline.mode", "dataset-update", *split, config=csd_edit_splat.config)
    assert config.pipeline.model.stop_split_at == 5000
    with pytest.raises(SystemExit):
        parse("--pipeline.mode", "distill", *split, config=csd_edit_splat.config)
    assert "Gaussians cannot be split in distill" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "args", "message"),
    [
        (csd_edit_splat.config, ["--pipeline.datamanager.train-cameras-sampling-strategy", "fps"], "at random"),
        (csd_edit.config, ["--pipeline.model.use-proposal-weight-anneal"], "flatten the proposal weights"),
    ],
)
def test_options_that_cannot_be_in_an_edit(config, args, message, capsys):
    with pytest.raises(SystemExit):
        parse(*args, config=config)
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--pipeline.edit.steps", "0"], "steps must be a whole number from 1"),
        (["--pipeline.edit.min-timestep", "nan"], "min_timestep must be from 0"),
        (["--pipeline.steps-per-round", "0"], "steps_per_round must be at least 1"),
        (["--pipeline.views-per-round", "-1"], "views_per_round must be at least 0"),
        # It would replace the whole config and overwrite the old run's.
        (["--load-config", "config.yml"], "--load-config"),
    ],
)
def test_bad_options_end_the_program_with_a_message(args, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*args)
    assert end.value.code not in (0, None)
    # tyro wraps lines within a box.
    printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in printed and "Traceback" not in printed
