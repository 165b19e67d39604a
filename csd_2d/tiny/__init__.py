"""A small InstructPix2Pix that ships with the package, and the code to train and evaluate it.

`model` is an ordinary diffusers folder. `scenes` and `instructions` generate the training data, `train` is the training
recipe, and `report` measures the quality of the result.
"""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
"""Folder of the diffusers pipeline."""
GUIDANCE_SCALE, IMAGE_GUIDANCE_SCALE = 1.0, 1.0
"""Default text and image guidance scales of the prior and of the report."""
