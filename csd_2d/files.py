"""Files that are whole or not there."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".unfinished-"
"""How names of temporary folders begin. One that is there while nothing writes is left of a program that was killed."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when the block ends without an error.

    So that a reader never meets a half-written file, and an error leaves what was there before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=UNFINISHED) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        os.replace(temporary, path)
