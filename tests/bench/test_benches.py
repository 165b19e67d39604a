"""Benchmarks run, at their smallest; what they measure is not looked at. Not those that take a whole scene or a GPU."""

import importlib
import io
import json
import sys
from contextlib import redirect_stdout
from typing import Any
from unittest import mock

import pytest

SMALLEST: dict[str, dict[str, Any]] = {
    "known_answers": {
        "seeds": 1,
        "steps": 2,
        "count": 2,
        "tasks": ("views: paint it a new color", "textures: make it night"),
    },
    "distill_memory": {"counts": (1,), "size": (16, 16)},
    "ranks": {"sizes": (1,), "steps": 1, "tasks": ("pixel frames",)},
    "speed": {"tasks": ("frames",), "count": 2, "batch": 2, "steps": 2, "image_guidance_scales": (1.0,)},
    "video_files": {"count": 2, "size": (32, 16), "turns": 1},
    "video_memory": {"counts": (2, 3), "steps": 1, "priors": ("analytic",)},
}


class InThisProcess:
    """Stands for `subprocess`: what would be measured in a process of its own runs here, where all is imported."""

    PIPE = None

    def __init__(self, command: list[str], **_: Any) -> None:
        executable, option, code, *arguments = command
        assert (executable, option) == (sys.executable, "-c")
        output = io.StringIO()
        with redirect_stdout(output), mock.patch.object(sys, "argv", [option, *arguments]):
            exec(code, {})
        self.stdout = output.getvalue()

    def communicate(self) -> tuple[str, None]:
        return self.stdout, None

    @classmethod
    def run(cls, command: list[str], **options: Any) -> "InThisProcess":
        return cls(command, **options)

    Popen = run


@pytest.mark.parametrize("name", SMALLEST)
def test_it_runs(name, tmp_path, monkeypatch):
    output = tmp_path / "figures.json"
    bench = importlib.import_module(f"tests.bench.{name}")
    monkeypatch.setattr(bench, "subprocess", InThisProcess, raising=False)
    bench.main(output=output, **SMALLEST[name])
    figures = json.loads(output.read_text(encoding="utf-8"))
    assert figures.get("rows") or figures["tables"]
