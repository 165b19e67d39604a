"""The panel of an edit in nerfstudio's viewer, in a real browser."""

import base64
import io
import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nerfstudio.scripts.viewer import run_viewer
from nerfstudio.utils.eval_utils import eval_setup
from nerfstudio.viewer.control_panel import ControlPanel
from nerfstudio.viewer.render_state_machine import RenderStateMachine
from nerfstudio.viewer_legacy.server.viewer_utils import get_free_port
from PIL import Image

from csd_2d import EditConfig
from csd_2d.panel import ssh_line
from csd_nerf.pipeline import CsdEditPipeline
from csd_nerf.viewer import parsed
from tests.browser import PATIENCE, browser, until
from tests.csd_nerf.conftest import train_in_process
from tests.csd_nerf.test_training import edit_in_process

RESOLUTION = 64
"""Largest side of what the viewer draws: more takes minutes on a CPU, and training waits for it."""


class Visitor(threading.Thread):
    """Somebody at the viewer, while the training has the main thread."""

    def __init__(self, visit: Callable[["Visitor"], None]) -> None:
        super().__init__(daemon=True)
        self._visit = visit
        self.page: Any = None
        self.port = get_free_port()
        self.error: BaseException | None = None
        self.pipeline: Any = None
        self.rendered = 0
        """Frames that were drawn during rounds."""

    def run(self) -> None:
        try:
            until(lambda: self.pipeline is not None and self.pipeline.run is not None, "the run begins")
            self._visit(self)
        except BaseException as error:
            self.error = error
        finally:
            if self.pipeline is not None:
                self.pipeline.steering.ask("stop") if not self.pipeline.over else None

    def click(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def fill(self, label: str, text: str) -> None:
        """Type into the field beside a label."""
        self.page.get_by_text(label, exact=True).locator("xpath=following::input[1]").fill(text)

    def choose(self, label: str, option: str) -> None:
        """Choose from the list beside a label."""
        self.page.get_by_text(label, exact=True).locator("xpath=following::input[1]").click()
        self.page.get_by_role("option", name=option, exact=True).click()

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def says(self, text: str) -> None:
        self.page.get_by_text(text).first.wait_for(timeout=1000 * PATIENCE)

    def pixels(self, alt: str) -> np.ndarray:
        """Return an image that the browser has drawn."""
        self.page.locator(f"img[alt='{alt}']").first.wait_for(timeout=1000 * PATIENCE)
        # In one go: the next update replaces the element.
        drawn = "alt => { const i = document.querySelector(`img[alt='${alt}']`); return i?.naturalWidth ? i.src : '' }"
        source = until(lambda: self.page.evaluate(drawn, alt), f"{alt} is drawn")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))

    def edits(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.pipeline.run.folder / "edited").glob("*.png")}


def visited(visit: Callable[[Visitor], None], monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Path, Visitor]:
    """Trains with a visitor, until the visit ends; returns the run's folder."""
    visitor = Visitor(visit)
    begin, send = CsdEditPipeline.begin_edit, RenderStateMachine._send_output_to_viewer

    def begun(self: CsdEditPipeline, run: Any) -> Any:
        visitor.pipeline = self
        return begin(self, run)

    def sent(self: RenderStateMachine, *args: Any, **kwargs: Any) -> None:
        send(self, *args, **kwargs)
        rounds = visitor.pipeline.rounds
        visitor.rendered += rounds.interrupted is not None and not visitor.pipeline.paused

    monkeypatch.setattr(ControlPanel, "max_res", RESOLUTION)
    monkeypatch.setattr(CsdEditPipeline, "begin_edit", begun)
    monkeypatch.setattr(RenderStateMachine, "_send_output_to_viewer", sent)
    visitor.start()
    run = train_in_process("csd-edit-tiny", vis="viewer", viewer__websocket_port=visitor.port, **options)
    visitor.join(PATIENCE)
    if visitor.error is not None:
        raise visitor.error
    return run, visitor


@pytest.fixture(scope="module")
def edit_run(scene_run, tmp_path_factory):
    return edit_in_process(tmp_path_factory.mktemp("edit"), load_run=scene_run, pipeline__film_frames=0)


def look_and_steer(visitor: Visitor) -> None:
    pipeline = visitor.pipeline
    with browser() as chromium:
        page = visitor.page = chromium.new_page(viewport={"width": 900, "height": 640})
        pipeline.viewer_control.viewer.control_panel._max_res.value = 64  # a CPU draws the scene and the page
        page.goto(f"http://localhost:{visitor.port}", timeout=1000 * PATIENCE)
        visitor.says("Round 1")

        # Images and charts have something to show, and the scene is drawn, during the first round.
        visitor.tab("Images")
        assert visitor.pixels("images").std() > 20
        visitor.tab("Charts")
        assert visitor.pixels("heat map").std() > 20
        until(lambda: visitor.rendered >= 2, "the scene is drawn during a round")
        scene = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))[80:560, :520]
        assert scene.std() > 10

        # A second browser comes, and goes without a word.
        other = chromium.new_page()
        other.goto(f"http://localhost:{visitor.port}", timeout=1000 * PATIENCE)
        other.get_by_text("Edit now").wait_for(timeout=1000 * PATIENCE)
        other.close()

        # Paused in the middle of the round, the scene goes on learning.
        visitor.tab("Edit")
        visitor.click("Pause edit")
        visitor.says("paused")
        before = until(lambda: pipeline.step, "training while the edit is paused")
        until(lambda: pipeline.step > before, "more training")
        assert pipeline.rounds.interrupted is not None and not visitor.edits()

        visitor.fill("Text guidance", "-1")
        visitor.click("Apply")
        visitor.says("Refused: text guidance must be from 0 to 1000, got -1")
        assert page.locator(".mantine-Notification-root", has_text="from 0 to 1000").count()
        visitor.fill("Prompt", "make it better")
        visitor.click("Edit now")
        visitor.says("Refused: ")
        assert pipeline.steering.settings.prompt == "make it night" and pipeline.paused

        # That round would take minutes: it is given up for shorter ones.
        visitor.click("Undo round")
        until(lambda: pipeline.rounds.interrupted is None, "the round is given up")
        visitor.fill("Prompt", "make it night")
        visitor.fill("Steps per round", "3")
        visitor.click("Edit now")
        first = until(lambda: not pipeline.rounds.interrupted and visitor.edits(), "a short round")
        visitor.fill("Prompt", "make it snowy")
        visitor.click("Edit now")
        until(lambda: pipeline.rounds.begun == 3 and not pipeline.rounds.interrupted, "another one")
        second = visitor.edits()
        assert {*second} == {*first} and second != first
        visitor.says("prompt: make it snowy")

        visitor.click("Undo round")
        until(lambda: visitor.edits() == first, "the second round is undone")
        visitor.click("Undo round")
        visitor.says("Refused: only the last round can be undone")

        # Any camera: photograph, edit and render side by side; the viewer's camera is exactly the training camera.
        visitor.tab("Views")
        name = pipeline.viewer_control._names[1]
        visitor.choose("Camera", name)
        assert visitor.pixels(f"view {name}").std() > 20
        visitor.click("Jump to it")
        (client,) = pipeline.viewer_control.viser_server.get_clients().values()
        wanted = pipeline.datamanager.train_dataset.cameras[1].camera_to_worlds[:, 3].numpy() * 10
        until(lambda: np.abs(client.camera.position - wanted).max() < 1e-3, "the jump")

        visitor.choose("Show", "original | edited")
        until(lambda: pipeline.model._compared is not None, "the original scene beside the edited one")
        visitor.choose("Show", "edited")

        visitor.tab("Edit")
        visitor.click("Reset scene")
        until(lambda: not visitor.edits(), "the scene is reset")
        visitor.click("Stop and save")
        until(lambda: pipeline.over, "the end")


@pytest.mark.slow
def test_a_visitor_sees_what_the_edit_does_and_steers_it(scene_run, tmp_path, monkeypatch):
    run, _ = visited(
        look_and_steer,
        monkeypatch,
        output=tmp_path,
        iterations=100_000,
        load_run=scene_run,
        pipeline__prompt="make it night",
        pipeline__edit=EditConfig(steps=2000),
        pipeline__steps_per_round=100_000,
        pipeline__film_frames=0,
        pipeline__report=False,
    )
    report = json.loads((run / "edit.json").read_text())
    names = [change["name"] for change in report["changes"]]
    assert names == ["pause", "undo", "steps", "edit_now", "prompt", "edit_now", "undo", "reset", "stop"]
    assert report["changes"][0]["edit_step"] is not None and list(run.glob("nerfstudio_models/*.ckpt"))


@pytest.mark.slow
def test_a_finished_run_is_reopened_read_only(edit_run, monkeypatch):
    """As `ns-viewer --load-config` does."""

    def load(*args: Any, **options: Any) -> None:
        raise AssertionError("a diffusion model was loaded")

    monkeypatch.setattr("csd_nerf.pipeline.load_prior", load)
    over, visitor = threading.Event(), Visitor(lambda _: None)

    def sleep(seconds: float) -> None:
        if over.wait(seconds):
            raise SystemExit

    drawn: list[float] = []
    """Mean brightness of the pictures of the scene."""
    send = RenderStateMachine._send_output_to_viewer

    def sent(self: RenderStateMachine, outputs: Any, *args: Any, **kwargs: Any) -> None:
        send(self, outputs, *args, **kwargs)
        drawn.append(outputs["rgb"].mean().item())

    monkeypatch.setattr(RenderStateMachine, "_send_output_to_viewer", sent)
    monkeypatch.setattr(ControlPanel, "max_res", RESOLUTION)
    monkeypatch.setattr(run_viewer, "time", SimpleNamespace(sleep=sleep))
    settings = run_viewer.ViewerConfigWithoutNumRays(websocket_port=visitor.port, websocket_host="127.0.0.1")
    viewer = run_viewer.RunViewer(load_config=edit_run / "config.yml", viewer=settings)
    serving = threading.Thread(target=viewer.main, daemon=True)
    serving.start()
    with browser() as chromium:
        page = visitor.page = chromium.new_page(viewport={"width": 1280, "height": 900})
        until(lambda: not socket.socket().connect_ex(("127.0.0.1", visitor.port)), "the page is served")
        page.goto(f"http://localhost:{visitor.port}")
        visitor.says("Edited scene")
        visitor.says("make it night")
        assert not page.get_by_role("button", name="Edit now").count()
        visitor.tab("Images")
        assert visitor.pixels("images").std() > 20
        visitor.tab("Charts")
        assert visitor.pixels("seconds per stage").std() > 20

        visitor.tab("Views")
        edited = until(lambda: drawn and drawn[-1], "the edited scene")
        visitor.choose("Show", "original")
        until(lambda: abs(drawn[-1] - edited) > 0.01, "the original scene, which is of another brightness")
        visitor.choose("Show", "edited")
        until(lambda: abs(drawn[-1] - edited) < 0.005, "the edited scene again")
    over.set()
    serving.join(PATIENCE)


def test_two_scenes_side_by_side_are_drawn_as_each_alone(edit_run, scene_run):
    edited: Any
    edited, original = (eval_setup(run / "config.yml")[1] for run in (edit_run, scene_run))
    camera = edited.datamanager.train_dataset.cameras[:1]
    alone = [pipeline.model.eval().get_outputs_for_camera(camera)["rgb"] for pipeline in (original, edited)]
    seen: dict[float, torch.Tensor] = {}

    class Drawing(RenderStateMachine):  # only the viewer's threads see both
        def __init__(self) -> None:
            threading.Thread.__init__(self)

        def run(self) -> None:
            for share in (0.0, 0.3, 1.0):
                edited.model.compare(original.model, share)
                seen[share] = edited.model.get_outputs_for_camera(camera)["rgb"]

    drawing = Drawing()
    drawing.start()
    drawing.join()
    for share, image in seen.items():
        column = round(share * image.shape[1])
        torch.testing.assert_close(image, torch.cat([alone[0][:, :column], alone[1][:, column:]], 1))
    assert len(seen) == 3 and not torch.allclose(alone[0], alone[1], atol=0.05)


def test_what_is_typed_is_read_or_refused():
    assert parsed("steps", " 12 ") == 12 and parsed("lr", "") is None and parsed("guidance_scale", "7.5") == 7.5
    with pytest.raises(ValueError, match=r"steps per round must be a whole number, got '1.5'"):
        parsed("steps", "1.5")
    assert ssh_line(7007).startswith("ssh -L 7007:localhost:7007 ")
