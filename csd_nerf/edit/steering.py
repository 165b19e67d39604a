"""Steer a running edit: changes come from a viewer or from an earlier run, and take effect at defined points."""

import dataclasses
import json
import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from csd_2d.config import EditConfig
from csd_2d.io.files import replacing
from csd_2d.loss import check_prompt

AT_NEXT_STEP = ("prompt", "guidance_scale", "image_guidance_scale", "lr")
"""Settings that the next step of an edit follows; in distill without `lr`, which is that of the scene's optimizers."""
AT_NEXT_ROUND = ("steps", "views_per_round", "mixing")
"""Settings that the next round follows."""
ACTIONS = ("edit_now", "pause", "resume", "undo", "reset", "stop")
"""edit_now: begin a round at once. pause: run no rounds, and interrupt the one that runs; resume: go on with it. undo:
give up the round that runs, else restore scene and training images from before the last one. reset: restore those from
before the first. stop: end the training, and save."""
ENDS_ROUND = ("pause", "undo", "reset", "stop")
IN_DISTILL = ("prompt", "guidance_scale", "image_guidance_scale", "reset", "stop")


@dataclass(frozen=True)
class Settings:
    """What may be changed while a run lasts."""

    prompt: str
    edit: EditConfig
    views_per_round: int = 0

    def changed(self, name: str, value: Any) -> "Settings":
        """Return them with another value of one setting. ValueError if it is out of range."""
        if name == "prompt":
            if not isinstance(value, str):
                raise ValueError(f"prompt must be a text, got {value}.")
            check_prompt(value)
            return replace(self, prompt=value)
        if name == "views_per_round":
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"views_per_round must be a whole number from 0 (all views), got {value}.")
            return replace(self, views_per_round=value)
        return replace(self, edit=replace(self.edit, **{name: value}))


@dataclass(frozen=True)
class Change:
    """A change of a setting, or an action, and the point where it took effect."""

    name: str
    value: Any
    training_step: int
    edit_step: int | None = None
    """Step of the edit of the round that ran; None: no round ran yet at this training step."""

    @property
    def point(self) -> tuple[float, float]:
        return self.training_step, -1 if self.edit_step is None else self.edit_step


def read_changes(path: str | Path) -> list[Change]:
    """Read the changes of a run from its edit.json, in order.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no edit.json.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no edit.json to replay at {path}.")
    try:
        changes = [Change(**change) for change in json.loads(path.read_text(encoding="utf-8"))["changes"]]
        known = all(change.name in AT_NEXT_STEP + AT_NEXT_ROUND + ACTIONS for change in changes)
        return sorted(changes, key=lambda change: change.point) if known else _unreadable(path)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no edit.json of a run that can be repeated.") from error


def _unreadable(path: Path) -> list[Change]:
    raise ValueError(f"{path} names changes that are not known here.")


class Steering:
    """The settings of a run as they are now, and the changes that are still to take effect.

    Changes are asked for by any thread. The training takes them over, at defined points: before a training step, or
    before a step of an edit within a round. Each is written to the run's edit.json before it takes effect, so that a
    run that was interrupted, or is repeated, meets the same changes at the same points.

    Args:
        settings: those that the run begins with.
        allowed: what may be asked for; default: everything.
        check_prompt: raises ValueError for a prompt that the diffusion model cannot follow.

    Example:
        >>> steering = Steering(Settings("make it night", EditConfig()))
        >>> steering.ask("prompt", "make it snowy")
        >>> steering.settings.prompt
        'make it night'
        >>> steering.take_over(training_step=7), steering.settings.prompt
        ([Change(name='prompt', value='make it snowy', training_step=7, edit_step=None)], 'make it snowy')
    """

    def __init__(
        self,
        settings: Settings,
        allowed: Iterable[str] = AT_NEXT_STEP + AT_NEXT_ROUND + ACTIONS,
        check_prompt: Callable[[str], object] = check_prompt,
    ) -> None:
        self.settings = settings
        self.changes: list[Change] = []
        """Those of this run, in order, and those of an earlier run whose points are still to come."""
        self.allowed, self._check_prompt = frozenset(allowed), check_prompt
        self._refusals: dict[str, str] = {}
        self._lock = threading.Lock()
        self._taken = 0
        self._asked: list[tuple[str, Any]] = []
        self._actions: list[Change] = []
        self._path: Path | None = None

    def record(self, path: Path, replay: Path | None = None) -> None:
        """Keep changes in a file, whose changes, or those of an earlier run, take effect again at their points.

        A run that was stopped, and whose report was written, goes on: the stop is over.

        Raises:
            FileNotFoundError, ValueError: as `read_changes` raises, or if this run cannot follow the changes.
        """
        if path.is_file() or replay is not None:
            self.changes = read_changes(path if path.is_file() or replay is None else replay)
        if path.is_file() and "history" in json.loads(path.read_text(encoding="utf-8")):
            self.changes = [change for change in self.changes if change.name != "stop"]
        self._path = path
        expected = self.settings
        for change in self.changes:
            expected = self._checked(expected, change.name, change.value)
        if self.changes or path.is_file():
            self._write()

    def _checked(self, settings: Settings, name: str, value: Any) -> Settings:
        """Return the settings after a change. ValueError if it is not possible in this run."""
        if name not in self.allowed:
            raise ValueError(f"{name.replace('_', ' ')} cannot be changed in this run.")
        if name in ACTIONS:
            return settings
        if name == "prompt" and isinstance(value, str):
            value = value.strip()
            self._check_prompt(value)
        return settings.changed(name, value)

    def refuse(self, name: str, reason: str | None) -> None:
        """Refuse an action from now on, for a reason; None allows it again."""
        with self._lock:
            self._refusals.pop(name, None)
            if reason is not None:
                self._refusals[name] = reason

    def refuse_all(self, reason: str) -> None:
        """Refuse everything from now on: the run is over."""
        for name in self.allowed:
            self.refuse(name, reason)

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError if a change of a setting is not possible."""
        self._checked(self.settings, name, value)

    def ask(self, name: str, value: Any = None) -> None:
        """Ask for a change, which takes effect at the next point. May be called by any thread.

        Raises:
            ValueError: if it is not possible; nothing changes then.
        """
        with self._lock:
            if name in self._refusals:
                raise ValueError(self._refusals[name])
            expected = self.settings
            for waiting in self._asked:
                expected = self._checked(expected, *waiting)
            if name not in ACTIONS and self._checked(expected, name, value) == expected:
                return
            self._checked(expected, name, value)
            self._asked.append((name, value.strip() if name == "prompt" else value))

    @property
    def waiting(self) -> list[str]:
        """Names of the changes that were asked for and have not taken effect yet."""
        with self._lock:
            return [name for name, _ in self._asked]

    def take_over(self, training_step: int, edit_step: float | None = None) -> list[Change]:
        """Let changes take effect: those recorded up to this point, then those asked for.

        Args:
            edit_step: infinity: at the end of the round of this training step, all of whose steps were taken before.
        """
        whole_round = edit_step == math.inf
        point = (training_step, -1 if edit_step is None else edit_step)
        with self._lock:
            until = self._taken
            while until < len(self.changes) and self.changes[until].point <= point:
                until += 1
            asked, self._asked = (self._asked, []) if self._asked and not whole_round else ([], self._asked)
            step = None if edit_step is None or whole_round else int(edit_step)
            new = [Change(name, value, training_step, step) for name, value in asked]
            self.changes[until:until] = new
            taken = self.changes[self._taken : until + len(new)]
            self._taken += len(taken)
            if any(change.name == "stop" for change in new):
                del self.changes[self._taken :]  # what an earlier run did later is not repeated
            for change in taken:
                if change.name in ACTIONS:
                    self._actions.append(change)
                else:
                    self.settings = self.settings.changed(change.name, change.value)
        if new:
            self._write()
        return taken

    @property
    def ends_round(self) -> bool:
        """Whether an action that was taken over interrupts the round that runs."""
        return any(action.name in ENDS_ROUND for action in self._actions)

    def next_action(self) -> str | None:
        """Return the next action to carry out, once; None if there is none."""
        return self._actions.pop(0).name if self._actions else None

    def report(self) -> list[dict[str, Any]]:
        """Return the changes as `read_changes` reads them."""
        return [dataclasses.asdict(change) for change in self.changes]

    def _write(self) -> None:
        if self._path is not None:
            with replacing(self._path) as temporary:
                temporary.write_text(json.dumps({"changes": self.report()}, indent=1), encoding="utf-8")
