"""A small InstructPix2Pix that ships with the package, and how it was made.

`model` is an ordinary diffusers folder; `scenes` and `instructions` are what it learned from, `train` is the recipe,
`report` says what came of it.
"""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
"""Folder of the diffusers pipeline."""
GUIDANCE_SCALE, IMAGE_GUIDANCE_SCALE = 2.0, 1.0
"""Default text and image guidance of the prior and of the report."""
