"""Collaborative Score Distillation: edit a set of images together, from one sentence.

The loop over an edit is `csd_2d.edit.edit`; `Edit` is the same edit step by step.
"""

from csd_2d.api import CsdPanoramaPipeline, CsdVideoPipeline
from csd_2d.canvas import CanvasCrops
from csd_2d.config import EditConfig
from csd_2d.csd import Mixing, NoisedParticles, Step, add_noise, edit_residual, guidance_weights, surrogate_loss
from csd_2d.edit import Edit
from csd_2d.errors import NonFiniteError
from csd_2d.image_set import ImageStack
from csd_2d.kernels import Kernel, KernelMatrix, RBFKernel
from csd_2d.latents import LatentStack
from csd_2d.loss import EditLoss
from csd_2d.mixing import SVGD, svgd_direction
from csd_2d.particles import Layout, Particles
from csd_2d.presets import load_preset
from csd_2d.prior import Prior
from csd_2d.priors.loading import load_prior

__all__ = [
    "SVGD",
    "CanvasCrops",
    "CsdPanoramaPipeline",
    "CsdVideoPipeline",
    "Edit",
    "EditConfig",
    "EditLoss",
    "ImageStack",
    "Kernel",
    "KernelMatrix",
    "LatentStack",
    "Layout",
    "Mixing",
    "NoisedParticles",
    "NonFiniteError",
    "Particles",
    "Prior",
    "RBFKernel",
    "Step",
    "add_noise",
    "edit_residual",
    "guidance_weights",
    "load_preset",
    "load_prior",
    "surrogate_loss",
    "svgd_direction",
]
