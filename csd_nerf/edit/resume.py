"""Exact resume: the state that checkpoints leave out, and the config of an interrupted run."""

import dataclasses
import random
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from csd_nerf.console import warn
from csd_nerf.source_run import PlainName, PlainObject, config_file, dataparser_of, read_plain_config

EDIT_STATE_SUFFIX = ".rest"
"""Suffix of the file beside a step's .ckpt that holds the state nerfstudio leaves out."""


def random_state() -> dict[str, Any]:
    """Return the state of all generators that nerfstudio draws from, loadable with `weights_only`."""
    _, keys, *numbers = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(np.asarray(keys).astype(np.int64)), *numbers),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    random.setstate(state["python"])
    keys, *numbers = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *numbers))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def latest_whole_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Read the last checkpoint that is whole, and the edit's state beside it; None if there is none.

    One that is cut short is skipped with a warning.
    """
    for path in sorted(folder.glob("step-*.ckpt"), reverse=True):
        try:
            checkpoint, edit_state = (
                torch.load(half, map_location="cpu", weights_only=True)
                for half in (path, path.with_suffix(EDIT_STATE_SUFFIX))
            )
            if checkpoint["step"] != edit_state["step"]:
                raise ValueError("two halves of different steps")
        except (OSError, RuntimeError, UnpicklingError, EOFError, KeyError, TypeError, ValueError):
            warn(f"{path.name} is not whole; going on from what was saved before it.")
            continue
        return checkpoint, edit_state
    return None


def restore_config(config: Any, path: Path, kept: frozenset[str]) -> None:
    """Load the settings of an interrupted run into the config of its method.

    The file is read, not executed: only values whose place in the config is known are taken.

    Args:
        config: of the run's method; changed in place.
        path: RUN/config.yml, or the folder RUN.
        kept: fields, with dots for nested ones, that are not restored.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is of another method, or cannot be read as its config.
    """
    path = config_file(path, "--resume", "of an edit that was interrupted")
    saved = read_plain_config(path)
    if not isinstance(saved, PlainObject) or saved.get("method_name") != config.method_name:
        name = saved.get("method_name") if isinstance(saved, dict) else None
        raise ValueError(f"--resume {path} is a run of '{name}', not of {config.method_name}.")
    try:
        restored = _restored(config, saved, kept)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"--resume {path} cannot be read as the config of a run: {error}.") from error
    for field in dataclasses.fields(config):
        setattr(config, field.name, getattr(restored, field.name))
    run = path.absolute().parent
    # The run may have been moved, or begun from another folder.
    config.timestamp, config.experiment_name, config.output_dir = run.name, run.parents[1].name, run.parents[2]
    if config.get_base_dir() != run:
        raise ValueError(f"--resume {path} must lie in EXPERIMENT/{config.method_name}/TIMESTAMP, as ns-train left it.")


def _restored(default: Any, saved: Any, kept: frozenset[str] = frozenset()) -> Any:
    """Replace values of `default` by those of `saved`, however deep."""
    if isinstance(saved, PlainName):  # a class or a function, which the default knows
        return default
    if isinstance(saved, PlainObject):
        if not saved.is_of(type(default)):
            default = dataparser_of(saved)
        below = {name.partition(".")[::2] for name in kept}
        values = {
            f.name: _restored(
                getattr(default, f.name),
                saved[f.name],
                frozenset(rest for name, rest in below if name == f.name and rest),
            )
            for f in dataclasses.fields(default)
            if f.name in saved and f.name not in kept
        }
        return dataclasses.replace(default, **values)
    if isinstance(saved, dict):
        defaults = default if isinstance(default, dict) else {}
        return {key: _restored(defaults.get(key), value) for key, value in saved.items()}
    return saved
