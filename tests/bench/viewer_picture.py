"""Make the README's picture of the viewer: a small scene while it learns an edit, and the panel beside it.

python -m tests.bench.viewer_picture .github/viewer.png
"""

import sys
import tempfile
from pathlib import Path

import pytest

from csd_2d import EditConfig
from csd_nerf.procedural_scene import write_scene
from tests.browser import browser, until
from tests.csd_nerf.conftest import train_in_process
from tests.csd_nerf.test_viewer import Visitor, visited

VIEWS, SIZE = 10, (128, 96)
SCENE_STEPS, LEARNED, STEPS = 300, 200, 2000
RESOLUTION = 320
"""Largest side of what the viewer draws."""


def look(visitor: Visitor, output: Path) -> None:
    """Waits until the scene shows its edit, and makes a picture of the whole window."""
    pipeline = visitor.pipeline
    with browser() as chromium:
        page = visitor.page = chromium.new_page(viewport={"width": 1280, "height": 860})
        page.goto(f"http://localhost:{visitor.port}")
        visitor.tab("Images")
        until(lambda: pipeline.step > LEARNED, "the scene learns")
        visitor.pixels("images")
        page.wait_for_timeout(5000)  # for a frame of the present scene
        page.screenshot(path=output)


def main(output: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.csd_nerf.test_viewer.RESOLUTION", RESOLUTION)
        data = Path(folder) / "island"
        write_scene(data, num_views=VIEWS, size=SIZE)
        visited(
            lambda visitor: look(visitor, output),
            patch,
            output=Path(folder),
            iterations=STEPS,
            load_run=train_in_process("csd-scene-tiny", Path(folder), SCENE_STEPS, data=data),
            pipeline__prompt="make it night",
            pipeline__edit=EditConfig(steps=15),
            pipeline__film_frames=0,
            pipeline__report=False,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
