"""Mode *dataset update*: in rounds, some training images are replaced by joint edits of their renders."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from csd_2d.cells import common_size
from csd_2d.config import EditConfig
from csd_2d.edit import Edit
from csd_2d.image_set import edit_images
from csd_2d.io.files import replacing
from csd_2d.io.images import read_image, write_image
from csd_2d.metrics.fidelity import change
from csd_2d.mixing import FindCorrespondence
from csd_2d.observer import Observer
from csd_2d.prior import Prior
from csd_nerf.console import warn
from csd_nerf.cost import Cost
from csd_nerf.edit.selection import Selection, ViewRounds
from csd_nerf.edit.steering import Settings, Steering
from csd_nerf.views.base import TrainingViews
from csd_nerf.views.correspondence import view_correspondence
from csd_nerf.views.surround import extended, joined

SMALLEST_CHANGE = 0.01
"""Mean change of the first round's views, within masks, in RGB from 0 to 1, below which a warning is printed."""


_SCENE = "scene_before.ckpt"


@dataclass(frozen=True)
class Round:
    """A round that was begun."""

    number: int
    views: list[int]
    settings: Settings
    """Those it was begun with."""
    config: EditConfig
    """Settings of its edit, as it was begun."""


class DatasetUpdate:
    """Draws views, renders them, edits them together and replaces their training images by the result.

    Every view gets its turn before any is drawn again. An edit starts from the present render (arXiv 2307.04787, D.3).

    A finished round is a folder RUN/rounds/NNN with the edited images and round.json. The scene is trained on the files
    in it, so that a run that was interrupted can read them back instead of editing again. RUN/edited holds the last
    edit of each view.

    A round may be interrupted (`Steering.ends_round`): its edit waits, and the next call goes on with it, unless it is
    given up.

    Args:
        views: the scene's training views.
        source: the image that conditions the edit of a view.
        load_prior: called at the first round, so that rendering a scene never loads a diffusion model.
        steering: the settings of each round, which may change; the seed of the edit is that of the draw, too.
        selection: see `ViewRounds`.
        folder: RUN.
        load_masks: called at the first round; one mask a view, see `edit_images`. None: everything may change.
        observer: looks at every step of an edit.
        save_scene: writes the scene to a file. It is called at the end of a round, before the scene learns it, and
            `undo` names the file.
    """

    def __init__(
        self,
        views: TrainingViews,
        source: Callable[[int], Tensor],
        load_prior: Callable[[], Prior],
        steering: Steering,
        *,
        selection: Selection,
        folder: Path,
        load_masks: Callable[[], list[Tensor]] | None = None,
        observer: Observer | None = None,
        save_scene: Callable[[Path], object] | None = None,
    ) -> None:
        self._views, self._source, self._load_prior = views, source, load_prior
        self._save_scene = save_scene
        self._prior: Prior | None = None
        self._steering, self._observer = steering, observer or Observer(lambda: False)
        self._rounds, self._edited = folder / "rounds", folder / "edited"
        settings = steering.settings
        self._drawn = ViewRounds(
            views.positions(),
            settings.views_per_round,
            selection,
            torch.Generator().manual_seed(settings.edit.seed),
        )
        self._load_masks = load_masks
        self._masks: list[Tensor] | None = None
        self.costs: list[Cost] = []
        """Costs of the rounds so far."""
        self.begun = 0
        """Number of rounds so far, with those that were given up."""
        self.interrupted: Round | None = None
        """The round that was begun and waits."""
        self.shown: dict[int, int] = {}
        """Number of the round whose edit each view shows; views that show their source are left out."""
        self.last: int | None = None
        """Number of the last round that was finished."""
        self._shown_before: dict[int, int] | None = None
        self._answered = ("", 0)
        """The prompt of the last round, and how many views were edited by it."""

    def run_round(self, training_step: int, label: str = "edit", finished: bool = False) -> list[int]:
        """Edit the next views, or go on with a round that was interrupted, unless that was done before the run stopped.

        Args:
            training_step: step of the training before which the round runs.
            label: of the progress bar.
            finished: the round must have been edited before.

        Returns:
            The views, which show their edits now; none if the round was interrupted.

        Raises:
            ValueError, OSError, NonFiniteError: as `load_prior` and `edit_images` raise; also if the finished round is
                of other views or other data.
        """
        current = self.interrupted = self.interrupted or self._begin()
        folder = self._folder(current.number)
        if self._load_masks is not None and self._masks is None:
            self._masks = self._load_masks()
        if finished or folder.is_dir():
            self._steering.take_over(training_step, math.inf)
        elif not self._edit(current, training_step, folder, label):
            return []
        if self._steering.ends_round:
            return []
        if not folder.is_dir():
            raise ValueError(f"{folder} is missing, but the scene was trained on it already; begin a new run.")
        self._check(folder, current.views)
        self._unfinished(current.number).unlink(missing_ok=True)
        self._shown_before = dict(self.shown)
        prompt, count = self._answered
        answered = count if prompt == current.settings.prompt else 0
        self._answered = (current.settings.prompt, answered + len(current.views))
        for index in current.views:
            self._show(index, current.number)
        self.interrupted, self.last = None, current.number
        return current.views

    def _begin(self) -> Round:
        settings = self._steering.settings
        self._drawn.size = settings.views_per_round
        number, self.begun = self.begun, self.begun + 1
        views = next(self._drawn)
        return Round(number, views, settings, self._config_of(number, settings))

    def _folder(self, number: int) -> Path:
        return self._rounds / f"{number:03d}"

    def _unfinished(self, number: int) -> Path:
        """Return the file that keeps the state of a round's edit until the round's folder exists."""
        return self._folder(number).with_suffix(".part")

    def _show(self, index: int, number: int | None) -> None:
        """Let a view show, and be trained on, its edit of a round; None: its source."""
        name = f"{self._views.name(index)}.png"
        if number is None:
            self.shown.pop(index, None)
            self._views.supervise(index, self._source(index))
            (self._edited / name).unlink(missing_ok=True)
            return
        self.shown[index] = number
        image = read_image(self._folder(number) / name)
        if self._masks is not None:  # outside the mask the source stays, even one of more than 8 bits
            image = torch.where(self._masks[index] > 0, image, self._source(index))
        self._views.supervise(index, image)
        with replacing(self._edited / name) as temporary:
            shutil.copyfile(self._folder(number) / name, temporary)

    def give_up(self) -> bool:
        """Give up the round that was interrupted. Returns whether there was one."""
        if self.interrupted is None:
            return False
        self._unfinished(self.interrupted.number).unlink(missing_ok=True)
        self.interrupted = None
        return True

    def undo(self) -> Path | None:
        """Let views show what they showed before the last round.

        Returns:
            The file with the scene from before that round; None if there is nothing to undo.
        """
        if self._shown_before is None or self.last is None:
            return None
        for index in [*self.shown]:
            if self._shown_before.get(index) != self.shown[index]:
                self._show(index, self._shown_before.get(index))
        self._shown_before, self._answered = None, ("", 0)
        return self._folder(self.last) / _SCENE

    def forget_scenes(self, rounds: int) -> None:
        """Delete the scenes from before the first rounds, so many, which nobody will come back to."""
        for number in range(rounds):
            (self._folder(number) / _SCENE).unlink(missing_ok=True)

    def reset(self) -> None:
        """Let all views show their sources."""
        for index in [*self.shown]:
            self._show(index, None)
        self._shown_before, self._answered = None, ("", 0)

    @cached_property
    def _data(self) -> str:
        return self._views.digest()

    def _edit(self, current: Round, training_step: int, folder: Path, label: str) -> bool:
        """Edit the views of a round; returns whether that was finished."""
        if self._prior is None:
            self._prior = self._load_prior()
        cost = Cost()
        # nerfstudio lets cuDNN choose the fastest algorithm; an interrupted round recognizes its sources by their bits.
        with cost.counted(self._prior.device), torch.backends.cudnn.flags(enabled=True, deterministic=True):
            edited = self._edit_together(current, training_step, label)
        if self._steering.ends_round:
            return False
        with replacing(folder) as unfinished:
            for index, image in zip(current.views, edited, strict=True):
                write_image(image, unfinished / f"{self._views.name(index)}.png")
            record = {"views": current.views, "data": self._data, "cost": cost.rounded()}
            if self._save_scene is not None:
                self._save_scene(unfinished / _SCENE)
            (unfinished / "round.json").write_text(json.dumps(record), encoding="utf-8")
        return True

    def _edit_together(self, current: Round, training_step: int, label: str) -> list[Tensor]:
        assert self._prior is not None
        drawn, config = current.views, current.config
        margins = [self._margin(index) for index in drawn]

        def continued(images: Iterable[Tensor]) -> list[Tensor]:
            return [extended(image, margin) for image, margin in zip(images, margins, strict=True)]

        start = continued(self._views.render(index) for index in drawn)
        masks = None if self._masks is None else continued(self._masks[index] for index in drawn)
        find = self._correspondence(drawn, start, margins) if config.matches_places else None
        sources = continued(self._source(index) for index in drawn)
        names = [self._views.name(index) for index in drawn]
        images = list(zip(sources, start, strict=True))
        self._observer.begin(label, names, config.steps, self._prior.decode, images)
        edited = edit_images(
            sources,
            self._prior,
            current.settings.prompt,
            config,
            start=start,
            masks=masks,
            correspondence=find,
            progress=label,
            resume=self._unfinished(current.number),
            before_step=partial(self._steer, current, training_step),
            on_step=self._observer.on_step,
        )
        self._observer.end()
        if current.number == 0 and (masks is None or any(bool(mask.any()) for mask in masks)):
            self._warn_of_no_change(change(start, edited, masks))
        whole = (joined(image, margin) for image, margin in zip(edited, margins, strict=True))
        return [self._views.with_surroundings(index, image) for index, image in zip(drawn, whole, strict=True)]

    def _margin(self, index: int) -> int:
        """Compute by how many pixels a view is continued beyond its borders for its edit: half a window, if at all."""
        assert self._prior is not None
        if not self._views.surrounds(index):
            return 0
        cell, width = self._prior.cell, int(self._views.cameras.width[index])
        return min(self._prior.window * cell // 2, width // 2) // cell * cell

    def _steer(self, current: Round, training_step: int, edit: Edit) -> bool:
        """Let changes take effect before a step; returns whether they interrupt the round."""
        self._steering.take_over(training_step, edit.index)
        settings = self._steering.settings
        if edit.prompt != [settings.prompt]:
            edit.prompt = settings.prompt
        scales = {name: getattr(settings.edit, name) for name in ("guidance_scale", "image_guidance_scale", "lr")}
        edit.steer(dataclasses.replace(current.config, **scales))
        return self._steering.ends_round

    def _config_of(self, number: int, settings: Settings) -> EditConfig:
        """Adapt the settings to a round."""
        config = dataclasses.replace(settings.edit, seed=(settings.edit.seed * 10_000 + number) % 2**40)
        prompt, count = self._answered
        if config.mixing == "consensus" and prompt == settings.prompt and count >= len(self._views):
            # All views were edited before. Stronger noise would let them forget the answer that the scene shows.
            config = dataclasses.replace(
                config, max_timestep=max(min(config.max_timestep, config.consensus_timestep), config.min_timestep)
            )
        return config

    def _correspondence(self, drawn: list[int], start: list[Tensor], margins: list[int]) -> FindCorrespondence:
        assert self._prior is not None
        size = common_size([image.shape[-2:] for image in start], self._prior.cell)
        return view_correspondence(self._views, self._source, drawn, size, self._prior.cell, margins)

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
            warn(
                f"The first round changed the views by {255 * changed:.1f} of 255 gray levels on average. Does "
                f"the prompt '{self._steering.settings.prompt}' ask for something the model can do? A higher "
                "--pipeline.edit.guidance-scale or more --pipeline.edit.steps make it stronger."
            )
