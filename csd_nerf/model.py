"""Nerfacto, and what lets any model be built without a download."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torchvision
from nerfstudio.models.base_model import Model
from nerfstudio.models.nerfacto import NerfactoModel, NerfactoModelConfig
from torch import Tensor, nn

from csd_nerf.source_run import SceneKind

OF_ANY_EDIT = frozenset({"_target", "prompt", "download_lpips", "eval_num_rays_per_chunk", "camera_optimizer"})
"""Fields of a model, of whatever kind, that an edit does not take over from the pretrained run."""


@dataclass
class OfflineLpipsConfig:
    """LPIPS as an option."""

    download_lpips: bool = False
    """Download AlexNet's weights (about 240 MB) so that LPIPS is reported, where neither torch's cache nor the
    checkpoint has them."""


class OfflineLpips(Model):
    """Mixed into a model of nerfstudio: builds it without a download, and with its stock parameters' names and shapes.

    Stock models download AlexNet whenever they are built, to be able to report LPIPS. Here AlexNet stays zero unless
    torch's cache or a checkpoint has its weights, and a metric of zero weights is not reported.
    """

    config: Any
    lpips: nn.Module

    def populate_modules(self) -> None:
        with nullcontext() if self.config.download_lpips or _alexnet_is_cached() else _blank_alexnet():
            super().populate_modules()

    @property
    def has_lpips(self) -> bool:
        """AlexNet holds weights."""
        return any(bool(p.any()) for p in self.lpips.net.net.parameters())  # type: ignore[union-attr]

    def get_image_metrics_and_images(
        self, outputs: dict[str, Tensor], batch: dict[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        if self.has_lpips:
            return super().get_image_metrics_and_images(outputs, batch)
        lpips, self.lpips = self.lpips, _NotMeasured()
        try:
            metrics, images = super().get_image_metrics_and_images(outputs, batch)
        finally:
            self.lpips = lpips
        return {name: value for name, value in metrics.items() if not name.endswith("lpips")}, images


@dataclass
class SceneModelConfig(OfflineLpipsConfig, NerfactoModelConfig):
    """Nerfacto, with LPIPS as an option."""

    kind: ClassVar[SceneKind] = "nerfacto"
    own: ClassVar[frozenset[str]] = OF_ANY_EDIT | {"implementation", "use_proposal_weight_anneal"}
    """Fields that an edit does not take over from the pretrained run."""

    _target: type = field(default_factory=lambda: SceneModel)


class SceneModel(OfflineLpips, NerfactoModel):
    """Nerfacto: stock checkpoints load, and ours load in stock nerfacto."""


class _NotMeasured(nn.Module):
    """Stands in for LPIPS, which fails on images under about 32 px even when nobody reads it."""

    def forward(self, *_: Tensor) -> float:
        return float("nan")


def _alexnet_is_cached() -> bool:
    name = torchvision.models.AlexNet_Weights.DEFAULT.url.rpartition("/")[2]
    return (Path(torch.hub.get_dir()) / "checkpoints" / name).is_file()


@contextmanager
def _blank_alexnet() -> Iterator[None]:
    """Within the block torchvision builds AlexNet's features full of zeros, whatever weights are asked for."""
    build: Callable[..., torchvision.models.AlexNet] = torchvision.models.alexnet

    def blank(**_: object) -> torchvision.models.AlexNet:
        with torch.device("meta"):  # its classifier has 58 million parameters that nobody reads
            net = build(weights=None)
        net.features.to_empty(device="cpu")
        for parameter in net.features.parameters():
            nn.init.zeros_(parameter)
        return net

    torchvision.models.alexnet = blank
    try:
        yield
    finally:
        torchvision.models.alexnet = build
