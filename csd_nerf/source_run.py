"""Read a pretrained run: its config, without executing it, and its checkpoint."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
import yaml
from nerfstudio.configs.dataparser_configs import all_dataparsers
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.utils.external import TCNN_EXISTS
from torch import Tensor

SceneKind = Literal["nerfacto", "splatfacto"]
"""Model of a scene: nerfacto or splatfacto. Our own methods have the parameters of one or the other."""
_EXPECTED: dict[SceneKind, str] = {"nerfacto": "nerfacto or csd-scene-tiny", "splatfacto": "splatfacto"}
_EDITED_BY: dict[SceneKind, str] = {"nerfacto": "csd-edit", "splatfacto": "csd-edit-splat"}


@dataclass(frozen=True)
class SourceRun:
    """A run of nerfacto, of splatfacto or of one of our methods."""

    model: dict[str, Any]
    """Fields of its model's config."""
    dataparser: DataParserConfig
    datamanager: dict[str, Any]
    """Fields of its data manager's config."""
    data: Path
    """Data it was trained on."""
    checkpoints: Path
    """Folder with its checkpoints."""
    edited: bool
    """Whether it is an edit itself, so that its scene does not look like its data."""


class PlainObject(dict):
    """Fields of a Python object in a config, and the name of the object's class."""

    def __init__(self, name: str, values: dict[Any, Any]) -> None:
        super().__init__(values)
        self.name = name

    def is_of(self, kind: type) -> bool:
        """Compare the name of the object's class."""
        return self.name == f"{kind.__module__}.{kind.__qualname__}"


class PlainName(str):
    """Name of a class or a function in a config."""


class _PlainLoader(yaml.SafeLoader):
    """Reads Python objects as their fields.

    nerfstudio itself reads a config with `yaml.Loader`, which calls whatever the file names: a run from a stranger
    could do anything, and a run of a method that is not installed could not be read at all.
    """

    def construct_python(self, suffix: str, node: yaml.Node) -> Any:
        kind, _, name = suffix.partition(":")
        if isinstance(node, yaml.MappingNode):
            return PlainObject(name, self.construct_mapping(node, deep=True))
        if isinstance(node, yaml.SequenceNode):
            values = self.construct_sequence(node, deep=True)
            if name.endswith("Path"):
                return Path(*values)
            return tuple(values) if kind == "tuple" else values
        return PlainName(name)


_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", _PlainLoader.construct_python)


def config_file(run: Path, option: str, expected: str) -> Path:
    """Find RUN/config.yml, given as that or as RUN.

    Args:
        option, expected: the user's option and what it should name, for the error's message.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = run / "config.yml" if run.is_dir() else run
    if not path.is_file():
        raise FileNotFoundError(f"no run at {option} {path}; expected the config.yml {expected}.")
    return path


def read_plain_config(path: Path) -> Any:
    """Read a run's config.yml with its objects as `PlainObject`; nothing in it is executed.

    Raises:
        ValueError: if it is no such file.
    """
    try:
        return yaml.load(path.read_text(encoding="utf8"), Loader=_PlainLoader)
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the config of a nerfstudio run.") from error


def read_run(path: Path, kind: SceneKind) -> SourceRun:
    """Read RUN/config.yml, or the config of the folder RUN.

    Args:
        kind: required model of the scene.

    Raises:
        FileNotFoundError: if there is no such config.
        ValueError: if its scene is of another kind, or its data parser is not known here.
    """
    config_path = config_file(path, "--load-run", f"that ns-train {kind} wrote")
    config = read_plain_config(config_path)
    try:
        pipeline = config["pipeline"]
        model, datamanager = pipeline["model"], pipeline["datamanager"]
        dataparser, checkpoints = datamanager["dataparser"], config_path.parent / config["relative_model_dir"]
        data = Path(datamanager.get("data") or dataparser["data"])
        if not (isinstance(model, PlainObject) and isinstance(dataparser, PlainObject)):
            raise TypeError("model and data parser must be objects")
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"--load-run {config_path} is not the config of a nerfstudio run.") from error
    found: SceneKind | None = None
    if {"proposal_net_args_list", "num_nerf_samples_per_ray"} <= model.keys():
        found = "nerfacto"
    elif {"sh_degree", "cull_alpha_thresh"} <= model.keys():
        found = "splatfacto"
    _refuse_others(found, kind, f"--load-run {config_path} is a run of '{config.get('method_name')}'")
    edited = str(config.get("method_name")).startswith("csd-edit")
    return SourceRun(dict(model), dataparser_of(dataparser), dict(datamanager), data, checkpoints, edited)


def _refuse_others(found: SceneKind | None, expected: SceneKind, what: str) -> None:
    if found is None:
        raise ValueError(f"{what}; expected {_EXPECTED[expected]}.")
    if found != expected:
        raise ValueError(f"{what}; a scene of {found} is edited by ns-train {_EDITED_BY[found]}.")


def dataparser_of(values: PlainObject) -> DataParserConfig:
    """Rebuild the config of a data parser that nerfstudio knows. ValueError if it knows none of that class."""
    if values.name.startswith(("csd_2d.", "csd_nerf.")):
        raise ValueError(
            "the run was written by another version of csd-edit; begin anew, with its scene as --load-run."
        )
    kinds = [type(config) for config in all_dataparsers.values() if values.is_of(type(config))]
    if not kinds:
        raise ValueError(f"the run's config holds a {values.name}, which is not installed.")
    names = {f.name for f in dataclasses.fields(kinds[0])} - {"_target"}
    return kinds[0](**{name: value for name, value in values.items() if name in names})


def find_checkpoint(folder: Path, step: int | None = None) -> Path:
    """Find the checkpoint of a step, or the latest one, in a folder `nerfstudio_models`.

    Raises:
        FileNotFoundError: if there is none.
    """
    if step is not None:
        path = folder / f"step-{step:09d}.ckpt"
        if path.is_file():
            return path
    elif paths := sorted(folder.glob("step-*.ckpt")):
        return paths[-1]
    raise FileNotFoundError(
        f"no checkpoint{'' if step is None else f' of step {step}'} in {folder}; expected a file like "
        "step-000029999.ckpt, which ns-train writes into RUN/nerfstudio_models."
    )


def read_checkpoint(path: Path, mmap: bool = False) -> dict[str, Tensor]:
    """Read the tensors of the pipeline in a checkpoint, by their present names.

    Prefixes of distributed training are removed; Gaussians get today's names whatever version wrote them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is cut short or not a nerfstudio checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}.")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        pipeline: dict[str, Tensor] = loaded["pipeline"]
        if not all(isinstance(value, Tensor) for value in pipeline.values()):
            raise TypeError("a pipeline's state is tensors")
    except (RuntimeError, UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as a nerfstudio checkpoint.") from error
    return {_present_name(key): value for key, value in pipeline.items()}


def _present_name(key: str) -> str:
    key = key.removeprefix("module.").replace("_model.module.", "_model.", 1)
    name = key.removeprefix("_model.")
    return f"{_GAUSSIANS}{name}" if name in _GAUSSIAN_NAMES else key


_GAUSSIANS = "_model.gauss_params."
_GAUSSIAN_NAMES = ("means", "scales", "quats", "features_dc", "features_rest", "opacities")


def check_kind(state: dict[str, Tensor], path: Path, kind: SceneKind) -> None:
    """Check the kind of scene in a checkpoint by its tensors.

    Raises:
        ValueError: if not those of a scene of this kind.
    """
    found: SceneKind | None = None
    if f"{_GAUSSIANS}means" in state:
        found = "splatfacto"
    elif any(key.startswith("_model.field.") and key.endswith((".params", "hash_table")) for key in state):
        found = "nerfacto"
    _refuse_others(found, kind, f"{path} is the checkpoint of {found or 'another method'}")


def implementation(state: dict[str, Tensor], path: Path) -> str:
    """Determine whether tinycudann or torch wrote a nerfacto checkpoint.

    Raises:
        ValueError: if tinycudann is needed and cannot run here.
    """
    if any(key.endswith("hash_table") for key in state):
        return "torch"
    if not (TCNN_EXISTS and torch.cuda.is_available()):
        raise ValueError(
            f"{path} was trained with tinycudann, which cannot run here (it needs the package tinycudann and a GPU); "
            "install it, or train the scene with --pipeline.model.implementation torch."
        )
    return "tcnn"


_OPTIONAL = ("_model.lpips.", "_model.camera_optimizer.")
"""May be absent on either side: LPIPS is a metric, and the poses are not tuned by every run."""


def _is_model(key: str) -> bool:
    return key.startswith("_model.") and not key.startswith(_OPTIONAL)


_PER_IMAGE = (
    "_model.field.embedding_appearance.embedding.weight",
    "_model.bil_grids.grids",
    "_model.camera_optimizer.pose_adjustment",
)
"""Tensors with a row for each training image."""


def _size(key: str, value: Tensor) -> object:
    """Return the part of a tensor's shape, or the number, that must be equal for it to fit."""
    if value.ndim == 0:  # single numbers are sizes, such as max_res, which no tensor's shape need show
        return value.item()
    return value.shape[1:] if key.startswith(_GAUSSIANS) else value.shape


def check_fits(state: dict[str, Tensor], model_state: dict[str, Tensor]) -> None:
    """Compare a checkpoint's tensors with those of the pipeline it is meant for.

    nerfstudio's own `load_state_dict` falls back to loading what fits and leaves the rest random. A model of Gaussians
    takes any number of them.

    Raises:
        ValueError: if a tensor is missing, unknown or of another shape.
    """
    theirs, ours = (
        {key: _size(key, value) for key, value in tensors.items() if _is_model(key)} for tensors in (state, model_state)
    )
    for rows in state.keys() & model_state.keys() & set(_PER_IMAGE):
        if len(state[rows]) != len(model_state[rows]):
            raise ValueError(
                f"the checkpoint was trained on {len(state[rows])} images, but --data has "
                f"{len(model_state[rows])} training images; give the data the scene was trained on."
            )
    if len({len(value) for key, value in state.items() if key.startswith(_GAUSSIANS)}) > 1:
        raise ValueError("the checkpoint is damaged: its tensors are of different numbers of Gaussians.")
    differing = sorted(
        key.removeprefix("_model.") for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)
    )
    if differing:
        shown = ", ".join(differing[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
        raise ValueError(
            f"the checkpoint does not fit the model ({shown}): it is of another method or of other sizes; "
            "give --load-run RUN/config.yml, which takes over the run's sizes, instead of --load-dir."
        )
