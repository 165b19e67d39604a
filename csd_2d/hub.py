"""Where weights come from: whether the Hugging Face hub can be reached, and torch.hub's cache."""

from pathlib import Path

import torch

HUB_TIMEOUT = 5.0
"""Seconds to wait for the hub's answer."""


def hub_refusal(model: str) -> Exception | None:
    """Ask the hub for a model; returns why it cannot be reached, None if it can.

    Libraries ask without a time limit, and wait for minutes behind a firewall that drops packets; without a network
    they ask six times, over 23 seconds.
    """
    import huggingface_hub

    try:
        huggingface_hub.model_info(model, timeout=HUB_TIMEOUT)
    except Exception as error:  # no network, a proxy's answer, an unknown or gated model: what is left is the cache
        return error
    return None


def in_torch_cache(file: str) -> Path:
    """Return where torch.hub keeps a file of weights, be it there or not: in hub/checkpoints below TORCH_HOME."""
    return Path(torch.hub.get_dir()) / "checkpoints" / file


def reason(error: BaseException) -> str:
    """Summarize the first cause of an error in one sentence."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].split('. ')[0].rstrip('.')}" if lines else type(error).__name__
