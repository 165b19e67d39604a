"""Training from the command line: scenes, edits of scenes, and errors in one sentence."""

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
from nerfstudio.configs.base_config import ViewerConfig
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.utils import writer
from nerfstudio.viewer.viewer import Viewer

from csd_2d.errors import NonFiniteError
from csd_2d.io.files import UNFINISHED
from csd_nerf.artifacts import results
from csd_nerf.capture import check_images
from csd_nerf.console import Progress, first, quiet_nerfstudio, say, told
from csd_nerf.edit.resume import EDIT_STATE_SUFFIX, latest_whole_checkpoint, random_state, set_random_state
from csd_nerf.pipeline import INITIAL_PICTURES, CsdEditPipeline, CsdEditPipelineConfig, Run
from csd_nerf.settle import settle_edit, settle_scene
from csd_nerf.source_run import read_checkpoint

OPEN_TO_ALL, ONLY_HERE = ViewerConfig().websocket_host, "127.0.0.1"
"""Addresses that a viewer listens at: nerfstudio's default, and ours."""
FIRST_FILES = ("config.yml", "edit.json", "dataparser_transforms.json")
"""Files that a run writes before it saves anything."""


@first("data", "max_num_iterations", "output_dir", "experiment_name", "vis", "verbose", "pipeline")
@dataclass
class SceneTrainerConfig(TrainerConfig):
    """Settings for training a scene."""

    _target: type = field(default_factory=lambda: SceneTrainer)
    # It would replace this config by another run's and then overwrite that run's file.
    load_config: tyro.conf.Fixed[Path | None] = None
    verbose: bool = False
    """Print what nerfstudio and its libraries print, too."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep the viewer to this machine: `ns-viewer` gives a finished run a viewer of its own, open to all."""
        viewer = self.__dict__.get("viewer")
        if name == "viewer" and viewer is not None and value != viewer and value.websocket_host == OPEN_TO_ALL:
            value = dataclasses.replace(value, websocket_host=ONLY_HERE)
        super().__setattr__(name, value)

    @property
    def dataparser(self) -> DataParserConfig:
        """Config of the data parser."""
        return self.pipeline.datamanager.dataparser  # type: ignore[attr-defined]

    def set_timestamp(self) -> None:
        """Settle the config, and name the run. ns-train calls this first, before anything is written."""
        with told(self.method_name):
            self.settle()
        super().set_timestamp()

    def print_to_terminal(self) -> None:
        """Say what is done and where the results go; with `verbose` all settings, as nerfstudio does."""
        if self.verbose:
            super().print_to_terminal()
        say(f"{self.what()}; results go to {self.get_base_dir()}")

    def what(self) -> str:
        """Say what the run does."""
        return f"Training a scene of {self.pipeline.datamanager.data}"

    def save_config(self) -> None:
        """Write config.yml into the run's folder."""
        with told(self.method_name), quiet_nerfstudio(self.verbose):
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
    """nerfstudio's trainer, which says what matters, and whose errors are one sentence.

    A run that fails, or is interrupted, before anything is saved removes the files it wrote.
    """

    config: SceneTrainerConfig  # type: ignore[assignment]

    def __init__(self, config: SceneTrainerConfig, local_rank: int = 0, world_size: int = 1) -> None:
        with quiet_nerfstudio(config.verbose):
            super().__init__(config, local_rank, world_size)

    def setup(self, test_mode: Literal["test", "val", "inference"] = "val") -> None:
        _close_event_writers()
        with self._ending(), quiet_nerfstudio(self.config.verbose):
            try:
                super().setup(test_mode)
                self._begin()
            except (OSError, SyntaxError):  # of PIL, which names no file
                check_images(self.config.pipeline.datamanager.data, self.config.dataparser)
                raise
        self.callbacks.append(TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN], self._announce))

    def _begin(self) -> None:
        """Prepare what training needs beside nerfstudio's own setup."""
        if isinstance(self.viewer_state, Viewer):
            say("\n".join(self.viewer_state.viewer_info))

    def train(self) -> None:
        try:
            with self._ending(), quiet_nerfstudio(self.config.verbose):
                total = self._start_step + self.config.max_num_iterations
                with Progress("training", self._start_step, total) as self._progress:
                    super().train()
        finally:
            _close_event_writers()

    def train_iteration(self, step: int) -> Any:
        result = super().train_iteration(step)
        self._progress.step_done()
        return result

    def _announce(self, step: int) -> None:
        """Say what there is now, and what can be done with it."""
        self._progress.close()
        config = self.base_dir / "config.yml"
        say(f"Done. The scene is in {self.base_dir}")
        editor = self.config.method_name.replace("scene", "edit")  # type: ignore[union-attr]
        self._say_commands(
            {
                "edit it": ["ns-train", editor, "--load-run", str(config), "--pipeline.prompt", "make it night"],
                "look at it": ["ns-viewer", "--load-config", str(config)],
            }
        )

    def _say_commands(self, commands: dict[str, list[str]]) -> None:
        width = max(map(len, commands)) + 1
        for purpose, command in commands.items():
            say(f"  {purpose + ':':<{width}} {shlex.join(command)}")
        if self.viewer_state is not None and not self.config.viewer.quit_on_train_completion:
            say("The viewer stays open until you press Ctrl-C.")

    def _train_complete_viewer(self) -> None:
        with contextlib.suppress(KeyboardInterrupt):  # how users leave it; there is nothing left to resume
            super()._train_complete_viewer()

    @property
    def _something_is_kept(self) -> bool:
        """Whether anything is saved that a run can go on from, be it the state of a round that is not finished."""
        return any(self.checkpoint_dir.glob("*.ckpt")) or any(self.base_dir.glob("rounds/[!.]*"))

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """Turn errors and Ctrl-C into a sentence each; nothing is left of a run that has saved nothing."""
        try:
            with told(self.config.method_name):
                yield
        except (SystemExit, KeyboardInterrupt) as end:
            kept = self._something_is_kept
            if not kept:
                self._remove()
            if isinstance(end, SystemExit):
                raise
            say(f"Interrupted. {self._way_on() if kept else 'Nothing was saved yet, and nothing is kept.'}")
            raise SystemExit(130) from None  # nerfstudio would print the traceback of a KeyboardInterrupt

    def _way_on(self) -> str:
        """Say what can be done with a run that was interrupted."""
        return f"What was learned up to the last save is in {self.checkpoint_dir}"

    def _remove(self) -> None:
        """Remove the files of a run that has saved nothing."""
        _close_event_writers()
        patterns = (*FIRST_FILES, self.config.viewer.relative_log_filename, "events.out.tfevents.*")
        for path in (path for pattern in patterns for path in self.base_dir.glob(pattern)):
            path.unlink()
        for path in (*(self.base_dir / name for name in INITIAL_PICTURES), *self.base_dir.rglob(f"{UNFINISHED}*")):
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):  # a folder with anything else in it stays
            for folder in (self.base_dir / "rounds", self.checkpoint_dir):
                if folder.is_dir():
                    folder.rmdir()
            for folder in (self.base_dir, *self.base_dir.parents[:3]):
                folder.rmdir()


@first("load_run", "prompt", "resume", "data", "max_num_iterations", "output_dir", "vis", "verbose", "pipeline")
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

    def what(self) -> str:
        """Say what the run does."""
        verb = "Going on with the edit of" if self.resume is not None else "Editing"
        return f"{verb} the scene of {self.load_checkpoint}: {self.pipeline.prompt}"

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
            return
        state, self._edit_state = found
        self.pipeline.load_pipeline(state["pipeline"], step=state["step"])
        self.optimizers.load_optimizers(state["optimizers"])
        self.optimizers.load_schedulers(state["schedulers"])
        self.grad_scaler.load_state_dict(state["scalers"])
        self.step = state["step"]
        self._start_step = self.step + 1
        say(f"Going on after step {self._start_step} of {self.config.max_num_iterations}")

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
        # nerfstudio counts from the step it starts at. A run that was stopped, and killed before its pictures were
        # written, has only these to do.
        self.config.max_num_iterations = 0 if self.pipeline.stopped else total - self._start_step
        try:
            super().train()
        finally:
            self.config.max_num_iterations = total

    @property
    def _something_is_kept(self) -> bool:
        return self.config.resume is not None or super()._something_is_kept

    def _way_on(self) -> str:
        command = ["ns-train", str(self.config.method_name), "--resume", str(self.base_dir / "config.yml")]
        return f"To go on: {shlex.join(command)}"

    def _announce(self, step: int) -> None:
        self._progress.close()
        config = str(self.base_dir / "config.yml")
        say(f"Done. Results in {self.base_dir}:")
        for name, what in results(self.base_dir).items():
            say(f"  {name:<14} {what}")
        self._say_commands(
            {
                "look at it": ["ns-viewer", "--load-config", config],
                "render it": ["ns-render", "dataset", "--load-config", config, "--output-path", "renders"],
                "edit it again": [
                    *("ns-train", str(self.config.method_name), "--load-run", config),
                    *("--pipeline.prompt", "make it snowy"),
                ],
            }
        )

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
        self.pipeline.checkpoint_saved()

    def _way_back(self) -> str:
        saved = sorted(self.checkpoint_dir.glob("*.ckpt"))
        kept = f"the last good checkpoint is {saved[-1]}" if saved else "nothing was saved yet"
        return f"{kept}. Lower learning rates (--optimizers.fields.optimizer.lr) or guidance scales are steadier."
