"""The nerfstudio pipeline that edits its scene while it trains."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.models.base_model import Model
from nerfstudio.models.splatfacto import SplatfactoModel
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor, nn
from torch.nn import Parameter

from csd_2d.edit import EditConfig
from csd_2d.priors import Prior, load_prior
from csd_nerf.artefacts import Artefacts, Cost, edits_before
from csd_nerf.dataset_update import DatasetUpdate, time_left
from csd_nerf.distill import Distillation, cost_of_distilling
from csd_nerf.masks import Box, Sphere, masks_from_folder, masks_of_solid
from csd_nerf.resume import random_state_kept
from csd_nerf.scene import NerfactoViews, TrainingViews, pictures_of_the_start
from csd_nerf.selection import Selection
from csd_nerf.source_run import check_fits
from csd_nerf.splat import SplatViews


@dataclass
class CsdEditPipelineConfig(VanillaPipelineConfig):
    """Settings of the edit of a scene."""

    _target: type = field(default_factory=lambda: CsdEditPipeline)
    prompt: str = ""
    """The instruction, e.g. "make it night"."""
    mode: Literal["dataset-update", "distill"] = "dataset-update"
    """How the edit reaches the scene. dataset-update: in rounds, training images are edited and learned again (what
    the paper does). distill: every step renders some views, and the direction of the edit goes back through encoder
    and renderer into the scene; `edit.steps` and `edit.lr` are then those of the training."""
    source: Literal["original", "current"] | None = None
    """What the diffusion model is shown as the unedited view, and what views not edited yet are trained on: the
    original images, or what the scene shows before this edit. Default: current if --load-run is an edit itself, so
    that edits add up; else original."""
    film_frames: int = 48
    """Frames of turntable.mp4, which shows the scene before and after, side by side; 0: no film."""
    prior: str = "ip2p"
    """Diffusion model: 'ip2p' (timbrooks/instruct-pix2pix; the default of csd-edit, whatever is installed), 'tiny'
    (ships with this package; the default of csd-edit-tiny), 'sd' (text-to-image), a folder or hub id with a diffusers
    pipeline (InstructPix2Pix, its XL, CosXL-Edit, Stable Diffusion, its XL, FLUX.1 Kontext), or 'analytic' (exact
    scores of closed-form edits)."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """What the diffusion model computes in. Default: float16 on a GPU, float32 elsewhere."""
    micro_batch: int = 8
    """Rows the diffusion model takes at once: lower it to save memory; the result is the same."""
    offload: bool = False
    """Keep each of the diffusion model's networks on the CPU while it is not in use."""
    local_files_only: bool = False
    """Take the diffusion model from the local cache; ask no hub."""
    source_prompt: str | None = None
    """What the views show before the edit; for text-to-image models, whose prompt then says what they shall show."""
    compile: bool = False
    """Have torch.compile make the diffusion model faster. The first steps then take minutes."""
    edit: EditConfig = field(default_factory=EditConfig)
    """The joint edit of one round's views. `transport` is not for scenes."""
    preset: str = "default"
    """Other defaults: a name in configs/ (`paper` is the published algorithm, `fast` edits all views once, `low-memory`
    spares the GPU), or a .yaml file. An option that differs from the method's own default wins."""
    views_per_round: int = 16
    """Training views edited together in one round (paper: 16); 0 takes all of them. Dataset update only."""
    view_selection: Selection = "random"
    """How the views of a round are drawn: at random (paper), spread evenly over the cameras' positions, or near each
    other, which lets far sides of a scene take different answers. Each gets its turn before any is drawn again."""
    steps_per_round: int = 2000
    """Training steps from one round to the next (paper: 2000). Dataset update only."""

    masks: Path | None = None
    """Folder with a mask for each training view, named like it: white where the edit may go, black where the training
    image stays as it is, bit for bit. Dataset update only, as are box and sphere."""
    box: Box | None = None
    """In place of masks: only what lies in this box of the scene is edited. Lowest x y z, highest x y z."""
    sphere: Sphere | None = None
    """In place of masks: only what lies in this sphere of the scene is edited. Centre x y z, radius."""
    feather: float = 4.0
    """Width in pixels over which the border of masks, box or sphere falls off, inwards."""

    def __post_init__(self) -> None:
        local = [name for name in ("masks", "box", "sphere") if getattr(self, name) is not None]
        if len(local) > 1 or (local and self.mode == "distill"):
            raise ValueError(f"{' and '.join(local)} cannot be used {'together' if len(local) > 1 else 'in distill'}.")
        if self.mode == "distill" and getattr(self.model, "stop_split_at", 0):
            raise ValueError("Gaussians cannot be split in distill; leave --pipeline.model.stop-split-at at 0.")
        if getattr(self.datamanager, "train_cameras_sampling_strategy", "random") != "random":
            raise ValueError("leave --pipeline.datamanager.train-cameras-sampling-strategy at random for an edit.")
        if getattr(self.model, "use_proposal_weight_anneal", False):
            raise ValueError("use_proposal_weight_anneal would flatten the proposal weights of a trained scene.")
        if self.edit.transport != "off":
            raise ValueError("transport is for videos and panoramas; leave --pipeline.edit.transport at off.")
        if self.masks is not None and not self.masks.is_dir():
            raise ValueError(f"masks must be a folder, there is none at {self.masks}.")
        for name, low in (("micro_batch", 1), ("views_per_round", 0), ("steps_per_round", 1), ("film_frames", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}.")


_OF_NERFSTUDIO = frozenset(f.name for f in dataclasses.fields(VanillaPipelineConfig))


PICTURES_OF_THE_START = ("source", "masks")
"""Folders of a run with what is made before its first step."""


def memory_advice(config: CsdEditPipelineConfig) -> str:
    """Which options take less memory, and by how much."""
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


def training_views(pipeline: VanillaPipeline) -> TrainingViews:
    """The training views of a nerfacto or splatfacto pipeline.

    Raises:
        ValueError: as `NerfactoViews`.
    """
    return SplatViews(pipeline) if isinstance(pipeline.model, SplatfactoModel) else NerfactoViews(pipeline)


def _appearance(model: Model) -> nn.Module | None:
    """What a model learns of each training image that is not the scene."""
    if isinstance(model, SplatfactoModel):
        return model.bil_grids if model.config.use_bilateral_grid else None
    return model.field.embedding_appearance  # type: ignore[union-attr]


class CsdEditPipeline(VanillaPipeline):
    """A scene under edit: nerfacto or splatfacto.

    Poses and appearance stay as the checkpoint has them: an edit must not be explained by either. What needs the
    diffusion model lives in the training callbacks, not in this module: checkpoints and the viewer take in every
    submodule, and rendering and evaluation build this class, too.
    """

    config: CsdEditPipelineConfig

    def __init__(self, config: CsdEditPipelineConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._distillation: Distillation | None = None
        self._update: DatasetUpdate | None = None
        self.training_cost = Cost()
        """Of the training steps so far."""
        self.model.camera_optimizer.requires_grad_(False)
        if (appearance := _appearance(self.model)) is not None:
            appearance.requires_grad_(False)

    def get_param_groups(self) -> dict[str, list[Parameter]]:
        groups = super().get_param_groups()
        return {name: groups[name] for name in groups if name not in ("camera_opt", "bilateral_grid")}

    def load_pipeline(self, loaded_state: dict[str, Any], step: int) -> None:
        """Loads a checkpoint's tensors.

        Raises:
            ValueError: if they do not fit the model.
        """
        check_fits(loaded_state, self.state_dict())
        super().load_pipeline(loaded_state, step)

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> list[TrainingCallback]:
        callbacks = super().get_training_callbacks(training_callback_attributes)
        trainer, config = training_callback_attributes.trainer, self.config
        assert trainer is not None
        run, total = trainer.base_dir, trainer.config.max_num_iterations
        views = self._views = training_views(self)
        with trainer.train_lock:  # a viewer renders in a thread of its own, and changes the model's mode for it
            source = self._source(views, run)
        masks = self._masks(views, run)
        # Two runs of different --machine.seed draw different noise, too.
        edit = dataclasses.replace(config.edit, seed=trainer.config.machine.seed + config.edit.seed)
        if config.mode == "distill":
            parameters = [p for group in self.get_param_groups().values() for p in group]
            edit = dataclasses.replace(edit, steps=total)
            self._distillation = Distillation(views, source, self._prior, config.prompt, edit, parameters)
            CONSOLE.print(cost_of_distilling(edit, len(views)))
        else:
            self._update = DatasetUpdate(
                views,
                source,
                self._prior,
                config.prompt,
                edit,
                views_per_round=config.views_per_round,
                selection=config.view_selection,
                folder=run,
                load_masks=masks,
            )
            callbacks.append(self._rounds(self._update, trainer._start_step, total))
        assert trainer.config.load_checkpoint is not None
        artefacts = Artefacts(self, views, source, trainer.config.load_checkpoint, masks)

        def write_artefacts(step: int) -> None:
            report = self._report(trainer.config, total)
            with trainer.train_lock:
                artefacts.write(run, report, config.film_frames, all_views=config.mode == "distill")

        return [*callbacks, TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN], write_artefacts)]

    def _rounds(self, update: DatasetUpdate, start: int, total: int) -> TrainingCallback:
        """What runs rounds as they are due; those before step `start` are taken up from where they were finished."""
        every = self.config.steps_per_round
        rounds = -(-total // every)
        for number in range(-(-start // every)):
            update.run_round(number, finished=True)

        def run_round(step: int) -> None:
            name = f"round {step // every + 1} of {rounds}"
            with self.advising_on_memory():
                update.run_round(step // every, name)
            CONSOLE.print(f"{name} is done{time_left(update.costs, rounds, self.training_cost, step, total)}.")

        # Not within the training step: that runs under autocast.
        before = TrainingCallbackLocation.BEFORE_TRAIN_ITERATION
        return TrainingCallback([before], run_round, update_every_num_iters=every)

    @contextmanager
    def advising_on_memory(self) -> Iterator[None]:
        """Says what lowers the use of memory when it does not suffice. ValueError then."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ValueError(f"out of GPU memory; {memory_advice(self.config)}") from error

    def _prior(self) -> Prior:
        config = self.config
        # A model is built from random weights, and what is drawn for them must not shift the rays of the training.
        with random_state_kept():
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

    def _source(self, views: TrainingViews, run: Path) -> Callable[[int], Tensor]:
        """What the edit of a view is conditioned on, and supervises it until it is edited."""
        if self.config.source != "current":
            return views.original
        source = pictures_of_the_start(run / "source", views, views.render, "rendering the scene as it is")
        for index in range(len(views)):
            views.supervise(index, source(index))
        return source

    def _masks(self, views: TrainingViews, run: Path) -> Callable[[], list[Tensor]] | None:
        """What makes the masks of a local edit; None if all may change."""
        config = self.config
        if config.masks is not None:
            return partial(masks_from_folder, views, config.masks, config.feather)
        solid = config.box or config.sphere
        if solid is None:
            return None

        def masks() -> list[Tensor]:
            made: list[Tensor] = [] if (run / "masks").is_dir() else masks_of_solid(views, solid, config.feather)
            mask = pictures_of_the_start(run / "masks", views, lambda index: made[index].expand(3, -1, -1), "masks")
            return [mask(index)[:1] for index in range(len(views))]

        return masks

    def edit_state(self) -> dict[str, Any]:
        """What an interrupted run needs to go on, beside the scene and what lies in its folder."""
        return {
            "training_cost": dataclasses.asdict(self.training_cost),
            "scene": self._views.training_state(),
            "distillation": None if self._distillation is None else self._distillation.state_dict(),
        }

    def load_edit_state(self, state: dict[str, Any]) -> None:
        """To be called once the training callbacks are there."""
        self.training_cost = Cost(**state["training_cost"])
        self._views.load_training_state(state["scene"])
        if self._distillation is not None:
            self._distillation.load_state_dict(state["distillation"])

    def _report(self, trainer_config: Any, steps: int) -> dict[str, Any]:
        config = self.config
        own = [f.name for f in dataclasses.fields(config) if f.name not in _OF_NERFSTUDIO]
        return {
            "prompt": config.prompt,
            "history": [*edits_before(trainer_config.load_checkpoint), config.prompt],
            "scene": trainer_config.load_checkpoint,
            "steps": steps,
            "seed": trainer_config.machine.seed,
            "settings": {name: value for name, value in dataclasses.asdict(config).items() if name in own},
            "costs": {
                "rounds": [cost.rounded() for cost in (self._update.costs if self._update else [])],
                "training": self.training_cost.rounded(),
            },
        }

    def get_train_loss_dict(self, step: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        if self._distillation is None:
            return super().get_train_loss_dict(step)
        # The prior has a precision of its own, and so does the path back through its encoder.
        with torch.autocast(torch.device(self.device).type, enabled=False):
            loss, info = self._distillation.loss(step)
        return {}, {"csd": loss}, {"edit_residual": info.residual_norm}
