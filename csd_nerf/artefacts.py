"""What an edit leaves for people to look at, and what it cost."""

import dataclasses
import json
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from nerfstudio.cameras.camera_paths import get_interpolated_camera_path
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.models.base_model import Model
from nerfstudio.pipelines.base_pipeline import VanillaPipeline
from torch import Tensor
from tqdm.auto import tqdm

from csd_2d.files import replacing
from csd_2d.images import write_image
from csd_2d.metrics import psnr
from csd_2d.video import Clip, Streamed, write_clip
from csd_nerf.scene import TrainingViews, eval_mode
from csd_nerf.selection import ViewRounds
from csd_nerf.source_run import read_checkpoint

SHOWN = 8
"""Training views of which pairs are written and whose change is measured, spread over the cameras' positions."""
STOPS = 6
"""Training cameras that the film passes."""
FILM_WIDTH = 640
"""Largest width of one half of a film, in pixels."""


@dataclass
class Cost:
    """Of a stage of a run."""

    seconds: float = 0.0
    peak_memory_mb: float = 0.0
    """On a GPU what torch took at most in this stage; without one what the process took at most until its end."""

    @contextmanager
    def counted(self, device: torch.device) -> Iterator[None]:
        """Adds what the block costs on a device; at its end the block must have waited for what it started there."""
        begin = time.monotonic()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        yield
        self.seconds += time.monotonic() - begin
        self.peak_memory_mb = max(self.peak_memory_mb, _peak_memory_mb(device))

    def rounded(self) -> dict[str, float]:
        """To a tenth of a second and of a megabyte."""
        return {name: round(value, 1) for name, value in dataclasses.asdict(self).items()}


def _peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def render(model: Model, camera: Cameras) -> Float[Tensor, "3 H W"]:
    """What a camera sees, RGB in [0, 1], on the CPU."""
    with eval_mode(model):
        rgb = model.get_outputs_for_camera(camera.to(model.device))["rgb"]
    return rgb.permute(2, 0, 1).clamp(0, 1).float().cpu()


Frames = list[UInt8[Tensor, "3 h w"]]


def film(model: Model, cameras: Cameras) -> Frames:
    """What cameras see of a scene, as bytes: a film of floats need not fit in memory."""
    bar = tqdm(range(len(cameras)), desc="film", unit="frame")
    return [(255 * render(model, cameras[i : i + 1])).round().byte() for i in bar]


def side_by_side(films: Sequence[Frames], enlarged: int = 1) -> Clip:
    """Films of the same cameras as one."""

    def pictures() -> Iterator[Tensor]:
        for frames in zip(*films, strict=True):
            picture = torch.cat(frames, dim=-1)[None].float() / 255
            yield F.interpolate(picture, scale_factor=enlarged, mode="bicubic").clamp(0, 1)[0]

    height, width = films[0][0].shape[-2:]
    return Clip(Streamed([(enlarged * height, enlarged * len(films) * width)] * len(films[0]), pictures))


def camera_path(cameras: Cameras, frames: int) -> Cameras:
    """From training camera to training camera: where a captured scene is known to look right.

    Args:
        frames: how many cameras there will be, at least.
    """
    stops = _well_spread(cameras.camera_to_worlds[..., 3], STOPS)
    stops = stops if len(stops) > 1 else 2 * stops  # a path from a single camera to itself
    path = get_interpolated_camera_path(cameras[torch.tensor(stops)], -(-frames // (len(stops) - 1)), order_poses=True)
    width = int(path.width.max())
    path.rescale_output_resolution(min(1.0, FILM_WIDTH / width))
    return path[:frames]


def _well_spread(positions: Float[Tensor, "n 3"], count: int) -> list[int]:
    """Which of some cameras cover their positions best."""
    return next(ViewRounds(positions.cpu(), count, "spread", torch.Generator().manual_seed(0)))


class Artefacts:
    """Pictures, film and figures of an edit, in the run's folder.

    before_after/: pairs of what the edit of a view was conditioned on and what the edited scene shows there;
    turntable.mp4: the scene before and after, side by side; edit.json: what was asked for and what it cost; after
    distill also edited/, what the edited scene shows from the training cameras.

    Args:
        source: what the edit of a view is conditioned on.
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

    def write(self, folder: Path, report: dict[str, Any], film_frames: int, all_views: bool) -> None:
        """Writes them; leaves the pipeline as it was.

        Args:
            report: of edit.json, which adds `change`, the cost of this stage and versions.
            film_frames: 0 for no film.
            all_views: write what the edited scene shows from each training camera.
        """
        views, cost = self._views, Cost()
        with cost.counted(self._pipeline.device):
            shown = _well_spread(views.positions(), SHOWN)
            cameras = camera_path(views.cameras, film_frames) if film_frames else None
            after, films = self._seen(shown, cameras)
            with self._before():
                before, films_before = self._seen(shown, cameras)
            for index, picture in zip(shown, after, strict=True):
                pair = torch.cat([self._source(index), picture], dim=-1)
                write_image(pair, folder / "before_after" / f"{views.name(index)}.png")
            for index in tqdm(range(len(views)), desc="edited views", unit="view") if all_views else ():
                write_image(views.render(index), folder / "edited" / f"{views.name(index)}.png")
            if cameras is not None:
                write_clip(side_by_side([films_before, films]), folder / "turntable.mp4")
        masks = None if self._load_masks is None else self._load_masks()
        report["change"] = change(before, after, masks and [masks[index] for index in shown])
        report["costs"]["artefacts"] = cost.rounded()
        report["versions"] = {name: version(name) for name in ("csd-edit", "nerfstudio", "diffusers", "torch")}
        with replacing(folder / "edit.json") as temporary:
            temporary.write_text(json.dumps(report, indent=1, default=str), encoding="utf-8")

    def _seen(self, shown: list[int], cameras: Cameras | None) -> tuple[list[Tensor], Frames]:
        with self._views.undisturbed():
            frames = [] if cameras is None else film(self._pipeline.model, cameras)
        return [self._views.render(index) for index in shown], frames

    @contextmanager
    def _before(self) -> Iterator[None]:
        """Within the block the pipeline holds the scene as it was before the edit."""
        edited = {name: tensor.cpu().clone() for name, tensor in self._pipeline.state_dict().items()}
        self._pipeline.load_pipeline(read_checkpoint(self._checkpoint), step=0)
        try:
            yield
        finally:
            self._pipeline.load_pipeline(edited, step=0)


def change(before: list[Tensor], after: list[Tensor], masks: list[Tensor] | None) -> dict[str, float]:
    """How much a scene changed, as it is seen from some cameras.

    Returns:
        Mean absolute difference of RGB in [0, 1]; with masks within them (weighted by the mask) and where they are 0,
        if they are anywhere, and there the PSNR in dB, too.

    Example:
        >>> black, white = torch.zeros(3, 2, 2), torch.ones(3, 2, 2)
        >>> change([black], [white], [torch.tensor([[[1.0, 1.0], [0.5, 0.0]]])])
        {'inside': 1.0, 'outside': 1.0, 'psnr_outside': 0.0}
    """
    old, new = (torch.cat([picture.flatten(1) for picture in pictures], dim=1) for pictures in (before, after))
    difference = new - old
    if masks is None:
        return {"mean": round(difference.abs().mean().item(), 4)}
    weight = torch.cat([mask.flatten() for mask in masks])
    untouched = weight == 0
    inside = (difference.abs().mean(0) * weight).sum() / weight.sum().clamp(min=1e-6)
    inner = {"inside": round(inside.item(), 4)}
    if not untouched.any():
        return inner
    return inner | {
        "outside": round(difference[:, untouched].abs().mean().item(), 4),
        "psnr_outside": round(psnr(new[:, untouched], old[:, untouched]), 2) + 0.0,
    }


def edits_before(checkpoint: Path) -> list[str]:
    """Prompts of the edits that made the scene of a checkpoint, the first one first."""
    path = checkpoint.parent.parent / "edit.json"
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["history"]
    except (OSError, ValueError, KeyError, TypeError):  # not an edit, or an unfinished one
        return []
    return [str(prompt) for prompt in history] if isinstance(history, list) else []
