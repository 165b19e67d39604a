"""Few views a round, or all at once? Novel-view PSNR of a small scene's edit to the exact answer.

    csd demo csd_demo
    python -m tests.bench.views_per_round --demo csd_demo --output views_per_round.json

Both variants start from the scene that the demo learned, train for as many steps and edit about as many images.
"""

import json
import tempfile
import time
from pathlib import Path

import tyro

from csd_nerf.demo import NovelViews, edit_config, load_scene, train

VARIANTS = {"16 views, 3 rounds": (16, 150), "all views, 1 round": (0, 450)}
"""Views per round and steps per round."""


def main(demo: Path, output: Path, prompt: str = "make it night", seeds: int = 1) -> None:
    """Edits the demo's scene with both variants and measures novel views."""
    scene = next((demo / "runs" / "demo" / "csd-scene-tiny").glob("*/config.yml"))
    rows = []
    for name, (views, steps) in VARIANTS.items():
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                config = edit_config(Path(folder), scene, prompt, seed)
                config.pipeline.views_per_round, config.pipeline.steps_per_round = views, steps
                config.max_num_iterations = 450
                start = time.monotonic()
                run = train(config)
                seconds = round(time.monotonic() - start, 1)
                psnr = NovelViews(load_scene(scene), load_scene(run), prompt).psnr()
            rows.append({"variant": name, "seed": seed, "seconds": seconds, **psnr})
            print(rows[-1], flush=True)
    output.write_text(json.dumps({"prompt": prompt, "rows": rows}, indent=1))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
