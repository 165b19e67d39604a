"""Mode *dataset update*: in rounds, some training images are replaced by joint edits of their renders."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from csd_2d.cells import common_size
from csd_2d.config import EditConfig
from csd_2d.image_set import edit_images
from csd_2d.io.files import replacing
from csd_2d.io.images import read_image, write_image
from csd_2d.metrics.fidelity import change
from csd_2d.mixing import FindCorrespondence
from csd_2d.prior import Prior
from csd_nerf.cost import Cost
from csd_nerf.edit.selection import Selection, ViewRounds
from csd_nerf.views.base import TrainingViews
from csd_nerf.views.correspondence import view_correspondence

SMALLEST_CHANGE = 0.01
"""Mean change of the first round's views, within masks, in RGB from 0 to 1, below which a warning is printed."""


class DatasetUpdate:
    """Draws views, renders them, edits them together and replaces their training images by the result.

    Every view gets its turn before any is drawn again. An edit starts from the present render (arXiv 2307.04787, D.3).

    A finished round is a folder RUN/rounds/NNN with the edited images and round.json. The scene is trained on the files
    in it, so that a run that was interrupted can read them back instead of editing again. RUN/edited holds the last
    edit of each view.

    Args:
        views: the scene's training views.
        source: the image that conditions the edit of a view.
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
        """Costs of the rounds so far."""

    def run_round(self, number: int, label: str = "edit", finished: bool = False) -> list[int]:
        """Edit the next views, unless that was done before the run was interrupted; returns their indices.

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
                raise ValueError(f"{folder} is missing, but the scene was trained on it already; begin a new run.")
            self._edit(number, drawn, folder, label)
        self._check(folder, drawn)
        _unfinished(folder).unlink(missing_ok=True)
        for index in drawn:
            name = f"{self._views.name(index)}.png"
            image = read_image(folder / name)
            if self._masks is not None:  # outside the mask the source stays, even one of more than 8 bits
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
        # nerfstudio lets cuDNN choose the fastest algorithm; an interrupted round recognizes its sources by their bits.
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
        config = self._config_of(number, len(drawn))
        edited = edit_images(
            [self._source(index) for index in drawn],
            self._prior,
            self._prompt,
            config,
            start=start,
            masks=masks,
            correspondence=self._correspondence(drawn, start) if config.matches_places else None,
            progress=label,
            resume=state,
        )
        if number == 0 and (masks is None or any(bool(mask.any()) for mask in masks)):
            self._warn_of_no_change(change(start, edited, masks))
        return edited

    def _config_of(self, number: int, count: int) -> EditConfig:
        """Adapt the settings to a round of so many views."""
        config = dataclasses.replace(self._config, seed=self._config.seed * 10_000 + number)
        if config.mixing == "consensus" and number * count >= len(self._views):
            # All views were edited before. Stronger noise would let them forget the answer that the scene shows.
            config = dataclasses.replace(
                config, max_timestep=max(min(config.max_timestep, config.consensus_timestep), config.min_timestep)
            )
        return config

    def _correspondence(self, drawn: list[int], start: list[Tensor]) -> FindCorrespondence:
        assert self._prior is not None
        size = common_size([image.shape[-2:] for image in start], self._prior.cell)
        return view_correspondence(self._views, self._source, drawn, size, self._prior.cell)

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
        """Warn of an edit that does nothing, which would train for hours and look like a bug of the renderer."""
        changed = measured["mean"] if self._masks is None else measured["inside"]
        if changed < SMALLEST_CHANGE:
            CONSOLE.print(
                f"[yellow]The first round changed the views by {255 * changed:.1f} of 255 gray levels on average. Does "
                f"the prompt '{self._prompt}' ask for something the model can do? A higher "
                "--pipeline.edit.guidance-scale or more --pipeline.edit.steps make it stronger."
            )


def _unfinished(folder: Path) -> Path:
    """Return the file that keeps the state of a round's edit until the round's folder exists."""
    return folder.with_suffix(".part")
