"""Training from the command line: what a run takes over from a pretrained one, and errors in one sentence."""

import contextlib
import dataclasses
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.utils import writer
from nerfstudio.utils.rich_utils import CONSOLE

from csd_2d.edit import load_preset, preset_of_scene
from csd_2d.errors import NonFiniteError, one_sentence
from csd_2d.files import UNFINISHED
from csd_2d.priors import check_prior
from csd_nerf.model import SceneModelConfig
from csd_nerf.pipeline import PICTURES_OF_THE_START, CsdEditPipeline, CsdEditPipelineConfig
from csd_nerf.resume import REST, latest_whole_checkpoint, random_state, set_random_state, take_up
from csd_nerf.source_run import (
    check_data,
    check_images,
    check_kind,
    find_checkpoint,
    implementation,
    read_checkpoint,
    read_run,
)
from csd_nerf.splat import SplatModelConfig

DISTILL_STEPS_PER_SAVE = 250
"""At most: a step of distill takes far longer than one that learns images."""


@dataclass
class SceneTrainerConfig(TrainerConfig):
    """Pretrains a scene."""

    _target: type = field(default_factory=lambda: SceneTrainer)
    # It would replace this config by another run's and then overwrite that run's file.
    load_config: tyro.conf.Fixed[Path | None] = None

    @property
    def dataparser(self) -> DataParserConfig:
        """What reads the data."""
        return self.pipeline.datamanager.dataparser  # type: ignore[attr-defined]

    def set_timestamp(self) -> None:
        """Prepares the run. The first thing ns-train calls, before anything is written."""
        with one_sentence(self.method_name):
            self.prepare()
        super().set_timestamp()

    def save_config(self) -> None:
        """Writes config.yml into the run's folder."""
        with one_sentence(self.method_name):
            super().save_config()

    def prepare(self) -> None:
        """Checks what the user gave.

        Raises:
            ValueError, OSError: if it cannot be used.
        """
        check_data(self.pipeline.datamanager.data, self.dataparser)


def _close_event_writers() -> None:
    """nerfstudio keeps them in a global list: a second run in one process would write into the first one's files."""
    for event_writer in writer.EVENT_WRITERS:
        if isinstance(event_writer, writer.TensorboardWriter):
            event_writer.tb_writer.close()
    writer.EVENT_WRITERS.clear()


class SceneTrainer(Trainer):
    """nerfstudio's trainer, whose errors are one sentence.

    A run that fails before its first checkpoint takes back what it wrote.
    """

    config: SceneTrainerConfig  # type: ignore[assignment]

    def setup(self, test_mode: Literal["test", "val", "inference"] = "val") -> None:
        _close_event_writers()
        with self._cleaning(), one_sentence(self.config.method_name):
            try:
                super().setup(test_mode)
            except OSError:
                data = self.config.pipeline.datamanager.data
                if data is not None and isinstance(self.config.dataparser, NerfstudioDataParserConfig):
                    check_images(data)
                raise

    def train(self) -> None:
        try:
            with self._cleaning(), one_sentence(self.config.method_name):
                super().train()
        finally:
            _close_event_writers()

    @contextlib.contextmanager
    def _cleaning(self) -> Iterator[None]:
        try:
            yield
        except SystemExit:
            # Finished rounds are worth keeping: the run can be resumed.
            if not any(self.checkpoint_dir.glob("*.ckpt")) and not any(self.base_dir.glob("rounds/*")):
                _close_event_writers()
                for pattern in ("config.yml", "dataparser_transforms.json", "events.out.tfevents.*"):
                    for path in self.base_dir.glob(pattern):
                        path.unlink()
                for name in PICTURES_OF_THE_START:
                    shutil.rmtree(self.base_dir / name, ignore_errors=True)
                with contextlib.suppress(OSError):  # a folder with anything else in it stays
                    for folder in (self.base_dir, *self.base_dir.parents[:3]):
                        folder.rmdir()
            raise


@dataclass
class EditTrainerConfig(SceneTrainerConfig):
    """Edits a pretrained scene."""

    _target: type = field(default_factory=lambda: EditTrainer)
    load_run: Path | None = None
    """Config of the pretrained run, RUN/config.yml. Its model's sizes, its data parser and its data are taken over,
    whatever the options of the same name say; --data overrides where the data lie. The file is read, not executed."""
    pipeline: CsdEditPipelineConfig = field(default_factory=CsdEditPipelineConfig)  # type: ignore[assignment]
    """The edit."""
    resume: Path | None = None
    """Config of an edit that was interrupted, RUN/config.yml: goes on with it, in its folder, as if it had never
    stopped. Its settings are taken over, whatever other options say, but for those that change no result: vis, viewer,
    logging, and the pipeline's micro-batch, offload and local-files-only. --data and --load-checkpoint say where the
    data and the scene's checkpoint lie, if they were moved."""

    def prepare(self) -> None:
        """Settles on the prompt, the scene and its checkpoint; afterwards `load_checkpoint` names the file.

        Raises:
            ValueError, OSError: if something is missing or cannot be used.
        """
        if self.resume is not None:
            self._take_up(self.resume)
            super().prepare()
            return
        self._settle_prompt()
        self._settle_training()
        self._settle_checkpoint()
        super().prepare()
        self._check_folder()
        self._fit_to_checkpoint()

    def _take_up(self, run: Path) -> None:
        """Takes over the interrupted run."""
        data, checkpoint = self.pipeline.datamanager.data, self.load_checkpoint
        take_up(self, run, _OF_THIS_MACHINE)
        self.pipeline.datamanager.data = data or self.pipeline.datamanager.data
        self.load_checkpoint = checkpoint or self.load_checkpoint
        if self.load_checkpoint is None or not self.load_checkpoint.is_file():
            raise FileNotFoundError(
                f"the scene of --resume {run} is not at {self.load_checkpoint} any more; set --load-checkpoint."
            )

    def _settle_training(self) -> None:
        if self.pipeline.preset != "default":
            self._apply_preset(self.pipeline.preset)
        check_prior(self.pipeline.prior, self.pipeline.prompt)
        if self.pipeline.mode == "distill":
            self.steps_per_save = min(self.steps_per_save, DISTILL_STEPS_PER_SAVE)
        if self.machine.num_devices * self.machine.num_machines > 1:
            raise ValueError(
                f"editing runs on one device; set --machine.num-devices 1, not {self.machine.num_devices}."
            )

    def _settle_checkpoint(self) -> None:
        """Takes over the pretrained run."""
        given = [name for name in ("load_run", "load_dir", "load_checkpoint") if getattr(self, name) is not None]
        if len(given) != 1:
            options = " and ".join("--" + name.replace("_", "-") for name in given) or "neither of them"
            raise ValueError(
                "there must be one scene to edit: set --load-run RUN/config.yml, or --load-dir RUN/nerfstudio_models; "
                f"got {options}."
            )
        if self.load_run is not None:
            self.load_dir = self._take_over(self.load_run)
        if self.load_dir is not None:
            self.load_checkpoint = find_checkpoint(self.load_dir, self.load_step)
        assert self.load_checkpoint is not None
        self.load_checkpoint = self.load_checkpoint.absolute()  # a resumed run need not begin in this folder
        # Kept in our config.yml they would send ns-eval and ns-render after the source's step.
        self.load_dir = self.load_step = None

    def _check_folder(self) -> None:
        """Another run's folder is not written into."""
        if "{" not in self.timestamp and (self.get_base_dir() / "config.yml").is_file():
            raise ValueError(
                f"there is a run in {self.get_base_dir()}; to go on with it set --resume to its config.yml, to begin "
                "anew leave --timestamp out."
            )

    def _fit_to_checkpoint(self) -> None:
        """Sets what of the model the checkpoint decides."""
        assert self.load_checkpoint is not None
        state = read_checkpoint(self.load_checkpoint, mmap=True)
        model: SceneModelConfig | SplatModelConfig = self.pipeline.model  # type: ignore[assignment]
        check_kind(state, self.load_checkpoint, model.kind)
        if isinstance(model, SceneModelConfig):
            model.implementation = implementation(state, self.load_checkpoint)  # type: ignore[assignment]
        # The views must be seen from where the scene was learned from. The pipeline keeps the poses as they are.
        tuned = "_model.camera_optimizer.pose_adjustment" in state
        if not tuned:
            model.camera_optimizer = CameraOptimizerConfig(mode="off")
        elif model.camera_optimizer.mode == "off":
            model.camera_optimizer = CameraOptimizerConfig(mode="SO3xR3")

    def save_config(self) -> None:
        """Writes config.yml into the run's folder, where a resumed run has it already."""
        if self.resume is None:
            super().save_config()

    def _apply_preset(self, name: str) -> None:
        """What the user set wins: as far as can be told, what differs from the method's default."""
        from nerfstudio.configs.method_configs import all_methods  # which imports this module

        default: Any = all_methods.get(self.method_name, self)
        edit = dataclasses.replace(load_preset(name), **_differing(self.pipeline.edit, default.pipeline.edit))
        scene = preset_of_scene(name)
        steps = scene.pop("max_num_iterations", self.max_num_iterations)
        if self.max_num_iterations == default.max_num_iterations:
            self._set_steps(steps)
        given = _differing(self.pipeline, default.pipeline)
        settings = {name: value for name, value in scene.items() if name not in given}
        try:
            self.pipeline = dataclasses.replace(self.pipeline, edit=edit, **settings)  # type: ignore[assignment]
        except (TypeError, ValueError) as error:
            raise ValueError(f"preset {name} cannot be used: {error}") from error

    def _set_steps(self, steps: int) -> None:
        """Learning rates that decay over the whole run still do."""
        optimizers = {}
        for group, optimizer in self.optimizers.items():
            schedule = optimizer["scheduler"]
            if getattr(schedule, "max_steps", None) == self.max_num_iterations:
                schedule = dataclasses.replace(schedule, max_steps=steps)
            optimizers[group] = optimizer | {"scheduler": schedule}
        self.optimizers, self.max_num_iterations = optimizers, steps

    def _settle_prompt(self) -> None:
        """`--prompt` is nerfstudio's alias of `--pipeline.model.prompt`; all three spellings mean the edit's prompt."""
        prompts = {p for p in (self.pipeline.prompt, self.prompt, self.pipeline.model.prompt) if p and p.strip()}
        if not prompts:
            raise ValueError("prompt is empty; set --pipeline.prompt, e.g. 'make it night'.")
        if len(prompts) > 1:
            raise ValueError(
                f"--prompt and --pipeline.prompt differ ({' / '.join(sorted(prompts))}); give one of them."
            )
        self.pipeline.prompt = prompts.pop()

    def _take_over(self, run: Path) -> Path:
        model: SceneModelConfig | SplatModelConfig = self.pipeline.model  # type: ignore[assignment]
        source = read_run(run, model.kind)
        names = {f.name for f in dataclasses.fields(model)} - model.own
        for name in names & source.model.keys():
            setattr(model, name, source.model[name])
        optimizer = source.model.get("camera_optimizer") or {}
        model.camera_optimizer = CameraOptimizerConfig(mode=optimizer.get("mode", "off"))
        datamanager = self.pipeline.datamanager
        data = datamanager.data or source.data
        if not data.exists():
            raise FileNotFoundError(f"the data of --load-run {run} are not at {data} any more; set --data.")
        datamanager.data = data
        datamanager.dataparser = source.dataparser  # type: ignore[attr-defined]
        if self.pipeline.source is None:
            self.pipeline.source = "current" if source.edited else "original"
        return source.checkpoints


def _differing(config: Any, default: Any) -> dict[str, Any]:
    """Fields of one config that are not those of another."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


_OF_THIS_MACHINE = frozenset(
    {"resume", "vis", "viewer", "logging"}
    | {f"pipeline.{name}" for name in ("micro_batch", "offload", "local_files_only")}
)
"""Settings that change no result, and need not be those a run was begun with."""


class EditTrainer(SceneTrainer):
    """Starts from a checkpoint's scene and nothing else of it: step 0, fresh optimisers and schedules.

    Or goes on from its own last checkpoint, exactly: beside each lies what nerfstudio's leave out. Two are kept.
    """

    config: EditTrainerConfig  # type: ignore[assignment]
    pipeline: CsdEditPipeline  # type: ignore[assignment]

    def _load_checkpoint(self) -> None:
        assert self.config.load_checkpoint is not None
        self._rest: dict[str, Any] | None = None
        found = None
        if self.config.resume is not None:
            for leftover in self.base_dir.rglob(f"{UNFINISHED}*"):
                shutil.rmtree(leftover)
            found = latest_whole_checkpoint(self.checkpoint_dir)
        if found is None:
            self.pipeline.load_pipeline(read_checkpoint(self.config.load_checkpoint), step=0)
            CONSOLE.print(f"Editing the scene of {self.config.load_checkpoint}")
            return
        state, self._rest = found
        self.pipeline.load_pipeline(state["pipeline"], step=state["step"])
        self.optimizers.load_optimizers(state["optimizers"])
        self.optimizers.load_schedulers(state["schedulers"])
        self.grad_scaler.load_state_dict(state["scalers"])
        self.step = state["step"]
        self._start_step = self.step + 1
        CONSOLE.print(f"Going on after step {self._start_step} of {self.config.max_num_iterations}")

    def setup(self, test_mode: Literal["test", "val", "inference"] = "val") -> None:
        super().setup(test_mode)
        if self._rest is not None:
            with one_sentence(self.config.method_name):
                self.pipeline.load_edit_state(self._rest["edit"])
            set_random_state(self._rest["random"])

    def train(self) -> None:
        total = self.config.max_num_iterations
        self.config.max_num_iterations = total - self._start_step  # nerfstudio counts from the step it starts at
        try:
            super().train()
        except KeyboardInterrupt:
            command = ["ns-train", self.config.method_name, "--resume", str(self.base_dir / "config.yml")]
            CONSOLE.print(f"Interrupted. To go on: {shlex.join(command)}", soft_wrap=True, markup=False)
            raise
        finally:
            self.config.max_num_iterations = total

    def _train_complete_viewer(self) -> None:
        with contextlib.suppress(KeyboardInterrupt):  # how it is left, with nothing to go on with
            super()._train_complete_viewer()

    def train_iteration(self, step: int) -> Any:
        device = self.pipeline.device
        with self.pipeline.training_cost.counted(device), self.pipeline.advising_on_memory():
            result = super().train_iteration(step)
            finite = bool(result[0].isfinite())  # here, for a GPU is waited for
        if not finite:
            raise NonFiniteError(f"the loss is not finite at step {step}; {self._way_back()}")
        return result

    def save_checkpoint(self, step: int) -> None:
        """Writes both halves of a checkpoint, whole or not at all; never one that is not finite."""
        if not all(bool(parameter.isfinite().all()) for parameter in self.pipeline.parameters()):
            raise NonFiniteError(f"the scene is not finite after step {step}; {self._way_back()}")
        folder = self.checkpoint_dir
        folder.mkdir(parents=True, exist_ok=True)
        # Not in that folder: nerfstudio takes every name there for a checkpoint, and a killed run leaves this one.
        with tempfile.TemporaryDirectory(dir=self.base_dir, prefix=UNFINISHED) as unfinished:
            self.checkpoint_dir = Path(unfinished)
            try:
                super().save_checkpoint(step)
            finally:
                self.checkpoint_dir = folder
            (checkpoint,) = Path(unfinished).glob("*.ckpt")
            rest = {"step": step, "random": random_state(), "edit": self.pipeline.edit_state()}
            torch.save(rest, checkpoint.with_suffix(REST))
            for half in (checkpoint.with_suffix(REST), checkpoint):
                os.replace(half, folder / half.name)
        if self.config.save_only_latest_checkpoint:
            for old in sorted(folder.glob("*.ckpt"))[:-2]:  # the one before stays, for a disk that fails
                old.unlink()
                old.with_suffix(REST).unlink(missing_ok=True)

    def _way_back(self) -> str:
        saved = sorted(self.checkpoint_dir.glob("*.ckpt"))
        kept = f"the last good checkpoint is {saved[-1]}" if saved else "nothing was saved yet"
        return f"{kept}. Lower learning rates (--optimizers.fields.optimizer.lr) or guidance scales are steadier."
