"""The loss of CSD-Edit, step by step: its gradient moves particles along phi."""

import hashlib
from collections.abc import Sequence
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from csd_2d import ranks
from csd_2d.config import EditConfig
from csd_2d.csd import Baseline, Mixing, NoisedParticles, Step, csd_step, edit_residual
from csd_2d.particles import Layout, Particles, noise_source
from csd_2d.prior import Prior
from csd_2d.schedule import Schedule

Prompt = str | Sequence[str]
"""One instruction, or several, each of which applies somewhere (`Layout.shares`)."""


def check_prompt(prompt: Prompt) -> list[str]:
    """Return the instructions as a list. Raises ValueError if there is none, or one is empty."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise ValueError("prompt is empty; say what to change, e.g. 'make it night'.")
    return prompts


def _name(rule: Any) -> str:
    """Name a mixing, with its settings if it is a dataclass; alike in all processes."""
    return repr(rule) if rule is None or is_dataclass(rule) else getattr(rule, "__qualname__", type(rule).__qualname__)


class EditLoss:
    """Compute the loss of an edit, one step after the other; the caller steps along its gradient.

    `csd_2d.edit.Edit` does so with SGD on latents, `csd_nerf` with the optimizers of a scene.

    Args:
        particles: what to edit.
        prompt: the instruction, e.g. "make it night", or several; see `Prompt`.
        config: default `EditConfig()`.
        layout: how the particles belong together. Default: each is an image of its own.
        mixing: mixes scores in all steps, in place of the rule that `config` names.

    Raises:
        ValueError: if a prompt is empty or unknown to the prior, or `config` and `layout` do not fit together.
    """

    def __init__(
        self,
        particles: Particles,
        prior: Prior,
        prompt: Prompt,
        config: EditConfig | None = None,
        *,
        layout: Layout | None = None,
        mixing: Mixing | None = None,
    ) -> None:
        self.particles, self.prior, self.config = particles, ranks.share_rows(prior), config or EditConfig()
        self._names = [type(prior).__name__, _name(mixing)]
        self.layout = layout or Layout()
        self.guidance = self._first_guidance = self._scales(self.config)
        first = particles.source([0])
        takes_images = prior.condition(first).shape[1] > 0
        self._baseline: Baseline = self.config.baseline or ("noise" if takes_images else "image")
        self.index = 0
        """Number of the next step."""
        self._generator = torch.Generator().manual_seed(self.config.seed)
        self._draw_noise = noise_source(self.config.noise, self.layout)
        self._schedule = Schedule(
            self.config, self.layout, len(particles), first.numel(), prior.num_timesteps, self._generator, mixing
        )
        self.steps = self._schedule.steps
        """Steps of the configuration; more if a step would not fit in memory, see `Schedule`."""
        self.prompts: list[tuple[int, list[str]]] = []
        """Prompts so far, each with the step from which on it holds."""
        self.prompt = prompt

    @property
    def prompt(self) -> list[str]:
        """The instructions of the next step. May be set between steps, to as many as there were."""
        return list(self.prompts[-1][1])

    @prompt.setter
    def prompt(self, prompt: Prompt) -> None:
        prompts = check_prompt(prompt)
        if self.prompts and len(prompts) != len(self.prompt):
            raise ValueError(f"the number of prompts must stay {len(self.prompt)}, got {len(prompts)}.")
        if len(prompts) > 1 and self.layout.shares is None:
            raise ValueError(f"{len(prompts)} prompts need a layout with the share of each in every particle.")
        self._text = self.prior.encode_text(prompts)
        self._schedule.forget_leader()
        if self.prompts and self.prompts[-1][0] == self.index:
            self.prompts.pop()
        self.prompts.append((self.index, prompts))

    def _scales(self, config: EditConfig) -> dict[str, float]:
        return {
            name: getattr(self.prior if getattr(config, name) is None else config, name)
            for name in ("guidance_scale", "image_guidance_scale")
        }

    def steer(self, config: EditConfig) -> None:
        """Take over the guidance scales of other settings, from the next step on; the rest of them has no effect."""
        self.guidance = self._scales(config)

    def next(self) -> tuple[Float[Tensor, ""], Step]:
        """Compute the next step's loss, whose gradient with respect to the particles is -w(t) phi, w(t) = sigma^2."""
        schedule = self._schedule
        loss, step = csd_step(
            self.particles,
            schedule.batch(self.index),
            self.prior,
            schedule.timesteps(self.index),
            self._draw_noise,
            self._residual,
            schedule.mix,
            self._generator,
            self.config.weight,
            self.index,
        )
        self.index += 1
        return loss, replace(step, correspondence=self.layout.correspondence)

    def _residual(self, noised: NoisedParticles) -> Float[Tensor, "n c h w"]:
        """Compute `edit_residual`, for `Schedule.rows_at_once` particles at a time."""
        shares = self.layout.shares
        parts = [
            edit_residual(
                self.prior,
                part.x_t,
                part.source_t,
                part.noise,
                self.prior.condition(part.source),
                timestep=part.timestep,
                text=self._text,
                **self.guidance,
                baseline=self._baseline,
                shares=None if shares is None else shares(part.indices),
            )
            for part in noised.split(self._schedule.rows_at_once * ranks.size())
        ]
        return torch.cat(parts)

    def fingerprint(self) -> str:
        """Hash first settings and prompt, prior and mixing, which tell edits apart; not the particles."""
        (_, prompts), *_ = self.prompts
        digest = hashlib.sha256(repr((self.config, prompts, self._first_guidance, self._names)).encode())
        # Models of one family differ in how they encode a prompt; the analytic prior makes it a list of functions.
        text = self._text if len(self.prompts) == 1 else self.prior.encode_text(prompts)
        for part in text if isinstance(text, tuple) else [text]:
            if isinstance(part, Tensor):
                digest.update(part.float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the following steps depend on, except the particles' parameters."""
        return {
            "index": self.index,
            "prompts": [(index, list(prompts)) for index, prompts in self.prompts],
            "guidance": dict(self.guidance),
            "generator": self._generator.get_state(),
            "schedule": self._schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.index = state["index"]
        self.prompts = [(index, list(prompts)) for index, prompts in state["prompts"]]
        self._text = self.prior.encode_text(self.prompt)
        self.guidance = dict(state["guidance"])
        self._generator.set_state(state["generator"])
        self._schedule.load_state_dict(state["schedule"])
