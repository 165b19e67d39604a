"""The training views of a scene as images: rendered, original, and as what they supervise."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManager
from nerfstudio.models.nerfacto import NerfactoModel
from nerfstudio.pipelines.base_pipeline import VanillaPipeline
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """No jitter, the mean appearance, no tuned poses; afterwards the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class TrainingViews(Protocol):
    """The training views of a pipeline. All images are RGB in [0, 1] on the CPU, and may differ in size."""

    def __len__(self) -> int: ...

    def filename(self, index: int) -> Path:
        """Image file of a view."""
        ...

    def positions(self) -> Float[Tensor, "n 3"]:
        """Where the cameras stand, in the scene's units."""
        ...

    def original(self, index: int) -> Float[Tensor, "3 H W"]:
        """The image as it was before any edit; transparency is put on the background the model renders."""
        ...

    def render(self, index: int) -> Float[Tensor, "3 H W"]:
        """What the model shows at present, from the pose the view was trained at, in eval mode."""
        ...

    def render_with_gradient(self, index: int) -> Float[Tensor, "3 H W"]:
        """The same image on the model's device, differentiable with respect to the model.

        It is rendered without a graph, and again, from the same random state, when the gradient comes back to it.
        """
        ...

    def surface(self, index: int) -> Float[Tensor, "3 H W"]:
        """Where, in the scene's coordinates, what each pixel shows lies."""
        ...

    def supervise(self, index: int, image: Float[Tensor, "3 H W"]) -> None:
        """Puts an image in place of the one the view is trained on.

        Alpha stays, and the background that `original` put behind it is taken away again: training adds its own.
        """
        ...


def without_background(
    image: Float[Tensor, "3 H W"], original: Float[Tensor, "3 H W"], unedited: Float[Tensor, "H W c"]
) -> Float[Tensor, "H W 3"]:
    """The colours which, put on the background of `original`, show `image`.

    Args:
        original: `unedited` put on that background.
        unedited: RGB or RGBA; alpha is the same before and after the edit.
    """
    rgb = image.permute(1, 2, 0)
    if unedited.shape[-1] == 3:
        return rgb
    alpha = unedited[..., 3:]
    background = original.permute(1, 2, 0) - alpha * unedited[..., :3]
    return torch.where(alpha > 0, (rgb - background) / alpha.clamp(min=1 / 255), rgb).clamp(0, 1)


class NerfactoViews:
    """The training views of a nerfacto pipeline; see `TrainingViews`.

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
        self._model: NerfactoModel = pipeline.model  # type: ignore[assignment]
        self._dataset = datamanager.train_dataset
        self._cameras = datamanager.train_ray_generator.cameras
        # One tensor, or a list where sizes differ; `row[i]` is the place of view i in it.
        self._supervision: Tensor | list[Tensor] = loader.cached_collated_batch["image"]
        self._row = {int(view): row for row, view in enumerate(loader.cached_collated_batch["image_idx"])}

    def __len__(self) -> int:
        return len(self._dataset)

    def filename(self, index: int) -> Path:
        return self._dataset.image_filenames[index]

    def positions(self) -> Float[Tensor, "n 3"]:
        return self._cameras.camera_to_worlds[..., 3].cpu()

    def original(self, index: int) -> Float[Tensor, "3 H W"]:
        image = self._dataset[index]["image"]
        return self._model.renderer_rgb.blend_background(image).permute(2, 0, 1)

    def _rays(self, index: int) -> RayBundle:
        """Of all pixels, from the pose the view was trained at, (H, W)."""
        rays = self._cameras.generate_rays(camera_indices=index, keep_shape=True)
        # The model applies a tuned pose in train mode only.
        correction = self._model.camera_optimizer(torch.tensor([index]))[0].detach().to(rays.origins)
        rays.origins = rays.origins + correction[:, 3]
        rays.directions = rays.directions @ correction[:, :3].T
        return rays

    @torch.no_grad()
    def render(self, index: int) -> Float[Tensor, "3 H W"]:
        """In chunks of rays; see `TrainingViews`."""
        with eval_mode(self._model):
            rgb = self._model.get_outputs_for_camera_ray_bundle(self._rays(index))["rgb"]
        return rgb.clamp(0, 1).permute(2, 0, 1).float().cpu()

    @torch.no_grad()
    def surface(self, index: int) -> Float[Tensor, "3 H W"]:
        """Where, in the scene's coordinates, each pixel's ray has lost half its light."""
        rays = self._rays(index)
        with eval_mode(self._model):
            depth = self._model.get_outputs_for_camera_ray_bundle(rays)["depth"]
        return (rays.origins + rays.directions * depth.to(rays.origins)).permute(2, 0, 1).float().cpu()

    def render_with_gradient(self, index: int, rays_per_chunk: int = 4096) -> Float[Tensor, "3 H W"]:
        """See `TrainingViews`. The graph of one chunk of rays at a time is in memory."""
        rays = self._rays(index)

        def colors(start: int) -> Float[Tensor, "n 3"]:
            with eval_mode(self._model):  # here, for the second rendering happens within backward()
                chunk = rays.get_row_major_sliced_ray_bundle(start, start + rays_per_chunk)
                return self._model(chunk.to(self._model.device))["rgb"]

        starts = range(0, len(rays), rays_per_chunk)
        rgb = torch.cat([checkpoint(colors, start, use_reentrant=False) for start in starts])  # type: ignore[misc]
        return rgb.float().view(*rays.shape, 3).permute(2, 0, 1)

    def supervise(self, index: int, image: Float[Tensor, "3 H W"]) -> None:
        rgb = without_background(image, self.original(index), self._dataset[index]["image"])
        self._supervision[self._row[index]][..., :3] = rgb
