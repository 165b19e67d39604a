"""From what a user typed, and a pretrained or an interrupted run, to a config with which training can start."""

import dataclasses
from pathlib import Path
from typing import Any

from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManagerConfig
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs

from csd_2d.presets import load_preset, scene_preset
from csd_2d.priors.loading import check_prior
from csd_nerf.capture import check_capture, check_same_scene
from csd_nerf.edit.resume import restore_config
from csd_nerf.models import SceneModelConfig, SplatModelConfig
from csd_nerf.source_run import (
    SourceRun,
    check_kind,
    find_checkpoint,
    implementation,
    read_checkpoint,
    read_run,
)

DISTILL_STEPS_PER_SAVE = 250
"""At most: a step of distill takes far longer than one that learns images."""

_NOT_RESTORED = frozenset(
    {"resume", "vis", "viewer", "logging", "verbose"}
    | {f"pipeline.{name}" for name in ("micro_batch", "offload", "local_files_only")}
)
"""Settings that change no result; a resumed run need not have those it was begun with."""


def settle_scene(config: Any) -> DataparserOutputs:
    """Check the data of a run that trains a scene; returns its training views.

    Raises:
        ValueError, OSError: if they cannot be used. Whatever nerfstudio's data parser raises.
    """
    datamanager = config.pipeline.datamanager
    return check_capture(
        datamanager.data, config.dataparser, one_kind=isinstance(datamanager, VanillaDataManagerConfig)
    )


def settle_edit(config: Any, defaults: Any) -> None:
    """Settle on the prompt, the scene and its checkpoint; afterwards `load_checkpoint` names the file.

    Args:
        config: of `csd_nerf.trainer.EditTrainerConfig`; changed in place.
        defaults: the method's own config, before any option.

    Raises:
        ValueError, OSError: if something is missing or cannot be used.
    """
    if config.resume is not None:
        _settle_resumed(config)
        settle_scene(config)
        return
    if config.pipeline.replay is not None and not any((config.load_run, config.load_dir, config.load_checkpoint)):
        _settle_replayed(config)
        settle_scene(config)
        _check_folder(config)
        return
    _settle_prompt(config)
    _settle_training(config, defaults)
    source = _settle_checkpoint(config)
    views = settle_scene(config)
    if source is not None:
        check_same_scene(views, source, config.pipeline.datamanager.data)
    _check_folder(config)
    _fit_to_checkpoint(config)


def _settle_resumed(config: Any) -> None:
    """Restore the settings of an interrupted run."""
    data, checkpoint, run = config.pipeline.datamanager.data, config.load_checkpoint, config.resume
    restore_config(config, run, _NOT_RESTORED)
    config.pipeline.datamanager.data = data or config.pipeline.datamanager.data
    config.load_checkpoint = checkpoint or config.load_checkpoint
    if config.load_checkpoint is None or not config.load_checkpoint.is_file():
        raise FileNotFoundError(
            f"the scene of --resume {run} is not at {config.load_checkpoint} any more; set --load-checkpoint."
        )


def _settle_replayed(config: Any) -> None:
    """Restore scene and settings of an earlier run, whose changes are made again in a run of its own."""
    replay, data, timestamp, output = (
        config.pipeline.replay,
        config.pipeline.datamanager.data,
        config.timestamp,
        config.output_dir,
    )
    restore_config(config, replay.parent / "config.yml", _NOT_RESTORED)
    config.timestamp, config.output_dir, config.pipeline.replay = timestamp, output, replay.absolute()
    config.pipeline.datamanager.data = data or config.pipeline.datamanager.data
    if config.load_checkpoint is None or not config.load_checkpoint.is_file():
        raise FileNotFoundError(
            f"the scene of --pipeline.replay {replay} is not at {config.load_checkpoint} any more; set --load-run."
        )


def _settle_prompt(config: Any) -> None:
    """Choose among the spellings: `--prompt` is nerfstudio's alias of `--pipeline.model.prompt`."""
    spellings = (config.pipeline.prompt, config.prompt, config.pipeline.model.prompt)
    prompts = {prompt for prompt in spellings if prompt and prompt.strip()}
    if not prompts:
        raise ValueError("prompt is empty; set --pipeline.prompt, e.g. 'make it night'.")
    if len(prompts) > 1:
        raise ValueError(f"--prompt and --pipeline.prompt differ ({' / '.join(sorted(prompts))}); give one of them.")
    config.pipeline.prompt = prompts.pop()


def _settle_training(config: Any, defaults: Any) -> None:
    if config.pipeline.preset != "default":
        _apply_preset(config, config.pipeline.preset, defaults)
    check_prior(config.pipeline.prior, config.pipeline.prompt)
    if config.pipeline.mode == "distill":
        config.steps_per_save = min(config.steps_per_save, DISTILL_STEPS_PER_SAVE)
    if config.machine.num_devices * config.machine.num_machines > 1:
        raise ValueError(f"editing runs on one device; set --machine.num-devices 1, not {config.machine.num_devices}.")


def _apply_preset(config: Any, name: str, defaults: Any) -> None:
    """Apply a preset. The user's options win: as far as can be told, those that differ from the method's default."""
    edit = dataclasses.replace(load_preset(name), **_differing(config.pipeline.edit, defaults.pipeline.edit))
    scene = scene_preset(name)
    steps = scene.pop("max_num_iterations", config.max_num_iterations)
    if config.max_num_iterations == defaults.max_num_iterations:
        _set_steps(config, steps)
    given = _differing(config.pipeline, defaults.pipeline)
    settings = {setting: value for setting, value in scene.items() if setting not in given}
    try:
        config.pipeline = dataclasses.replace(config.pipeline, edit=edit, **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"preset {name} cannot be used: {error}") from error


def _differing(config: Any, default: Any) -> dict[str, Any]:
    """Return the fields of one config that differ from those of another."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def _set_steps(config: Any, steps: int) -> None:
    """Change the number of steps; learning rates that decay over the whole run still do."""
    optimizers = {}
    for group, optimizer in config.optimizers.items():
        schedule = optimizer["scheduler"]
        if getattr(schedule, "max_steps", None) == config.max_num_iterations:
            schedule = dataclasses.replace(schedule, max_steps=steps)
        optimizers[group] = optimizer | {"scheduler": schedule}
    config.optimizers, config.max_num_iterations = optimizers, steps


def _settle_checkpoint(config: Any) -> SourceRun | None:
    """Find the scene's checkpoint, and inherit from its run, if that is given; returns the run."""
    given = [name for name in ("load_run", "load_dir", "load_checkpoint") if getattr(config, name) is not None]
    if len(given) != 1:
        options = " and ".join("--" + name.replace("_", "-") for name in given) or "neither of them"
        raise ValueError(
            "there must be one scene to edit: set --load-run RUN/config.yml, or --load-dir RUN/nerfstudio_models; "
            f"got {options}."
        )
    source = None
    if config.load_run is not None:
        source = _inherit(config, config.load_run)
        config.load_dir = source.checkpoints
    if config.load_dir is not None:
        config.load_checkpoint = find_checkpoint(config.load_dir, config.load_step)
    assert config.load_checkpoint is not None
    config.load_checkpoint = config.load_checkpoint.absolute()  # a resumed run need not begin in this folder
    # Kept in our config.yml they would send ns-eval and ns-render after the source's step.
    config.load_dir = config.load_step = None
    return source


_OF_THE_VIEWS = ("camera_res_scale_factor", "patch_size")
"""Settings of a data manager that decide what of the data a scene is trained on."""


def _inherit(config: Any, run: Path) -> SourceRun:
    """Take over from a pretrained run what its views are and the sizes of its model."""
    model: SceneModelConfig | SplatModelConfig = config.pipeline.model
    source = read_run(run, model.kind)
    names = {f.name for f in dataclasses.fields(model)} - model.set_by_edit
    for name in names & source.model.keys():
        setattr(model, name, source.model[name])
    optimizer = source.model.get("camera_optimizer") or {}
    model.camera_optimizer = CameraOptimizerConfig(mode=optimizer.get("mode", "off"))
    datamanager = config.pipeline.datamanager
    data = datamanager.data or source.data
    if not data.exists():
        raise FileNotFoundError(f"the data of --load-run {run} are not at {data} any more; set --data.")
    datamanager.data = data
    datamanager.dataparser = source.dataparser
    for name in _OF_THE_VIEWS:
        if name in source.datamanager and hasattr(datamanager, name):
            setattr(datamanager, name, source.datamanager[name])
    if config.pipeline.source is None:
        config.pipeline.source = "current" if source.edited else "original"
    return source


def _check_folder(config: Any) -> None:
    """Refuse to write into another run's folder."""
    if "{" not in config.timestamp and (config.get_base_dir() / "config.yml").is_file():
        raise ValueError(
            f"there is a run in {config.get_base_dir()}; to go on with it set --resume to its config.yml, to begin "
            "anew leave --timestamp out."
        )


def _fit_to_checkpoint(config: Any) -> None:
    """Set the fields of the model that the checkpoint decides."""
    state = read_checkpoint(config.load_checkpoint, mmap=True)
    model: SceneModelConfig | SplatModelConfig = config.pipeline.model
    check_kind(state, config.load_checkpoint, model.kind)
    if isinstance(model, SceneModelConfig):
        model.implementation = implementation(state, config.load_checkpoint)  # type: ignore[assignment]
    # Views must be rendered from where the scene was trained from. The pipeline keeps the poses as they are.
    tuned = "_model.camera_optimizer.pose_adjustment" in state
    if not tuned:
        model.camera_optimizer = CameraOptimizerConfig(mode="off")
    elif model.camera_optimizer.mode == "off":
        model.camera_optimizer = CameraOptimizerConfig(mode="SO3xR3")
