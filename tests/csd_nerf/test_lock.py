"""Rounds of an edit leave the scene to a viewer while they work."""

import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from nerfstudio.model_components.renderers import background_color_override_context
from PIL import Image

from csd_2d import EditConfig
from csd_nerf.pipeline import CsdEditPipeline
from csd_nerf.procedural_scene import write_scene
from csd_nerf.views.base import _acquire
from tests.csd_nerf.conftest import train_in_process

LONGEST_WAIT = 2.0


class Viewer(threading.Thread):
    """Renders training views under the trainer's lock, one after the other, as nerfstudio's viewer does."""

    def __init__(self, pipeline: CsdEditPipeline) -> None:
        super().__init__(daemon=True)
        self._pipeline, self._ended = pipeline, threading.Event()
        self.waits: list[float] = []
        self.rendered = 0

    def run(self) -> None:
        lock = self._pipeline._run.lock
        while not self._ended.is_set():
            asked = time.monotonic()
            taken = lock.acquire(timeout=LONGEST_WAIT)
            if not self._ended.is_set():  # when the round is over the training has the lock again
                self.waits.append(time.monotonic() - asked)
            if taken:
                self._render()
                lock.release()
            time.sleep(0.01)

    @torch.no_grad()
    def _render(self) -> None:
        model, cameras = self._pipeline.model, self._pipeline.datamanager.train_dataset.cameras
        was_training = model.training
        model.eval()
        with background_color_override_context(torch.tensor([1.0, 0.0, 1.0])):  # as where the viewer crops
            model.get_outputs_for_camera(cameras[:1])
        model.train(was_training)
        self.rendered += 1

    def end(self) -> None:
        self._ended.set()
        self.join()


@pytest.fixture
def one_thread():
    """Sums over several threads are in no fixed order, with or without a viewer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def transparent_scene(tmp_path_factory) -> Path:
    """A scene whose images have alpha, hardly trained: what is transparent gets the background."""
    folder = tmp_path_factory.mktemp("transparent")
    write_scene(folder / "data", num_views=8, size=(32, 24))
    for path in (folder / "data" / "images").glob("*.png"):
        image = Image.open(path).convert("RGBA")
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(path)
    return train_in_process("csd-scene-tiny", folder / "scene", 30, data=folder / "data")


def test_a_viewer_renders_during_a_round_and_changes_no_bit(transparent_scene, one_thread, tmp_path, monkeypatch):
    viewers: list[Viewer] = []
    run_round = CsdEditPipeline._run_round

    def watched(self: CsdEditPipeline, step: int) -> None:
        assert self._run.lock.locked()
        viewers.append(Viewer(self))
        viewers[-1].start()
        try:
            run_round(self, step)
        finally:
            viewers[-1].end()
        assert self._run.lock.locked()

    def checkpoint(name: str) -> dict:
        settings = {"pipeline__prompt": "make it night", "pipeline__edit": EditConfig(steps=8, batch=3)}
        settings |= {"pipeline__steps_per_round": 2, "pipeline__views_per_round": 4, "pipeline__film_frames": 0}
        run = train_in_process("csd-edit-tiny", tmp_path / name, 4, load_run=transparent_scene, **settings)
        return torch.load(run / "nerfstudio_models" / "step-000000003.ckpt", weights_only=True)["pipeline"]

    alone = checkpoint("alone")
    monkeypatch.setattr(CsdEditPipeline, "_run_round", watched)
    seen = checkpoint("seen")
    assert len(viewers) == 2
    for viewer in viewers:
        assert viewer.rendered >= 5, "a round of several seconds is long enough for several frames"
        assert max(viewer.waits) < LONGEST_WAIT
    assert all(torch.equal(alone[name], seen[name]) for name in alone)


def test_ctrl_c_while_a_viewer_renders_waits_for_the_lock_and_is_raised_then():
    lock = threading.Lock()
    lock.acquire()
    main = threading.main_thread().ident
    interrupt = threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT))
    release = threading.Timer(0.6, lock.release)
    interrupt.start(), release.start()
    with pytest.raises(KeyboardInterrupt):
        _acquire(lock)
    assert lock.locked()
    lock.release()
