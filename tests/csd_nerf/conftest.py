"""Scenes and runs that several test files share. Training runs in this process: ns-train takes a minute to start."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torchvision

from csd_nerf.procedural_scene import write_scene


def train_in_process(method: str, output: Path, iterations: int, **options: Any) -> Path:
    """What `ns-train METHOD` does after parsing; returns the run's folder.

    Args:
        options: fields of the config, with `__` for a dot: `pipeline__prompt="..."`. Without `pipeline__report` novel
            views are not measured, which takes longer than a run of a few steps; of splats they always are.
    """
    from nerfstudio.configs.method_configs import all_methods
    from nerfstudio.scripts.train import main

    config = copy.deepcopy(all_methods[method])
    config.output_dir = output
    config.max_num_iterations = iterations
    config.machine.device_type = "cpu"
    config.vis = "tensorboard"  # no viewer, no network
    if method in ("csd-edit", "csd-edit-tiny"):
        config.pipeline.report = False  # type: ignore[attr-defined]
    for path, value in options.items():
        *parents, name = path.split("__")
        target = config
        for parent in parents:
            target = getattr(target, parent)
        assert hasattr(target, name), path
        setattr(target, name, value)
    main(config)  # type: ignore[arg-type]
    return config.get_base_dir()


def train_stock(method: str, output: Path, iterations: int, **options: Any) -> Path:
    """`train_in_process` for a method of nerfstudio's own, whose LPIPS would download weights: here they are random."""
    build = torchvision.models.alexnet
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models, "alexnet", lambda weights: build(weights=None))
        return train_in_process(method, output, iterations, **options)


@pytest.fixture(scope="session")
def scene_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight views of 32x24 px."""
    folder = tmp_path_factory.mktemp("data") / "island"
    write_scene(folder, num_views=8, size=(32, 24))
    return folder


@pytest.fixture(scope="session")
def num_views(scene_data: Path) -> int:
    """How many of them are for training."""
    return len(json.loads((scene_data / "transforms.json").read_text())["train_filenames"])


@pytest.fixture(scope="session")
def scene_run(scene_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene of csd-scene-tiny, hardly trained."""
    return train_in_process("csd-scene-tiny", tmp_path_factory.mktemp("scene"), 30, data=scene_data)
