"""The one optimisation loop: panorama, video and 3D scenes all run it."""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, get_args

import torch
import yaml
from jaxtyping import Float
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, StepLR
from tqdm.auto import tqdm

from csd_2d.csd import Baseline, add_noise, edit_residual, surrogate_loss, svgd_direction
from csd_2d.errors import NonFiniteError
from csd_2d.files import replacing
from csd_2d.kernels import RBFKernel, low_pass
from csd_2d.particles import NoiseMode, Particles
from csd_2d.priors import Prior
from csd_2d.transport import Transport, everywhere

JOINT_PARTICLES = 256
"""Most particles that move as one: what is mixed at once is held in memory at once."""

OWN_SCORE, SAME_PLACES = 0.01, 10.0
"""Factors on the median bandwidth in the second phase: so small that each particle follows its own score, and, where
scores are moved to corresponding places, so large that all count almost alike."""


@dataclass(frozen=True)
class EditConfig:
    """Settings of one edit; `load_preset` reads other sets of defaults."""

    steps: int = 200
    """Optimiser steps (paper: 200)."""
    lr: float = 1.0
    """Learning rate of SGD on the latents."""
    lr_decay: float = 0.9
    """Factor on the learning rate every `lr_decay_every` steps (authors' code: 0.9)."""
    lr_decay_every: int = 20
    """Steps between two decays of the learning rate (authors' code: 20)."""
    together: float = 0.5
    """Share of the steps that make the first phase. In it all particles move as one (of over 256, as many at a time),
    under noise that leaves the answer open; in the second each follows its own score, under noise too weak to change
    the answer. 0: no first phase, as published."""
    batch: int | None = None
    """Particles drawn for a step of the second phase; 0 takes all of them. Default: of frames or views a third, but 8
    at least (paper: 4 of 12 crops); of a canvas as many crops as cover it. Fewer make a step cheaper, and leave each
    particle fewer steps to change in."""
    guidance_scale: float | None = None
    """Text guidance scale omega_y. Default: the prior's."""
    image_guidance_scale: float | None = None
    """Image guidance scale omega_s. Default: the prior's."""
    min_timestep: float = 0.02
    """Smallest timestep, as a share of the noise schedule (authors' code: 0.02)."""
    turn_timestep: float = 0.5
    """Largest timestep of the second phase and smallest of the first (paper: 0.5)."""
    max_timestep: float = 0.98
    """Largest timestep of the first phase, as a share of the noise schedule."""
    baseline: Baseline = "image"
    """Subtracted from the guided estimate: CSD-Edit's image-conditional one, SDS's noise, or nothing."""
    svgd: bool = True
    """Mix the particles' scores by the kernel. Off: every particle follows its own score."""
    kernel_input: Literal["clean", "low_pass", "noisy"] = "clean"
    """Latents the kernel compares: x_0, x_0 without detail (`low_pass`), or x_t as published. Independent noise hides
    what the images show."""
    transport: Literal["off", "first", "second", "both"] = "off"
    """Phases in which scores are moved to where the receiver shows the same thing before they are mixed, as far as that
    is known: between frames of a video (optical flow) and crops of a panorama. Makes a video flicker less."""
    noise: NoiseMode = "independent"
    """Noise of the particles in one step."""
    bandwidth_scale_together: float = 1000.0
    """Factor on the median bandwidth in the first phase. Large: all particles move as one."""
    bandwidth_scale: float | None = None
    """Factor on the median bandwidth in the second phase. Default: 0.01, so small that each particle follows its own
    score; 10 where scores are moved to corresponding places."""
    normalize_rows: bool = True
    """Divide kernel rows by their sum, so that step size does not depend on the number of particles."""
    seed: int = 0
    """Seed of timesteps, noise and the choice of particles."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("steps", 1, 10**6),
            ("lr", 1e-8, 1e4),
            ("lr_decay", 1e-3, 1),
            ("lr_decay_every", 1, 10**6),
            ("batch", 0, 10**6),
            ("guidance_scale", 0, 1000),
            ("image_guidance_scale", 0, 1000),
            ("together", 0, 1),
            ("min_timestep", 0, 1),
            ("turn_timestep", 0, 1),
            ("max_timestep", 0, 1),
            ("bandwidth_scale", 1e-12, 1e12),
            ("bandwidth_scale_together", 1e-12, 1e12),
            ("seed", 0, 2**40),
        ):
            value = getattr(self, name)
            if value is None and name in ("batch", "guidance_scale", "image_guidance_scale", "bandwidth_scale"):
                continue
            kind = int if name == "batch" or isinstance(getattr(type(self), name), int) else int | float
            if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:  # NaN, too
                whole = "a whole number " if kind is int else ""
                raise ValueError(f"{name} must be {whole}from {low} to {high}, got {value}.")
        for name, choices in (
            ("baseline", get_args(Baseline)),
            ("kernel_input", ("clean", "low_pass", "noisy")),
            ("transport", ("off", "first", "second", "both")),
            ("noise", get_args(NoiseMode)),
            ("svgd", (True, False)),
            ("normalize_rows", (True, False)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {getattr(self, name)}.")
        timesteps = (self.min_timestep, self.turn_timestep, self.max_timestep)
        if sorted(timesteps) != list(timesteps):
            raise ValueError(
                "min_timestep must not exceed turn_timestep, nor that max_timestep; "
                f"got {', '.join(map(str, timesteps))}."
            )


def preset_names() -> list[str]:
    """Names that `load_preset` knows."""
    shipped = (entry.name for entry in files("csd_presets").iterdir())
    return ["default", *sorted(name.removesuffix(".yaml") for name in shipped if name.endswith(".yaml"))]


def load_preset(name: str) -> EditConfig:
    """Settings by the name of a preset in `configs/`, or from a YAML file of one's own.

    A preset holds only what differs from the defaults. `paper` is eq. 9 as the authors run it, without their scripts'
    defects.

    Raises:
        ValueError: if there is no such preset or file, or it holds an unknown setting or a value out of range.

    Example:
        >>> load_preset("paper").kernel_input
        'noisy'
    """
    if name == "default":
        return EditConfig()
    source = Path(name) if name.endswith((".yaml", ".yml")) else files("csd_presets") / f"{name}.yaml"
    if not source.is_file():
        raise ValueError(f"unknown preset '{name}'; expected {', '.join(preset_names())} or a .yaml file.")
    try:
        settings = yaml.safe_load(source.read_text()) or {}
        return EditConfig(**settings)
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"preset {name} cannot be used: {error}") from error


@dataclass(frozen=True)
class StepInfo:
    """What one step did; handed to the callback."""

    step: int
    timestep: int
    indices: list[int]
    residual_norm: float
    """Root mean square of the edit residual over the step's particles."""


Prompt = str | Sequence[str]
"""One instruction, or several, of which the particles say where each applies (`Particles.shares`)."""


def check_prompt(prompt: Prompt) -> list[str]:
    """The instructions as a list. Raises ValueError if there is none, or one is empty."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError("prompt is empty; say what to change, e.g. 'make it night'.")
    return prompts


class Batches:
    """Random batches without end; every particle is drawn equally often, to within one.

    Args:
        rounds: sets of particles; each is used up before the next, drawn at random, is begun. See `Particles.rounds`.
        size: particles in a batch; 0 takes a whole round.
    """

    def __init__(self, rounds: list[list[int]], size: int, generator: torch.Generator) -> None:
        self._rounds, self._generator = rounds, generator
        self._size = min([size, *map(len, rounds)])
        self.queue: deque[int] = deque()
        """Who is still to be drawn in this round, in order."""
        self.rounds_left: list[int] = []
        """Which rounds are still to come before any comes again; the last is next."""

    def _begin_round(self, batch: list[int]) -> None:
        if not self.rounds_left:
            self.rounds_left = torch.randperm(len(self._rounds), generator=self._generator).tolist()
        particles = self._rounds[self.rounds_left.pop()]
        shuffled = [particles[i] for i in torch.randperm(len(particles), generator=self._generator)]
        # What this batch holds already goes to the end of the next round, so that no batch holds it twice.
        self.queue.extend(sorted(shuffled, key=batch.__contains__))

    def __next__(self) -> list[int]:
        batch: list[int] = []
        if not self.queue:
            self._begin_round(batch)
        size = self._size or len(self.queue)
        while len(batch) < size:
            if not self.queue:
                self._begin_round(batch)
            batch.append(self.queue.popleft())
        return batch


class EditRun:
    """One edit by CSD-Edit (arXiv 2307.04787, eq. 9), step by step; the caller steps along the gradient.

    Every step draws one timestep for all particles, noises the particles and their sources alike, takes the residual
    between the guided and the baseline estimate and mixes the scores with SVGD.

    Args:
        particles: what to edit.
        prompt: the instruction, e.g. "make it night", or several; see `Prompt`.

    Raises:
        ValueError: if a prompt is empty or unknown to the prior.
    """

    def __init__(self, particles: Particles, prior: Prior, prompt: Prompt, config: EditConfig) -> None:
        self._prompts = check_prompt(prompt)
        self.particles, self.prior, self.config = particles, prior, config
        self.guidance = {
            name: getattr(prior if getattr(config, name) is None else config, name)
            for name in ("guidance_scale", "image_guidance_scale")
        }
        self._text = prior.encode_text(self._prompts)
        self._generator = torch.Generator().manual_seed(config.seed)
        rounds = particles.rounds()
        together = JOINT_PARTICLES if max(map(len, rounds)) > JOINT_PARTICLES else 0
        self._batch = particles.default_batch if config.batch is None else config.batch
        self._drawn = {
            True: Batches(rounds, together, self._generator),
            False: Batches(rounds, self._batch, self._generator),
        }

    def fingerprint(self) -> str:
        """Tells edits apart by settings, prompts and sources."""
        digest = hashlib.sha256(repr((self.config, self._prompts)).encode())
        for index in self.particles.rounds()[0]:
            digest.update(self.particles.source([index]).cpu().numpy().tobytes())
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the particles' parameters to draw what it would have drawn."""
        return {
            "generator": self._generator.get_state(),
            "drawn": {phase: (list(drawn.queue), drawn.rounds_left) for phase, drawn in self._drawn.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])
        for phase, (queue, rounds_left) in state["drawn"].items():
            self._drawn[phase].queue, self._drawn[phase].rounds_left = deque(queue), rounds_left

    def loss(self, step: int) -> tuple[Float[Tensor, ""], StepInfo]:
        """A scalar whose gradient with respect to the particles is -w(t) phi, w(t) = sigma^2.

        Steps are to be asked for in order, 0 .. config.steps - 1: the phase depends on them, and what is random is
        drawn on the way.
        """
        particles, prior, config = self.particles, self.prior, self.config
        together = step < config.together * config.steps
        indices = next(self._drawn[together])
        span = (config.turn_timestep, config.max_timestep) if together else (config.min_timestep, config.turn_timestep)
        lowest, highest = (round(share * (prior.num_timesteps - 1)) for share in span)
        timestep = int(torch.randint(lowest, highest + 1, (), generator=self._generator))
        alpha, sigma = prior.alpha_sigma(timestep)

        x_0 = particles.render(indices)
        clean = x_0.detach()
        noise = particles.noise(indices, config.noise, self._generator)
        x_t = add_noise(clean, noise, alpha, sigma)
        source_t = add_noise(particles.source(indices), noise, alpha, sigma)
        stacks = [x_t, source_t, noise, particles.condition(indices)]
        shares = particles.shares(indices)
        size = self._batch or len(indices)  # moving as one takes no more memory in the prior than any other
        residual = torch.cat(
            [
                edit_residual(
                    prior,
                    *(stack[rows] for stack in stacks),
                    timestep=timestep,
                    text=self._text,
                    **self.guidance,
                    baseline=config.baseline,
                    shares=None if shares is None else shares[rows],
                )
                for rows in torch.arange(len(indices)).split(size)
            ]
        )
        direction = -residual
        if config.svgd:
            compared = x_t if config.kernel_input == "noisy" else clean
            if config.kernel_input == "low_pass":
                compared = low_pass(clean)
            transport, scale = self._mixing(indices, together)
            kernel = RBFKernel(bandwidth_scale=scale)
            direction = svgd_direction(direction, compared, kernel, config.normalize_rows, transport)
        info = StepInfo(step, timestep, indices, residual.square().mean().sqrt().item())
        return surrogate_loss(x_0, direction, weight=sigma**2), info

    def _mixing(self, indices: list[int], together: bool) -> tuple[Transport | None, float]:
        """What the scores of a step are mixed by: the transport, if one is wanted and known, and the bandwidth."""
        config = self.config
        follow = config.transport in ("both", "first" if together else "second")
        transport = self.particles.transport(indices) if follow else None
        if together:
            # Whom one shows nothing in common with must be heard too, or distant particles take different answers.
            return None if transport is None else everywhere(transport), config.bandwidth_scale_together
        if config.bandwidth_scale is not None:
            return transport, config.bandwidth_scale
        return transport, OWN_SCORE if transport is None else SAME_PLACES


class _ProgressFile:
    """State of an edit between two steps, on disk: written twice a minute, so that no more than that is ever lost."""

    SECONDS = 30.0

    def __init__(self, path: Path, run: EditRun, optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> None:
        self.path, self._run, self._optimizer, self._scheduler = path, run, optimizer, scheduler
        self._edit = run.fingerprint()
        self._saved = time.monotonic()

    def load(self) -> int:
        """Restores what the file holds; returns the step to go on with, 0 if there is no file.

        Raises:
            ValueError: if the file is of another edit or cannot be read.
        """
        if not self.path.exists():
            return 0
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            if state["edit"] != self._edit:
                raise ValueError(
                    f"{self.path} is of an edit with another prompt, other settings or other images; give what was "
                    "given then, or delete it to begin anew."
                )
            with torch.no_grad():
                for parameter, value in zip(self._run.particles.parameters(), state["parameters"], strict=True):
                    parameter.copy_(value)
            self._run.load_state_dict(state["run"])
            self._optimizer.load_state_dict(state["optimizer"])
            self._scheduler.load_state_dict(state["scheduler"])
        except (RuntimeError, UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path} cannot be read as the state of an edit; delete it to begin anew.") from error
        return state["step"]

    def step_done(self, step: int) -> None:
        if time.monotonic() - self._saved < self.SECONDS:
            return
        state = {
            "edit": self._edit,
            "step": step + 1,
            "parameters": [parameter.detach() for parameter in self._run.particles.parameters()],
            "run": self._run.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
        }
        with replacing(self.path) as temporary:
            torch.save(state, temporary)
        self._saved = time.monotonic()


def edit(
    particles: Particles,
    prior: Prior,
    prompt: Prompt,
    config: EditConfig | None = None,
    on_step: Callable[[StepInfo], bool | None] | None = None,
    progress: str | None = None,
    resume: Path | None = None,
) -> None:
    """Edits particles in place: `EditRun` with SGD. Same seed, same bits on a CPU.

    Args:
        particles: what to edit; their parameters change.
        prompt: the instruction, e.g. "make it night", or several; see `Prompt`.
        config: default `EditConfig()`.
        on_step: called after every step; the edit ends there if it returns True.
        progress: label of a progress bar with ETA; none if None.
        resume: file that keeps the state of an edit that is interrupted, by Ctrl-C or by an error. Where it is there
            the edit goes on from it, and ends as if it had never stopped; when the edit ends it is removed.

    Raises:
        ValueError: if a prompt is empty or unknown to the prior, or `resume` holds the state of another edit.
        NonFiniteError: if latents become NaN or infinite; names the step.
    """
    config = config or EditConfig()
    run = EditRun(particles, prior, prompt, config)
    optimizer = torch.optim.SGD(particles.parameters(), lr=config.lr)
    scheduler = StepLR(optimizer, config.lr_decay_every, config.lr_decay)
    progress_file = None if resume is None else _ProgressFile(resume, run, optimizer, scheduler)
    steps = range(0 if progress_file is None else progress_file.load(), config.steps)
    bar = tqdm(steps, desc=progress, disable=progress is None, unit="step", initial=steps.start, total=steps.stop)
    for step in bar:
        loss, info = run.loss(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if not all(bool(p.isfinite().all()) for p in particles.parameters()):
            raise NonFiniteError(
                f"latents are not finite after step {step + 1} of {config.steps} (timestep {info.timestep}); lower "
                f"lr (now {config.lr}) or the guidance scales (now "
                f"{' and '.join(map(str, run.guidance.values()))})."
            )
        if progress_file is not None:
            progress_file.step_done(step)
        if on_step is not None and on_step(info):
            break
    if progress_file is not None:
        progress_file.path.unlink(missing_ok=True)
