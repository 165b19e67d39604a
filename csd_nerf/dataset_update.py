"""Mode *dataset update*: in rounds, some training images are replaced by joint edits of what the scene shows."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from csd_2d.edit import EditConfig
from csd_2d.files import replacing
from csd_2d.images import edit_images, read_image, write_image
from csd_2d.priors import Prior
from csd_nerf.artefacts import Cost, change
from csd_nerf.scene import TrainingViews
from csd_nerf.selection import Selection, ViewRounds

SMALLEST_CHANGE = 0.01
"""Mean change of the first round's views, within masks, of RGB in [0, 1], under which a warning says so."""


class DatasetUpdate:
    """Draws views, renders them, edits them together and puts the result in place of their training images.

    Every view gets its turn before any is drawn again. The start of an edit is the present render (arXiv 2307.04787,
    D.3).

    A finished round is a folder RUN/rounds/NNN: the edited images, and round.json. A run that was interrupted finds it
    there and does not edit again; what is supervised is what lies there, so that it makes no difference. RUN/edited
    holds each view as it was last edited.

    Args:
        views: the scene's training views.
        source: what the edit of a view is conditioned on.
        load_prior: called at the first round, so that rendering a scene never loads a diffusion model.
        prompt: the instruction.
        edit: settings of each round's edit; its seed is that of the draw, too.
        views_per_round, selection: see `ViewRounds`.
        folder: RUN.
        load_masks: called at the first round; one mask a view, see `edit_images`. None: everything may change.
    """

    def __init__(
        self,
        views: TrainingViews,
        source: Callable[[int], Tensor],
        load_prior: Callable[[], Prior],
        prompt: str,
        edit: EditConfig,
        *,
        views_per_round: int,
        selection: Selection,
        folder: Path,
        load_masks: Callable[[], list[Tensor]] | None = None,
    ) -> None:
        self._views, self._source, self._load_prior = views, source, load_prior
        self._prior: Prior | None = None
        self._prompt, self._config = prompt, edit
        self._rounds, self._edited = folder / "rounds", folder / "edited"
        self._drawn = ViewRounds(
            views.positions(), views_per_round, selection, torch.Generator().manual_seed(edit.seed)
        )
        self._load_masks = load_masks
        self._masks: list[Tensor] | None = None
        self.costs: list[Cost] = []
        """Of each round so far."""

    def run_round(self, number: int, label: str = "edit", finished: bool = False) -> list[int]:
        """Edits the next views, unless that was done before the run was interrupted; returns which.

        Args:
            number: 0 for the first round; rounds are to be asked for in order.
            label: of the progress bar.
            finished: the round must have been edited before.

        Raises:
            ValueError, OSError, NonFiniteError: as `load_prior` and `edit_images` raise; also if the finished round is
                of other views or other data.
        """
        drawn = next(self._drawn)
        folder = self._rounds / f"{number:03d}"
        if self._load_masks is not None and self._masks is None:
            self._masks = self._load_masks()
        if not folder.is_dir():
            if finished:
                raise ValueError(f"{folder} is missing, which the run has learned from already; begin a new run.")
            self._edit(number, drawn, folder, label)
        self._check(folder, drawn)
        _unfinished(folder).unlink(missing_ok=True)
        for index in drawn:
            name = f"{self._views.name(index)}.png"
            image = read_image(folder / name)
            if self._masks is not None:  # a source need not be one of 8 bits, and stays what it is outside the mask
                image = torch.where(self._masks[index] > 0, image, self._source(index))
            self._views.supervise(index, image)
            with replacing(self._edited / name) as temporary:
                shutil.copyfile(folder / name, temporary)
        return drawn

    @cached_property
    def _data(self) -> str:
        return self._views.digest()

    def _edit(self, number: int, drawn: list[int], folder: Path, label: str) -> None:
        if self._prior is None:
            self._prior = self._load_prior()
        cost = Cost()
        # nerfstudio lets cuDNN try which algorithm is fastest; an interrupted round knows its sources by their bits.
        with cost.counted(self._prior.device), torch.backends.cudnn.flags(enabled=True, deterministic=True):
            edited = self._edit_together(number, drawn, label, _unfinished(folder))
        with replacing(folder) as unfinished:
            for index, image in zip(drawn, edited, strict=True):
                write_image(image, unfinished / f"{self._views.name(index)}.png")
            record = {"views": drawn, "data": self._data, "cost": cost.rounded()}
            (unfinished / "round.json").write_text(json.dumps(record), encoding="utf-8")

    def _edit_together(self, number: int, drawn: list[int], label: str, state: Path) -> list[Tensor]:
        assert self._prior is not None
        start = [self._views.render(index) for index in drawn]
        masks = None if self._masks is None else [self._masks[index] for index in drawn]
        edited = edit_images(
            [self._source(index) for index in drawn],
            self._prior,
            self._prompt,
            dataclasses.replace(self._config, seed=self._config.seed * 10_000 + number),
            start=start,
            masks=masks,
            progress=label,
            resume=state,
        )
        if number == 0 and (masks is None or any(bool(mask.any()) for mask in masks)):
            self._warn_of_no_change(change(start, edited, masks))
        return edited

    def _check(self, folder: Path, drawn: list[int]) -> None:
        try:
            record = json.loads((folder / "round.json").read_text(encoding="utf-8"))
            same = record["views"] == drawn and record["data"] == self._data
            self.costs.append(Cost(**record["cost"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder} cannot be read as a round of an edit; delete it to edit its views again."
            ) from error
        if not same:
            raise ValueError(f"the data or the settings have changed since {folder} was made; begin a new run.")

    def _warn_of_no_change(self, measured: dict[str, float]) -> None:
        """An edit that does nothing would train for hours and look like a bug of the renderer."""
        changed = measured["mean"] if self._masks is None else measured["inside"]
        if changed < SMALLEST_CHANGE:
            CONSOLE.print(
                f"[yellow]The first round changed the views by {255 * changed:.1f} of 255 grey levels on average. Does "
                f"the prompt '{self._prompt}' ask for something the model can do? A higher "
                "--pipeline.edit.guidance-scale or more --pipeline.edit.steps make it stronger."
            )


def _unfinished(folder: Path) -> Path:
    """Where the state of a round's edit is kept until the round's folder is there."""
    return folder.with_suffix(".part")


def time_left(rounds: list[Cost], count: int, training: Cost, step: int, steps: int) -> str:
    """How long a run will still take, as far as that is known.

    nerfstudio's own estimate is the mean of the last few steps, and knows of no rounds.

    Args:
        rounds: what those so far took.
        count: how many there will be.
        training: what the steps so far took.
        step: how many these are.
        steps: how many there will be.

    Example:
        >>> time_left([Cost(600.0)] * 2, 10, Cost(100.0), 1000, 5000)
        '; about 1 h 27 min left'
        >>> time_left([Cost(600.0)], 10, Cost(), 0, 5000)
        '; about 1 h 30 min left, and the training between the rounds'
    """
    seconds = (count - len(rounds)) * sum(cost.seconds for cost in rounds) / len(rounds)
    seconds += (steps - step) * training.seconds / max(step, 1)
    hours, minutes = divmod(max(round(seconds / 60), 1), 60)
    time = f"{hours} h {minutes} min" if hours else f"{minutes} min"
    if count == len(rounds) and not step:
        return ""
    return f"; about {time} left" + ("" if step else ", and the training between the rounds")
