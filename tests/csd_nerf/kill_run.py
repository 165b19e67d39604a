"""A run that is killed, in a process of its own."""

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nerfstudio.engine.trainer import Trainer

from csd_2d.loss import EditLoss
from csd_2d.progress import ProgressFile
from tests.csd_nerf.conftest import train_in_process


def run_and_die(die_at: int | None, output: Path, events_file: Path, options: dict[str, Any]) -> None:
    """Trains, and is killed, as by `kill -9`, at an event: a step of an edit, a step of the training, or a file.

    Args:
        die_at: number of the event; a file is then half written. None: lives, and says how many there were.
        events_file: that number is written there.
    """
    torch.set_num_threads(1)
    events = itertools.count()

    def counted(function: Callable) -> Callable:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if next(events) == die_at:
                if function is save:
                    Path(args[1]).write_bytes(b"half a file")
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    save = torch.save
    ProgressFile.SECONDS = 0.0
    EditLoss.next = counted(EditLoss.next)
    Trainer.train_iteration = counted(Trainer.train_iteration)
    os.replace = counted(os.replace)
    torch.save = counted(torch.save)
    train_in_process("csd-edit-tiny", output, 8, timestamp="killed", **options)
    events_file.write_text(str(next(events)))
