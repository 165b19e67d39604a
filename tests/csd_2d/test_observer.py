"""What somebody who watches an edit gets to see, and what that may not do to the edit."""

import numpy as np
import pytest
import torch

from csd_2d import Edit, EditConfig, ImageStack
from csd_2d.observer import MATCHED, SHOWN, Budget, Observer
from csd_2d.panel import CURVES, Panel, short
from csd_2d.priors.analytic import AnalyticPrior

PRIOR = AnalyticPrior()


def images(count: int) -> list[torch.Tensor]:
    return list(torch.rand(count, 3, 16, 24, generator=torch.Generator().manual_seed(count)))


def observed(count: int, steps: int, observer: Observer, **config) -> Observer:
    """Looks at every step of an edit, in spite of what that costs."""
    observer._for_measures = observer._for_images = Budget(1.0)
    stack = ImageStack(images(count), PRIOR)
    edit = Edit(stack.particles, PRIOR, "make it night", EditConfig(steps=10, **config), layout=stack.layout)
    observer.begin("edit", [f"view {index}" for index in range(count)], edit.steps, PRIOR.decode)
    for _ in range(steps):
        observer.on_step(edit.step())
    return observer


def test_nothing_is_looked_at_for_nobody():
    def decode(latents):
        raise AssertionError("decoded for nobody")

    observer = Observer(lambda: False)
    observer.begin("edit", ["a"], 3, decode)
    stack = ImageStack(images(1), PRIOR)
    observer.on_step(Edit(stack.particles, PRIOR, "make it night", EditConfig(steps=3)).step())
    seen = observer.seen
    assert seen.taken == 1 and not seen.curves and not seen.trouble


def test_who_comes_late_sees_the_beginning_and_nothing_is_kept_after_the_end():
    watchers: list[str] = []
    observer = Observer(lambda: bool(watchers))
    pairs = [(image, image.flip(0)) for image in images(SHOWN + 2)]
    observer.begin("edit", [f"{index}" for index in range(len(pairs))], 3, PRIOR.decode, pairs)
    watchers.append("somebody")
    shown = observer.seen.thumbnails
    assert [*shown] == [*range(SHOWN)] and np.array_equal(shown[0].current, shown[0].source[..., ::-1])
    observer.begin("edit", ["a"], 3, PRIOR.decode, pairs)
    observer.end()
    assert not observer._images and not observer.seen.thumbnails


@pytest.mark.parametrize("count", [3, MATCHED + 6])
def test_all_steps_are_seen_however_many_particles_there_are(count):
    seen = observed(count, 4, Observer(lambda: True)).seen
    assert not seen.trouble and len(seen.thumbnails) == min(count, 4)
    assert seen.matrix is not None and len(seen.matrix_names) == len(seen.matrix) == min(count, MATCHED)
    assert seen.curves["step"] == [1, 2, 3, 4] and len(seen.curves["likeness of changes"]) == 3
    assert 0 < seen.curves["likeness of changes"][-1] <= 1 and {*seen.curves} <= {*CURVES, "step"}
    assert seen.seconds_left == pytest.approx(6 * seen.seconds / 4)


def test_partial_batches_are_named_by_their_particles():
    observer = observed(7, 5, Observer(lambda: True), batch=3)
    seen = observer.seen
    assert len(seen.indices) == 3 and {*seen.matrix_names} == {f"view {index}" for index in seen.indices}
    assert all(thumbnails.step for thumbnails in seen.thumbnails.values()) and len(seen.thumbnails) == 5


def test_what_fails_is_told_and_ends_no_edit():
    class Failing(AnalyticPrior):
        def decode(self, latents):
            raise torch.OutOfMemoryError("no memory")

    observer, prior = Observer(lambda: True), Failing()
    observer.begin("edit", ["a"], 3, prior.decode)
    stack = ImageStack(images(1), PRIOR)
    edit = Edit(stack.particles, PRIOR, "make it night", EditConfig(steps=3))
    for _ in range(2):
        observer.on_step(edit.step())
    assert observer.seen.taken == 2 and "OutOfMemoryError: no memory" in observer.seen.trouble


def test_work_gets_its_share_of_the_time():
    budget = Budget(0.25)
    with budget.spending():
        sum(range(200_000))
    waits = budget._free_from
    assert not budget.allows
    with budget.spending():
        sum(range(200_000))
    assert budget._free_from > waits


class Gui:
    """Keeps what would be sent to a browser."""

    def __init__(self) -> None:
        self.elements: list[Gui] = []
        self.content = ""

    def add_markdown(self, content: str) -> "Gui":
        element = Gui()
        element.content = content
        self.elements.append(element)
        return element


def test_a_panel_shows_what_was_seen_with_legible_names():
    gui = Gui()
    panel = Panel(gui)
    panel.add_thumbnails()
    panel.add_charts()
    seen = observed(7, 5, Observer(lambda: True), batch=3).seen
    panel.show(seen, images=False)
    assert "Images appear" in gui.elements[1].content and 'alt="heat map"' in gui.elements[2].content
    panel.show(seen)
    assert 'alt="images"' in gui.elements[1].content
    assert short("0003_frame_00003") == "0003_frame_00003" and short("0003_IMG_20240101_3") == "…_IMG_20240101_3"
