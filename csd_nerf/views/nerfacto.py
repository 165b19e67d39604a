"""The training views of a nerfacto scene."""

import torch
from jaxtyping import Float
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManager
from nerfstudio.pipelines.base_pipeline import VanillaPipeline
from torch import Tensor

from csd_nerf.views.base import TrainingViews, replayed, without_background


class NerfactoViews(TrainingViews):
    """The training views of a nerfacto pipeline.

    Raises:
        ValueError: if the data manager does not hold all training images in memory.
    """

    def __init__(self, pipeline: VanillaPipeline) -> None:
        datamanager = pipeline.datamanager
        loader = getattr(datamanager, "train_image_dataloader", None)
        if not isinstance(datamanager, VanillaDataManager) or loader is None or not loader.cache_all_images:
            raise ValueError(
                "editing needs all training images in memory; leave "
                "--pipeline.datamanager.train-num-images-to-sample-from at -1."
            )
        super().__init__(pipeline.model, datamanager.train_dataset, datamanager.train_ray_generator.cameras)
        # One tensor, or a list where sizes differ; `row[i]` is the place of view i in it.
        self._supervision: Tensor | list[Tensor] = loader.cached_collated_batch["image"]
        self._row = {int(view): row for row, view in enumerate(loader.cached_collated_batch["image_idx"])}

    def original(self, index: int) -> Float[Tensor, "3 H W"]:
        return self._on_background(self._unedited(index))

    def _unedited(self, index: int) -> Float[Tensor, "H W c"]:
        return self._dataset[index]["image"]

    def _on_background(self, image: Float[Tensor, "H W c"]) -> Float[Tensor, "3 H W"]:
        with self._turn():  # a viewer sets another background, in all models, while it renders a crop
            return self._model.renderer_rgb.blend_background(image).permute(2, 0, 1)

    def _rays(self, index: int, coords: Float[Tensor, "*rays 2"] | None = None) -> RayBundle:
        """Generate rays of some pixels, all by default, from the pose the view was trained at."""
        rays = self.cameras.generate_rays(camera_indices=index, coords=coords, keep_shape=True)
        # The model applies a tuned pose in train mode only.
        correction = self._model.camera_optimizer(torch.tensor([index]))[0].detach().to(rays.origins)
        rays.origins = rays.origins + correction[:, 3]
        rays.directions = rays.directions @ correction[:, :3].T
        return rays

    @torch.no_grad()
    def render(self, index: int) -> Float[Tensor, "3 H W"]:
        with self.undisturbed():
            rgb = self._model.get_outputs_for_camera_ray_bundle(self._rays(index))["rgb"]
        return rgb.clamp(0, 1).permute(2, 0, 1).float().cpu()

    @torch.no_grad()
    def surface(self, index: int, every: int = 1) -> Float[Tensor, "3 h w"]:
        """See `TrainingViews`: at the median depth, where a ray has lost half its light."""
        rows = slice(every // 2, None, every)
        rays = self._rays(index, self.cameras.get_image_coords(index=(index,))[rows, rows])
        with self.undisturbed():
            depth = self._model.get_outputs_for_camera_ray_bundle(rays)["depth"]
        return (rays.origins + rays.directions * depth.to(rays.origins)).permute(2, 0, 1).float().cpu()

    def render_with_gradient(self, index: int, rays_per_chunk: int = 4096) -> Float[Tensor, "3 H W"]:
        """See `TrainingViews`. Only the rays and the graph of one chunk of pixels are in memory.

        The model's own chunks may be larger: they are for rendering without a graph.
        """
        coords = self.cameras.get_image_coords(index=(index,))
        height, width, _ = coords.shape

        def colors(start: int) -> Float[Tensor, "n 3"]:
            # Both are made in here, because the second rendering happens within backward().
            chunk = self._rays(index, coords.view(-1, 2)[start : start + rays_per_chunk])
            with self.undisturbed():
                return self._model(chunk.to(self._model.device))["rgb"]

        starts = range(0, height * width, rays_per_chunk)
        rgb = torch.cat([replayed(colors, start, device=self._model.device) for start in starts])
        return rgb.float().view(height, width, 3).permute(2, 0, 1)

    def supervise(self, index: int, image: Float[Tensor, "3 H W"]) -> None:
        unedited = self._unedited(index)
        rgb = without_background(image, self._on_background(unedited), unedited)
        self._supervision[self._row[index]][..., :3] = rgb
