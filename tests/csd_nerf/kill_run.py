"""A run that is killed, in a process of its own, and one that goes on with it."""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nerfstudio.engine.trainer import Trainer

from csd_2d.loss import EditLoss
from csd_2d.progress import ProgressFile
from csd_nerf import artifacts
from tests.csd_nerf.conftest import train_in_process


def run_and_die(die_at: int | None, output: Path, events_file: Path, options: dict[str, Any]) -> None:
    """Trains, and is killed, as by `kill -9`, at an event: a step of an edit, a step of the training, or a file.

    Args:
        die_at: number of the event; a file is then half written. None: lives, and writes the names of all events.
        events_file: for these.
    """
    _be_quick()
    events: list[str] = []

    def counted(function: Callable, name: Callable[..., str]) -> Callable:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            events.append(name(*args))
            if len(events) - 1 == die_at:
                if function is save:
                    Path(args[1]).write_bytes(b"half a file")
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    save = torch.save
    ProgressFile.SECONDS = 0.0
    EditLoss.next = counted(EditLoss.next, lambda *_: "step of an edit")
    Trainer.train_iteration = counted(Trainer.train_iteration, lambda *_: "step of the training")
    os.replace = counted(os.replace, lambda _, path: _kind(Path(path)))
    torch.save = counted(torch.save, lambda _, path: f"saving {_kind(Path(path))}")
    train_in_process("csd-edit-tiny", output, 8, timestamp="killed", **options)
    events_file.write_text(json.dumps(events))


def _be_quick() -> None:
    torch.set_num_threads(1)
    artifacts.MEASURED = 2


def _kind(path: Path) -> str:
    """Names what a file is for: a picture's folder, else its own name, without numbers, which are those of rounds."""
    name, ending = (path.parent.name, "") if path.suffix == ".png" else (path.stem, path.suffix)
    return (re.sub(r"[\d-]+", "", name) or "round") + ending


def go_on(run: Path) -> None:
    """Resumes a run."""
    _be_quick()
    assert train_in_process("csd-edit-tiny", run / "nowhere", 1, resume=run / "config.yml") == run
