"""`csd demo`: generate a scene, train on it, edit it with csd-edit-tiny and render a video, on a CPU and offline."""

import copy
import dataclasses
import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.models.base_model import Model
from nerfstudio.models.nerfacto import NerfactoModelConfig
from nerfstudio.pipelines.base_pipeline import Pipeline
from nerfstudio.scripts.train import train_loop
from nerfstudio.utils.eval_utils import eval_setup
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm.auto import tqdm

from csd_2d.closed_form import known_answers
from csd_2d.io.files import replacing
from csd_2d.io.images import to_tensor, write_image
from csd_2d.io.video import Clip, write_clip
from csd_2d.metrics.fidelity import psnr
from csd_2d.presets import load_preset
from csd_nerf.artifacts import film, render, side_by_side
from csd_nerf.methods import csd_edit_tiny, csd_scene_tiny
from csd_nerf.procedural_scene import FAR_PLANE, NEAR_PLANE, intrinsics, turntable, write_scene

VIEWS = 48
SCENE_STEPS = 500
EDIT_STEPS = 450
FILM_FRAMES = 24
FILM_SIZE = (96, 72)
SHEET_VIEWS = 5
SHEET_WIDTH = 240
"""Width of one image of the contact sheet, in pixels."""


class _Stopwatch:
    """A timer that prints the name of each stage and records how many seconds it took."""

    def __init__(self, stages: int) -> None:
        self.seconds: dict[str, float] = {}
        self._stages = stages

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        print(f"\n[{len(self.seconds) + 1}/{self._stages}] {name}", flush=True)
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 1)


def run_demo(
    folder: Path, prompt: str, seed: int = 0, preset: str = "default", guidance_scale: float | None = None
) -> Path:
    """Write before_after.png, turntable.mp4, edited/ and report.json to a folder, next to the scene and both runs.

    Args:
        folder: new or empty.
        prompt: an instruction from `csd_2d.closed_form`. Its answer is known, and the result is compared with it.
        preset, guidance_scale: settings of the edit, see `csd_2d.presets.load_preset` and `EditConfig`.

    Returns:
        The folder.

    Raises:
        ValueError: if there is no known answer to the prompt; nothing is written in this case.
    """
    known_answers(prompt, torch.zeros(1, 3, 8, 8))
    folder = folder.resolve()  # runs store the path of their data and may be opened from any directory
    watch = _Stopwatch(stages=5)
    with watch.stage("writing a procedural scene"):
        write_scene(folder / "scene", VIEWS, progress="views")
    with watch.stage("learning the scene (ns-train csd-scene-tiny)"):
        scene_run = train(scene_config(folder, seed))
    with watch.stage(f"editing it: {prompt} (ns-train csd-edit-tiny)"):
        edit_run = train(edit_config(folder, scene_run, prompt, seed, preset, guidance_scale))
    with watch.stage("rendering novel views and the film"):
        before, after = (load_scene(run) for run in (scene_run, edit_run))
        novel = NovelViews(before, after, prompt)
        turn = _turntable(before.model, after.model)
    with watch.stage("writing the results"):
        write_image(novel.contact_sheet(), folder / "before_after.png")
        write_clip(turn, folder / "turntable.mp4")
        (edit_run.parent / "edited").rename(folder / "edited")
    report = {
        "prompt": prompt,
        "seed": seed,
        "answer": novel.answer_name,
        "psnr": novel.psnr(),
        "seconds": watch.seconds,
        "seconds_total": round(sum(watch.seconds.values()), 1),
        "settings": _settings(edit_run, preset),
        "versions": {name: version(name) for name in ("csd-edit", "nerfstudio", "torch")},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    with replacing(folder / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2), encoding="utf-8")
    _announce(report)
    return folder


def scene_config(folder: Path, seed: int) -> TrainerConfig:
    """Configure csd-scene-tiny to train on FOLDER/scene, in the scene's own coordinates."""
    config = copy.deepcopy(csd_scene_tiny.config)
    config.data = folder / "scene"
    config.max_num_iterations = SCENE_STEPS
    dataparser = config.pipeline.datamanager.dataparser  # type: ignore[attr-defined]
    dataparser.orientation_method = dataparser.center_method = "none"
    dataparser.auto_scale_poses = False
    model: NerfactoModelConfig = config.pipeline.model  # type: ignore[assignment]
    model.near_plane, model.far_plane = NEAR_PLANE, FAR_PLANE
    model.proposal_initial_sampler = "uniform"
    return _demo_run(config, folder, seed)


def edit_config(
    folder: Path,
    scene_run: Path,
    prompt: str,
    seed: int,
    preset: str = "default",
    guidance_scale: float | None = None,
) -> TrainerConfig:
    """Configure csd-edit-tiny to edit the scene of a run's config.yml and write its run to FOLDER/runs."""
    config = copy.deepcopy(csd_edit_tiny.config)
    config.load_run = scene_run  # type: ignore[attr-defined]
    pipeline: Any = config.pipeline
    pipeline.prompt = prompt
    # A preset's settings of rounds and training are for real scenes: hours for this one.
    pipeline.edit = load_preset(preset)
    if guidance_scale is not None:
        pipeline.edit = dataclasses.replace(pipeline.edit, guidance_scale=guidance_scale)
    config.max_num_iterations = config.pipeline.steps_per_round = EDIT_STEPS  # type: ignore[attr-defined]
    config.pipeline.film_frames = 0  # type: ignore[attr-defined]  # the demo renders its own turntable
    return _demo_run(config, folder, seed)


def _demo_run(config: TrainerConfig, folder: Path, seed: int) -> TrainerConfig:
    config.output_dir = folder / "runs"
    config.experiment_name = "demo"
    config.machine.seed = seed
    # No viewer and no evaluation during training: the demo evaluates and renders at the end.
    config.vis = "tensorboard"
    config.steps_per_eval_batch = config.steps_per_eval_image = config.steps_per_eval_all_images = 10**9
    return config


def train(config: TrainerConfig) -> Path:
    """Train a config as ns-train does, and return the path of the run's config.yml."""
    config.pipeline.datamanager.data = config.data
    config.set_timestamp()
    config.save_config()
    train_loop(local_rank=0, world_size=1, config=config)
    return config.get_base_dir() / "config.yml"


def load_scene(run: Path) -> Pipeline:
    """Load a trained scene from disk as ns-render does."""
    return eval_setup(run, test_mode="test")[1]


class NovelViews:
    """Held-out views of the scene: ground truth, renders before and after the edit, and the exact answer."""

    def __init__(self, before: Pipeline, after: Pipeline, prompt: str) -> None:
        dataset = before.datamanager.eval_dataset
        assert dataset is not None
        self.true = torch.stack([dataset[i]["image"][..., :3].permute(2, 0, 1) for i in range(len(dataset))])
        cameras = [dataset.cameras[i : i + 1] for i in range(len(dataset))]
        self.before, self.after = (
            torch.stack([render(pipeline.model, camera) for camera in tqdm(cameras, desc=name, unit="view")])
            for name, pipeline in (("before", before), ("after", after))
        )
        # An ambiguous instruction has several answers. Compare with the one that is closest over all views together, so
        # that views with different answers score badly.
        answers = known_answers(prompt, self.true)
        taken = max(range(len(answers)), key=lambda k: psnr(self.after, answers[k]))
        self.answer = answers[taken]
        self.answer_name = f"{taken + 1} of {len(answers)}"

    def psnr(self) -> dict[str, float]:
        """Compute the PSNR, in dB, of unedited views to the ground truth and of both kinds of views to the answer."""
        pairs = {
            "unedited_views_to_truth": (self.before, self.true),
            "unedited_views_to_answer": (self.before, self.answer),
            "edited_views_to_answer": (self.after, self.answer),
        }
        return {name: round(psnr(*pair), 2) for name, pair in pairs.items()}

    def contact_sheet(self) -> Float[Tensor, "3 H W"]:
        """Draw a grid of images. Rows: the scene before, the scene after, the exact answer; columns: views."""
        height = round(SHEET_WIDTH * self.true.shape[-2] / self.true.shape[-1])
        shown = torch.linspace(0, len(self.true) - 1, min(SHEET_VIEWS, len(self.true))).long()
        rows = {"scene": self.before[shown], "edited": self.after[shown], "exact answer": self.answer[shown]}
        sheet = Image.new("RGB", (SHEET_WIDTH * len(shown), height * len(rows)))
        draw = ImageDraw.Draw(sheet)
        for row, (label, images) in enumerate(rows.items()):
            for column, image in enumerate(_enlarged(images, (height, SHEET_WIDTH))):
                sheet.paste(Image.fromarray(image), (SHEET_WIDTH * column, height * row))
            draw.text((8, height * row + 6), label, fill="white", stroke_width=2, stroke_fill="black")
        return to_tensor(sheet)


def _enlarged(images: Float[Tensor, "n 3 h w"], size: tuple[int, int]) -> np.ndarray:
    """Enlarge images to `size` (H, W) and convert them to uint8 (n, H, W, 3)."""
    larger = torch.nn.functional.interpolate(images, size, mode="bicubic").clamp(0, 1)
    return (255 * larger).round().byte().permute(0, 2, 3, 1).numpy()


def _turntable(before: Model, after: Model) -> Clip:
    """Render one full turn around both scenes, side by side."""
    lens = intrinsics(FILM_SIZE)
    cameras = Cameras(
        camera_to_worlds=turntable(FILM_FRAMES)[:, :3],
        fx=lens["fl_x"],
        fy=lens["fl_y"],
        cx=lens["cx"],
        cy=lens["cy"],
        width=int(lens["w"]),
        height=int(lens["h"]),
    )
    return side_by_side([film(model, cameras) for model in (before, after)], enlarged=4)


def _settings(edit_run: Path, preset: str) -> dict[str, object]:
    settings = json.loads((edit_run.parent / "edit.json").read_text(encoding="utf-8"))["settings"]
    edit = {name: settings[name] for name in ("views_per_round", "edit")}
    return {"scene_steps": SCENE_STEPS, "edit_steps": EDIT_STEPS, "preset": preset, **edit}


def _announce(report: dict) -> None:
    psnr = report["psnr"]
    print(
        f"\nNovel views: {psnr['unedited_views_to_truth']} dB to the true scene before the edit; "
        f"to the exact answer {psnr['unedited_views_to_answer']} dB before and "
        f"{psnr['edited_views_to_answer']} dB after.\n"
        "Look at before_after.png and turntable.mp4; report.json has all figures."
    )
