"""An edit that can be stepped, and the loop that runs one to its end: panorama, video and scenes all use it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import StepLR
from tqdm.auto import tqdm

from csd_2d import ranks
from csd_2d.config import EditConfig
from csd_2d.csd import Step
from csd_2d.errors import NonFiniteError
from csd_2d.loss import EditLoss, Prompt
from csd_2d.particles import Particles
from csd_2d.prior import Prior
from csd_2d.progress import ProgressFile


class Edit(EditLoss):
    """An edit of particles by CSD-Edit (arXiv 2307.04787, eq. 9) with SGD, step by step. Same seed, same bits on a CPU.

    Args: see `EditLoss`. The particles' parameters change in place.

    Example:
        >>> from csd_2d import LatentStack, load_prior
        >>> particles = LatentStack(torch.full((3, 3, 8, 8), 0.5))
        >>> edit = Edit(particles, load_prior("analytic"), "make it night", EditConfig(steps=40))
        >>> while not edit.done:
        ...     step = edit.step()
        >>> step.index, step.direction.shape, bool((particles.latents < 0).all())
        (39, torch.Size([3, 3, 8, 8]), True)
    """

    def __init__(
        self, particles: Particles, prior: Prior, prompt: Prompt, config: EditConfig | None = None, **options: Any
    ) -> None:
        super().__init__(particles, prior, prompt, config, **options)
        self._learning_rate = self._schedule.learning_rate(self.config)
        self._optimizer = torch.optim.SGD(particles.parameters(), lr=self._learning_rate)
        self._scheduler = StepLR(self._optimizer, *self.config.decay)

    @property
    def done(self) -> bool:
        """All steps of the configuration were taken. More may follow."""
        return self.index >= self.steps

    def steer(self, config: EditConfig) -> None:
        """Take over guidance scales and learning rate of other settings, from the next step on.

        The rest of them has no effect. A new learning rate decays from here on.
        """
        super().steer(config)
        learning_rate = self._schedule.learning_rate(config)
        if learning_rate != self._learning_rate:
            self._learning_rate = self._optimizer.param_groups[0]["lr"] = learning_rate

    def step(self) -> Step:
        """Take one step.

        Raises:
            NonFiniteError: if latents become NaN or infinite; names the step.
            LostRankError: if another process ends.
        """
        loss, step = self.next()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        if self._schedule.ends_parts(step.index):
            self._scheduler.step()
        self._check_finite(step)
        return step

    def _check_finite(self, step: Step) -> None:
        # Particles that were not drawn have no gradient and did not change.
        if all(bool(p.isfinite().all()) for p in self.particles.parameters() if p.grad is not None):
            return
        raise NonFiniteError(
            f"latents are not finite after step {step.index + 1} of {self.steps} (timestep {step.timestep}); "
            f"lower lr (now {self._learning_rate:.3g}) or the guidance scales (now "
            f"{' and '.join(map(str, self.guidance.values()))})."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything the following steps depend on, as torch does: by reference.

        To come back to a state that is not written to a file, keep a `copy.deepcopy` of it.
        """
        return super().state_dict() | {
            "parameters": [parameter.detach() for parameter in self.particles.parameters()],
            "learning_rate": self._learning_rate,
            "lr": self._optimizer.param_groups[0]["lr"],  # SGD keeps nothing else
            "scheduler": self._scheduler.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. ValueError if it is of other particles."""
        parameters = list(self.particles.parameters())
        if [parameter.shape for parameter in parameters] != [values.shape for values in state["parameters"]]:
            raise ValueError("the state is of an edit of other particles: their parameters differ in number or shape.")
        super().load_state_dict(state)
        for parameter, values in zip(parameters, state["parameters"], strict=True):
            parameter.copy_(values)
        self._learning_rate = state["learning_rate"]
        self._optimizer.param_groups[0]["lr"] = state["lr"]
        self._scheduler.load_state_dict(state["scheduler"])


def _should_end(hook: Callable[[Any], object] | None, argument: Any) -> bool:
    """Ask a hook whether the edit should end; any process may say so."""
    return hook is not None and any(ranks.gather_numbers(bool(hook(argument))))


def _take_step(
    run: Edit,
    state: ProgressFile | None,
    before_step: Callable[[Edit], object] | None,
    on_step: Callable[[Step], object] | None,
) -> bool:
    """Take one step and report it; returns whether the edit should end. The step is not kept: it may be large."""
    if _should_end(before_step, run):
        return True
    step = run.step()
    if state is not None:
        state.step_done()
    return _should_end(on_step, step)


def edit(
    particles: Particles,
    prior: Prior,
    prompt: Prompt,
    config: EditConfig | None = None,
    on_step: Callable[[Step], object] | None = None,
    progress: str | None = None,
    resume: str | Path | None = None,
    before_step: Callable[[Edit], object] | None = None,
    **options: Any,
) -> None:
    """Edit particles in place: all steps of `Edit`.

    Several processes work on one edit inside `csd_2d.ranks.joined`.

    Args:
        particles, prior, prompt, config: see `Edit`.
        on_step: called after every step; the edit ends there if it returns True.
        progress: label of a progress bar with ETA; none if None.
        resume: file that keeps the state of the edit, in case it is interrupted; written twice a minute, and at the
            end. If it exists the edit continues from it and ends as if it had never stopped, even with a different
            number of processes. Delete it once the result is saved.
        before_step: called with the edit before every step, and may steer it; the edit ends there if it returns True.
        options: layout, mixing; see `Edit`.

    Raises:
        ValueError: as `Edit` raises, or if `resume` holds the state of another edit.
        NonFiniteError: if latents become NaN or infinite; names the step.
        LostRankError: if another process ends.
    """
    run = Edit(particles, prior, prompt, config, **options)
    state = None if resume is None else ProgressFile(Path(resume), run)
    silent = progress is None or ranks.rank() > 0
    with tqdm(desc=progress, disable=silent, unit="step", initial=run.index, total=run.steps) as bar:
        # An edit that was interrupted, and whose process was killed later, may have a state beyond that point.
        interrupted = run.done and _should_end(before_step, run)
        while not (run.done or interrupted):
            interrupted = _take_step(run, state, before_step, on_step)
            bar.update(run.index - bar.n)
    if state is not None:
        state.save()
