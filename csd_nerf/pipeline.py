"""The nerfstudio pipeline that edits its scene while it trains."""

import dataclasses
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation
from nerfstudio.engine.optimizers import Optimizers
from nerfstudio.models.base_model import Model
from nerfstudio.models.splatfacto import SplatfactoModel
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig
from torch import Tensor, nn
from torch.nn import Parameter

from csd_2d.config import EditConfig
from csd_2d.prior import Prior
from csd_2d.priors.loading import check_prior, load_prior
from csd_nerf.artifacts import Artifacts, edits_before
from csd_nerf.console import first, say, warn
from csd_nerf.cost import Cost, time_left
from csd_nerf.edit.distill import Distillation, cost_of_distilling
from csd_nerf.edit.masks import SCENE, Box, Coordinates, Sphere, masks_from_folder, masks_of_solid
from csd_nerf.edit.place import (
    FEW_RAYS,
    FEW_VIEWS,
    RAYS,
    PixelOfView,
    center_at,
    check_shown,
    data_coordinates,
    look,
)
from csd_nerf.edit.rounds import DatasetUpdate
from csd_nerf.edit.selection import Selection, farthest_points
from csd_nerf.edit.steering import ACTIONS, AT_NEXT_ROUND, AT_NEXT_STEP, IN_DISTILL, Settings, Steering
from csd_nerf.source_run import check_fits, read_checkpoint
from csd_nerf.viewer import EditViewer
from csd_nerf.views import training_views
from csd_nerf.views.base import TrainingViews, initial_pictures


@first("edit")
@dataclass
class CsdEditPipelineConfig(VanillaPipelineConfig):
    """Settings of the edit of a scene."""

    _target: type = field(default_factory=lambda: CsdEditPipeline)
    prompt: str = ""
    """Instruction, e.g. "make it night"."""
    mode: Literal["dataset-update", "distill"] = "dataset-update"
    """How the edit reaches the scene. dataset-update: in rounds, training images are edited and learned again (what
    the paper does). distill: every step renders some views, and the direction of the edit goes back through encoder
    and renderer into the scene; `edit.steps` and `edit.lr` are then those of the training."""
    source: Literal["original", "current"] | None = None
    """Unedited views, on which the diffusion model is conditioned and views not edited yet are trained: the original
    images, or renders of the scene before this edit. Default: current if --load-run is an edit itself, so that edits
    add up; else original."""
    film_frames: int = 48
    """Frames of turntable.mp4, which shows the scene before and after, side by side; 0: no film."""
    report: bool = True
    """Measure novel views of the scene before and after, and write report.html and report.json: consistency, structure,
    change. Nothing is downloaded; `csd eval BEFORE AFTER` adds what needs CLIP."""
    prior: str = "ip2p"
    """Diffusion model: 'ip2p' (timbrooks/instruct-pix2pix; the default of csd-edit, whatever is installed), 'tiny'
    (ships with this package; the default of csd-edit-tiny), 'sd' (text-to-image), a folder or hub id with a diffusers
    pipeline (InstructPix2Pix, its XL, CosXL-Edit, Stable Diffusion, its XL, FLUX.1 Kontext), or 'analytic' (exact
    scores of closed-form edits)."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Precision of the diffusion model. Default: float16 on a GPU, float32 elsewhere."""
    micro_batch: int = 8
    """Rows the diffusion model takes at once: lower it to save memory; the result is the same."""
    offload: bool = False
    """Keep each network of the diffusion model on the CPU while it is not in use."""
    local_files_only: bool = False
    """Load the diffusion model from the local cache only; do not ask the hub."""
    source_prompt: str | None = None
    """For text-to-image models: describes the views before the edit; the prompt then describes them after it."""
    compile: bool = False
    """Compile the diffusion model with torch.compile: faster, after first steps that take minutes."""
    edit: EditConfig = field(default_factory=EditConfig)
    """Settings of the joint edit of a round's views."""
    preset: str = "default"
    """Source of other defaults: a name in configs/ (`paper` is the published algorithm, `low-memory` spares the GPU),
    or a .yaml file. Options that differ from the method's own default win."""
    views_per_round: int = 0
    """Training views edited together in one round (paper: 16); 0 takes all of them. While only some views are edited,
    a scene explains the differences with geometry and loses parts. Dataset update only."""
    view_selection: Selection = "random"
    """How the views of a round are drawn: at random (paper), spread evenly over the cameras' positions, or near each
    other, which lets far sides of a scene take different answers. All are drawn before any is drawn again."""
    steps_per_round: int = 3000
    """Training steps from one round to the next (paper: 2000). Dataset update only."""

    masks: Path | None = None
    """Folder with a mask for each training view, named like it: white where the edit may change it, black where the
    training image stays, bit for bit. Dataset update only, as are box and sphere."""
    box: Box | None = None
    """In place of masks: only surfaces in this box of the scene are edited. Lowest x y z, highest x y z."""
    sphere: Sphere | None = None
    """In place of masks: only surfaces in this sphere of the scene are edited. Center x y z, radius. At the start a run
    prints where what the cameras look at lies."""
    sphere_at: PixelOfView | None = None
    """In place of sphere: its center is what a training view shows in a pixel. Name of the view's image, the pixel's x
    and y from the upper left corner, radius."""
    coordinates: Literal["scene", "data"] = "scene"
    """Whose coordinates those of box and sphere are: the scene's as nerfstudio trains it, or the data's, as the poses
    in transforms.json have them."""
    feather: float = 4.0
    """Width in pixels of the soft border, inside masks, box or sphere."""
    replay: Path | None = None
    """RUN/edit.json of an earlier run: what was changed while it ran, in the viewer, is changed again, at the same
    steps. Without a scene (--load-run) scene and settings, too, are those of that run."""

    def __post_init__(self) -> None:
        local = [name for name in ("masks", "box", "sphere", "sphere_at") if getattr(self, name) is not None]
        if len(local) > 1 or (local and self.mode == "distill"):
            raise ValueError(f"{' and '.join(local)} cannot be used {'together' if len(local) > 1 else 'in distill'}.")
        if self.mode == "distill" and getattr(self.model, "stop_split_at", 0):
            raise ValueError("Gaussians cannot be split in distill; leave --pipeline.model.stop-split-at at 0.")
        if getattr(self.datamanager, "train_cameras_sampling_strategy", "random") != "random":
            raise ValueError("leave --pipeline.datamanager.train-cameras-sampling-strategy at random for an edit.")
        if getattr(self.model, "use_proposal_weight_anneal", False):
            raise ValueError("use_proposal_weight_anneal would flatten the proposal weights of a trained scene.")
        if self.masks is not None and not self.masks.is_dir():
            raise ValueError(f"masks must be a folder, there is none at {self.masks}.")
        for name, low in (("micro_batch", 1), ("views_per_round", 0), ("steps_per_round", 1), ("film_frames", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}.")


MASKS = "masks"
"""Folder of a run with the masks of a solid."""
NOWHERE: Sphere = (0.0, 0.0, 0.0, 0.0)
"""Solid of a run that is resumed, whose masks were made before."""
INITIAL_PICTURES = ("source", MASKS)
"""Folders of a run with the pictures that are made before its first step."""


_SPEEDS = ("num_rays_per_sec", "fps")
"""Names of nerfstudio's metrics, or beginnings of them, that do not compare images."""


@dataclass(frozen=True)
class Run:
    """The training run that a pipeline edits its scene in."""

    folder: Path
    scene: Path
    """Checkpoint of the scene before the edit."""
    start: int
    """First step; above 0 the run is resumed."""
    steps: int
    """Number of steps in all."""
    seed: int
    lock: threading.Lock
    """Held during training steps; whoever holds it may use the scene."""
    optimizers: Optimizers
    """Those of the scene."""


def memory_advice(config: CsdEditPipelineConfig) -> str:
    """List the options that save memory, and how much each does."""
    advice = []
    if config.micro_batch > 1:
        half = config.micro_batch // 2
        advice.append(
            f"--pipeline.micro-batch {half} takes {1 - half / config.micro_batch:.0%} off what the diffusion model "
            f"works with (now {config.micro_batch} rows at once), at the same result"
        )
    if not config.offload:
        advice.append(
            "--pipeline.offload keeps all of its networks but one off the GPU (of ip2p in float16: 0.4 of 2.1 GB)"
        )
    rays = getattr(config.datamanager, "train_num_rays_per_batch", 0)
    if rays:
        advice.append(
            f"--pipeline.datamanager.train-num-rays-per-batch {max(rays // 2, 1)} halves what a step of the scene takes"
        )
    return "; ".join(advice) + "." if advice else "take smaller images."


def _appearance(model: Model) -> nn.Module | None:
    """Return the part of a model that learns the appearance of single training images, not the scene."""
    if isinstance(model, SplatfactoModel):
        return model.bil_grids if model.config.use_bilateral_grid else None
    return model.field.embedding_appearance  # type: ignore[union-attr]


class CsdEditPipeline(VanillaPipeline):
    """A scene under edit: nerfacto or splatfacto.

    Poses and appearance stay as the checkpoint has them: neither may explain an edit. The diffusion model is held by
    plain objects and loaded at the first training step: checkpoints and the viewer include every submodule, and
    rendering and evaluation build this class, too.
    """

    config: CsdEditPipelineConfig

    def __init__(self, config: CsdEditPipelineConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._distillation: Distillation | None = None
        self.rounds: DatasetUpdate | None = None
        """The rounds of dataset update."""
        self.run: Run | None = None
        """The run that edits the scene; None while it is only rendered."""
        self.step = 0
        """Step of the training."""
        self.over = self.saved = False
        """The training has ended; all that is written at the end is."""
        self.training_cost = Cost()
        """Cost of the training steps so far."""
        allowed = IN_DISTILL if config.mode == "distill" else AT_NEXT_STEP + AT_NEXT_ROUND + ACTIONS
        self.steering = Steering(
            Settings(config.prompt, config.edit, config.views_per_round), allowed, partial(check_prior, config.prior)
        )
        """Takes changes to the edit while it runs, from any thread."""
        self.paused = False
        """No rounds are run, while the scene goes on learning."""
        self.stopped = False
        """The training is to end after the present step."""
        self._due = False
        self._rounds_saved: int | None = None
        """Number of the last round that the last checkpoint holds."""
        self.viewer_control = EditViewer(self)
        """Found, and built, by nerfstudio's viewer."""
        self.model.camera_optimizer.requires_grad_(False)
        if (appearance := _appearance(self.model)) is not None:
            appearance.requires_grad_(False)

    def get_param_groups(self) -> dict[str, list[Parameter]]:
        groups = super().get_param_groups()
        return {name: groups[name] for name in groups if name not in ("camera_opt", "bilateral_grid")}

    def load_pipeline(self, loaded_state: dict[str, Any], step: int) -> None:
        """Load a checkpoint's tensors.

        Raises:
            ValueError: if they do not fit the model.
        """
        check_fits(loaded_state, self.state_dict())
        super().load_pipeline(loaded_state, step)

    def begin_edit(self, run: Run) -> list[TrainingCallback]:
        """Prepare the edit of the scene; returns the callbacks that carry it out.

        Raises:
            ValueError, OSError: if the run cannot be edited or resumed.
        """
        config, self.run, self._run = self.config, run, run
        views = self._views = training_views(self)
        with run.lock, views.sharing(run.lock):
            place = self._place(views)
            source = self._source(views)
        masks = self._masks(views, place)
        # Runs with different --machine.seed draw different noise, too.
        edit = dataclasses.replace(config.edit, seed=run.seed + config.edit.seed)
        if config.mode == "distill":
            edit = dataclasses.replace(edit, steps=run.steps)
        self.steering.settings = dataclasses.replace(self.steering.settings, edit=edit)
        self.steering.record(run.folder / "edit.json", config.replay)
        if not self._can_go_back:
            for name in ("undo", "reset"):
                self.steering.refuse(name, "Gaussians are split in this run, so that their number cannot go back.")
        artifacts = Artifacts(self, views, source, run.scene, masks)
        # Not within the training step: that runs under autocast.
        before, after = TrainingCallbackLocation.BEFORE_TRAIN_ITERATION, TrainingCallbackLocation.AFTER_TRAIN
        callbacks = [
            TrainingCallback([before], self._before_step, 1),
            TrainingCallback([after], partial(self._finish, artifacts)),
        ]
        if config.mode == "distill":
            parameters = [p for group in self.get_param_groups().values() for p in group]
            self._distillation = Distillation(
                views, source, self._prior, config.prompt, edit, parameters, self.viewer_control.observer
            )
            say(cost_of_distilling(edit, len(views)))
        else:
            self._warn_of_views_left_out(len(views))
            self.rounds = DatasetUpdate(
                views,
                source,
                self._prior,
                self.steering,
                selection=config.view_selection,
                folder=run.folder,
                load_masks=masks,
                observer=self.viewer_control.observer,
                save_scene=self._save_scene if self._can_go_back else None,
            )
        for step in range(run.start):
            self._before_step(step)
        self._rounds_saved = None if self.rounds is None else self.rounds.last
        return callbacks

    @property
    def _can_go_back(self) -> bool:
        return not getattr(self.model.config, "stop_split_at", 0)

    def _save_scene(self, path: Path) -> None:
        torch.save(self.state_dict(), path)

    def checkpoint_saved(self) -> None:
        """Delete scenes that undo cannot come back to any more, neither from this checkpoint nor from the one before.

        Two checkpoints are kept.
        """
        if self.rounds is not None:
            self.rounds.forget_scenes(self._rounds_saved or 0)
            self._rounds_saved = self.rounds.last

    def _warn_of_views_left_out(self, views: int) -> None:
        """Warn of rounds that will not reach all views of the scene."""
        size, rounds = self.config.views_per_round, -(-self._run.steps // self.config.steps_per_round)
        if 0 < size * rounds < views:
            warn(
                f"{rounds} round{'s' * (rounds > 1)} of {size} views will not reach all {views}, and the scene "
                "will be a mixture of edited and unedited views; raise --max-num-iterations, or leave "
                "--pipeline.views-per-round at 0."
            )

    def _before_step(self, step: int) -> None:
        """Let changes take effect, and run a round if it is time to.

        A resumed run goes through the steps before its start again, to have drawn and shown the same views.
        """
        self.step = step
        changes = self.steering.take_over(step)
        self._carry_out(step)
        if self._distillation is not None and changes and step >= self._run.start:
            with self.advising_on_memory():
                self._distillation.steer(self.steering.settings)
        if self.rounds is None:
            return
        self._due |= step % self.config.steps_per_round == 0
        if not self.paused and (self._due or self.rounds.interrupted):
            self._due = self._due and self.rounds.interrupted is not None  # another round follows it
            self._run_round(step)
            self._carry_out(step)

    def _run_round(self, step: int) -> None:
        update, run = self.rounds, self._run
        assert update is not None
        if step < run.start:
            done = update.run_round(step, finished=True)
        else:
            number = update.begun - (update.interrupted is not None)
            to_come = self.rounds_to_come(step)
            name = f"round {number + 1} of {number + 1 + to_come}"
            # The edit of a round takes minutes, in which a viewer should be able to render.
            with self.advising_on_memory(), self._views.sharing(run.lock):
                done = update.run_round(step, name)
            count = len(update.costs) + to_come
            left = time_left(update.costs, count, self.training_cost, step, run.steps) if done else ""
            say(f"{name} is {'done' if done else 'interrupted'}{left}.")
        if done:
            self._allow_undo(True)

    def rounds_to_come(self, step: int) -> int:
        """Count the rounds that are due after a step."""
        every = self.config.steps_per_round
        return -(-self._run.steps // every) - step // every - 1

    def _allow_undo(self, possible: bool) -> None:
        if self._can_go_back:
            self.steering.refuse("undo", None if possible else "only the last round can be undone; reset undoes all.")

    def _carry_out(self, step: int) -> None:
        """Carry out the actions that were taken over."""
        while (action := self.steering.next_action()) is not None:
            past = step < self._run.start
            if action in ("pause", "resume"):
                self.paused = action == "pause"
            elif action == "edit_now":
                self.paused, self._due = False, True
            elif action == "undo":
                self._undo(past)
            elif action == "reset":
                self._reset(past)
            else:
                self.stopped = True

    def _undo(self, past: bool) -> None:
        """Give up the round that was begun, or go back to before the last one; see `_before_step` for the past."""
        update = self.rounds
        if update is None or update.give_up():
            return
        scene = update.undo()
        self._allow_undo(False)
        if not past and scene is not None:
            self._restore_scene(torch.load(scene, map_location="cpu", weights_only=True))

    def _reset(self, past: bool) -> None:
        """Go back to before the first round."""
        if self.rounds is not None:
            self.rounds.give_up()
            self.rounds.reset()
            self._allow_undo(False)
        if not past:
            self._restore_scene(read_checkpoint(self._run.scene))

    def _restore_scene(self, state: dict[str, Any]) -> None:
        """Load an earlier state of the scene; its optimizers start anew."""
        self.load_pipeline(state, step=0)
        for optimizer in self._run.optimizers.optimizers.values():
            optimizer.state.clear()

    def _finish(self, artifacts: Artifacts, step: int) -> None:
        self.over = True
        self.viewer_control.show_edited()
        self.steering.refuse_all("the run is over; edit its scene in a new one, with --load-run.")
        with self._run.lock:
            artifacts.write(
                self._run.folder,
                self._report(self._run),
                self.config.film_frames,
                self.config.report,
                all_views=self.config.mode == "distill",
            )
        if self.rounds is not None and not self.stopped:  # a run that was stopped can go on
            self.rounds.forget_scenes(self.rounds.begun)
        self.saved = True

    @contextmanager
    def advising_on_memory(self) -> Iterator[None]:
        """Turn running out of GPU memory into a ValueError that says how to use less."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ValueError(f"out of GPU memory; {memory_advice(self.config)}") from error

    def _prior(self) -> Prior:
        config = self.config
        if config.prior != "analytic" and not sys.stderr.isatty():
            # Bars within bars move the cursor, whatever they are written to.
            import_module("transformers.utils.logging").disable_progress_bar()
        # A model is built from random weights; drawing them must not shift the rays of the training.
        device = torch.device(self.device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return load_prior(
                config.prior,
                self.device,
                dtype=None if config.dtype is None else getattr(torch, config.dtype),
                micro_batch=config.micro_batch,
                offload=config.offload,
                local_files_only=config.local_files_only,
                source_prompt=config.source_prompt,
                compile=config.compile,
            )

    def _source(self, views: TrainingViews) -> Callable[[int], Tensor]:
        """Choose the image that conditions the edit of a view, and supervises it until it is edited."""
        if self.config.source != "current":
            return views.original
        folder = self._run.folder / "source"
        source = initial_pictures(folder, views, views.render, "rendering the scene as it is")
        for index in range(len(views)):
            views.supervise(index, source(index))
        return source

    def _place(self, views: TrainingViews) -> tuple[Sphere | Box, Coordinates] | None:
        """Find the solid that is edited, and say where the scene lies; None if there is no solid.

        Raises:
            ValueError: if the views show nothing of it.
        """
        config = self.config
        solid = config.box or config.sphere
        coordinates = SCENE
        if config.coordinates == "data":
            datamanager: Any = self.datamanager
            coordinates = data_coordinates(datamanager.train_dataparser_outputs, datamanager.config.dataparser)
        local = solid is not None or config.sphere_at is not None
        if self._run.start or (self._run.folder / MASKS).is_dir():  # a run that is resumed
            return (solid or NOWHERE, coordinates) if local else None
        few = farthest_points(views.positions(), FEW_VIEWS)
        rays = RAYS["cuda" if torch.device(self.device).type == "cuda" else "cpu"]
        seen = look(views, range(len(views)), rays) if solid else look(views, few, FEW_RAYS)
        say(f"The cameras look at {seen.extent(coordinates)}, for the most part.")
        if config.sphere_at is not None:
            x, y, z, radius = solid = center_at(views, config.sphere_at)
            say(f"The sphere's center is {x:.3g} {y:.3g} {z:.3g} of {SCENE.name}, its radius {radius:g}.")
            return solid, SCENE
        if solid is None:
            return None
        check_shown(seen, solid, coordinates)
        return solid, coordinates

    def _masks(
        self, views: TrainingViews, place: tuple[Sphere | Box, Coordinates] | None
    ) -> Callable[[], list[Tensor]] | None:
        """Choose how the masks of a local edit are made; None if everything may change."""
        config, folder = self.config, self._run.folder / MASKS
        if config.masks is not None:
            return partial(masks_from_folder, views, config.masks, config.feather)
        if place is None:
            return None

        def masks() -> list[Tensor]:
            solid, coordinates = place
            made = [] if folder.is_dir() else masks_of_solid(views, solid, config.feather, coordinates)
            mask = initial_pictures(folder, views, lambda index: made[index].expand(3, -1, -1), "masks")
            return [mask(index)[:1] for index in range(len(views))]

        return masks

    def edit_state(self) -> dict[str, Any]:
        """Return the state of the edit beside the scene and the files in the run's folder."""
        return {
            "training_cost": dataclasses.asdict(self.training_cost),
            "scene": self._views.training_state(),
            "distillation": None if self._distillation is None else self._distillation.state_dict(),
        }

    def load_edit_state(self, state: dict[str, Any]) -> None:
        """Restore what `edit_state` returned; after `begin_edit`."""
        self.training_cost = Cost(**state["training_cost"])
        self._views.load_training_state(state["scene"])
        if self._distillation is not None:
            self._distillation.load_state_dict(state["distillation"])

    def _prompts(self) -> list[str]:
        """List the prompts of this run, in order, since the scene was last reset."""
        prompts = [self.config.prompt]
        for change in self.steering.changes:
            if change.name == "reset":
                prompts = prompts[-1:]
            elif change.name == "prompt":
                prompts.append(change.value)
        return prompts

    def _report(self, run: Run) -> dict[str, Any]:
        config = self.config
        names = {f.name for f in dataclasses.fields(config)} - {
            f.name for f in dataclasses.fields(VanillaPipelineConfig)
        }
        return {
            "prompt": config.prompt,
            "history": [*edits_before(run.scene), *self._prompts()],
            "scene": run.scene,
            "steps": self.step + 1,
            "seed": run.seed,
            "changes": self.steering.report(),
            "settings": {name: value for name, value in dataclasses.asdict(config).items() if name in names},
            "costs": {
                "rounds": [cost.rounded() for cost in (self.rounds.costs if self.rounds else [])],
                "training": self.training_cost.rounded(),
            },
        }

    def get_average_eval_image_metrics(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Compute nerfstudio's metrics, for `ns-eval`, under names that say what renders are compared with."""
        metrics = super().get_average_eval_image_metrics(*args, **kwargs)
        return {name if name.startswith(_SPEEDS) else f"unedited_photographs_{name}": metrics[name] for name in metrics}

    def get_train_loss_dict(self, step: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        if self._distillation is None:
            return super().get_train_loss_dict(step)
        # The prior has a precision of its own, and so does the path back through its encoder.
        with torch.autocast(torch.device(self.device).type, enabled=False):
            loss, edit_step = self._distillation.next()
        return {}, {"csd": loss}, {"edit_residual": edit_step.residual_norm}
