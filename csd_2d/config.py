"""Settings of an edit."""

from dataclasses import dataclass
from typing import Literal, get_args

from csd_2d.csd import Baseline, Weight
from csd_2d.mixing import KernelInput
from csd_2d.particles import NoiseMode

RENAMED = {
    "together": "consensus_fraction",
    "turn_timestep": "phase_boundary",
    "bandwidth_scale_together": "consensus_bandwidth_scale",
}
"""Settings of version 0.1 and their present names; the old ones still work on the command line and in presets."""


@dataclass(frozen=True)
class EditConfig:
    """Settings of one edit; `load_preset` reads other sets of defaults."""

    steps: int = 200
    """Optimizer steps (paper: 200)."""
    lr: float = 1.0
    """Learning rate of SGD on the latents."""
    lr_decay: float = 0.9
    """Factor on the learning rate every `lr_decay_every` steps (authors' code: 0.9)."""
    lr_decay_every: int = 20
    """Steps between two decays of the learning rate (authors' code: 20)."""
    consensus_fraction: float = 0.8
    """Share of the steps that make the first phase, consensus. In it all particles move together (if they do not fit
    in memory, as many at a time as do), under noise that leaves the answer open. In the second phase, refinement, each
    follows its own score, under noise too weak to change the answer. 0: no first phase, as published."""
    batch: int | None = None
    """Particles drawn for a step of the second phase; 0 takes all of them. Default: a third of the frames or views, but
    8 at least (paper: 4 of 12 crops); of a canvas as many crops as cover it. Fewer make a step cheaper, but each
    particle then takes part in fewer steps."""
    guidance_scale: float | None = None
    """Text guidance scale omega_y. Default: the prior's."""
    image_guidance_scale: float | None = None
    """Image guidance scale omega_s. Default: the prior's."""
    schedule: Literal["random", "descending"] = "random"
    """How timesteps are drawn from a phase's range: at random, as published, or descending from the largest."""
    min_timestep: float = 0.02
    """Smallest timestep, as a share of the noise schedule (authors' code: 0.02)."""
    phase_boundary: float = 0.5
    """Largest timestep of the second phase and smallest of the first, as a share of the noise schedule (paper: 0.5)."""
    max_timestep: float = 0.98
    """Largest timestep of the first phase, as a share of the noise schedule."""
    baseline: Baseline = "image"
    """Subtracted from the guided estimate: CSD-Edit's image-conditional estimate, SDS's noise, or nothing."""
    svgd: bool = True
    """Mix the particles' scores by the kernel. Off: every particle follows its own score."""
    consensus: Literal["mean", "color"] = "mean"
    """What particles share in the first phase: the mean of their scores, pixel by pixel, or the change of colors of the
    most typical one, while all else stays each one's own."""
    kernel_input: KernelInput = "clean"
    """Latents the kernel compares: x_0, x_0 without detail (`low_pass`), or x_t as published. Independent noise hides
    the content of the images."""
    transport: Literal["off", "first", "second", "both"] = "off"
    """Phases in which scores are mixed between corresponding places instead of equal pixels, where correspondences are
    known: between frames of a video (optical flow) and crops of a panorama. Makes a video flicker less."""
    noise: NoiseMode = "independent"
    """How noise is drawn in one step: a map for each particle, one for all, or crops of one map of the canvas."""
    consensus_bandwidth_scale: float = 1000.0
    """Factor on the median bandwidth in the first phase. Large: all particles move together."""
    bandwidth_scale: float | None = None
    """Factor on the median bandwidth in the second phase. None: 0.01, so small that each particle follows its own
    score; 10 where corresponding places are mixed."""
    weight: Weight = "noise"
    """Units of a step: of noise, as published, or of the image. In units of the image a step takes the share lr w(t) of
    the way to the model's present estimate."""
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
            ("consensus_fraction", 0, 1),
            ("min_timestep", 0, 1),
            ("phase_boundary", 0, 1),
            ("max_timestep", 0, 1),
            ("bandwidth_scale", 1e-12, 1e12),
            ("consensus_bandwidth_scale", 1e-12, 1e12),
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
            ("kernel_input", get_args(KernelInput)),
            ("transport", ("off", "first", "second", "both")),
            ("noise", get_args(NoiseMode)),
            ("schedule", ("random", "descending")),
            ("consensus", ("mean", "color")),
            ("weight", get_args(Weight)),
            ("svgd", (True, False)),
            ("normalize_rows", (True, False)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {getattr(self, name)}.")
        timesteps = (self.min_timestep, self.phase_boundary, self.max_timestep)
        if sorted(timesteps) != list(timesteps):
            raise ValueError(
                "min_timestep must not exceed phase_boundary, nor that max_timestep; "
                f"got {', '.join(map(str, timesteps))}."
            )
