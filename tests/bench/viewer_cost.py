"""What watching costs: processor time of an edit's steps with one browser connected, and with nobody, in turn.

Of this process only, thread by thread: a browser that draws in software on the same machine takes far more than what
serves it, and gets another core where there is one. What it costs to send a browser the page is not counted.

python -m tests.bench.viewer_cost --output viewer_cost.json
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from nerfstudio.viewer.control_panel import ControlPanel
from nerfstudio.viewer_legacy.server.viewer_utils import get_free_port

from csd_2d import Edit, EditConfig, ImageStack, load_prior
from csd_2d.watch import Watch
from csd_nerf.edit.rounds import DatasetUpdate
from csd_nerf.pipeline import CsdEditPipeline
from csd_nerf.procedural_scene import write_scene
from tests.browser import browser, until
from tests.csd_nerf.conftest import train_in_process

SECONDS = 25.0
"""Length of a stretch, with or without a browser."""
STRETCHES = 4
"""Half of them with a browser."""
SETTLING = 10.0
"""Seconds after a browser came or went that are not counted as steps."""
VIEWS, SIZE = 8, (96, 72)
ENDLESS = 1_000_000
"""Steps, of which the time takes a part."""


def processor_seconds() -> dict[str, float]:
    """Return the processor time so far of this process's threads, by name; the rest is that of threads that ended."""
    tick = os.sysconf("SC_CLK_TCK")
    seconds: defaultdict[str, float] = defaultdict(float)
    for thread in threading.enumerate():
        fields = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()
        seconds[thread.name.rstrip("0123456789-_ ()")] += (int(fields[11]) + int(fields[12])) / tick
    seconds["all"] = time.process_time()
    return seconds


class Meter:
    """Called between steps, lets a browser come and go, and counts what steps cost; True: it has seen enough."""

    def __init__(self, chromium: Any, seconds: float) -> None:
        self._chromium, self._seconds = chromium, seconds
        self.url = ""
        self.clients: Callable[[], Any] = list
        self._page: Any = None
        self._stretch, self._counting_from, self._ends = -1, 0.0, 0.0
        self._began: dict[str, float] | None = None
        self._counted = 0
        self._steps: Counter[str] = Counter()
        self._cost: dict[str, defaultdict[str, float]] = {who: defaultdict(float) for who in ("nobody", "one browser")}

    @property
    def _who(self) -> str:
        return ("nobody", "one browser")[self._stretch % 2]

    def __call__(self) -> bool:
        now = time.monotonic()
        if self._began is None and now >= self._counting_from and self._stretch >= 0:
            self._began, self._counted, self._ends = processor_seconds(), 0, now + self._seconds
        elif self._began is not None:
            self._counted += 1
            if now >= self._ends:
                self._finish(self._began)
        if self._stretch < 0 or (self._began is None and now >= self._counting_from):
            self._begin()
        return self._stretch >= STRETCHES

    def _finish(self, began: dict[str, float]) -> None:
        for thread, seconds in processor_seconds().items():
            self._cost[self._who][thread] += seconds - began.get(thread, 0.0)
        self._steps[self._who] += self._counted
        self._began = None

    def _begin(self) -> None:
        self._stretch += 1
        if self._page is not None:
            self._page.close()
            self._page = None
            until(lambda: not self.clients(), "the browser leaves")
        if self._stretch < STRETCHES and self._who == "one browser":
            self._page = self._chromium.new_page()
            self._page.goto(self.url)
            until(self.clients, "the browser connects")
        self._counting_from = time.monotonic() + SETTLING

    def result(self) -> dict[str, Any]:
        """Return seconds per step, by thread, and the ratio."""
        per_step = {
            who: {name: round(seconds / self._steps[who], 5) for name, seconds in cost.items() if seconds}
            for who, cost in self._cost.items()
        }
        ratio = per_step["one browser"]["all"] / per_step["nobody"]["all"]
        return {"ratio": round(ratio, 4), "steps": dict(self._steps), "seconds per step": per_step}


def watch_a_video(meter: Meter) -> None:
    """Edit frames, as `csd video --watch` does."""
    images = list(torch.rand(VIEWS, 3, SIZE[1], SIZE[0], generator=torch.Generator().manual_seed(0)))
    prior = load_prior("tiny")
    stack = ImageStack(images, prior)
    edit = Edit(stack.particles, prior, "make it night", EditConfig(steps=ENDLESS), layout=stack.layout)
    with Watch(get_free_port(), "benchmark", ENDLESS, prior, images) as page:
        meter.url, meter.clients = f"http://localhost:{page.port}", page._server.get_clients
        while not meter():
            page.on_step(edit.step())


def watch_a_scene(meter: Meter) -> None:
    """Run one round of `ns-train csd-edit-tiny`."""
    steer: Callable[..., bool] = DatasetUpdate._steer
    begin = CsdEditPipeline.begin_edit
    running: list[CsdEditPipeline] = []

    def begun(self: CsdEditPipeline, run: Any) -> Any:
        running.append(self)
        return begin(self, run)

    def between_steps(self: DatasetUpdate, *arguments: Any) -> bool:
        server = running[0].viewer_control.viser_server
        meter.url, meter.clients = f"http://localhost:{server.get_port()}", server.get_clients
        if meter():
            running[0].steering.ask("stop")
        return steer(self, *arguments)

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "island"
        write_scene(data, num_views=VIEWS, size=SIZE)
        scene = train_in_process("csd-scene-tiny", Path(folder), 30, data=data)
        with (
            mock.patch.object(ControlPanel, "max_res", SIZE[0]),
            mock.patch.object(CsdEditPipeline, "begin_edit", begun),
            mock.patch.object(DatasetUpdate, "_steer", between_steps),
        ):
            train_in_process(
                "csd-edit-tiny",
                Path(folder),
                ENDLESS,
                load_run=scene,
                vis="viewer",
                viewer__websocket_port=get_free_port(),
                pipeline__prompt="make it night",
                pipeline__edit=EditConfig(steps=ENDLESS),
                pipeline__film_frames=0,
                pipeline__report=False,
            )


KINDS = {"video": watch_a_video, "scene": watch_a_scene}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--seconds", type=float, default=SECONDS)
    options = parser.parse_args()
    ours = min(os.sched_getaffinity(0))
    others = set(range(os.cpu_count() or 1)) - {ours} or {ours}
    os.sched_setaffinity(0, others)
    results = {}
    with browser() as chromium:
        os.sched_setaffinity(0, {ours})
        for kind in options.kinds:
            meter = Meter(chromium, options.seconds)
            KINDS[kind](meter)
            results[kind] = meter.result()
            options.output.write_text(json.dumps(results, indent=1), encoding="utf-8")
            print(kind, json.dumps(results[kind], indent=1), flush=True)


if __name__ == "__main__":
    main()
