"""Presets: sets of settings by name, or from a YAML file."""

from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from csd_2d.config import EditConfig, check_replaced


def preset_names() -> list[str]:
    """List the names that `load_preset` knows."""
    shipped = (entry.name for entry in files("csd_presets").iterdir())
    return ["default", *sorted(name.removesuffix(".yaml") for name in shipped if name.endswith(".yaml"))]


def load_preset(name: str, defaults: EditConfig | None = None) -> EditConfig:
    """Load the settings of a preset in `configs/`, by its name, or of a YAML file.

    A preset holds only what differs from the defaults (`EditConfig()` if None). `paper` is eq. 9 as the authors run it,
    without their scripts' defects. Its section `scene` is for the edit of a 3D scene, see `scene_preset`.

    Raises:
        ValueError: if there is no such preset or file, or it holds an unknown setting or a value out of range.

    Example:
        >>> load_preset("paper").kernel_input
        'noisy'
    """
    settings = _read_preset(name)
    settings.pop("scene", None)
    try:
        for setting in settings:
            check_replaced(setting)
        return replace(defaults or EditConfig(), **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"preset {name} cannot be used: {error}") from error


def scene_preset(name: str) -> dict[str, Any]:
    """Load the settings of a preset for the edit of a 3D scene, those of `csd_nerf`. Raises as `load_preset`."""
    settings = _read_preset(name).get("scene", {})
    if not isinstance(settings, dict):
        raise ValueError(f"preset {name} cannot be used: scene must hold settings, got {settings}.")
    return settings


def _read_preset(name: str) -> dict[str, Any]:
    if name == "default":
        return {}
    source = Path(name) if name.endswith((".yaml", ".yml")) else files("csd_presets") / f"{name}.yaml"
    if not source.is_file():
        raise ValueError(f"unknown preset '{name}'; expected {', '.join(preset_names())} or a .yaml file.")
    try:
        return dict(yaml.safe_load(source.read_text()) or {})
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"preset {name} cannot be used: {error}") from error
