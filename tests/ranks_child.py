"""What `tests/csd_2d/test_ranks.py` runs in processes of its own."""

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from csd_2d import CanvasCrops, EditConfig, LatentStack, load_preset, load_prior, ranks
from csd_2d.edit import edit
from csd_2d.image_set import ImageStack, edit_images
from csd_2d.io.video import Clip
from csd_2d.panorama import PanoramaCanvas, edit_panorama
from csd_2d.particles import Layout, Particles
from csd_2d.prior import Prior
from csd_2d.priors.analytic import AnalyticPrior
from csd_2d.progress import ProgressFile
from csd_2d.video import edit_video

STEPS = 6


class SmallWindow(AnalyticPrior):
    """Crops of 16 px, so that a small picture has many of them."""

    window = 16


def smooth(height: int, width: int, seed: int = 0) -> Tensor:
    coarse = torch.rand(1, 3, 3, 5, generator=torch.Generator().manual_seed(seed)) * 0.7 + 0.15
    return F.interpolate(coarse, (height, width), mode="bilinear")[0]


def _half(image: Tensor) -> Tensor:
    mask = torch.zeros(1, *image.shape[1:])
    mask[..., : image.shape[-1] // 2] = 1
    return mask


def edits(model: str) -> dict[str, Callable[[], list[Tensor]]]:
    """Edits by name; `model` is a folder with an InstructPix2Pix."""
    frames = [smooth(20, 30 - i, i) for i in range(7)]
    wide, small = smooth(23, 61), smooth(16, 16)
    paper, default = EditConfig(**{**vars(load_preset("paper")), "steps": STEPS}), EditConfig(steps=STEPS)
    # On random weights guidance of 7.5 diverges: their estimates are not those of a denoiser.
    calm = EditConfig(steps=3, guidance_scale=1.5, lr=0.1)

    def images(config: EditConfig, **options) -> list[Tensor]:
        return edit_images(frames, AnalyticPrior(), "make it night", config, **options)

    def latents(prompts: list[str], make: Callable[[Prior], tuple[Particles, Layout]]) -> list[Tensor]:
        """By a U-Net, which takes one row at a time: how it rounds depends on the rows."""
        prior = load_prior(model, micro_batch=1)
        particles, layout = make(prior)
        edit(particles, prior, prompts, calm, layout=layout)
        return [parameter.detach() for parameter in particles.parameters()]

    def images_and_layout(prior: Prior) -> tuple[Particles, Layout]:
        stack = ImageStack(frames, prior)
        return stack.particles, stack.layout

    def crops_and_layout(prior: Prior) -> tuple[Particles, Layout]:
        crops = PanoramaCanvas(smooth(70, 150), prior, 2).crops
        return crops, crops.layout

    def panorama(image: Tensor, config: EditConfig, **options) -> list[Tensor]:
        return [edit_panorama(image, SmallWindow(), "make it night", config, **options)]

    def video() -> list[Tensor]:
        edited = edit_video(Clip(frames[2:]), AnalyticPrior(), "make it night", default)
        return list(edited.frames) if ranks.rank() == 0 else []  # the first has them

    return {
        "video": video,
        "images": lambda: images(default),
        "images, of which few are drawn": lambda: images(EditConfig(steps=STEPS, batch=2)),
        "images, paper": lambda: images(paper),
        "images, no mixing, shared noise": lambda: images(EditConfig(steps=STEPS, mixing="none", noise="shared")),
        "images, masks": lambda: images(default, masks=[_half(frame) for frame in frames]),
        "images, diffusers": lambda: latents(["make it night"], images_and_layout),
        "panorama": lambda: panorama(wide, default),
        "panorama, paper": lambda: panorama(wide, paper, fade=False, stride=4),
        "panorama, wrapped, one noise": lambda: panorama(wide, EditConfig(steps=STEPS, noise="canvas"), wrap=True),
        "panorama, svgd": lambda: panorama(wide, EditConfig(steps=STEPS, mixing="svgd")),
        "panorama of fewer crops than processes": lambda: panorama(small, default),
        "panorama, diffusers, two prompts": lambda: latents(["it", "make it"], crops_and_layout),
    }


def rows_of_an_edit() -> int:
    """How many noise estimates this process makes for an edit of five frames."""
    rows = 0

    class Counting(AnalyticPrior):
        def noise_estimate(self, x_t, *arguments, **options):
            nonlocal rows
            rows += len(x_t)
            return super().noise_estimate(x_t, *arguments, **options)

    edit(frames_stack(), Counting(), "make it night", EditConfig(steps=3))
    return rows


def frames_stack(count: int = 5) -> LatentStack:
    return ImageStack([smooth(12, 10, i) for i in range(count)], AnalyticPrior()).particles


def long_edit(particles, file: Path, on_step=None) -> None:
    """An edit that keeps its state after every step."""
    with patch.object(ProgressFile, "SECONDS", 0.0):
        layout, config = getattr(particles, "layout", None), EditConfig(steps=12, batch=3)
        edit(particles, AnalyticPrior(), "paint it a new color", config, on_step, resume=file, layout=layout)


def long_canvas() -> CanvasCrops:
    source = 2 * smooth(16, 40)[None] - 1
    return CanvasCrops(source, 16, 8)


def main(what: str, file: Path, *model: Path) -> None:
    """Do what is named, as one of several processes, and leave the result in the file."""
    torch.set_num_threads(1)
    try:
        with ranks.joined(timedelta(seconds=8 if what == "hang" else 120)):
            work(what, file, *model)
    finally:
        # Threads of gloo's that outlive the group now and then abort the process as it ends.
        left = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        assert not any("gloo" in name for name in left), left


def work(what: str, file: Path, *model: Path) -> None:
    if what == "edits":
        results = {name: run() for name, run in edits(*map(str, model)).items()}
        rows = ranks.gather_numbers(rows_of_an_edit())
        if ranks.rank() == 0:
            torch.save({"rows": rows, **results}, file)
    elif what in ("die", "hang"):

        def fail(info) -> None:
            if ranks.rank() == 1 and info.index == 4:
                os.kill(os.getpid(), signal.SIGKILL) if what == "die" else time.sleep(12)

        long_edit(frames_stack(), file, fail)
    elif what in ("resume stack", "resume canvas"):
        particles = frames_stack() if what == "resume stack" else long_canvas()
        steps = []
        long_edit(particles, file, lambda info: steps.append(info.index))
        whole = [parameter.detach() for parameter in particles.parameters()]
        if ranks.rank() == 0:
            torch.save({"steps": steps, "latents": whole}, f"{file}.result")
    elif what == "not finite":

        class Broken(AnalyticPrior):
            def noise_estimate(self, x_t, *arguments, **options):  # on the second process only
                return super().noise_estimate(x_t, *arguments, **options) * (torch.nan if ranks.rank() == 1 else 1)

        edit(frames_stack(), Broken(), "make it night", EditConfig(mixing="none"))
