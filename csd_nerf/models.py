"""Nerfacto and splatfacto, built without a download; stock checkpoints load in them, and theirs in stock models."""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torchvision
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.engine.optimizers import Optimizers
from nerfstudio.models.base_model import Model
from nerfstudio.models.nerfacto import NerfactoModel, NerfactoModelConfig
from nerfstudio.models.splatfacto import SplatfactoModel, SplatfactoModelConfig
from nerfstudio.viewer.render_state_machine import RenderStateMachine
from torch import Tensor, nn

from csd_2d.hub import in_torch_cache
from csd_nerf.source_run import SceneKind

_SET_BY_EDIT = frozenset({"_target", "prompt", "download_lpips", "eval_num_rays_per_chunk", "camera_optimizer"})
"""Fields of any model that an edit does not inherit from the pretrained run."""
LEARNED = 30000
"""The step at which splatfacto itself assumes a loaded scene to be (`SplatfactoModel.load_state_dict`)."""


@dataclass
class OfflineLpipsConfig:
    """LPIPS as an option."""

    download_lpips: bool = False
    """Download AlexNet's weights (about 240 MB) so that LPIPS is reported, where neither torch's cache nor the
    checkpoint has them."""


class OfflineLpips(Model):
    """Mixin that builds a model of nerfstudio without a download, with its stock parameters' names and shapes.

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
        """Tell whether AlexNet has weights."""
        return any(bool(p.any()) for p in self.lpips.net.net.parameters())  # type: ignore[union-attr]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the parameters; blank ones of AlexNet are left out, which other programs would take for trained."""
        state = super().state_dict(*args, **kwargs)
        if not self.has_lpips:
            prefix = kwargs.get("prefix", "") + "lpips."
            for name in [name for name in state if name.startswith(prefix)]:
                del state[name]
        return state

    def load_state_dict(self, dict: dict[str, Tensor], **kwargs: Any) -> Any:  # type: ignore[override]
        """Load parameters; where LPIPS has none, or the blank ones of earlier versions, this model's own stay."""
        if not any(bool(value.any()) for name, value in dict.items() if name.startswith("lpips.net.net.")):
            own = {f"lpips.{name}": value for name, value in self.lpips.state_dict().items()}
            dict = {name: value for name, value in dict.items() if not name.startswith("lpips.")} | own
        return super().load_state_dict(dict, **kwargs)

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


class Comparable(Model):
    """Mixin that lets nerfstudio's viewer draw another scene beside this one, for the same camera."""

    _compared: tuple[Model, float] | None = None

    def compare(self, other: Model | None, share: float = 1.0) -> None:
        """Draw another scene from now on, in a share of the picture from its left border; None: this one alone."""
        # Not a submodule, which checkpoints would hold.
        self.__dict__["_compared"] = None if other is None else (other, share)

    def get_outputs_for_camera(self, camera: Cameras, obb_box: OrientedBox | None = None) -> dict[str, Tensor]:
        """Render a camera; for the viewer, with the other scene beside this one."""
        compared = self._compared
        if compared is None or not isinstance(threading.current_thread(), RenderStateMachine):
            return super().get_outputs_for_camera(camera, obb_box)
        other, share = compared
        if isinstance(self, SplatfactoModel):
            other.set_background(self.background_color)  # type: ignore[operator]
        column = round(share * int(camera.width))
        parts = []
        if column > 0:
            parts.append(other.get_outputs_for_camera(_columns(camera, 0, column), obb_box))
        if column < int(camera.width):
            parts.append(super().get_outputs_for_camera(_columns(camera, column, int(camera.width)), obb_box))
        size = parts[-1]["rgb"].shape[:2]
        return parts[-1] | {
            name: torch.cat([part[name] for part in parts], 1)
            for name, value in parts[-1].items()
            if value.shape[:2] == size
        }


def _columns(camera: Cameras, begin: int, end: int) -> Cameras:
    """Return the camera of some columns of another's image, so that both scenes together take as long as one."""
    part = deepcopy(camera)
    part.cx, part.width = camera.cx - begin, torch.full_like(camera.width, end - begin)
    return part


@dataclass
class SceneModelConfig(OfflineLpipsConfig, NerfactoModelConfig):
    """Nerfacto, with LPIPS as an option."""

    kind: ClassVar[SceneKind] = "nerfacto"
    set_by_edit: ClassVar[frozenset[str]] = _SET_BY_EDIT | {"implementation", "use_proposal_weight_anneal"}
    """Fields that an edit does not inherit from the pretrained run."""

    _target: type = field(default_factory=lambda: SceneModel)


class SceneModel(Comparable, OfflineLpips, NerfactoModel):  # type: ignore[override]
    """Nerfacto: stock checkpoints load, and ours load in stock nerfacto.

    Without the anneal of proposal weights, which flattens those of a trained scene, nerfacto would also train its
    proposals in every step. Here they are trained in every fifth (`proposal_update_every`), as in a scene that is past
    its warm-up.
    """

    def populate_modules(self) -> None:
        super().populate_modules()
        if not self.config.use_proposal_weight_anneal:
            every = self.config.proposal_update_every
            # A function of the step alone, so that a resumed run trains them in the same steps.
            self.proposal_sampler.update_sched = lambda step: -1 if step % every == 0 else math.inf

    def get_training_callbacks(self, attributes: TrainingCallbackAttributes) -> list[TrainingCallback]:  # type: ignore[override]
        """Return nerfacto's callbacks, and one that tells the sampler of the step it does not learn of otherwise."""
        callbacks = super().get_training_callbacks(attributes)
        if not self.config.use_proposal_weight_anneal:
            before = [TrainingCallbackLocation.BEFORE_TRAIN_ITERATION]
            callbacks.append(TrainingCallback(before, self.proposal_sampler.step_cb, update_every_num_iters=1))
        return callbacks


@dataclass
class SplatModelConfig(OfflineLpipsConfig, SplatfactoModelConfig):
    """Splatfacto, with LPIPS and densification as options."""

    kind: ClassVar[SceneKind] = "splatfacto"
    set_by_edit: ClassVar[frozenset[str]] = _SET_BY_EDIT | {
        "stop_split_at",
        "reset_alpha_every",
        "num_downscales",
        "random_init",
        "num_random",
    }
    """Fields that an edit does not inherit from the pretrained run."""

    _target: type = field(default_factory=lambda: SplatModel)
    stop_split_at: int = 0
    """Step of the edit up to which Gaussians are split and culled (splatfacto: 15000). 0: they stay as many as they
    are. Dataset update only."""
    reset_alpha_every: int = 1_000_000
    """In steps of refinement (splatfacto: 30). As good as never: a reset would show in the edited views."""
    num_downscales: int = 0
    """The scene was already trained on its images in full size."""
    random_init: bool = True
    """The checkpoint's Gaussians replace those that the model starts with, and the data's points."""
    num_random: int = 1000
    """Gaussians before the checkpoint is loaded."""


class SplatModel(Comparable, OfflineLpips, SplatfactoModel):  # type: ignore[override]
    """Splatfacto: stock checkpoints load, and ours load in stock splatfacto.

    Its schedules continue where a loaded scene left them, with all degrees of spherical harmonics: step 0 of the
    trainer is splatfacto's step `LEARNED`.
    """

    config: SplatModelConfig  # type: ignore[assignment]

    def populate_modules(self) -> None:
        super().populate_modules()
        if self.config.stop_split_at:
            self.strategy.refine_start_iter += LEARNED
            self.strategy.refine_stop_iter += LEARNED

    def load_state_dict(self, dict: dict[str, Tensor], **kwargs: Any) -> None:  # type: ignore[override]
        parameters = [*self.gauss_params.items()]
        try:
            super().load_state_dict(dict, **kwargs)
        finally:  # also if it is strict and fails: the pipeline then tries again
            # Optimizers, which were built before, do not know the parameters that splatfacto makes here.
            for name, parameter in parameters:
                parameter.data = self.gauss_params[name].data
                self.gauss_params[name] = parameter

    def step_cb(self, optimizers: Optimizers, step: int) -> None:
        super().step_cb(optimizers, LEARNED + step)

    def step_post_backward(self, step: int) -> None:
        super().step_post_backward(LEARNED + step)


class _NotMeasured(nn.Module):
    """Placeholder for LPIPS, which fails on images under about 32 px even when nobody reads it."""

    def forward(self, *_: Tensor) -> float:
        return float("nan")


def _alexnet_is_cached() -> bool:
    return in_torch_cache(torchvision.models.AlexNet_Weights.DEFAULT.url.rpartition("/")[2]).is_file()


@contextmanager
def _blank_alexnet() -> Iterator[None]:
    """Let torchvision build AlexNet's features full of zeros inside, whatever weights are asked for."""
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
