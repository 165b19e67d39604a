"""Mode *dataset update*: in rounds, some training images are replaced by joint edits of what the scene shows."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from csd_2d.edit import EditConfig
from csd_2d.images import edit_images, write_image
from csd_2d.priors import Prior
from csd_nerf.scene import TrainingViews
from csd_nerf.selection import Selection, ViewRounds

SMALLEST_CHANGE = 0.01
"""Mean change of the first round's views, of RGB in [0, 1], under which a warning says so."""


class DatasetUpdate:
    """Draws views, renders them, edits them together and puts the result in place of their training images.

    Every view gets its turn before any is drawn again. The source of an edit is always the original image, its start is
    the present render (arXiv 2307.04787, D.3).

    Args:
        load_prior: called at the first round, so that rendering a scene never loads a diffusion model.
        views_per_round, selection: see `ViewRounds`.
        rounds: how many there will be, for the progress report.
        folder: where edited images are written, one PNG a view.
        seed: of the draw and of each round's edit.
        load_masks: called at the first round; one mask a view, see `edit_images`. None: everything may change.
    """

    def __init__(
        self,
        views: TrainingViews,
        load_prior: Callable[[], Prior],
        prompt: str,
        edit: EditConfig,
        views_per_round: int,
        selection: Selection,
        rounds: int,
        folder: Path,
        seed: int,
        load_masks: Callable[[], list[Tensor]] | None = None,
    ) -> None:
        self._views = views
        self._load_prior = load_prior
        self._prior: Prior | None = None
        self._prompt = prompt
        self._edit = edit
        dice = torch.Generator().manual_seed(seed)
        self._drawn = ViewRounds(views.positions(), views_per_round, selection, dice)
        self._rounds = rounds
        self._folder = folder
        self._seed = seed
        self._load_masks = load_masks
        self._masks: list[Tensor] | None = None

    def run_round(self, number: int) -> list[int]:
        """Edits the next views; returns which.

        Args:
            number: 0 for the first round.

        Raises:
            ValueError, OSError, NonFiniteError: as `load_prior` and `edit_images` raise.
        """
        if self._prior is None:
            self._prior = self._load_prior()
            self._masks = None if self._load_masks is None else self._load_masks()
        drawn = next(self._drawn)
        label = f"round {number + 1} of {self._rounds}"
        CONSOLE.print(f"{label}: {len(drawn)} views")
        start = [self._views.render(index) for index in drawn]
        edited = edit_images(
            [self._views.original(index) for index in drawn],
            self._prior,
            self._prompt,
            dataclasses.replace(self._edit, seed=self._seed * 10_000 + number),
            start=start,
            masks=None if self._masks is None else [self._masks[index] for index in drawn],
            progress=label,
        )
        if number == 0:
            self._warn_of_no_change(start, edited)
        for index, image in zip(drawn, edited, strict=True):
            self._views.supervise(index, image)
            # Two folders of a data set may hold files of the same name.
            write_image(image, self._folder / f"{index:04d}_{self._views.filename(index).stem}.png")
        return drawn

    def _warn_of_no_change(self, before: list[Tensor], after: list[Tensor]) -> None:
        """An edit that does nothing would train for hours and look like a bug of the renderer."""
        changes = [(new - old).abs().mean().item() for old, new in zip(before, after, strict=True)]
        change = sum(changes) / len(changes)
        if change < SMALLEST_CHANGE:
            CONSOLE.print(
                f"[yellow]The first round changed the views by {255 * change:.1f} of 255 grey levels on average. Does "
                f"the prompt '{self._prompt}' ask for something the model can do? A higher "
                "--pipeline.edit.guidance-scale or more --pipeline.edit.steps make it stronger."
            )
