r"""Does the memory of mode distill grow with the number of views rendered in one step?

For each number of views a process of its own builds a small nerfacto, renders the views with gradient, encodes them
and goes back. Reported is how much the process's peak memory rose above what it held before, and the time, with
rendering in chunks as csd-edit does it and, beside it, with everything in one graph.

    python -m tests.bench.distill_memory --output memory.json
"""

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import tyro

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_ARENA_MAX": "1"}
"""glibc's settings by which memory that is freed is the process's no more: what it would keep in reserve is no need of
the method. It costs time, in which the two ways are compared all the same."""


def _memory_mb(field: str) -> float:
    """VmRSS, what the process holds now, or VmHWM, the most it held since the last reset. Linux only."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


def measure(data: Path, views: int, one_graph: bool) -> dict[str, float]:
    """In this process: peak memory above the start's in MB, and seconds, of one step forward and back."""
    from nerfstudio.configs.method_configs import all_methods

    from csd_2d.priors.loading import load_prior
    from csd_nerf.edit.distill import SceneParticles
    from csd_nerf.views.nerfacto import NerfactoViews

    torch.manual_seed(0)
    config = copy.deepcopy(all_methods["csd-edit-tiny"].pipeline)
    config.datamanager.data = data
    pipeline = config.setup(device="cpu")
    pipeline.train()
    parameters = [p for group in pipeline.get_param_groups().values() for p in group]
    scene = NerfactoViews(pipeline)
    prior = load_prior("tiny")
    particles = SceneParticles(scene, scene.original, prior, parameters)
    indices = list(range(views))

    def latents() -> torch.Tensor:
        if not one_graph:
            return particles.render(indices)
        pipeline.eval()
        cameras = pipeline.datamanager.train_dataset.cameras
        images = [pipeline.model(cameras.generate_rays(i).flatten())["rgb"] for i in indices]
        shape = scene.original(0).shape
        return prior.encode(torch.stack([image.view(*shape[1:], 3).permute(2, 0, 1) for image in images]))

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = _memory_mb("VmRSS"), time.monotonic()
    latents().square().sum().backward()
    return {"peak_mb": round(_memory_mb("VmHWM") - before, 1), "seconds": round(time.monotonic() - start, 2)}


def main(output: Path, counts: tuple[int, ...] = (1, 2, 4, 8), size: tuple[int, int] = (160, 120)) -> None:
    """Measures both ways at every number of views and writes a table as JSON."""
    from csd_nerf.procedural_scene import write_scene

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "scene"
        write_scene(data, num_views=max(counts) + 4, size=size)
        for one_graph in (False, True):
            for views in counts:
                code = (
                    "import json, pathlib; from tests.bench.distill_memory import measure; "
                    f"print(json.dumps(measure(pathlib.Path({str(data)!r}), {views}, {one_graph})))"
                )
                command = [sys.executable, "-c", code]
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | GIVE_BACK)
                figures = json.loads(done.stdout.splitlines()[-1])
                rows.append({"views": views, "one_graph": one_graph, **figures})
                print(rows[-1], flush=True)
    output.write_text(json.dumps({"size": size, "rows": rows}, indent=1))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
