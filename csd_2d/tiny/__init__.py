"""A small InstructPix2Pix that ships with the package, and how it was made.

`model` is an ordinary diffusers folder; `scenes` and `instructions` are what it learned from, `train` is the recipe,
`report` says what came of it.
"""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
"""Folder of the diffusers pipeline."""
GUIDANCE_SCALE = 1.0
IMAGE_GUIDANCE_SCALE = 1.0
