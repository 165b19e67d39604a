"""The training views of a splatfacto scene."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.datamanagers.full_images_datamanager import FullImageDatamanager
from nerfstudio.pipelines.base_pipeline import VanillaPipeline
from torch import Tensor

from csd_nerf.views.base import FAR, TrainingViews, replayed, without_background


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
        """Return the camera at the pose the view was trained at."""
        camera = self.cameras[index : index + 1].to(self._model.device)
        camera.metadata = {"cam_idx": index}
        # The model applies a tuned pose in train mode only.
        camera.camera_to_worlds = self._model.camera_optimizer.apply_to_camera(camera).detach()
        return camera

    @contextmanager
    def _without_viewer_settings(self) -> Iterator[None]:
        model = self._model
        crop, background = model.crop_box, model.background_color
        model.set_crop(None)
        model.set_background(self._background)
        try:
            yield
        finally:
            model.set_crop(crop)
            model.set_background(background)

    def _outputs(self, index: int) -> dict[str, Tensor]:
        """Call `SplatfactoModel.get_outputs`: `get_outputs_for_camera` has no gradient."""
        with self.undisturbed():
            return self._model.get_outputs(self._camera(index))

    @torch.no_grad()
    def render(self, index: int) -> Float[Tensor, "3 H W"]:
        return self._outputs(index)["rgb"].permute(2, 0, 1).float().cpu()

    def render_with_gradient(self, index: int) -> Float[Tensor, "3 H W"]:
        """See `TrainingViews`. Only the graph of one view is in memory."""

        def colors(index: int) -> Float[Tensor, "H W 3"]:
            return self._outputs(index)["rgb"]

        return replayed(colors, index, device=self._model.device).float().permute(2, 0, 1)

    @torch.no_grad()
    def surface(self, index: int, every: int = 1) -> Float[Tensor, "3 h w"]:
        """See `TrainingViews`: at the mean depth of a pixel's Gaussians, or far away if they cover less than half."""
        outputs, camera = self._outputs(index), self._camera(index)
        depth = outputs["depth"].where(outputs["accumulation"] >= 0.5, FAR)[..., 0].cpu()
        # A pinhole camera's, whatever the camera was: renders are undistorted. Depth is along its axis, -z.
        y, x = camera.get_image_coords().unbind(-1)
        k = camera.get_intrinsics_matrices()[0].cpu()
        points = torch.stack([(x - k[0, 2]) / k[0, 0], (k[1, 2] - y) / k[1, 1], -torch.ones_like(x)]) * depth
        rotation, position = camera.camera_to_worlds[0].cpu().split([3, 1], dim=1)
        points = torch.einsum("ij,jhw->ihw", rotation, points) + position[:, :, None]
        return points[:, every // 2 :: every, every // 2 :: every]

    def supervise(self, index: int, image: Float[Tensor, "3 H W"]) -> None:
        before = self._originals[index]
        rgb = without_background(image, self.original(index), self._unedited(index))
        if before.dtype == torch.uint8:
            rgb = (255 * rgb).round()
        self._supervision[index]["image"] = torch.cat([rgb.to(before), before[..., 3:]], dim=-1)

    def training_state(self) -> dict[str, Any]:
        """See `TrainingViews`: cameras still to be drawn, and the statistics of densification."""
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
