"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest

# As many processes as cores run tests, or start others: before torch is imported, and for all that are started.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An InstructPix2Pix pipeline with tiny random weights, as diffusers saves it."""
    from tests.tiny_pipeline import save_tiny_pipeline  # here, for it takes seconds to import diffusers

    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny_pipeline"))
