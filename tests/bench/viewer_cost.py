"""What watching costs: processor time per step with one browser connected and with nobody, in turn, in one run.

Of this process only: a browser that draws in software on the same machine takes far more than what serves it.

python -m tests.bench.viewer_cost OUT.json --port 8124
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from csd_2d import Edit, EditConfig, ImageStack, load_prior
from csd_2d.watch import Watch
from tests.browser import browser, until

STEPS = 12
"""Steps of a stretch, with or without a browser."""
STRETCHES = 3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--port", type=int, default=8124)
    options = parser.parse_args()
    images = list(torch.rand(8, 3, 72, 96, generator=torch.Generator().manual_seed(0)))
    prior = load_prior("tiny")
    stack = ImageStack(images, prior)
    edit = Edit(stack.particles, prior, "make it night", EditConfig(steps=10_000), layout=stack.layout)
    seconds: dict[str, list[float]] = {"nobody": [], "one browser": []}
    with Watch(options.port, "benchmark", 10_000, prior, images) as page, browser() as chromium:
        for stretch in range(2 * STRETCHES):
            who = ("nobody", "one browser")[stretch % 2]
            tab = chromium.new_page() if who == "one browser" else None
            if tab is not None:
                tab.goto(f"http://localhost:{page.port}")
                until(page._server.get_clients, "the browser connects")
            for step in range(STEPS):
                begin = time.process_time()
                page.on_step(edit.step())
                if step:  # the first pays for what was never run before
                    seconds[who].append(time.process_time() - begin)
            if tab is not None:
                tab.close()
                until(lambda: not page._server.get_clients(), "the browser leaves")
    mean = {who: statistics.mean(values) for who, values in seconds.items()}
    result = {"seconds per step": mean, "ratio": mean["one browser"] / mean["nobody"], "steps": len(seconds["nobody"])}
    options.output.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
