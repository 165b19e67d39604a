"""The one optimisation loop: panorama, video and 3D scenes all run it."""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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

from csd_2d import ranks
from csd_2d.csd import Baseline, add_noise, edit_residual, surrogate_loss, svgd_direction
from csd_2d.errors import NonFiniteError
from csd_2d.files import replacing
from csd_2d.kernels import RBFKernel, low_pass
from csd_2d.particles import NoiseMode, Particles
from csd_2d.priors import Prior
from csd_2d.transport import Transport, everywhere

MIXED_NUMBERS = 2**23
"""Most latent numbers a step takes, 32 MiB: what is mixed at once is held in memory at once, several times over. It is
what 512 particles of 512 px have in Stable Diffusion."""

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
    together: float = 0.8
    """Share of the steps that make the first phase. In it all particles move as one (of those that do not fit
    the memory, as many at a time as do), under noise that leaves the answer open; in the second each follows its own
    score, under noise too weak to change the answer. 0: no first phase, as published."""
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
    """Phases in which the changes that scores ask for are moved to where the receiver shows the same thing before they
    are mixed, as far as that is known: between frames of a video (optical flow) and crops of a panorama. Makes a video
    flicker less."""
    noise: NoiseMode = "independent"
    """Noise of the particles in one step."""
    bandwidth_scale_together: float = 1000.0
    """Factor on the median bandwidth in the first phase. Large: all particles move as one."""
    bandwidth_scale: float | None = None
    """Factor on the median bandwidth in the second phase. None: 0.01, so small that each particle follows its own
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


def load_preset(name: str, defaults: EditConfig | None = None) -> EditConfig:
    """Settings by the name of a preset in `configs/`, or from a YAML file of one's own.

    A preset holds only what differs from the defaults (`EditConfig()` if None). `paper` is eq. 9 as the authors run it,
    without their scripts' defects. What it says under `scene` is for the edit of a 3D scene, see `preset_of_scene`.

    Raises:
        ValueError: if there is no such preset or file, or it holds an unknown setting or a value out of range.

    Example:
        >>> load_preset("paper").kernel_input
        'noisy'
    """
    settings = _read_preset(name)
    settings.pop("scene", None)
    try:
        return replace(defaults or EditConfig(), **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"preset {name} cannot be used: {error}") from error


def preset_of_scene(name: str) -> dict[str, Any]:
    """What a preset says of the edit of a 3D scene: settings of `csd_nerf`, by name. Raises as `load_preset`."""
    settings = _read_preset(name).get("scene", {})
    if not isinstance(settings, dict):
        raise ValueError(f"preset {name} cannot be used: scene must hold settings, got {settings}.")
    return settings


def _read_preset(name: str) -> dict[str, Any]:
    if name == "default":
        return {}
    source = Path(name) if name.endswith((".yaml", ".yml")) else files("csd_presets") / f"{name}.yaml"
    if not source.is_file():
        raise ValueError(f"unknown preset '{name}'; expected {', '.join(preset_names())} or a .yaml file.")
    try:
        return dict(yaml.safe_load(source.read_text()) or {})
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
        most, longest = max(1, MIXED_NUMBERS // ranks.numbers(particles)), max(map(len, rounds))
        batch = min((particles.default_batch if config.batch is None else config.batch) or longest, most)
        # Moving as one takes no more memory in the prior than any other step, whose rows are several a particle.
        self._at_once = min(batch, max(1, most // 16))
        self._drawn = {
            True: Batches(rounds, 0 if longest <= most else most, self._generator),
            False: Batches(rounds, 0 if longest <= batch else batch, self._generator),
        }

    def fingerprint(self) -> str:
        """Tells edits apart by settings, prompts and prior; not by what is edited."""
        digest = hashlib.sha256(repr((self.config, self._prompts, self.guidance, type(self.prior).__name__)).encode())
        # Models of one family differ in how they read a prompt; the analytic prior reads it as a list of functions.
        for part in self._text if isinstance(self._text, tuple) else [self._text]:
            if isinstance(part, Tensor):
                digest.update(part.float().cpu().numpy().tobytes())
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

        With several processes of this process's share of the step's particles; see `csd_2d.ranks.sum_gradients`.

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

        division = ranks.Division(particles, indices)
        x_0 = division.of_mine(particles.render)
        clean = x_0.detach()
        noise = particles.noise(indices, config.noise, self._generator)[division.mine]
        mine = [indices[row] for row in division.mine]
        residual = division.gather(self._residual(mine, clean, noise, timestep))
        direction = -residual
        if config.svgd:
            compared = clean
            if config.kernel_input != "clean":
                compared = (
                    low_pass(clean) if config.kernel_input == "low_pass" else add_noise(clean, noise, alpha, sigma)
                )
            transport, scale = self._mixing(indices, together)
            changes = None
            if transport is not None:
                # A score s of x_t = alpha x_0 + sigma noise points at x_0 + sigma / alpha s.
                changes = division.gather(alpha / sigma * (clean - division.of_mine(particles.source)))
            direction = svgd_direction(
                direction,
                division.gather(compared),
                RBFKernel(bandwidth_scale=scale),
                config.normalize_rows,
                transport,
                division.mine,
                changes,
            )
        else:
            direction = direction[division.mine]
        info = StepInfo(step, timestep, indices, residual.square().mean().sqrt().item())
        return surrogate_loss(x_0, direction, weight=sigma**2), info

    def _residual(
        self, indices: list[int], x_0: Float[Tensor, "n c h w"], noise: Float[Tensor, "n c h w"], timestep: int
    ) -> Float[Tensor, "n c h w"]:
        """`edit_residual` of some particles, as many at a time as the prior may see."""
        particles, prior = self.particles, self.prior
        alpha, sigma = prior.alpha_sigma(timestep)
        parts = [x_0[:0]]  # of images of their own a process may hold none of those drawn
        for start in range(0, len(indices), self._at_once):
            rows = slice(start, start + self._at_once)
            drawn = indices[rows]
            residual = edit_residual(
                prior,
                add_noise(x_0[rows], noise[rows], alpha, sigma),
                add_noise(particles.source(drawn), noise[rows], alpha, sigma),
                noise[rows],
                particles.condition(drawn),
                timestep=timestep,
                text=self._text,
                **self.guidance,
                baseline=self.config.baseline,
                shares=particles.shares(drawn),
            )
            parts.append(residual)
        return torch.cat(parts)

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
    """State of an edit on disk: written twice a minute, so that no more than that is ever lost, and at the end."""

    SECONDS = 30.0

    def __init__(self, path: Path, run: EditRun, optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> None:
        self.path, self._run, self._optimizer, self._scheduler = path, run, optimizer, scheduler
        self._edit = [run.fingerprint(), *ranks.digests(run.particles)]
        self._step, self._saved = 0, time.monotonic()

    def load(self) -> int:
        """Restores what the file holds; returns the step to go on with, 0 if there is no file.

        Raises:
            ValueError: if the file is of another edit or cannot be read, or not all processes have it.
        """
        self._step = self._read() if self.path.exists() else 0
        if len({*ranks.of_each(self._step)}) > 1:
            raise ValueError(f"{self.path} must lie where all processes can read it; here it is at step {self._step}.")
        return self._step

    def _read(self) -> int:
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            if state["edit"] != self._edit:
                raise ValueError(
                    f"{self.path} is of an edit with another prompt, other settings, masks or images; give what was "
                    "given then, or delete it to begin anew."
                )
            ranks.load_parameters(self._run.particles, state["parameters"])
            self._run.load_state_dict(state["run"])
            self._optimizer.param_groups[0]["lr"] = state["lr"]  # SGD keeps nothing else
            self._scheduler.load_state_dict(state["scheduler"])
        except (RuntimeError, UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path} cannot be read as the state of an edit; delete it to begin anew.") from error
        return state["step"]

    def step_done(self, step: int) -> None:
        self._step = step + 1
        # The first process's clock counts.
        if ranks.of_each(time.monotonic() - self._saved >= self.SECONDS)[0]:
            self.save()

    def save(self) -> None:
        parameters = ranks.whole_parameters(self._run.particles)
        self._saved = time.monotonic()
        if ranks.rank() == 0:
            self._write(parameters)

    def _write(self, parameters: list[Tensor]) -> None:
        state = {
            "edit": self._edit,
            "step": self._step,
            "parameters": parameters,
            "run": self._run.state_dict(),
            "lr": self._optimizer.param_groups[0]["lr"],
            "scheduler": self._scheduler.state_dict(),
        }
        with replacing(self.path) as temporary:
            torch.save(state, temporary)


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

    Several processes work on one edit inside `csd_2d.ranks.joined`.

    Args:
        particles: what to edit; their parameters change.
        prompt: the instruction, e.g. "make it night", or several; see `Prompt`.
        config: default `EditConfig()`.
        on_step: called after every step; the edit ends there if it returns True.
        progress: label of a progress bar with ETA; none if None.
        resume: file that keeps the state of the edit, should it be interrupted, by Ctrl-C or by an error. Where it is
            there the edit goes on from it, and ends as if it had never stopped; the number of processes may be another
            one then. It is written at the end, too, and for the caller to delete once the result is safe.

    Raises:
        ValueError: if a prompt is empty or unknown to the prior, or `resume` holds the state of another edit.
        NonFiniteError: if latents become NaN or infinite; names the step.
        LostRankError: if another process ends.
    """
    config = config or EditConfig()
    run = EditRun(particles, prior, prompt, config)
    optimizer = torch.optim.SGD(particles.parameters(), lr=config.lr)
    scheduler = StepLR(optimizer, config.lr_decay_every, config.lr_decay)
    progress_file = None if resume is None else _ProgressFile(resume, run, optimizer, scheduler)
    steps = range(0 if progress_file is None else progress_file.load(), config.steps)
    silent = progress is None or ranks.rank() > 0
    bar = tqdm(steps, desc=progress, disable=silent, unit="step", initial=steps.start, total=steps.stop)
    for step in bar:
        loss, info = run.loss(step)
        optimizer.zero_grad()
        loss.backward()
        ranks.sum_gradients(particles)
        optimizer.step()
        scheduler.step()
        # What was not drawn has no gradient and is what it was.
        finite = all(bool(p.isfinite().all()) for p in particles.parameters() if p.grad is not None)
        if not all(ranks.of_each(finite)):
            raise NonFiniteError(
                f"latents are not finite after step {step + 1} of {config.steps} (timestep {info.timestep}); lower "
                f"lr (now {config.lr}) or the guidance scales (now "
                f"{' and '.join(map(str, run.guidance.values()))})."
            )
        if progress_file is not None:
            progress_file.step_done(step)
        if on_step is not None and any(ranks.of_each(bool(on_step(info)))):
            break
    if progress_file is not None:
        progress_file.save()
