"""Memory and time of each process when one, two or more work on one edit.

    python -m tests.bench.ranks --output ranks.json

Frames of pixels (the analytic prior), of which there are enough to see them in the memory, and frames and a panorama
edited by a small U-Net of random weights, which takes the time. Reported for each process: how far its memory rose in
the edit over what it held before it, seconds of its processor time, and of the clock; processes share the machine's
cores with each other and with whatever else runs there.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
import tyro

from csd_2d import EditConfig, load_prior, ranks
from csd_2d.image_set import edit_images
from csd_2d.panorama import edit_panorama
from csd_2d.prior import Prior
from csd_2d.priors.instruct_pix2pix import InstructPix2PixPrior
from tests.bench.speed import Memory, small_pipeline

TASKS = ("pixel frames", "frames", "panorama")


def _edit(task: str, prior: Prior, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # Every step takes all particles; on random weights a rate as usual would diverge.
    config = EditConfig(steps=steps, lr=1e-3)
    if task == "panorama":
        edit_panorama(torch.rand(3, 128, 512, generator=generator), prior, "it", config)
    elif task == "frames":
        edit_images(list(torch.rand(8, 3, 128, 128, generator=generator)), prior, "it", config)
    else:
        edit_images(list(torch.rand(64, 3, 192, 192, generator=generator)), prior, "make it night", config)


def measure(task: str, steps: int) -> None:
    """In a process of its own: prints its figures."""
    torch.set_num_threads(1)
    prior = load_prior("analytic") if task == "pixel frames" else InstructPix2PixPrior(small_pipeline())
    with ranks.joined():
        memory, processor, clock = Memory(prior.device), time.process_time(), time.monotonic()
        _edit(task, prior, steps)
        figures = {"memory_mb": memory.rise(), "processor_seconds": time.process_time() - processor}
        print(json.dumps({**figures, "clock_seconds": time.monotonic() - clock}))


def _run(task: str, steps: int, size: int) -> list[dict[str, float]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"from tests.bench.ranks import measure; measure({task!r}, {steps})"
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **address, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]


def main(output: Path, sizes: tuple[int, ...] = (1, 2), steps: int = 3, tasks: tuple[str, ...] = TASKS) -> None:
    """Measures every task with every number of processes, prints a table and writes JSON."""
    rows = []
    for task in tasks:
        for size in sizes:
            for rank, figures in enumerate(_run(task, steps, size)):
                rows.append({"task": task, "processes": size, "rank": rank, **figures})
                print(
                    f"{task:12} process {rank + 1} of {size}: +{figures['memory_mb']:7.1f} MB "
                    f"{figures['processor_seconds'] / steps:7.2f} s of processor time a step "
                    f"{figures['clock_seconds'] / steps:7.2f} s of the clock",
                    flush=True,
                )
    output.write_text(json.dumps({"steps": steps, "rows": rows}, indent=1))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
