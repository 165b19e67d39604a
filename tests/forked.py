"""Processes that start at once: each is forked off a server that has imported all that takes long to import."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

IMPORTED = [
    "torch._dynamo",  # by the first optimizer
    "torch.distributed.nn.functional",
    "tests.tiny_pipeline",
    "tests.ranks_child",
    "csd_2d.cli",
    "nerfstudio.scripts.train",
    "tests.csd_nerf.kill_run",
]


def _run(function: Callable, arguments: tuple, environment: Mapping[str, str], errors: str) -> None:
    os.environ.update(environment)
    with open(errors, "w") as file:
        os.dup2(file.fileno(), 2)
    function(*arguments)


class Forked:
    """A running process; it has started what a test must not do in its own process.

    Args:
        function: of a module; what it raises ends the process as it ends a program.
        environment: variables besides those of this process when it first started one.
    """

    def __init__(self, function: Callable, *arguments: Any, environment: Mapping[str, str] | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        handle, self._errors = tempfile.mkstemp()
        os.close(handle)
        self._process = context.Process(target=_run, args=(function, arguments, environment or {}, self._errors))
        self._process.start()

    @property
    def errors(self) -> str:
        """What the process has written to stderr so far."""
        with open(self._errors) as file:
            return file.read()

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
