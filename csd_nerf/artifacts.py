"""Pictures, film and report of a run, for people to look at."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.models.base_model import Model
from nerfstudio.pipelines.base_pipeline import VanillaPipeline
from torch import Tensor
from tqdm.auto import tqdm

from csd_2d.evaluate import Learned, Subject, evaluate
from csd_2d.io.files import replacing
from csd_2d.io.images import write_image
from csd_2d.io.video import Clip, Streamed, write_clip
from csd_2d.metrics.fidelity import change
from csd_2d.report import write_report
from csd_nerf.console import say
from csd_nerf.cost import Cost
from csd_nerf.edit.selection import farthest_points
from csd_nerf.evaluate import NovelViews, novel_cameras, path_stops, path_through, see, subject_of
from csd_nerf.source_run import read_checkpoint
from csd_nerf.views.base import TrainingViews, eval_mode

SHOWN = 8
"""Number of training views whose change is shown and measured, spread over the cameras' positions."""
MEASURED = 12
"""Number of novel views that are measured."""
SMALLEST_FILM = 256
"""Shortest side of one half of a film, in pixels; smaller ones are enlarged by a whole number."""


def render(model: Model, camera: Cameras) -> Float[Tensor, "3 H W"]:
    """Render a camera's image, RGB in [0, 1], on the CPU."""
    with eval_mode(model):
        rgb = model.get_outputs_for_camera(camera.to(model.device))["rgb"]
    return rgb.permute(2, 0, 1).clamp(0, 1).float().cpu()


Frames = list[UInt8[Tensor, "3 h w"]]


def film(model: Model, cameras: Cameras) -> Frames:
    """Render the images of cameras as bytes: a film of floats need not fit in memory."""
    bar = tqdm(range(len(cameras)), desc="film", unit="frame")
    return [(255 * render(model, cameras[i : i + 1])).round().byte() for i in bar]


def side_by_side(films: Sequence[Frames], enlarged: int = 1) -> Clip:
    """Join films of the same cameras into one."""

    def pictures() -> Iterator[Tensor]:
        for frames in zip(*films, strict=True):
            picture = torch.cat(frames, dim=-1)[None].float() / 255
            yield F.interpolate(picture, scale_factor=enlarged, mode="bicubic").clamp(0, 1)[0]

    height, width = films[0][0].shape[-2:]
    return Clip(Streamed([(enlarged * height, enlarged * len(films) * width)] * len(films[0]), pictures))


def camera_path(cameras: Cameras, frames: int) -> Cameras:
    """Interpolate a path through training cameras, where a captured scene is known to look right.

    Args:
        frames: number of cameras, at least.
    """
    stops = path_stops(cameras)
    path = path_through(stops, -(-frames // (len(stops) - 1)))
    # Many players refuse an odd number of rows; the last one is left out.
    path.width, path.height = path.width - path.width % 2, path.height - path.height % 2
    return path[:frames]


class Artifacts:
    """Pictures, film and figures of an edit, in the run's folder.

    before_after/: the image that conditioned the edit of a view, beside renders of the scene before and after;
    turntable.mp4: the scene before and after, side by side; report.html and report.json: metrics of novel views;
    edit.json: prompts, settings and costs; after distill also edited/: the edited scene from the training cameras.

    Args:
        source: the image that conditions the edit of a view.
        checkpoint: of the scene before the edit.
        load_masks: one mask a view; None: everything may change.
    """

    def __init__(
        self,
        pipeline: VanillaPipeline,
        views: TrainingViews,
        source: Callable[[int], Tensor],
        checkpoint: Path,
        load_masks: Callable[[], list[Tensor]] | None,
    ) -> None:
        self._pipeline, self._views, self._source = pipeline, views, source
        self._checkpoint, self._load_masks = checkpoint, load_masks

    def write(self, folder: Path, report: dict[str, Any], film_frames: int, measured: bool, all_views: bool) -> None:
        """Write pictures, film and report; the pipeline is unchanged afterwards.

        Args:
            report: the content of edit.json; `change`, the cost of this stage and versions are added.
            film_frames: 0 for no film.
            measured: also write the metrics of novel views.
            all_views: also write renders of the edited scene from each training camera.
        """
        views, cost = self._views, Cost()
        also = (f", a film of {film_frames} frames" if film_frames else "") + (", metrics" if measured else "")
        say(f"The scene is learned and saved. Making pictures of it before and after{also} …")
        with cost.counted(self._pipeline.device):
            shown = farthest_points(views.positions(), SHOWN)
            cameras = camera_path(views.cameras, film_frames) if film_frames else None
            novel = novel_cameras(views.cameras, MEASURED) if measured else None
            after, films, novel_after = self._seen(shown, cameras, novel)
            with self._before():
                before, films_before, novel_before = self._seen(shown, cameras, novel)
            for index, *scenes in zip(shown, before, after, strict=True):
                picture = torch.cat([self._source(index), *scenes], dim=-1)
                write_image(picture, folder / "before_after" / f"{views.name(index)}.png")
            for index in tqdm(range(len(views)), desc="edited views", unit="view") if all_views else ():
                write_image(views.render(index), folder / "edited" / f"{views.name(index)}.png")
            if cameras is not None:
                enlarged = -(-SMALLEST_FILM // min(films[0].shape[-2:]))
                write_clip(side_by_side([films_before, films], enlarged), folder / "turntable.mp4")
            if novel is not None:
                self._measure(subject_of(novel_before, novel_after, novel), folder, report)
        masks = None if self._load_masks is None else self._load_masks()
        report["change"] = change(before, after, masks and [masks[index] for index in shown])
        report["costs"]["artifacts"] = cost.rounded()
        report["versions"] = {name: version(name) for name in ("csd-edit", "nerfstudio", "diffusers", "torch")}
        with replacing(folder / "edit.json") as temporary:
            temporary.write_text(json.dumps(report, indent=1, default=str), encoding="utf-8")

    def _measure(self, subject: Subject, folder: Path, report: dict[str, Any]) -> None:
        command = f"csd eval SCENE/config.yml {folder / 'config.yml'} --output DIR"
        networks = Learned(None, self._pipeline.device, True, f"it is not loaded after a training; {command} does.")
        settings = {name: report[name] for name in ("prompt", "history", "scene", "steps", "seed", "settings")}
        write_report(evaluate(subject, networks, "measuring"), subject, folder, report["prompt"], settings)

    def _seen(
        self, shown: list[int], cameras: Cameras | None, novel: Cameras | None
    ) -> tuple[list[Tensor], Frames, NovelViews]:
        model = self._pipeline.model
        with self._views.undisturbed():
            frames = [] if cameras is None else film(model, cameras)
            views = NovelViews([], []) if novel is None else see(model, novel, surfaces=True, progress="novel views")
        return [self._views.render(index) for index in shown], frames, views

    @contextmanager
    def _before(self) -> Iterator[None]:
        """Load the scene from before the edit into the pipeline inside the block."""
        edited = {name: tensor.cpu().clone() for name, tensor in self._pipeline.state_dict().items()}
        self._pipeline.load_pipeline(read_checkpoint(self._checkpoint), step=0)
        try:
            yield
        finally:
            self._pipeline.load_pipeline(edited, step=0)


def results(folder: Path) -> dict[str, str]:
    """List what there is in the folder of an edit for people to look at, and what it shows."""
    kinds = {
        "before_after": "of some views: what the edit was conditioned on, the scene before, the scene after",
        "edited": "the edited training views",
        "turntable.mp4": "a film of the scene before and after",
        "report.html": "metrics of novel views, with pictures",
        "edit.json": "prompts, settings, change and costs",
    }
    return {name: what for name, what in kinds.items() if (folder / name).exists()}


def edits_before(checkpoint: Path) -> list[str]:
    """Read the prompts of the edits that made the scene of a checkpoint, the first one first."""
    path = checkpoint.parent.parent / "edit.json"
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["history"]
    except (OSError, ValueError, KeyError, TypeError):  # not an edit, or an unfinished one
        return []
    return [str(prompt) for prompt in history] if isinstance(history, list) else []
