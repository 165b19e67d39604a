r"""Which mixing of scores makes images agree without costing them detail, or leaving them to flicker?

Frames of a moving scene whose flow is known exactly, frames of a real video (--frames), or crops of a panorama are
edited together under instructions whose answers are known. Reported for each variant, over seeds: the share of frames,
or windows, on the commonest answer; PSNR to the answer taken; warp error between consecutive frames.

    python tests/bench/collaboration.py --output analytic.json
    python tests/bench/collaboration.py --task panorama --output panorama.json
    python tests/bench/collaboration.py --prior tiny --seeds 8 --output learned.json
    python tests/bench/collaboration.py --frames FOLDER --output real.json

Exact scores know no doubt and reach any answer exactly. Here the analytic prior is therefore wrong about every picture
in a way of its own: a smooth error is added to its answers (--error, in latents), another one to each frame or crop.
"""

import dataclasses
import json
import math
import time
import zlib
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from csd_2d import CanvasCrops, EditConfig, LatentStack, load_preset
from csd_2d.closed_form import known_answers
from csd_2d.correspondence.flow import FrameFlows, visible
from csd_2d.edit import edit
from csd_2d.io.video import read_clip
from csd_2d.metrics.consistency import warp_error
from csd_2d.metrics.fidelity import agreement
from csd_2d.particles import Layout
from csd_2d.prior import Prior
from csd_2d.priors.analytic import AnalyticPrior
from csd_2d.priors.loading import load_prior
from csd_2d.tiny.scenes import held_out


def _config(preset: str = "default", **changes) -> EditConfig:
    return dataclasses.replace(load_preset(preset), **{"transport": "off", **changes})


VARIANTS = {
    "SVGD off": _config(svgd=False),
    "paper": _config("paper"),
    "paper, transport": _config("paper", transport="both"),
    "two phases": _config(),
    "two phases, x1": _config(bandwidth_scale=1.0),
    "two phases, x1, low-pass": _config(bandwidth_scale=1.0, kernel_input="low_pass"),
    "two phases, x10": _config(bandwidth_scale=10.0),
    "two phases, x1000": _config(bandwidth_scale=1000.0),
    "transport in the first": _config(transport="first"),
    "transport in the second": _config(transport="second"),
    "transport in the second, x1000": _config(transport="second", bandwidth_scale=1000.0),
    "transport in both": _config(transport="both"),
    "transport in both, x1": _config(transport="both", bandwidth_scale=1.0),
    "transport in both, x1, low-pass": _config(transport="both", bandwidth_scale=1.0, kernel_input="low_pass"),
    "transport in both, x1000": _config(transport="both", bandwidth_scale=1000.0),
}
"""x: factor on the median bandwidth in the second phase; where none is named the default."""


class FalliblePrior(AnalyticPrior):
    """Exact scores of answers that are a little wrong, in every picture in another way.

    Args:
        error: root mean square of the smooth error, in latents.
    """

    def __init__(self, error: float) -> None:
        super().__init__()
        self.error = error

    def noise_estimate(self, x_t, timestep, condition, text, branches):
        estimate = super().noise_estimate(x_t, timestep, condition, text, branches)
        alpha, sigma = self.alpha_sigma(timestep)
        slope = sigma * alpha / ((alpha * self.spread) ** 2 + sigma**2)
        for row, branch in enumerate(branches):
            if isinstance(branch, int):
                estimate[row] -= slope * self._mistake(condition[row])
        return estimate

    def _mistake(self, condition: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(condition.numpy().tobytes()))
        coarse = torch.randn(1, 3, *(max(side // 6, 2) for side in condition.shape[-2:]), generator=generator)
        smooth = F.interpolate(coarse, condition.shape[-2:], mode="bicubic")[0]
        return self.error * smooth / smooth.square().mean().sqrt()


class MovingScene(FrameFlows):
    """A scene that a turning camera moves over, and a disc that moves before it; every flow is exact."""

    def __init__(self, count: int, size: int, cell: int, seed: int) -> None:
        self._size = size
        ground, disc = held_out(2, 2 * size, seed).images
        self._turns = [(0.05 * k, 0.35 * math.sin(k), 0.25 * k) for k in range(count)]
        self._centers = [(size * (0.2 + 0.6 * k / count), size * (0.5 + 0.2 * math.sin(k))) for k in range(count)]
        super().__init__([self._frame(k, ground, disc) for k in range(count)], cell)

    @property
    def frames(self) -> Tensor:
        return torch.stack(list(self._frames))

    def _pixels(self) -> Tensor:
        y, x = torch.meshgrid(torch.arange(self._size), torch.arange(self._size), indexing="ij")
        return torch.stack([x, y]).double()

    def _camera(self, k: int) -> tuple[Tensor, Tensor]:
        """Where the ground's middle point p is in a frame: matrix and offset of p -> turn (p - middle) + offset."""
        angle, wobble, pan = self._turns[k]
        c, s = math.cos(angle), math.sin(angle)
        middle = torch.tensor([self._size / 2 + 4 * pan, self._size / 2 + 4 * wobble]).double()
        return torch.tensor([[c, -s], [s, c]]).double(), middle

    def _on_ground(self, k: int) -> Tensor:
        """Places of the ground, from its middle, that a frame's pixels show."""
        turn, middle = self._camera(k)
        return torch.einsum("dc,dhw->chw", turn, self._pixels() - middle[:, None, None])

    def _on_disc(self, k: int) -> Tensor:
        return self._pixels() - torch.tensor(self._centers[k]).double()[:, None, None]

    def _frame(self, k: int, ground: Tensor, disc: Tensor) -> Tensor:
        place = self._on_disc(k)
        inside = (0.18 * self._size - place.norm(dim=0) + 0.5).clamp(0, 1)
        shown = [_sampled(picture, at) for picture, at in ((ground, self._on_ground(k)), (disc, place))]
        return torch.lerp(*shown, inside.float())

    def flow(self, a: int, b: int) -> Tensor:
        turn, middle = self._camera(b)
        ground = torch.einsum("cd,dhw->chw", turn, self._on_ground(a)) + middle[:, None, None] - self._pixels()
        place = self._on_disc(a)
        moved = (torch.tensor(self._centers[b]) - torch.tensor(self._centers[a])).double()[:, None, None]
        return torch.where(place.norm(dim=0) < 0.18 * self._size, moved, ground).float()


def _sampled(picture: Tensor, place: Tensor) -> Tensor:
    """A picture at places counted from its middle."""
    middle = (torch.tensor([picture.shape[-1], picture.shape[-2]]) / 2)[:, None, None]
    grid = ((place + middle) / middle - 1).permute(1, 2, 0).float()
    return F.grid_sample(picture[None], grid[None], padding_mode="reflection", align_corners=False)[0]


def _edit_frames(flows: FrameFlows, frames: Tensor, prior: Prior, prompt: str, config: EditConfig) -> dict[str, float]:
    with torch.no_grad():
        source = prior.encode(frames)
    particles = LatentStack(source)
    edit(particles, prior, prompt, config, layout=Layout(correspondence=flows.correspondence))
    with torch.no_grad():
        edited = prior.decode(particles.latents)
    pairs = [(flows.flow(k, k + 1), flows.flow(k + 1, k)) for k in range(len(frames) - 1)]
    forward, backward = (torch.stack(direction) for direction in zip(*pairs, strict=True))
    seen = visible(forward, backward)
    answers = known_answers(prompt, frames)
    share, psnr = agreement(edited, answers)
    return {
        "agreement": share,
        "psnr": psnr.mean().item(),
        "warp_error": 1e4 * warp_error(edited, forward, seen),
        "warp_error_of_answer": 1e4 * sum(warp_error(answer, forward, seen) for answer in answers) / len(answers),
    }


def _edit_panorama(size: int, seed: int, prior: Prior, prompt: str, config: EditConfig) -> dict[str, float]:
    """A picture four windows wide; agreement is that of the four."""
    scene = held_out(1, 4 * size, seed).images
    image = scene[..., 3 * size // 2 : 5 * size // 2, :]
    with torch.no_grad():
        source = prior.encode(image)
    window = size // prior.cell
    crops = CanvasCrops(source, window, 3 * window // 4)
    edit(crops, prior, prompt, config, layout=crops.layout)
    with torch.no_grad():
        edited = prior.decode(crops.edited())
    share, psnr = agreement(_windows(edited), [_windows(answer) for answer in known_answers(prompt, image)])
    return {"agreement": share, "psnr": psnr.mean().item()}


def _windows(image: Tensor) -> Tensor:
    return torch.cat(image.chunk(4, -1))


def _flows(frames: Path | None, count: int, size: int, cell: int, seed: int) -> tuple[FrameFlows, Tensor]:
    if frames is None:
        scene = MovingScene(count, size, cell, seed)
        return scene, scene.frames
    clip = torch.stack(read_clip(frames).frames[:count])
    height, width = clip.shape[-2:]
    wide = 2 * cell * round(size * width / height / (2 * cell))
    clip = F.interpolate(clip, (size, wide), mode="area")
    return FrameFlows(list(clip), cell), clip


def _table(rows: list[dict]) -> str:
    measures = [name for name in ("agreement", "psnr", "warp_error") if name in rows[0]]
    lines = [f"{'':44}" + "".join(f"{name:>20}" for name in measures) + f"{'seconds':>9}"]
    for row in rows:
        cells = (f"{row[name]:13.2f} ±{row[name + '_std']:5.2f}" for name in measures)
        lines.append(f"{row['variant']:44}" + "".join(cells) + f"{row['seconds']:9.1f}")
    return "\n".join(lines)


def main(
    output: Path,
    task: Literal["video", "panorama"] = "video",
    frames: Path | None = None,
    prior: str = "analytic",
    prompts: tuple[str, ...] = ("paint it a new color", "make it night"),
    seeds: int = 10,
    steps: int = 60,
    count: int = 8,
    size: int = 64,
    error: float = 0.1,
    variants: tuple[str, ...] = tuple(VARIANTS),
) -> None:
    """Measures every variant, prints a table and writes JSON. `size` is a frame's height and a window's side in pixels.
    Warp errors are mean squares times 10,000."""
    torch.set_num_threads(1)
    model = FalliblePrior(error) if prior == "analytic" else load_prior(prior)
    scenes = {}
    tables = {}
    for prompt in prompts:
        rows = []
        for name in variants:
            start = time.monotonic()
            results = []
            for seed in range(seeds):
                config = dataclasses.replace(VARIANTS[name], steps=steps, seed=seed)
                if task == "panorama":
                    results.append(_edit_panorama(size, seed, model, prompt, config))
                    continue
                key = None if frames else seed
                if key not in scenes:
                    scenes[key] = _flows(frames, count, size, model.cell, seed)
                results.append(_edit_frames(*scenes[key], model, prompt, config))
            row: dict = {"variant": name, "seconds": round((time.monotonic() - start) / seeds, 2)}
            for measure in results[0]:
                values = torch.tensor([result[measure] for result in results])
                row |= {measure: round(values.mean().item(), 3), measure + "_std": round(values.std().item(), 3)}
            rows.append(row)
            print(row, flush=True)
        tables[prompt] = rows
    for prompt, rows in tables.items():
        print(f"\n{prompt}\n{_table(rows)}")
    settings = {"task": task, "prior": prior, "seeds": seeds, "steps": steps, "count": count, "size": size}
    output.write_text(json.dumps({**settings, "error": error, "tables": tables}, indent=1))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
