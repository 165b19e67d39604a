"""Collaborative Score Distillation: edit a set of images together, from one sentence."""

from csd_2d.api import CsdPanoramaPipeline, CsdVideoPipeline
from csd_2d.csd import add_noise, edit_residual, guidance_weights, surrogate_loss, svgd_direction
from csd_2d.edit import EditConfig, StepInfo, edit, load_preset
from csd_2d.errors import NonFiniteError
from csd_2d.kernels import Kernel, KernelMatrix, RBFKernel
from csd_2d.particles import CanvasCrops, LatentStack, Particles
from csd_2d.priors import Prior, load_prior

__all__ = [
    "CanvasCrops",
    "CsdPanoramaPipeline",
    "CsdVideoPipeline",
    "EditConfig",
    "Kernel",
    "KernelMatrix",
    "LatentStack",
    "NonFiniteError",
    "Particles",
    "Prior",
    "RBFKernel",
    "StepInfo",
    "add_noise",
    "edit",
    "edit_residual",
    "guidance_weights",
    "load_preset",
    "load_prior",
    "surrogate_loss",
    "svgd_direction",
]
