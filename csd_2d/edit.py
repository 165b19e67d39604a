"""The one optimisation loop: panorama, video and 3D scenes all run it."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args

import torch
import yaml
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from csd_2d.csd import Baseline, add_noise, edit_residual, surrogate_loss, svgd_direction
from csd_2d.errors import NonFiniteError
from csd_2d.kernels import RBFKernel
from csd_2d.particles import NoiseMode, Particles
from csd_2d.priors import Prior

JOINT_PARTICLES = 256
"""Most particles that move as one: what is mixed at once is held in memory at once."""


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
    """Particles drawn for a step of the second phase; 0 takes all of them. Default: a third (paper: 4 of 12 crops), but
    8 at least. Fewer make a step cheaper, and leave each particle fewer steps to change in."""
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
    kernel_input: Literal["clean", "noisy"] = "clean"
    """Latents the kernel compares: x_0, or x_t as published. Independent noise hides what the images show."""
    noise: NoiseMode = "independent"
    """Noise of the particles in one step."""
    bandwidth_scale_together: float = 1000.0
    """Factor on the median bandwidth in the first phase. Large: all particles move as one."""
    bandwidth_scale: float = 0.01
    """Factor on the median bandwidth in the second phase. Small: each particle follows its own score."""
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
            if value is None and name in ("batch", "guidance_scale", "image_guidance_scale"):
                continue
            kind = int if name == "batch" or isinstance(getattr(type(self), name), int) else int | float
            if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:  # NaN, too
                whole = "a whole number " if kind is int else ""
                raise ValueError(f"{name} must be {whole}from {low} to {high}, got {value}.")
        for name, choices in (
            ("baseline", get_args(Baseline)),
            ("kernel_input", ("clean", "noisy")),
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


def check_prompt(prompt: str) -> None:
    """Raises ValueError if the prompt is empty."""
    if not prompt.strip():
        raise ValueError("prompt is empty; say what to change, e.g. 'make it night'.")


def batches(total: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Random batches without end; every particle is drawn equally often, to within one."""
    size = min(size or total, total)
    queue: deque[int] = deque()
    while True:
        batch: list[int] = []
        while len(batch) < size:
            if not queue:
                shuffled = torch.randperm(total, generator=generator).tolist()
                # What this batch holds already goes to the end of the next round, so that no batch holds it twice.
                queue.extend(sorted(shuffled, key=batch.__contains__))
            batch.append(queue.popleft())
        yield batch


class EditRun:
    """One edit by CSD-Edit (arXiv 2307.04787, eq. 9), step by step; the caller steps along the gradient.

    Every step draws one timestep for all particles, noises the particles and their sources alike, takes the residual
    between the guided and the baseline estimate and mixes the scores with SVGD.

    Args:
        particles: what to edit.
        prompt: the instruction, e.g. "make it night".

    Raises:
        ValueError: if the prompt is empty or unknown to the prior.
    """

    def __init__(self, particles: Particles, prior: Prior, prompt: str, config: EditConfig) -> None:
        check_prompt(prompt)
        self.particles, self.prior, self.config = particles, prior, config
        self.guidance = {
            name: getattr(prior if getattr(config, name) is None else config, name)
            for name in ("guidance_scale", "image_guidance_scale")
        }
        self._text = prior.encode_text(prompt)
        self._generator = torch.Generator().manual_seed(config.seed)
        total = len(particles)
        self._batch = max(8, -(-total // 3)) if config.batch is None else config.batch
        self._drawn = {
            True: batches(total, JOINT_PARTICLES, self._generator),
            False: batches(total, self._batch, self._generator),
        }

    def loss(self, step: int) -> tuple[Float[Tensor, ""], StepInfo]:
        """A scalar whose gradient with respect to the particles is -w(t) phi, w(t) = sigma^2.

        Steps are to be asked for in order, 0 .. config.steps - 1: the phase depends on them, and what is random is
        drawn on the way.
        """
        particles, prior, config = self.particles, self.prior, self.config
        together = step < config.together * config.steps
        indices = next(self._drawn[together])
        shares = (
            (config.turn_timestep, config.max_timestep) if together else (config.min_timestep, config.turn_timestep)
        )
        lowest, highest = (round(share * (prior.num_timesteps - 1)) for share in shares)
        timestep = int(torch.randint(lowest, highest + 1, (), generator=self._generator))
        alpha, sigma = prior.alpha_sigma(timestep)

        x_0 = particles.render(indices)
        clean = x_0.detach()
        noise = particles.noise(indices, config.noise, self._generator)
        x_t = add_noise(clean, noise, alpha, sigma)
        source_t = add_noise(particles.source(indices), noise, alpha, sigma)
        condition = particles.condition(indices)
        size = self._batch or len(indices)  # moving as one takes no more memory in the prior than any other
        residual = torch.cat(
            [
                edit_residual(
                    prior, *rows, timestep=timestep, text=self._text, **self.guidance, baseline=config.baseline
                )
                for rows in zip(*(stack.split(size) for stack in (x_t, source_t, noise, condition)), strict=True)
            ]
        )
        direction = -residual
        if config.svgd:
            kernel = RBFKernel(bandwidth_scale=config.bandwidth_scale_together if together else config.bandwidth_scale)
            compared = clean if config.kernel_input == "clean" else x_t
            direction = svgd_direction(direction, compared, kernel, config.normalize_rows)
        info = StepInfo(step, timestep, indices, residual.square().mean().sqrt().item())
        return surrogate_loss(x_0, direction, weight=sigma**2), info


def edit(
    particles: Particles,
    prior: Prior,
    prompt: str,
    config: EditConfig | None = None,
    on_step: Callable[[StepInfo], None] | None = None,
    progress: str | None = None,
) -> None:
    """Edits particles in place: `EditRun` with SGD. Same seed, same bits on a CPU.

    Args:
        particles: what to edit; their parameters change.
        prompt: the instruction, e.g. "make it night".
        config: default `EditConfig()`.
        on_step: called after every step.
        progress: label of a progress bar with ETA; none if None.

    Raises:
        ValueError: if the prompt is empty or unknown to the prior.
        NonFiniteError: if latents become NaN or infinite; names the step.
    """
    config = config or EditConfig()
    run = EditRun(particles, prior, prompt, config)
    optimizer = torch.optim.SGD(particles.parameters(), lr=config.lr)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, config.lr_decay_every, config.lr_decay)
    for step in tqdm(range(config.steps), desc=progress, disable=progress is None, unit="step"):
        loss, info = run.loss(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if not all(bool(p.isfinite().all()) for p in particles.parameters()):
            raise NonFiniteError(
                f"latents are not finite after step {step + 1} of {config.steps} (timestep {info.timestep}); lower lr "
                f"(now {config.lr}) or the guidance scales (now {' and '.join(map(str, run.guidance.values()))})."
            )
        if on_step is not None:
            on_step(info)
