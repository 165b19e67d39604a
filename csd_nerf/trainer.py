"""Training from the command line: scenes, edits of scenes, and errors in one sentence."""

import contextlib
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
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.utils import writer
from nerfstudio.utils.rich_utils import CONSOLE

from csd_2d.errors import NonFiniteError, one_sentence
from csd_2d.io.files import UNFINISHED
from csd_nerf.edit.resume import EDIT_STATE_SUFFIX, latest_whole_checkpoint, random_state, set_random_state
from csd_nerf.pipeline import INITIAL_PICTURES, CsdEditPipeline, CsdEditPipelineConfig, Run
from csd_nerf.settle import settle_edit, settle_scene
from csd_nerf.source_run import check_images, read_checkpoint


@dataclass
class SceneTrainerConfig(TrainerConfig):
    """Settings for training a scene."""

    _target: type = field(default_factory=lambda: SceneTrainer)
    # It would replace this config by another run's and then overwrite that run's file.
    load_config: tyro.conf.Fixed[Path | None] = None

    @property
    def dataparser(self) -> DataParserConfig:
        """Config of the data parser."""
        return self.pipeline.datamanager.dataparser  # type: ignore[attr-defined]

    def set_timestamp(self) -> None:
        """Settle the config, and name the run. ns-train calls this first, before anything is written."""
        with one_sentence(self.method_name):
            self.settle()
        super().set_timestamp()

    def save_config(self) -> None:
        """Write config.yml into the run's folder."""
        with one_sentence(self.method_name):
            super().save_config()

    def settle(self) -> None:
        """See `csd_nerf.settle.settle_scene`."""
        settle_scene(self)


def _close_event_writers() -> None:
    """Close nerfstudio's event writers: in its global list, a second run in one process would write to the first's."""
    for event_writer in writer.EVENT_WRITERS:
        if isinstance(event_writer, writer.TensorboardWriter):
            event_writer.tb_writer.close()
    writer.EVENT_WRITERS.clear()


class SceneTrainer(Trainer):
    """nerfstudio's trainer, whose errors are one sentence.

    A run that fails before its first checkpoint removes the files it wrote.
    """

    config: SceneTrainerConfig  # type: ignore[assignment]

    def setup(self, test_mode: Literal["test", "val", "inference"] = "val") -> None:
        _close_event_writers()
        with self._cleaning(), one_sentence(self.config.method_name):
            try:
                super().setup(test_mode)
                self._begin()
            except OSError:
                data = self.config.pipeline.datamanager.data
                if data is not None and isinstance(self.config.dataparser, NerfstudioDataParserConfig):
                    check_images(data)
                raise

    def _begin(self) -> None:
        """Prepare what training needs beside nerfstudio's own setup."""

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
                for pattern in ("config.yml", "edit.json", "dataparser_transforms.json", "events.out.tfevents.*"):
                    for path in self.base_dir.glob(pattern):
                        path.unlink()
                for name in INITIAL_PICTURES:
                    shutil.rmtree(self.base_dir / name, ignore_errors=True)
                with contextlib.suppress(OSError):  # a folder with anything else in it stays
                    for folder in (self.base_dir, *self.base_dir.parents[:3]):
                        folder.rmdir()
            raise


@dataclass
class EditTrainerConfig(SceneTrainerConfig):
    """Settings for editing a pretrained scene."""

    _target: type = field(default_factory=lambda: EditTrainer)
    load_run: Path | None = None
    """Config of the pretrained run, RUN/config.yml. The edit inherits its model's sizes, data parser and data, whatever
    the options of the same name say; --data overrides the place of the data. The file is read, not executed."""
    pipeline: CsdEditPipelineConfig = field(default_factory=CsdEditPipelineConfig)  # type: ignore[assignment]
    """The edit."""
    resume: Path | None = None
    """Config of an edit that was interrupted, RUN/config.yml: continues it, in its folder, as if it had never stopped.
    Its settings are restored, whatever other options say, except those that change no result: vis, viewer, logging, and
    the pipeline's micro-batch, offload and local-files-only. --data and --load-checkpoint name the places of the data
    and of the scene's checkpoint, if they were moved."""

    def settle(self) -> None:
        """See `csd_nerf.settle.settle_edit`."""
        from nerfstudio.configs.method_configs import all_methods  # which imports this module

        settle_edit(self, all_methods.get(self.method_name, self))

    def save_config(self) -> None:
        """Write config.yml into the run's folder, where a resumed run has it already."""
        if self.resume is None:
            super().save_config()


class EditTrainer(SceneTrainer):
    """Starts from the scene of a checkpoint, at step 0, with fresh optimizers and schedules.

    Or continues from its own last checkpoint, exactly: beside each lies the state that nerfstudio leaves out. Two are
    kept.
    """

    config: EditTrainerConfig  # type: ignore[assignment]
    pipeline: CsdEditPipeline  # type: ignore[assignment]

    def _load_checkpoint(self) -> None:
        assert self.config.load_checkpoint is not None
        self._edit_state: dict[str, Any] | None = None
        found = None
        if self.config.resume is not None:
            for leftover in self.base_dir.rglob(f"{UNFINISHED}*"):
                shutil.rmtree(leftover)
            found = latest_whole_checkpoint(self.checkpoint_dir)
        if found is None:
            self.pipeline.load_pipeline(read_checkpoint(self.config.load_checkpoint), step=0)
            CONSOLE.print(f"Editing the scene of {self.config.load_checkpoint}")
            return
        state, self._edit_state = found
        self.pipeline.load_pipeline(state["pipeline"], step=state["step"])
        self.optimizers.load_optimizers(state["optimizers"])
        self.optimizers.load_schedulers(state["schedulers"])
        self.grad_scaler.load_state_dict(state["scalers"])
        self.step = state["step"]
        self._start_step = self.step + 1
        CONSOLE.print(f"Going on after step {self._start_step} of {self.config.max_num_iterations}")

    def _begin(self) -> None:
        self._trained = max(self._start_step - 1, 0)
        self.callbacks += self.pipeline.begin_edit(self._run())
        if self._edit_state is not None:
            self.pipeline.load_edit_state(self._edit_state["edit"])
            set_random_state(self._edit_state["random"])

    def _run(self) -> Run:
        assert self.config.load_checkpoint is not None
        return Run(
            folder=self.base_dir,
            scene=self.config.load_checkpoint,
            start=self._start_step,
            steps=self.config.max_num_iterations,
            seed=self.config.machine.seed,
            lock=self.train_lock,
            optimizers=self.optimizers,
        )

    def train(self) -> None:
        total = self.config.max_num_iterations
        # nerfstudio prints the last step it timed, which a run that is resumed after its last step does not have.
        writer.GLOBAL_BUFFER.setdefault("step", self._start_step)
        self.config.max_num_iterations = total - self._start_step  # nerfstudio counts from the step it starts at
        try:
            super().train()
        except KeyboardInterrupt:
            command = ["ns-train", self.config.method_name, "--resume", str(self.base_dir / "config.yml")]
            CONSOLE.print(f"Interrupted. To go on: {shlex.join(command)}", soft_wrap=True, markup=False)
            raise SystemExit(130) from None  # nerfstudio would print the traceback of a KeyboardInterrupt
        finally:
            self.config.max_num_iterations = total

    def _train_complete_viewer(self) -> None:
        with contextlib.suppress(KeyboardInterrupt):  # how users leave it; there is nothing left to resume
            super()._train_complete_viewer()

    def train_iteration(self, step: int) -> Any:
        device = self.pipeline.device
        with self.pipeline.training_cost.counted(device), self.pipeline.advising_on_memory():
            result = super().train_iteration(step)
            finite = bool(result[0].isfinite())  # in here, because it waits for the GPU
        if not finite:
            raise NonFiniteError(f"the loss is not finite at step {step}; {self._way_back()}")
        self._trained = step
        if self.pipeline.stopped:
            self.stop_training = True
        return result

    def _after_train(self) -> None:
        self.step = self._trained  # nerfstudio's may be the step before which it was told to stop
        super()._after_train()

    def save_checkpoint(self, step: int) -> None:
        """Write a checkpoint and the edit's state, whole or not at all; never one that is not finite."""
        if not all(bool(parameter.isfinite().all()) for parameter in self.pipeline.parameters()):
            raise NonFiniteError(f"the scene is not finite after step {step}; {self._way_back()}")
        folder = self.checkpoint_dir
        folder.mkdir(parents=True, exist_ok=True)
        # Not in that folder: nerfstudio takes every file there for a checkpoint, and a killed run leaves this one.
        with tempfile.TemporaryDirectory(dir=self.base_dir, prefix=UNFINISHED) as unfinished:
            self.checkpoint_dir = Path(unfinished)
            try:
                super().save_checkpoint(step)
            finally:
                self.checkpoint_dir = folder
            (checkpoint,) = Path(unfinished).glob("*.ckpt")
            edit_state = {"step": step, "random": random_state(), "edit": self.pipeline.edit_state()}
            torch.save(edit_state, checkpoint.with_suffix(EDIT_STATE_SUFFIX))
            for file in (checkpoint.with_suffix(EDIT_STATE_SUFFIX), checkpoint):
                os.replace(file, folder / file.name)
        if self.config.save_only_latest_checkpoint:
            for old in sorted(folder.glob("*.ckpt"))[:-2]:  # the one before stays, for a disk that fails
                old.unlink()
                old.with_suffix(EDIT_STATE_SUFFIX).unlink(missing_ok=True)

    def _way_back(self) -> str:
        saved = sorted(self.checkpoint_dir.glob("*.ckpt"))
        kept = f"the last good checkpoint is {saved[-1]}" if saved else "nothing was saved yet"
        return f"{kept}. Lower learning rates (--optimizers.fields.optimizer.lr) or guidance scales are steadier."
