"""Processes that start at once: each is forked off a server that has imported all that takes long to import."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

IMPORTED = [
    "torch._dynamo",  # by the first optimizer
    "torch.distributed.nn.functional",
    "tests.tiny_pipeline",
    "tests.ranks_child",
    "csd_2d.cli",
    "nerfstudio.scripts.train",
    "nerfstudio.scripts.render",
    "nerfstudio.scripts.eval",
    "tests.csd_nerf.kill_run",
]


def context() -> ForkServerContext:
    """Return the context of these processes, for `multiprocessing` and what takes one."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(IMPORTED)
    return forkserver


def _run(function: Callable, arguments: tuple, environment: Mapping[str, str], files: tuple[str, str]) -> None:
    os.environ.update(environment)
    for stream, path in zip((1, 2), files, strict=True):
        with open(path, "w") as file:
            os.dup2(file.fileno(), stream)
    function(*arguments)


def _text(path: str) -> str:
    return Path(path).read_text() if os.path.exists(path) else ""  # it may not have begun


class Forked:
    """A running process; it has started what a test must not do in its own process.

    Args:
        function: of a module; what it raises ends the process as it ends a program.
        environment: variables besides those of this process when it first started one.
    """

    def __init__(self, function: Callable, *arguments: Any, environment: Mapping[str, str] | None = None) -> None:
        folder = tempfile.mkdtemp()
        self._files = os.path.join(folder, "stdout"), os.path.join(folder, "stderr")
        self._process = context().Process(target=_run, args=(function, arguments, environment or {}, self._files))
        self._process.start()

    @property
    def output(self) -> str:
        """What the process has written to stdout so far."""
        return _text(self._files[0])

    @property
    def errors(self) -> str:
        """What the process has written to stderr so far."""
        return _text(self._files[1])

    def running(self) -> bool:
        return self._process.is_alive()

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def ended(self, timeout: float = 300) -> int:
        """Wait for its end; returns the exit status, below 0 that of a signal."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, self.errors
        return self._process.exitcode
