"""Every benchmark runs, at its smallest; what it measures is not looked at."""

import importlib
import json
from typing import Any

import pytest

SMALLEST: dict[str, dict[str, Any]] = {
    "agreement": {"seeds": 1, "steps": 2, "counts": (2,), "variants": ("paper", "default")},
    "collaboration": {"prior": "tiny", "seeds": 1, "steps": 2, "count": 2, "variants": ("transport in both",)},
    "distill_memory": {"counts": (1,), "size": (16, 16)},
    "ranks": {"sizes": (1,), "steps": 1, "tasks": ("pixel frames",)},
    "scene_edit": {"prompts": ("paint it blue",), "only": ("default", "distill"), "seeds": 1, "nerf_steps": 2},
    "speed": {"tasks": ("frames",), "count": 2, "batch": 2, "steps": 1, "image_guidance_scales": (1.0,)},
    "video_memory": {"counts": (2,), "steps": 1, "priors": ("analytic",)},
}


@pytest.mark.parametrize("name", SMALLEST)
def test_it_runs(name, tmp_path, monkeypatch):
    bench, output, options = importlib.import_module(f"tests.bench.{name}"), tmp_path / "figures.json", SMALLEST[name]
    if name == "scene_edit":
        monkeypatch.setattr(bench, "SCENE_STEPS", 2)
        options = {"scene": tmp_path / "scene", **options}
    bench.main(output=output, **options)
    figures = json.loads(output.read_text(encoding="utf-8"))
    assert figures.get("rows") or figures["tables"]
