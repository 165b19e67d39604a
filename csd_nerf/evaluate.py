"""Measure the edit of a scene: novel views before and after, and where they show the same; `csd eval`, `csd ablate`."""

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from nerfstudio.cameras.camera_paths import get_interpolated_camera_path
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.models.base_model import Model
from nerfstudio.models.splatfacto import SplatfactoModel
from nerfstudio.pipelines.base_pipeline import Pipeline
from torch import Tensor
from tqdm.auto import tqdm

from csd_2d.config import EditConfig
from csd_2d.evaluate import Subject
from csd_2d.metrics.consistency import Motion, reprojection
from csd_nerf.edit.selection import farthest_points
from csd_nerf.source_run import config_file
from csd_nerf.views.base import FAR, eval_mode

STOPS = 6
"""Number of training cameras between which the path leads."""
WIDTH = 640
"""Largest width of a novel view, or of one half of a film, in pixels."""


def novel_cameras(cameras: Cameras, count: int) -> Cameras:
    """Interpolate a path between training cameras that are far apart, without the cameras themselves.

    Example: with 24 views between 6 cameras, the path has five parts of 5 views, of which the last one is not used.

    Args:
        count: at least 1.
    """
    stops = path_stops(cameras)
    parts = len(stops) - 1
    each = -(-count // parts)
    path = path_through(stops, each + 2)
    between = [part * (each + 2) + 1 + i for part in range(parts) for i in range(each)][:count]
    return path[torch.tensor(between)]


def path_stops(cameras: Cameras) -> Cameras:
    """Choose cameras, at least 2, that a path through a scene leads through: far apart, a single one twice."""
    stops = farthest_points(cameras.camera_to_worlds[..., 3], STOPS)
    return cameras[torch.tensor(stops if len(stops) > 1 else 2 * stops)]


def path_through(stops: Cameras, each: int) -> Cameras:
    """Interpolate a path through some cameras, in the order that makes it short.

    Args:
        each: cameras from one stop to the next.
    """
    path = get_interpolated_camera_path(stops, each, order_poses=True)
    # nerfstudio gives its cameras the principal point of one stop, and twice that as their size.
    of_one = int(((stops.cx - path.cx[0]).abs() + (stops.cy - path.cy[0]).abs()).flatten().argmin())
    path.width = torch.full_like(path.width, int(stops.width[of_one]))
    path.height = torch.full_like(path.height, int(stops.height[of_one]))
    path.rescale_output_resolution(min(1.0, WIDTH / int(path.width.max())))
    return path


@dataclass
class NovelViews:
    """A scene, seen by some cameras."""

    images: list[Float[Tensor, "3 H W"]]
    points: list[Float[Tensor, "3 H W"]]
    """Of each pixel, the point of the scene that it shows; empty if depth was not asked for."""


@torch.no_grad()
def see(model: Model, cameras: Cameras, surfaces: bool, progress: str) -> NovelViews:
    """Render the images of cameras, and the surfaces that they show."""
    seen = NovelViews([], [])
    with eval_mode(model):
        for index in tqdm(range(len(cameras)), desc=progress, unit="view"):
            camera = cameras[index : index + 1].to(model.device)
            outputs = model.get_outputs_for_camera(camera)
            seen.images.append(outputs["rgb"].permute(2, 0, 1).clamp(0, 1).float().cpu())
            if surfaces:
                seen.points.append(_points(model, camera, outputs))
    return seen


def _points(model: Model, camera: Cameras, outputs: dict[str, Tensor]) -> Float[Tensor, "3 H W"]:
    depth = outputs["depth"][..., 0].float().cpu()
    rays = camera.to("cpu").generate_rays(camera_indices=0, keep_shape=True)
    directions = rays.directions
    if isinstance(model, SplatfactoModel):  # whose depth is along the camera's axis, and 0 where there is nothing
        depth = depth.where(outputs["accumulation"][..., 0].cpu() >= 0.5, FAR)
        axis = -camera.camera_to_worlds[0, :, 2].cpu()
        depth = depth / (directions @ axis).clamp(min=1e-6)
    return (rays.origins + directions * depth[..., None]).permute(2, 0, 1)


def motions(points: list[Float[Tensor, "3 H W"]], cameras: Cameras) -> list[Motion]:
    """Compute where the surfaces that each view shows lie in the next one, by depth; see `reprojection`."""
    cameras = cameras.to("cpu")
    intrinsics = cameras.get_intrinsics_matrices()
    return [
        reprojection(points[i], points[i + 1], cameras.camera_to_worlds[i + 1], intrinsics[i + 1])
        for i in range(len(points) - 1)
    ]


def subject_of(before: NovelViews, after: NovelViews, cameras: Cameras) -> Subject:
    """Make what is measured of the views of both scenes; the source's depth says where they show the same.

    Places are found again by a pinhole's projection: of other cameras it is not known where they are.
    """
    pinhole = bool((cameras.camera_type == CameraType.PERSPECTIVE.value).all())
    known = motions(before.points, cameras) if pinhole else None
    return Subject("scene", before.images, after.images, motions=known)


def novel_views(before: Path, after: Path, count: int, device: str) -> Subject:
    """Render novel views of two runs of nerfstudio along one path; the command behind `csd eval`.

    Args:
        before, after: RUN/config.yml, or the folder RUN. As ns-eval does, nerfstudio executes what they name.

    Raises:
        FileNotFoundError: if there is no run.
        ValueError: if both are not in the same coordinates, or count is less than 2.
    """
    if count < 2:
        raise ValueError(f"a path has at least 2 views, got {count}.")
    files = [config_file(run, option, "of a nerfstudio run") for run, option in ((before, "BEFORE"), (after, "AFTER"))]
    scenes = [_load(file, device) for file in files]
    poses = [_training_cameras(scene).camera_to_worlds for scene in scenes]
    if poses[0].shape != poses[1].shape or not torch.allclose(poses[0], poses[1], atol=1e-3):
        raise ValueError(
            f"{before} and {after} do not have the same training cameras; expected a scene and its edit (--load-run)."
        )
    cameras = novel_cameras(_training_cameras(scenes[0]), count)
    source = see(scenes[0].model, cameras, surfaces=True, progress="views before")
    return subject_of(source, see(scenes[1].model, cameras, surfaces=False, progress="views after"), cameras)


def _load(config: Path, device: str) -> Pipeline:
    from nerfstudio.utils.eval_utils import eval_setup  # imports all methods, and with them this module

    def settled(loaded: TrainerConfig) -> TrainerConfig:
        loaded.machine.device_type = "cuda" if device.startswith("cuda") else "cpu"
        return loaded

    return eval_setup(config, test_mode="val", update_config_callback=settled)[1]


def _training_cameras(pipeline: Pipeline) -> Cameras:
    dataset = pipeline.datamanager.train_dataset
    assert dataset is not None
    return dataset.cameras


def edit_scene(
    run: Path,
    prompt: str,
    edit: EditConfig,
    options: dict[str, Any],
    method: str,
    prior: str,
    folder: Path,
    device: str,
) -> Subject:
    """Edit the scene of a run as ns-train does, and render novel views before and after; behind `csd ablate`.

    Args:
        run: its config.yml.
        options: fields of the pipeline's config, and max_num_iterations.
        method: csd-edit, csd-edit-splat or csd-edit-tiny.
        folder: for the run of the edit.

    Raises:
        ValueError: for an unknown option or method, or as ns-train raises.
    """
    from nerfstudio.configs.method_configs import all_methods
    from nerfstudio.scripts.train import train_loop

    if not method.startswith("csd-edit") or method not in all_methods:
        raise ValueError(f"method must be one of {', '.join(_methods(all_methods))}; got {method}.")
    config: Any = copy.deepcopy(all_methods[method])
    config.load_run, config.output_dir, config.experiment_name = run.resolve(), folder.resolve(), "edit"
    config.vis, config.viewer.quit_on_train_completion = "tensorboard", True
    config.machine.seed, config.machine.device_type = edit.seed, "cuda" if device.startswith("cuda") else "cpu"
    config.steps_per_eval_batch = config.steps_per_eval_image = config.steps_per_eval_all_images = 10**9
    pipeline = config.pipeline
    pipeline.prompt, pipeline.prior, pipeline.report, pipeline.film_frames = prompt, prior, False, 0
    # The pipeline adds the run's seed to the edit's own.
    pipeline.edit = dataclasses.replace(edit, seed=0)
    for name, value in options.items():
        target = config if name == "max_num_iterations" else pipeline
        if not hasattr(target, name):
            raise ValueError(f"the edit of a scene has no option {name}.")
        setattr(target, name, value)
    config.set_timestamp()
    config.save_config()
    train_loop(local_rank=0, world_size=1, config=config)
    return novel_views(run, config.get_base_dir() / "config.yml", VIEWS, device)


VIEWS = 24
"""Novel views of a scene in a study."""


def _methods(known: dict[str, Any]) -> Iterator[str]:
    return (name for name in known if name.startswith("csd-edit"))
