r"""How fast is a step of ours beside the published algorithm, at equal results?

Both edit the same random latents with the same U-Net of random weights, noise, timesteps and crops, with the published
settings (`--preset paper`, crops that do not fade), so that they end on the same latents: that is asserted, to 1e-4 in
fp32. Reported are steps a second (the fastest step, the first not counted; on a CPU by one thread's processor time, so
that other programs do not count), the share of that step outside the U-Net, and how far the process's (on a GPU the
device's) memory rose in the steps over what it held before them.

    python -m tests.bench.speed --output speed.json
    python -m tests.bench.speed --device cuda --model full --output speed.json

The published algorithm is `tests/bench/published.py`; ours is `csd_2d.edit` without a change. On a GPU both are
measured in bf16, too, and ours compiled. How many U-Net evaluations a step costs is counted for every kind of guidance.
"""

import dataclasses
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from csd_2d import CanvasCrops, EditConfig, LatentStack, load_preset
from csd_2d.csd import Step
from csd_2d.edit import edit
from csd_2d.priors.instruct_pix2pix import InstructPix2PixPrior
from tests.bench.ip2p_cost import full_size_pipeline
from tests.bench.published import Draw, Published, edit_canvas, edit_frames
from tests.tiny_pipeline import tiny_pipeline, tiny_tokenizer

Task = Literal["panorama", "frames"]
SIZES = {"small": 32, "full": 64}
"""Side of the latents a model was made for."""
PROMPT = "it"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to do the same steps."""

    method: Literal["published", "ours"]
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    micro_batch: int = 8

    @property
    def name(self) -> str:
        return " ".join([self.method, self.dtype, *["compiled"] * self.compile])


class MeasuredUNet:
    """Adds up the seconds and rows of a U-Net; everything else is the U-Net's own."""

    def __init__(self, unet: UNet2DConditionModel, compile: bool = False) -> None:
        self._unet, self._forward = unet, torch.compile(unet) if compile else unet
        self.seconds, self.rows = 0.0, 0

    def __call__(self, rows: Tensor, *args: Any, **kwargs: Any) -> Any:
        start = _now(rows.device)
        output = self._forward(rows, *args, **kwargs)
        self.seconds += _now(rows.device) - start
        self.rows += len(rows)
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unet, name)


def small_pipeline():
    """InstructPix2Pix's architecture at a fifth of its width, with one level less and latents of 32x32 cells."""
    pipeline = tiny_pipeline()
    torch.manual_seed(0)
    pipeline.unet = UNet2DConditionModel(
        sample_size=SIZES["small"],
        in_channels=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128, 256),
        cross_attention_dim=256,
    ).eval()
    tokenizer = tiny_tokenizer()
    pipeline.text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).eval()
    return pipeline


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class Memory:
    """Peak memory above what is held when it is made, in MB. On a CPU Linux only."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self._before = self._held("VmRSS")

    def _held(self, field: str) -> float:
        if self._device.type == "cuda":
            return (torch.cuda.memory_allocated() if field == "VmRSS" else torch.cuda.max_memory_allocated()) / 1e6
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
        return int(line.split()[1]) / 1e3

    def rise(self) -> float:
        return self._held("VmHWM") - self._before


class _Stopwatch:
    """Seconds of each step, and of the U-Net in it."""

    def __init__(self, unet: MeasuredUNet, device: torch.device) -> None:
        self._unet, self._device = unet, device
        self._marks = [(_now(device), 0.0)]

    def step_done(self, *_: object) -> None:
        self._marks.append((_now(self._device), self._unet.seconds))

    def fastest(self) -> tuple[float, float]:
        steps = list(zip(self._marks[1:], self._marks[2:], strict=False))
        return min((end[0] - start[0], end[1] - start[1]) for start, end in steps)


def _root_mean_square(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def _latents(task: Task, size: int, count: int) -> Float[Tensor, "n 4 h w"]:
    """Of a panorama over which `count` crops fit at a quarter of a window's distance, or of `count` frames."""
    shape = (1, 4, size, size + (count - 1) * size // 4) if task == "panorama" else (count, 4, size, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def measure(
    task: Task,
    variant: Variant,
    image_guidance_scale: float,
    model: str,
    device: str,
    count: int,
    batch: int,
    steps: int,
    folder: Path,
) -> dict[str, float]:
    """In this process: figures of `steps` steps. Ours leaves its draws in `folder`, the published finds them there."""
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # its 10 bits are no fp32
    dtype = getattr(torch, variant.dtype)
    torch.manual_seed(0)
    pipeline = full_size_pipeline(dtype) if model == "full" else small_pipeline()
    if dtype != torch.float32:
        pipeline.to(dtype=dtype)
    prior = InstructPix2PixPrior(pipeline, device, micro_batch=variant.micro_batch)
    prior.unet = unet = MeasuredUNet(prior.unet, variant.compile)  # type: ignore[assignment]
    prior.image_guidance_scale = image_guidance_scale
    config = dataclasses.replace(load_preset("paper"), steps=steps, batch=batch)
    source = _latents(task, prior.window, count).to(device)
    recorded = folder / "draws.pt"
    run = _ours if variant.method == "ours" else _published
    memory, stopwatch = Memory(prior.device), _Stopwatch(unet, prior.device)
    result = run(task, prior, source, config, recorded, stopwatch.step_done)
    rise = memory.rise()
    torch.save(result.cpu(), folder / f"{variant.name}.pt")
    seconds, in_unet = stopwatch.fastest()
    return {
        "steps_per_second": 1 / seconds,
        "outside_unet": 1 - in_unet / seconds,
        "memory_mb": rise,
        "unet_rows_per_particle": unet.rows / steps / batch,
        "change": _root_mean_square(result - source),
    }


def _ours(
    task: Task,
    prior: InstructPix2PixPrior,
    source: Tensor,
    config: EditConfig,
    recorded: Path,
    step_done: Callable[..., None],
) -> Tensor:
    draws = []

    def on_step(step: Step) -> None:
        step_done()
        draws.append((step.timestep, step.indices, step.noised.noise.cpu()))

    if task == "panorama":
        crops = CanvasCrops(source, prior.window, prior.window // 4, fade=False)
        edit(crops, prior, PROMPT, config, on_step, layout=crops.layout)
        result = crops.canvas.detach()
    else:
        frames = LatentStack(source)
        edit(frames, prior, PROMPT, config, on_step)
        result = frames.latents
    torch.save(draws, recorded)
    return result


def _published(
    task: Task,
    prior: InstructPix2PixPrior,
    source: Tensor,
    config: EditConfig,
    recorded: Path,
    step_done: Callable[..., None],
) -> Tensor:
    draws = [
        Draw(timestep, indices, noise.to(prior.device))
        for timestep, indices, noise in torch.load(recorded, weights_only=True)
    ]
    unet, condition = cast(UNet2DConditionModel, prior.unet), prior.condition(source)
    scales = prior.guidance_scale, prior.image_guidance_scale
    published = Published(unet, prior.schedule.alphas_cumprod, prior.encode_text([PROMPT]), *scales)
    if task == "panorama":
        corners = CanvasCrops(source, prior.window, prior.window // 4, fade=False).corners
        run = edit_canvas(published, source, condition, corners, prior.window, draws, config.lr)
    else:
        run = edit_frames(published, source, condition, draws, config.lr)
    result = source
    for latents in run:
        step_done()
        result = latents
    return result


def unet_rows() -> list[dict[str, object]]:
    """U-Net evaluations of a step for each particle, ours counted and the published algorithm's, by guidance."""
    prior = InstructPix2PixPrior(tiny_pipeline())
    prior.unet = unet = MeasuredUNet(prior.unet)  # type: ignore[assignment]
    picture = torch.zeros(1, 4, 16, 40)
    rows = []
    for prompts, text, image in [
        (1, 7.5, 1.5),
        (1, 1.5, 1.5),
        (1, 7.5, 1.0),
        (1, 1.0, 1.0),
        (2, 7.5, 1.5),
        (4, 7.5, 1.5),
    ]:
        # Every region covers some of every crop: all prompts are active everywhere.
        regions = torch.full((1, prompts, 16, 40), 1 / prompts) if prompts > 1 else None
        particles = CanvasCrops(picture, 16, 8, regions=regions)
        config = EditConfig(steps=1, lr=1e-6, guidance_scale=text, image_guidance_scale=image)
        seen: list[int] = []
        unet.rows = 0
        edit(
            particles,
            prior,
            [PROMPT] * prompts,
            config,
            on_step=lambda step, seen=seen: seen.append(len(step.indices)),
            layout=particles.layout,
        )
        rows.append(
            {"prompts": prompts, "w_y": text, "w_s": image, "ours": unet.rows / seen[0], "published": 6 * prompts}
        )
    return rows


def _in_a_process_of_its_own(*arguments: object) -> dict[str, float]:
    code = (
        "import json, pathlib, torch; from pathlib import PosixPath; from tests.bench.speed import Variant, measure; "
        f"print(json.dumps(measure(*{arguments!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(
    output: Path,
    device: str = "cpu",
    model: Literal["small", "full"] = "small",
    tasks: tuple[Task, ...] = ("panorama", "frames"),
    count: int = 12,
    batch: int = 4,
    steps: int = 4,
    image_guidance_scales: tuple[float, ...] = (1.5, 1.0),
) -> None:
    """Measures everything, prints a table and writes JSON; ends with an error if results differ."""
    variants = [Variant("ours"), Variant("published")]
    if device.startswith("cuda"):
        variants += [Variant("ours", "bfloat16"), Variant("published", "bfloat16"), Variant("ours", "bfloat16", True)]
    rows, differences = [], []
    for task, scale in itertools.product(tasks, image_guidance_scales):
        title = f"{task:8} w_s {scale:3}"
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for variant in variants:
                figures = _in_a_process_of_its_own(task, variant, scale, model, device, count, batch, steps, folder)
                rows.append({"task": task, "image_guidance_scale": scale, "variant": variant.name, **figures})
                print(
                    f"{title} {variant.name:27} {figures['steps_per_second']:7.3f} steps/s "
                    f"{100 * figures['outside_unet']:5.1f} % outside the U-Net  +{figures['memory_mb']:7.1f} MB "
                    f"{figures['unet_rows_per_particle']:4.1f} U-Net rows a particle",
                    flush=True,
                )
            ours, published = (torch.load(folder / f"{variant.name}.pt") for variant in variants[:2])
        assert ours.shape == published.shape
        difference = (ours - published).abs().max().item()
        differences.append({"task": task, "image_guidance_scale": scale, "largest_difference": difference})
        print(f"{title} latents moved by {rows[-1]['change']:.2f}, and differ by {difference:.1e} at most", flush=True)
    counted = unet_rows()
    for row in counted:
        print(*(f"{name} {value}" for name, value in row.items()), sep="  ")
    settings = {"device": device, "model": model, "count": count, "batch": batch, "steps": steps}
    result = {**settings, "rows": rows, "differences": differences, "unet_rows": counted}
    output.write_text(json.dumps(result, indent=1))
    assert max(entry["largest_difference"] for entry in differences) < 1e-4, differences


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
