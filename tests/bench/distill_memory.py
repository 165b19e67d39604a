r"""Does the memory of mode distill grow with the number of views rendered in one step?

For each number of views a process of its own builds a small nerfacto, renders the views with gradient, encodes them
and goes back. Reported is how much the process's peak memory rose above what it held before, and the time, with
rendering in chunks as csd-edit does it and, beside it, with everything in one graph.

    python -m tests.bench.distill_memory --output memory.json
"""

import copy
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import tyro


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(data: Path, views: int, one_graph: bool) -> dict[str, float]:
    """In this process: peak memory above the start's in MB, and seconds, of one step forward and back."""
    from nerfstudio.configs.method_configs import all_methods

    from csd_2d.priors import load_prior
    from csd_nerf.distill import SceneParticles
    from csd_nerf.scene import TrainingViews

    torch.manual_seed(0)
    config = copy.deepcopy(all_methods["csd-edit-tiny"].pipeline)
    config.datamanager.data = data
    pipeline = config.setup(device="cpu")
    pipeline.train()
    parameters = [p for group in pipeline.get_param_groups().values() for p in group]
    scene = TrainingViews(pipeline)
    prior = load_prior("tiny")
    particles = SceneParticles(scene, prior, parameters)
    indices = list(range(views))

    def latents() -> torch.Tensor:
        if not one_graph:
            return particles.render(indices)
        pipeline.eval()
        cameras = pipeline.datamanager.train_dataset.cameras
        images = [pipeline.model(cameras.generate_rays(i).flatten())["rgb"] for i in indices]
        shape = scene.original(0).shape
        return prior.encode(torch.stack([image.view(*shape[1:], 3).permute(2, 0, 1) for image in images]))

    latents()[:1].sum().backward()  # what is allocated once, whatever the number of views
    before, start = _peak_mb(), time.monotonic()
    latents().square().sum().backward()
    return {"peak_mb": round(_peak_mb() - before, 1), "seconds": round(time.monotonic() - start, 2)}


def main(
    output: Path,
    counts: tuple[int, ...] = (1, 2, 4, 8),
    size: tuple[int, int] = (160, 120),
    one: Annotated[tuple[Path, int, bool] | None, tyro.conf.Suppress] = None,
) -> None:
    """Measures both ways at every number of views and writes a table as JSON."""
    if one is not None:
        output.write_text(json.dumps(measure(*one)))
        return
    from csd_nerf.procedural_scene import write_scene

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data, result = Path(folder) / "scene", Path(folder) / "result.json"
        write_scene(data, num_views=max(counts) + 4, size=size)
        for one_graph in (False, True):
            for views in counts:
                argument = [str(data), str(views), str(one_graph)]
                subprocess.run(
                    [sys.executable, "-m", "tests.bench.distill_memory", "--output", result, "--one", *argument],
                    check=True,
                )
                rows.append({"views": views, "one_graph": one_graph, **json.loads(result.read_text())})
                print(rows[-1], flush=True)
    output.write_text(json.dumps({"size": size, "rows": rows}, indent=1))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
