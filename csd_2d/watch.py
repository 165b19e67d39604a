"""A live page of a 2D edit: what it does to the picture, or the frames, and a button that ends it. Needs viser."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from csd_2d.canvas import CanvasCrops
from csd_2d.csd import Step
from csd_2d.io.images import to_array
from csd_2d.observer import Budget, Observation, Observer
from csd_2d.panel import ORIGINAL, SCENES, SPLIT, Panel, keep_updated, side_by_side, ssh_line
from csd_2d.prior import Prior
from csd_2d.progress import duration

LARGEST = 1600
"""Largest width of the picture, in pixels: it is sent to the browser with every update."""


def _shown(image: Float[Tensor, "3 h w"]) -> np.ndarray:
    if image.shape[-1] > LARGEST:
        scale = LARGEST / image.shape[-1]
        image = torch.nn.functional.interpolate(image[None], scale_factor=scale, mode="bilinear", antialias=True)[0]
    return to_array(image)


def _framed(picture: np.ndarray, aspect: float) -> np.ndarray:
    """Put a picture on a dark ground as wide for its height as a browser's window."""
    height, width = picture.shape[:2]
    ground = np.full((max(height, round(width / aspect)), max(width, round(height * aspect)), 3), 28, np.uint8)
    top, left = (ground.shape[0] - height) // 2, (ground.shape[1] - width) // 2
    ground[top : top + height, left : left + width] = picture
    return ground


class Watch:
    """Serves the page until the block ends; it can be reached from this machine only.

    Args:
        port: of the page, or the next one that is free.
        title: of the page.
        steps: of the edit.
        prior: decodes what is shown.
        before: the pictures before the edit: of a panorama one, of a video all frames. They are read as they are shown.
        keys: frames that are edited, of a video with keyframes. Default: all.

    Raises:
        ImportError: if viser is not installed.

    Note:
        With nobody watching nothing is decoded. Otherwise that takes a few percent of the time.
    """

    def __init__(
        self,
        port: int,
        title: str,
        steps: int,
        prior: Prior,
        before: Sequence[Tensor],
        keys: Sequence[int] | None = None,
    ) -> None:
        try:
            import viser
        except ImportError as error:
            raise ImportError('--watch needs viser: pip install "csd-edit[watch]".') from error
        self._steps, self._prior, self._before = steps, prior, before
        self._keys = list(range(len(before))) if keys is None else list(keys)
        self._server: Any = viser.ViserServer(host="127.0.0.1", port=port, verbose=False)
        self.port: int = self._server.get_port()
        self.observer = Observer(self._watched)
        self._budget, self._for_pictures = Budget(0.01), Budget(0.01)
        first = _shown(before[self._keys[0]])
        self._pictures = first, first
        self._frame, self._stale = 0, False
        self._shown_version = -1
        self._begun = self._stopped = False
        self._over = threading.Event()
        self._aspects: dict[int, float] = {}
        self._build(title)
        self._thread = threading.Thread(
            target=keep_updated, args=(self._update, self._watched, self._over), daemon=True, name="csd watch"
        )

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._server.stop()

    def _watched(self) -> bool:
        return bool(self._server.get_clients())

    def message(self) -> str:
        """Say where the page is."""
        return (
            f"watch at http://localhost:{self.port}; if this is a remote machine, first, on yours: "
            f"{ssh_line(self.port)}"
        )

    def _build(self, title: str) -> None:
        gui = self._server.gui
        gui.configure_theme(
            control_layout="collapsible", control_width="large", dark_mode=True, show_share_button=False
        )
        gui.set_panel_label("csd")
        gui.add_markdown(f"**{title}**")
        self._status = gui.add_markdown("getting ready")
        self._compare = gui.add_dropdown("Show", SCENES)
        self._split = gui.add_slider("Split", 0.0, 1.0, 0.01, 0.5, visible=False)
        self._scrubber: Any = None
        if len(self._keys) > 1:
            self._scrubber = gui.add_slider("Frame", 1, len(self._keys), 1, 1)
            self._scrubber.on_update(lambda _: self._choose())
        stop = gui.add_button("Stop and save", color="red", hint="Take the edit as it is now, and write it.")
        stop.on_click(lambda _: self._stop())
        for element in (self._compare, self._split):
            element.on_update(lambda _: self._changed())
        tabs, self._panel = gui.add_tab_group(), Panel(gui)
        with tabs.add_tab("Images"):
            self._panel.add_thumbnails()
        with tabs.add_tab("Charts"):
            self._panel.add_charts()
        self._server.on_client_connect(lambda client: self._welcome(client))

    def _welcome(self, client: Any) -> None:
        self._stale = True
        client.camera.on_update(lambda _: self._reshape(client))

    def _reshape(self, client: Any) -> None:
        """Draw the picture anew if the window has another shape now; where its camera looks does not matter."""
        self._stale |= self._aspects.get(client.client_id) != client.camera.aspect

    def _stop(self) -> None:
        self._stopped = True
        self._status.content = "Stopping: the edit is written as it is now."

    def _choose(self) -> None:
        self._frame, self._for_pictures = self._scrubber.value - 1, Budget(0.01)  # at the very next step

    def _changed(self) -> None:
        self._split.visible, self._stale = self._compare.value == SPLIT, True

    @torch.no_grad()
    def on_step(self, step: Step) -> bool:
        """Look at a step; returns whether the edit should end (see `csd_2d.edit.edit`)."""
        particles = step.noised.particles
        if not self._begun:
            self._begun = True
            names = [f"frame {number + 1}" for number in self._keys]
            if isinstance(particles, CanvasCrops):
                corners = ([self._prior.cell * place for place in corner] for corner in particles.corners)
                names = [f"crop at {left}, {top} px" for top, left in corners]
            self.observer.begin("edit", names, self._steps, self._prior.decode)
        self.observer.on_step(step)
        if self._watched() and self._for_pictures.allows:
            with self._for_pictures.spending(step.x_0.device):
                source = self._before[self._keys[self._frame]]
                latents = particles.canvas if isinstance(particles, CanvasCrops) else particles.render([self._frame])
                height, width = source.shape[-2:]
                picture = self._prior.decode(latents)[0, :, :height, :width].clamp(0, 1).cpu()
                self._pictures, self._stale = (_shown(source), _shown(picture)), True
        return self._stopped

    def _update(self) -> None:
        """Show what changed since the last time."""
        if self.observer.seen.taken and not self._stopped:
            self._status.content = self._progress(self.observer.seen)
        if self._stale:
            self._stale = False
            self._show_picture()
        if self.observer.version != self._shown_version and self._budget.allows:
            with self._budget.spending():
                self._shown_version = self.observer.version
                self._panel.show(self.observer.seen)

    def _progress(self, seen: Observation) -> str:
        return f"Step {seen.taken} of {seen.steps} · about {duration(seen.seconds_left)} left"

    def _show_picture(self) -> None:
        before, after = self._pictures
        share = self._split.value if self._compare.value == SPLIT else float(self._compare.value == ORIGINAL)
        picture = side_by_side(before, after, share)
        clients = self._server.get_clients()
        self._aspects = {number: client.camera.aspect for number, client in clients.items()}
        for client in clients.values():
            client.scene.set_background_image(_framed(picture, client.camera.aspect), format="jpeg", jpeg_quality=90)
