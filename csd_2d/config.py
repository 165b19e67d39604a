"""Settings of an edit."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from csd_2d.csd import Baseline, Weight
from csd_2d.mixing import KernelInput
from csd_2d.particles import NoiseMode

MixingMode = Literal["consensus", "svgd", "none"]
"""What particles share: the change of colors and what corresponding places show; all, by a kernel, as published; or
nothing."""
Order = Literal["descending", "random"]
"""Order of the timesteps."""

_RANGES: dict[str, tuple[float, float]] = {
    "steps": (1, 10**6),
    "lr": (1e-8, 1e4),
    "lr_decay": (1e-3, 1),
    "lr_decay_every": (1, 10**6),
    "batch": (1, 10**6),
    "guidance_scale": (0, 1000),
    "image_guidance_scale": (0, 1000),
    "min_timestep": (0, 1),
    "consensus_timestep": (0, 1),
    "max_timestep": (0, 0.999),  # at 1 nothing of the image is left that a score could be of
    "bandwidth_scale": (1e-12, 1e12),
    "seed": (0, 2**40),
}
_WHOLE = {"steps", "lr_decay_every", "batch", "seed"}
_CHOICES: dict[str, tuple[object, ...]] = {
    "schedule": get_args(Order),
    "baseline": get_args(Baseline),
    "mixing": get_args(MixingMode),
    "correspondence": (True, False),
    "kernel_input": get_args(KernelInput),
    "normalize_rows": (True, False),
    "noise": get_args(NoiseMode),
    "weight": get_args(Weight),
}

_REPLACED = {
    "svgd": "mixing",
    "together": "mixing",
    "turn_timestep": "consensus_timestep",
    "consensus_bandwidth_scale": "mixing",
    "transport": "correspondence",
}


def check_replaced(name: str) -> None:
    """Refuse a setting of earlier versions: ValueError that names the one that took its place."""
    if name in _REPLACED:
        raise ValueError(f"{name} is gone; {_REPLACED[name]} took its place.")


@dataclass(frozen=True)
class EditConfig:
    """Settings of one edit; `load_preset` reads other sets of defaults."""

    steps: int = 30
    """Optimizer steps (paper: 200). Every particle takes part in each, unless `batch` says otherwise."""
    lr: float | None = None
    """Learning rate of SGD on the latents (paper: 2). Default: 12 / steps, but at most 1, so that more steps average
    over more noise and go no further; with `batch` 12 / the steps that a particle takes part in."""
    lr_decay: float | None = None
    """Factor on the learning rate every `lr_decay_every` steps (authors' code: 0.9). Default: exp(-1.5 / steps) every
    step. An edit is decided under strong noise. Under weak noise a model asks for a little more of what the image shows
    already, which large steps would add up."""
    lr_decay_every: int = 20
    """Steps between two decays of the learning rate (authors' code: 20)."""
    batch: int | None = None
    """Particles drawn at random for a step (paper: 4 of 12). Default: all, or of a canvas as many crops as cover it.
    Fewer agree less, unless `steps` is raised as well: only those of one step see each other."""
    guidance_scale: float | None = None
    """Text guidance scale omega_y. Default: the prior's."""
    image_guidance_scale: float | None = None
    """Image guidance scale omega_s. Default: the prior's."""
    schedule: Order = "descending"
    """Order of the timesteps: descending from `max_timestep` to `min_timestep`, slowly at first, or random, as
    published."""
    min_timestep: float = 0.02
    """Smallest timestep, as a share of the noise schedule (authors' code: 0.02)."""
    max_timestep: float = 0.98
    """Largest timestep, as a share of the noise schedule (authors' code: 0.5)."""
    baseline: Baseline | None = None
    """Subtracted from the guided estimate: CSD-Edit's image-conditional estimate of the noised source, the noise, or
    nothing. Default: the noise, but image for models that take no image. What a model expects of an image without an
    instruction is a mean of all edits, not the image: under strong noise that error goes into the edit."""
    mixing: MixingMode = "consensus"
    """What particles share. consensus: under strong noise all change their colors as the most typical of them does, and
    corresponding places move alike; the rest of each score stays its own. svgd: all scores, mixed by a kernel, as
    published. none: nothing."""
    consensus_timestep: float = 0.5
    """Smallest timestep of the consensus on colors, as a share of the noise schedule: weaker noise leaves no answer
    open."""
    correspondence: bool = True
    """With consensus: places of two images that show the same thing move alike, where such places are known: in the
    frames of a video (by optical flow) and the views of a scene (by depth)."""
    kernel_input: KernelInput = "clean"
    """With svgd: latents the kernel compares, x_0, or x_t as published. Independent noise hides the content of the
    images."""
    bandwidth_scale: float = 1.0
    """With svgd: factor on the median bandwidth. Large: all particles move together."""
    normalize_rows: bool = True
    """With svgd: divide kernel rows by their sum, so that step size does not depend on the number of particles."""
    noise: NoiseMode = "independent"
    """How noise is drawn in one step: a map for each particle, one for all, or crops of one map of the canvas."""
    weight: Weight = "image"
    """Units of a step: of noise, as published, or of the image. In units of the image a step takes the share lr w(t) of
    the way to the model's present estimate."""
    seed: int = 0
    """Seed of timesteps, noise and the choice of particles."""

    def __post_init__(self) -> None:
        left_out = {name for name, value in vars(self).items() if value is None and getattr(type(self), name) is None}
        for name, bounds in _RANGES.items():
            if name not in left_out:
                _check_number(name, getattr(self, name), *bounds)
        for name, choices in _CHOICES.items():
            if name not in left_out and getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {getattr(self, name)}.")
        if self.min_timestep > self.max_timestep:
            raise ValueError(
                f"min_timestep must not exceed max_timestep; got {self.min_timestep} and {self.max_timestep}."
            )

    @property
    def matches_places(self) -> bool:
        """Whether corresponding places move alike, where they are known."""
        return self.mixing == "consensus" and self.correspondence

    @property
    def learning_rate(self) -> float:
        """The learning rate, `lr` or its default where all particles take part in every step."""
        return min(12 / self.steps, 1.0) if self.lr is None else self.lr

    @property
    def decay(self) -> tuple[int, float]:
        """The number of steps from one decay of the learning rate to the next, and its factor, or their defaults."""
        return (1, math.exp(-1.5 / self.steps)) if self.lr_decay is None else (self.lr_decay_every, self.lr_decay)


def _check_number(name: str, value: object, low: float, high: float) -> None:
    whole = name in _WHOLE
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    kind = "a whole number " if whole else "" if is_number else "a number "
    if not is_number or not low <= value <= high:  # type: ignore[operator]  # NaN is not in any range
        raise ValueError(f"{name} must be {kind}from {low} to {high}, got {value!r}.")
