"""Live inspection: a panel in nerfstudio's viewer that shows what an edit does, and steers it."""

import json
import math
import threading
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nerfstudio.viewer.viewer_elements import ViewerControl

from csd_2d.io.images import read_image
from csd_2d.observer import WIDTH, Budget, Observer, thumbnail
from csd_2d.panel import (
    AMPLIFIED,
    EDITED,
    ORIGINAL,
    SCENES,
    SPLIT,
    Panel,
    Row,
    amplified,
    as_markdown,
    grid,
    keep_updated,
    ssh_line,
)
from csd_2d.progress import duration
from csd_nerf.artifacts import render
from csd_nerf.console import say
from csd_nerf.cost import peak_memory_mb, seconds_left
from csd_nerf.edit.selection import farthest_points
from csd_nerf.source_run import read_checkpoint
from csd_nerf.views.base import view_name

if TYPE_CHECKING:
    from nerfstudio.viewer.viewer import Viewer

SCALE = 10.0
"""Units of nerfstudio's viewer in one of the scene; it does not export its constant without importing the viewer."""
SHOWN = 6
"""Views whose images the panel shows while no round runs."""
SMALL = 128
"""Width of their renders, in pixels: training waits for each."""
FIELDS = {
    "guidance_scale": "Text guidance",
    "image_guidance_scale": "Image guidance",
    "lr": "Learning rate",
    "steps": "Steps per round",
    "views_per_round": "Views per round",
}
"""Labels of settings that are typed."""
HINTS = {
    "guidance_scale": "Higher follows the sentence more closely. From the next step. Empty: the model's own.",
    "image_guidance_scale": "Higher keeps more of the image. From the next step. Empty: the model's own.",
    "lr": "How far a step moves the images. From the next step. Empty: it follows from the steps.",
    "steps": "From the next round.",
    "views_per_round": "0 takes all of them. From the next round.",
}
RECORDED = (
    "mode",
    "prior",
    "mixing",
    "steps",
    "guidance_scale",
    "image_guidance_scale",
    "views_per_round",
    "source",
)
"""Settings of a finished run that are shown."""
MIXINGS = ("consensus", "svgd", "none")
NO_VIEW = "choose one, or click a camera"


def parsed(name: str, text: str) -> Any:
    """Read a setting that was typed or chosen; an empty number is the default.

    Raises:
        ValueError: if it is no number.
    """
    text = text.strip()
    if name not in FIELDS:
        return text
    if not text and name in ("guidance_scale", "image_guidance_scale", "lr"):
        return None
    try:
        return int(text) if name in ("steps", "views_per_round") else float(text)
    except ValueError:
        kind = "a whole number" if name in ("steps", "views_per_round") else "a number"
        raise ValueError(f"{FIELDS[name].lower()} must be {kind}, got '{text}'.") from None


class EditViewer(ViewerControl):
    """The panel of an edit in nerfstudio's viewer, which builds it when it starts, if it does.

    While the run lasts it steers, afterwards (`ns-viewer`) it shows what the run's folder holds. All that takes time is
    done by a thread of its own, and only while a browser is connected.

    Args:
        pipeline: `csd_nerf.pipeline.CsdEditPipeline`.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self.observer = Observer(self._watched)
        self._server: Any = None
        self._shown_version = -1
        self._marked: tuple[int, ...] = ()
        self._budget, self._for_views = Budget(0.01), Budget(0.01)
        self._chosen: int | None = None
        self._chosen_is_stale = False
        self._learned: dict[int, int] | None = None
        self._original: Any = None
        self._marks: dict[int, Any] = {}
        self._drawn: set[int] = set()
        """Training cameras that are drawn."""
        self._clickable = False

    def _watched(self) -> bool:
        return self._server is not None and bool(self._server.get_clients())

    # ---- building --------------------------------------------------------------------------------------------------

    def _setup(self, viewer: "Viewer") -> None:
        """Build the panel; nerfstudio's viewer calls this once, in its constructor."""
        super()._setup(viewer)
        self._server, gui = self.viser_server, self.viser_server.gui
        # nerfstudio's bar loads its logo from the internet, and viser's button for sharing makes the page public.
        gui.configure_theme(
            control_layout="collapsible",
            control_width="large",
            dark_mode=True,
            show_share_button=False,
            brand_color=(255, 211, 105),
        )
        self._names = [view_name(i, file) for i, file in enumerate(self._dataset.image_filenames)]
        self._status = gui.add_markdown("**csd-edit**", order=-3)
        self._message = gui.add_markdown("", order=-2)
        tabs = gui.add_tab_group(order=-1)
        live = viewer.trainer is not None
        with tabs.add_tab("Edit" if live else "Run"):
            self._add_steering() if live else self._add_record()
        with tabs.add_tab("Images"):
            self._panel = Panel(gui)
            self._panel.add_thumbnails()
        with tabs.add_tab("Views"):
            self._add_views()
        with tabs.add_tab("Charts"):
            self._panel.add_charts()
        self._drawn = set(range(len(self._names)))
        self.viser_server.on_client_connect(lambda client: self._look_from(client, 0))
        viewer.pause_train.visible &= live
        if live:
            port = self.viser_server.get_port()
            say(
                f"Watch and steer the edit at http://localhost:{port}; if this is a remote machine, first, on yours: "
                f"{ssh_line(port)}"
            )
        update = self._update if live else self._update_record
        threading.Thread(
            target=keep_updated, args=(update, self._watched, threading.Event()), daemon=True, name="csd-edit panel"
        ).start()

    @property
    def _lock(self) -> threading.Lock:
        assert self.viewer.train_lock is not None
        return self.viewer.train_lock

    @property
    def _dataset(self) -> Any:
        return self._pipeline.datamanager.train_dataset

    @property
    def _folder(self) -> Path:
        return self.viewer.log_filename.parent

    def _add_steering(self) -> None:
        gui, steering = self.viser_server.gui, self._pipeline.steering
        settings = steering.settings
        self._prompt = gui.add_text(
            "Prompt", settings.prompt, hint="What to change. Of a running round from its next step."
        )
        self._add_button("Edit now", "edit_now", "Run a round with these settings at once.", color="yellow")
        with gui.add_folder("Settings", expand_by_default=True):
            self._typed_fields = {"prompt": self._prompt} | {
                name: gui.add_text(label, _typed(_value(settings, name)), hint=HINTS[name])
                for name, label in FIELDS.items()
                if name in steering.allowed
            }
            if "mixing" in steering.allowed:
                hint = "What images share. From the next round."
                self._typed_fields["mixing"] = gui.add_dropdown("Mixing", MIXINGS, settings.edit.mixing, hint=hint)
            apply = gui.add_button("Apply", hint="Prompt and settings take effect as soon as they can.")
            apply.on_click(lambda event: self._answer(event.client, self._ask_for_settings))
        with gui.add_folder("Run"):
            self._pause = self._add_button("Pause edit", "pause", "The scene goes on learning; no round is run.")
            self._resume = self._add_button("Resume edit", "resume", "Go on with the round that was interrupted.")
            self._add_button("Undo round", "undo", "Give up the round that runs, or go back to before the last one.")
            self._add_button("Reset scene", "reset", "Bring back the original scene and the unedited images.")
            self._add_button(
                "Stop and save", "stop", "End the run now, with checkpoint, pictures and film.", color="red"
            )
        self._history = gui.add_markdown("")

    def _add_button(self, label: str, action: str, hint: str, color: Any = None) -> Any:
        button = self.viser_server.gui.add_button(label, hint=hint, color=color)
        button.visible = action in self._pipeline.steering.allowed
        button.on_click(lambda event: self._answer(event.client, self._ask_for, action))
        return button

    def _add_record(self) -> None:
        """Show what edit.json says of a run that is over."""
        gui, report = self.viser_server.gui, self._report
        if report is None:
            gui.add_markdown(f"There is no edit.json in {self._folder}: the run did not end.")
            return
        try:
            gui.add_markdown(_record(report))
            gui.add_markdown(_history(report["changes"]))
        except (KeyError, TypeError, AttributeError):
            gui.add_markdown("edit.json is not one of this version; pictures and scenes are shown all the same.")

    @property
    def _report(self) -> dict[str, Any] | None:
        try:
            report = json.loads((self._folder / "edit.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return report if "history" in report else None

    def _add_views(self) -> None:
        gui = self.viser_server.gui
        self._compare = gui.add_dropdown(
            "Show",
            SCENES,
            hint="The scene from before the edit is loaded when it is first shown, and let go of with 'edited'.",
        )
        self._split = gui.add_slider("Split", 0.0, 1.0, 0.01, 0.5, visible=False)
        self._compare.on_update(lambda event: self._answer(event.client, self._show_scenes))
        self._split.on_update(lambda event: self._answer(event.client, self._show_scenes))
        self._views = gui.add_dropdown("Camera", (NO_VIEW, *self._names), hint="A training view.")
        self._views.on_update(lambda event: self._answer(event.client, self._choose, event.client))
        jump = gui.add_button("Jump to it", hint="Look at the scene exactly from this camera.")
        jump.on_click(lambda event: self._answer(event.client, self._jump, event.client))
        self._picture = gui.add_markdown("*A camera's photograph, its edit and the scene from there.*")

    # ---- steering --------------------------------------------------------------------------------------------------

    def _answer(self, client: Any, action: Callable[..., Any], *arguments: Any) -> None:
        """Do what a browser asks for; an error is told in the panel, and over the scene of that browser."""
        try:
            self._message.content = action(*arguments) or ""
            return
        except ValueError as error:
            title, said = "Refused", str(error)
        except Exception as error:
            title, said = "Failed", f"{type(error).__name__}: {error}"
        self._message.content = f"⚠️ **{title}:** {said}"
        if client is not None:  # None: the change was made here
            client.add_notification(title, said, auto_close=10_000, color="red")

    def _ask_for(self, action: str) -> str:
        if action == "edit_now":
            self._ask_for_settings()
        self._pipeline.steering.ask(action)
        said = f"✓ {action.replace('_', ' ')}: takes effect before the next step."
        run, every = self._pipeline.run, self._pipeline.config.steps_per_round
        if action == "edit_now" and run is not None and (left := run.steps - self._pipeline.step) < every / 2:
            said += (
                f" ⚠️ The scene has only {left} steps left to learn it, of {every} for a round; edit the finished scene "
                "in a new run, with --load-run, or begin with more --max-num-iterations."
            )
        return said

    def _ask_for_settings(self) -> str:
        steering, given = self._pipeline.steering, {}
        for name, field in self._typed_fields.items():  # all of them, or none
            try:
                given[name] = parsed(name, field.value)
                steering.check(name, given[name])
            except ValueError as error:
                field.value = _typed(_value(steering.settings, name))  # the one that holds
                raise ValueError(str(error).replace(name, FIELDS.get(name, name).lower())) from None
        for name, value in given.items():
            steering.ask(name, value)
        return "✓ Taken over; the list below says from which step on."

    # ---- scenes and cameras ----------------------------------------------------------------------------------------

    def _show_scenes(self) -> str:
        shown, model = self._compare.value, self._pipeline.model
        self._split.visible = shown == SPLIT
        if shown == EDITED:
            self._original = None
            model.compare(None)
        else:
            if self._original is None:
                self._original = self._load_original()
            model.compare(self._original, 1.0 if shown == ORIGINAL else self._split.value)
        self.viewer._trigger_rerender()
        return "" if shown != SPLIT else "Left: the original scene. Right: the edited one."

    def show_edited(self) -> None:
        """Show the edited scene alone, and let go of the original one."""
        if self._server is not None:
            self._compare.value = EDITED  # which calls what follows
        self._pipeline.model.compare(None)

    def _load_original(self) -> Any:
        """Load the scene from before the edit, beside the edited one. ValueError, OSError if it is not there."""
        run, report = self._pipeline.run, self._report
        checkpoint = run.scene if run is not None else Path((report or {}).get("scene", ""))
        if not checkpoint.is_file():
            raise ValueError(f"the scene from before the edit is not at '{checkpoint}'.")
        state = read_checkpoint(checkpoint)
        dataset, device = self._dataset, torch.device(self._pipeline.device)
        # Random weights are drawn, and replaced: that must not shift the rays of the training.
        with self._lock, torch.random.fork_rng([device] if device.type == "cuda" else []):
            model = self._pipeline.config.model.setup(
                scene_box=dataset.scene_box,
                num_train_data=len(dataset),
                metadata=dataset.metadata,
                device=device,
                grad_scaler=None,
                seed_points=None,
            ).to(device)
        model.load_state_dict(
            {name.removeprefix("_model."): value for name, value in state.items() if name.startswith("_model.")},
            strict=False,
        )
        return model.eval()

    def _choose(self, client: Any, index: int | None = None) -> None:
        """Show a training view; from the list, or by its index."""
        if index is not None:
            self._views.value = self._names[index]  # which calls this again
            self._look_from(client, index)
            return
        self._chosen = None if self._views.value == NO_VIEW else self._names.index(self._views.value)
        self._chosen_is_stale = True

    def _jump(self, client: Any) -> str | None:
        if self._chosen is None:
            raise ValueError("choose a camera first.")
        self._look_from(client, self._chosen)

    def _look_from(self, client: Any, index: int) -> None:
        """Move a browser's camera exactly to a training camera."""
        wxyz, position, fov, _ = self._pose(index)
        with client.atomic():
            client.camera.position, client.camera.wxyz, client.camera.fov = position, wxyz, fov

    def _show_cameras(self) -> None:
        """Draw the cameras, as far as nerfstudio's button lets them, but none that somebody looks from.

        The photograph in it would hide the scene.
        """
        if not (handles := getattr(self.viewer, "camera_handles", {})):
            return
        positions = SCALE * self._dataset.cameras.camera_to_worlds[..., 3].cpu().numpy()
        eyes = [client.camera.position for client in self.viser_server.get_clients().values()]
        near = {i for eye in eyes for i in np.flatnonzero(np.linalg.norm(positions - eye, axis=1) < self._near)}
        wanted = set(range(len(positions))) - near if self.viewer.hide_images.visible else set()
        for index in (wanted ^ self._drawn) & handles.keys():
            handles[index].visible = index in wanted
        for index, mark in self._marks.items():
            if mark.visible == (index in near):
                mark.visible = index not in near
        self._drawn = wanted

    @property
    def _near(self) -> float:
        """Distance from a camera up to which its photograph may be in the way, in viser's units."""
        return 4 * self.viewer.config.camera_frustum_scale

    def _pose(self, index: int) -> tuple[np.ndarray, np.ndarray, float, float]:
        """Return rotation, position, vertical field of view and aspect of a training camera, in viser's conventions."""
        import viser.transforms as vtf

        camera = self._dataset.cameras[index]
        to_world = camera.camera_to_worlds.cpu().numpy()
        rotation = vtf.SO3.from_matrix(to_world[:3, :3]) @ vtf.SO3.from_x_radians(np.pi)
        height, width = float(camera.height), float(camera.width)
        fov = 2 * math.atan(height / 2 / float(camera.fy))
        return rotation.wxyz, to_world[:3, 3] * SCALE, fov, width / height

    # ---- the thread ------------------------------------------------------------------------------------------------

    def _update(self) -> None:
        """Show what changed since the last time."""
        pipeline, update = self._pipeline, self._pipeline.rounds
        self._make_cameras_clickable()
        if (status := self._status_line()) != self._status.content:
            self._status.content = status
        if "pause" in pipeline.steering.allowed:
            self._pause.visible, self._resume.visible = not pipeline.paused, pipeline.paused
        history = _history(pipeline.steering.report())
        if history != self._history.content:
            self._history.content = history
        self._show_cameras()
        views = () if update is None or update.interrupted is None else tuple(update.interrupted.views)
        if views != self._marked:
            self._mark_cameras(views)
        learned = update.shown if update is not None and update.begun and update.interrupted is None else None
        if self.observer.version != self._shown_version and self._budget.allows:
            with self._budget.spending():
                self._shown_version = self.observer.version
                self._panel.show(self.observer.seen, images=learned is None)
                seconds = {f"round {i + 1}": cost.seconds for i, cost in enumerate(update.costs if update else [])}
                self._panel.show_seconds(seconds | {"training": pipeline.training_cost.seconds})
        self._show_views(None if learned is None else dict(learned))

    def _show_views(self, shown: dict[int, int] | None) -> None:
        """Show the camera that was chosen, and what the scene has made of its edits so far.

        Both anew if they change, or when there is time for it.

        Args:
            shown: see `DatasetUpdate.shown`; None while a round runs, whose images are shown.
        """
        free, device = self._for_views.allows, torch.device(self._pipeline.device)
        if self._chosen_is_stale or (self._chosen is not None and free):
            self._chosen_is_stale = False
            with self._for_views.spending(device):
                self._show_chosen()
        if shown is not None and (free or shown != self._learned):
            with self._for_views.spending(device):
                self._show_scene(sorted(shown))
        self._learned = shown

    def _update_record(self) -> None:
        """Show the pictures and costs of a run that is over, once, and the camera that was chosen."""
        self._make_cameras_clickable()
        self._show_cameras()
        if self._shown_version < 0:
            self._shown_version = 0
            self._status.content = f"**Edited scene** · {self._folder.name}"
            self._show_scene()
            self._show_costs()
        if self._chosen_is_stale:
            self._chosen_is_stale = False
            self._show_chosen()

    def _status_line(self) -> str:
        pipeline, run, update = self._pipeline, self._pipeline.run, self._pipeline.rounds
        if run is None:
            return "**csd-edit** is getting ready."
        if pipeline.over and not pipeline.saved:
            return "**The training has ended.** Pictures, film and report are being written."
        if pipeline.over:
            return f"**The run is over.** It is in {run.folder}; its scene can be edited again with --load-run."
        step = pipeline.step
        where = f"**Learning**, step {step + 1} of {run.steps}"
        costs = [] if update is None else update.costs
        seconds = seconds_left(costs, pipeline.rounds_to_come(step), pipeline.training_cost, step, run.steps)
        if update is not None and update.interrupted is not None:
            seen, number = self.observer.seen, update.interrupted.number + 1
            where = f"**Round {number} of {number + pipeline.rounds_to_come(step)}**, "
            running = self.observer.running
            where += f"step {seen.taken} of {seen.steps}" if running else "rendering and encoding its views"
            seconds += seen.seconds_left if running else 0
        paused = " · **paused**, the scene goes on learning" if pipeline.paused else ""
        memory = peak_memory_mb(torch.device(pipeline.device)) / 1000
        left = duration(seconds) + (" left" if step else " left, and the training after it")
        return f"{where}{paused} · about {left} · peak memory {memory:.1f} GB"

    def _make_cameras_clickable(self) -> None:
        handles = getattr(self.viewer, "camera_handles", None)
        if self._clickable or not handles:
            return
        self._clickable = True
        for index, handle in list(handles.items()):
            handle.on_click(lambda event, index=index: self._answer(event.client, self._choose, event.client, index))

    def _mark_cameras(self, views: tuple[int, ...]) -> None:
        """Show the cameras of the present round in orange."""
        for mark in self._marks.values():
            mark.remove()
        self._marks, self._marked = {}, views
        scale = self.viewer.config.camera_frustum_scale * 1.3
        for index in views:
            wxyz, position, fov, aspect = self._pose(index)
            mark = self.viser_server.scene.add_camera_frustum(
                f"/edited_now/{self._names[index]}", fov, aspect, scale, (255, 140, 0), wxyz=wxyz, position=position
            )
            mark.on_click(lambda event, index=index: self._answer(event.client, self._choose, event.client, index))
            self._marks[index] = mark

    def _photograph(self, index: int) -> np.ndarray:
        return thumbnail(self._dataset[index]["image"][..., :3].permute(2, 0, 1).cpu())

    def _edit(self, index: int) -> np.ndarray | None:
        path = self._folder / "edited" / f"{self._names[index]}.png"
        return thumbnail(read_image(path)) if path.is_file() else None

    def _render(self, index: int, width: int = WIDTH) -> np.ndarray:
        camera = deepcopy(self._dataset.cameras[index : index + 1])
        camera.rescale_output_resolution(min(1.0, width / int(camera.width.max())))
        with self._lock, torch.no_grad():
            return thumbnail(render(self._pipeline.model, camera))

    def _show_chosen(self) -> None:
        if self._chosen is None:
            self._picture.content = "*A camera's photograph, its edit and the scene from there.*"
            return
        images = [self._photograph(self._chosen), self._edit(self._chosen), self._render(self._chosen)]
        sheet = grid(("photograph", "edit", "scene"), [(self._names[self._chosen], images)], width=220)
        self._picture.content = as_markdown(sheet, f"view {self._names[self._chosen]}")

    def _show_scene(self, among: Sequence[int] = ()) -> None:
        """Show photograph, edit and present scene of some views, spread over the positions of all or of some."""
        indices = list(among) or list(range(len(self._dataset)))
        spread = farthest_points(self._dataset.cameras.camera_to_worlds[indices, :, 3], SHOWN)
        rows: list[Row] = []
        for index in sorted(indices[place] for place in spread):
            source, edit = self._photograph(index), self._edit(index)
            change = None if edit is None else amplified(source, edit)
            rows.append((self._names[index], [source, edit, self._render(index, SMALL), change]))
        self._panel.show_images(grid(("photograph", "edit", "scene", f"change x{AMPLIFIED}"), rows))

    def _show_costs(self) -> None:
        """Show the seconds per stage of a run that is over, if its edit.json has them."""
        try:
            costs = (self._report or {})["costs"]
            seconds = {f"round {i + 1}": float(cost["seconds"]) for i, cost in enumerate(costs["rounds"])}
            seconds |= {name: float(costs[name]["seconds"]) for name in ("training", "artifacts") if name in costs}
        except (KeyError, TypeError, ValueError):
            return
        self._panel.show_seconds(seconds)


def _value(settings: Any, name: str) -> Any:
    return getattr(settings if name in ("prompt", "views_per_round") else settings.edit, name)


def _record(report: dict[str, Any]) -> str:
    """List what edit.json says of a run."""
    settings = {**report["settings"], **report["settings"]["edit"]}
    lines = [f"**Prompts:** {', then '.join(report['history'])}", f"**Training steps:** {report['steps']}"]
    lines += [f"**{name.replace('_', ' ')}:** {settings[name]}" for name in RECORDED if settings.get(name) is not None]
    lines += [f"**Mean change:** {255 * report['change']['mean']:.1f} of 255 gray levels"]
    return "\n\n".join(lines)


def _typed(value: Any) -> str:
    return "" if value is None else str(value)


def _history(changes: list[dict[str, Any]]) -> str:
    """List changes, the last one first."""
    if not changes:
        return ""
    lines = []
    for change in reversed(changes):
        what = change["name"].replace("_", " ")
        value = "" if change["value"] is None else f": {change['value']}"
        where = "" if change["edit_step"] is None else f", step {change['edit_step'] + 1} of its round"
        lines.append(f"- {what}{value} *(training step {change['training_step']}{where})*")
    return "**Changes**\n\n" + "\n".join(lines)
