"""Scenes of Gaussian splats: splatfacto under edit, and its training views."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.datamanagers.full_images_datamanager import FullImageDatamanager
from nerfstudio.engine.optimizers import Optimizers
from nerfstudio.models.splatfacto import SplatfactoModel, SplatfactoModelConfig
from nerfstudio.pipelines.base_pipeline import VanillaPipeline
from torch import Tensor

from csd_nerf.model import OF_ANY_EDIT, OfflineLpips, OfflineLpipsConfig
from csd_nerf.scene import TrainingViews, replayed, without_background
from csd_nerf.source_run import SceneKind

LEARNED = 30000
"""The step at which splatfacto itself believes a loaded scene to be (`SplatfactoModel.load_state_dict`)."""
FAR = 1e10
"""Depth of what shows nothing: splatfacto's far plane."""


@dataclass
class SplatModelConfig(OfflineLpipsConfig, SplatfactoModelConfig):
    """Splatfacto, with LPIPS and densification as options."""

    kind: ClassVar[SceneKind] = "splatfacto"
    own: ClassVar[frozenset[str]] = OF_ANY_EDIT | {
        "stop_split_at",
        "reset_alpha_every",
        "num_downscales",
        "random_init",
        "num_random",
    }
    """Fields that an edit does not take over from the pretrained run."""

    _target: type = field(default_factory=lambda: SplatModel)
    stop_split_at: int = 0
    """Step of the edit up to which Gaussians are split and culled (splatfacto: 15000). 0: they stay as many as they
    are. Dataset update only."""
    reset_alpha_every: int = 1_000_000
    """In steps of refinement (splatfacto: 30). A reset would show in the views that are edited: as good as never."""
    num_downscales: int = 0
    """The scene has seen its images in full size."""
    random_init: bool = True
    """The checkpoint's Gaussians take the place of any that the model starts with, and of the data's points."""
    num_random: int = 1000
    """Gaussians before the checkpoint is loaded."""


class SplatModel(OfflineLpips, SplatfactoModel):
    """Splatfacto: stock checkpoints load, and ours load in stock splatfacto.

    Its schedules go on where a loaded scene has left them, with all degrees of spherical harmonics: the trainer's
    step 0 is splatfacto's step `LEARNED`.
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
            # Those that splatfacto made, of the checkpoint's size, are unknown to optimisers, which are built before.
            for name, parameter in parameters:
                parameter.data = self.gauss_params[name].data
                self.gauss_params[name] = parameter

    def step_cb(self, optimizers: Optimizers, step: int) -> None:
        super().step_cb(optimizers, LEARNED + step)

    def step_post_backward(self, step: int) -> None:
        super().step_post_backward(LEARNED + step)


class SplatViews(TrainingViews):
    """The training views of a splatfacto pipeline.

    Where cameras are distorted, a view is the undistorted image that splatfacto learns.
    """

    def __init__(self, pipeline: VanillaPipeline) -> None:
        datamanager: FullImageDatamanager = pipeline.datamanager  # type: ignore[assignment]
        self._supervision = datamanager.cached_train  # loads the images, and undistorts the cameras with them
        super().__init__(pipeline.model, datamanager.train_dataset, datamanager.train_cameras)
        self._datamanager = datamanager
        self._originals: list[Tensor] = [view["image"] for view in self._supervision]
        self._background = self._model.background_color.detach().cpu()

    def _unedited(self, index: int) -> Float[Tensor, "H W c"]:
        image = self._originals[index].cpu()
        return image / 255 if image.dtype == torch.uint8 else image

    def original(self, index: int) -> Float[Tensor, "3 H W"]:
        return self._model.composite_with_background(self._unedited(index), self._background).permute(2, 0, 1)

    def _camera(self, index: int) -> Cameras:
        """From the pose the view was trained at."""
        camera = self.cameras[index : index + 1].to(self._model.device)
        camera.metadata = {"cam_idx": index}
        # The model applies a tuned pose in train mode only.
        camera.camera_to_worlds = self._model.camera_optimizer.apply_to_camera(camera).detach()
        return camera

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """See `TrainingViews`: a viewer sets crop and background."""
        model = self._model
        crop, background = model.crop_box, model.background_color
        model.set_crop(None)
        model.set_background(self._background)
        try:
            with super().undisturbed():
                yield
        finally:
            model.set_crop(crop)
            model.set_background(background)

    def _outputs(self, index: int) -> dict[str, Tensor]:
        """Of `SplatfactoModel.get_outputs`: `get_outputs_for_camera` has no gradient."""
        with self.undisturbed():
            return self._model.get_outputs(self._camera(index))

    @torch.no_grad()
    def render(self, index: int) -> Float[Tensor, "3 H W"]:
        return self._outputs(index)["rgb"].permute(2, 0, 1).float().cpu()

    def render_with_gradient(self, index: int) -> Float[Tensor, "3 H W"]:
        """See `TrainingViews`. The graph of one view at a time is in memory."""

        def colors(index: int) -> Float[Tensor, "H W 3"]:
            return self._outputs(index)["rgb"]

        return replayed(colors, index, device=self._model.device).float().permute(2, 0, 1)

    @torch.no_grad()
    def surface(self, index: int) -> Float[Tensor, "3 H W"]:
        """See `TrainingViews`: at the mean depth of a pixel's Gaussians, or far away if they hide less than half."""
        outputs, camera = self._outputs(index), self._camera(index)
        depth = outputs["depth"].where(outputs["accumulation"] >= 0.5, FAR)[..., 0].cpu()
        # A pinhole's, whatever the camera was: what is rendered is undistorted. Depth is along its axis, -z.
        y, x = camera.get_image_coords().unbind(-1)
        k = camera.get_intrinsics_matrices()[0].cpu()
        points = torch.stack([(x - k[0, 2]) / k[0, 0], (k[1, 2] - y) / k[1, 1], -torch.ones_like(x)]) * depth
        rotation, position = camera.camera_to_worlds[0].cpu().split([3, 1], dim=1)
        return torch.einsum("ij,jhw->ihw", rotation, points) + position[:, :, None]

    def supervise(self, index: int, image: Float[Tensor, "3 H W"]) -> None:
        before = self._originals[index]
        rgb = without_background(image, self.original(index), self._unedited(index))
        if before.dtype == torch.uint8:
            rgb = (255 * rgb).round()
        self._supervision[index]["image"] = torch.cat([rgb.to(before), before[..., 3:]], dim=-1)

    def training_state(self) -> dict[str, Any]:
        """See `TrainingViews`; which cameras are still to be drawn, and what densification has counted."""
        data = self._datamanager
        return {
            "unseen": data.train_unseen_cameras,
            "draw": data.random_generator.getstate(),
            "densification": self._model.strategy_state,
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        data = self._datamanager
        data.train_unseen_cameras = state["unseen"]
        data.random_generator.setstate(state["draw"])
        self._model.strategy_state = {
            name: value.to(self._model.device) if isinstance(value, Tensor) else value
            for name, value in state["densification"].items()
        }
