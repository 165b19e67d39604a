"""The live page of a 2D edit, in a real browser."""

import re
import socket
import threading

import pytest
import torch

from csd_2d.cli import _with_port, main
from csd_2d.io.images import read_image, write_image
from csd_2d.watch import Watch
from tests.browser import PATIENCE, browser, until


def test_the_port_may_be_left_out():
    assert _with_port(["in", "--watch", "--steps", "3"]) == ["in", "--watch", "8080", "--steps", "3"]
    assert _with_port(["--watch", "9000"]) == ["--watch", "9000"] and _with_port(["--watch"]) == ["--watch", "8080"]


def test_what_is_no_port_is_refused(tmp_path):
    write_image(torch.rand(3, 24, 96), tmp_path / "in.png")
    command = ["panorama", str(tmp_path / "in.png"), str(tmp_path / "out.png"), "--prompt", "make it night"]
    with pytest.raises(SystemExit, match="--watch takes a port from 1 to 65535, got 99999"):
        main([*command, "--prior", "analytic", "--watch", "99999"])


@pytest.mark.slow
def test_a_page_shows_the_edit_and_ends_it(tmp_path, monkeypatch):
    write_image(torch.rand(3, 24, 96), tmp_path / "in.png")
    pages: list[Watch] = []
    enter, seen, errors = Watch.__enter__, [], []
    monkeypatch.setattr(Watch, "__enter__", lambda self: pages.append(self) or enter(self))

    def visit() -> None:
        try:
            until(lambda: pages, "the page is served")
            with browser() as chromium:
                page = chromium.new_page(viewport={"width": 640, "height": 480})
                page.goto(f"http://localhost:{pages[0].port}", timeout=1000 * PATIENCE)
                page.get_by_text(re.compile(r"Step \d+ of")).wait_for(timeout=1000 * PATIENCE)
                for tab, image in (("Images", "images"), ("Charts", "heat map")):
                    page.get_by_role("tab", name=tab).click()
                    page.locator(f"img[alt='{image}']").wait_for(timeout=1000 * PATIENCE)
                    seen.append(image)
                page.get_by_role("button", name="Stop and save").click()
                until(lambda: pages[0]._stopped, "the stop")
        except BaseException as error:
            errors.append(error)
        finally:
            for served in pages:
                served._stopped = True

    visitor = threading.Thread(target=visit, daemon=True)
    visitor.start()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["panorama", str(tmp_path / "in.png"), str(tmp_path / "out.png"), "--prompt", "make it night"]
    main([*command, "--prior", "analytic", "--steps", "1000000", "--watch", str(port)])
    visitor.join(PATIENCE)
    if errors:
        raise errors[0]
    assert seen == ["images", "heat map"] and pages[0]._pictures is not None
    assert read_image(tmp_path / "out.png").shape == (3, 24, 96)
