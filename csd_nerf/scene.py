"""The training views of a scene as images: rendered, original, and as what they supervise."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManager
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.models.base_model import Model
from nerfstudio.pipelines.base_pipeline import VanillaPipeline
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from csd_2d.files import replacing
from csd_2d.images import read_image, write_image


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """No jitter, the mean appearance, no tuned poses; afterwards the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def replayed(function: Callable[..., Tensor], *args: Any, device: str | torch.device) -> Tensor:
    """`function(*args)`, which is called again, from the same random state, when a gradient comes back to it.

    Nothing of a graph is kept in between: torch's other kind of checkpoint keeps the graph's nodes, and of many small
    ones they are what fills the memory. Gradients are added to parameters, as by `backward()`; `torch.autograd.grad`
    does not see them.

    Args:
        device: whose random state it is, beside the CPU's.
    """
    # Without an input that wants a gradient none would come back; torch keeps the random state of the inputs' device.
    gate = torch.zeros((), device=device, requires_grad=True)
    return checkpoint(lambda _, *args: function(*args), gate, *args, use_reentrant=True)  # type: ignore[return-value]


class TrainingViews(ABC):
    """The training views of a pipeline. All images are RGB in [0, 1] on the CPU, and may differ in size."""

    def __init__(self, model: Model, dataset: InputDataset, cameras: Cameras) -> None:
        self._model: Any = model
        self._dataset = dataset
        self.cameras = cameras
        """Of the views, as the data have them."""

    def __len__(self) -> int:
        return len(self._dataset)

    def filename(self, index: int) -> Path:
        """Image file of a view."""
        return self._dataset.image_filenames[index]

    def name(self, index: int) -> str:
        """Of the files that are written about a view: two folders of a data set may hold files of one name."""
        return f"{index:04d}_{self.filename(index).stem}"

    def digest(self) -> str:
        """Tells data sets apart by their training images' files."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(hashlib.sha256(self.filename(index).read_bytes()).digest())
        return digest.hexdigest()

    def positions(self) -> Float[Tensor, "n 3"]:
        """Where the cameras stand, in the scene's units."""
        return self.cameras.camera_to_worlds[..., 3].cpu()

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Eval mode, without what a viewer may have set."""
        with eval_mode(self._model):
            yield

    @abstractmethod
    def original(self, index: int) -> Float[Tensor, "3 H W"]:
        """The image as it was before any edit; transparency is put on the background the model renders."""

    @abstractmethod
    def render(self, index: int) -> Float[Tensor, "3 H W"]:
        """What the model shows at present, from the pose the view was trained at, in eval mode."""

    @abstractmethod
    def render_with_gradient(self, index: int) -> Float[Tensor, "3 H W"]:
        """The same image on the model's device, differentiable with respect to the model.

        It is rendered without a graph, and again, from the same random state, when the gradient comes back to it.
        """

    @abstractmethod
    def surface(self, index: int) -> Float[Tensor, "3 H W"]:
        """Where, in the scene's coordinates, what each pixel shows lies."""

    @abstractmethod
    def supervise(self, index: int, image: Float[Tensor, "3 H W"]) -> None:
        """Puts an image in place of the one the view is trained on.

        Alpha stays, and the background that `original` put behind it is taken away again: training adds its own.
        """

    def training_state(self) -> dict[str, Any]:
        """What the training of the scene goes by, beside tensors of the model and the optimisers."""
        return {}

    def load_training_state(self, state: dict[str, Any]) -> None:  # noqa: B027  there is nothing by default
        """Goes back to what `training_state` returned."""


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
        return self._on_background(self._dataset[index]["image"])

    def _on_background(self, image: Float[Tensor, "H W c"]) -> Float[Tensor, "3 H W"]:
        return self._model.renderer_rgb.blend_background(image).permute(2, 0, 1)

    def _rays(self, index: int, coords: Float[Tensor, "*rays 2"] | None = None) -> RayBundle:
        """Of some pixels, all by default, from the pose the view was trained at."""
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
    def surface(self, index: int) -> Float[Tensor, "3 H W"]:
        """See `TrainingViews`: where each pixel's ray has lost half its light."""
        rays = self._rays(index)
        with self.undisturbed():
            depth = self._model.get_outputs_for_camera_ray_bundle(rays)["depth"]
        return (rays.origins + rays.directions * depth.to(rays.origins)).permute(2, 0, 1).float().cpu()

    def render_with_gradient(self, index: int, rays_per_chunk: int = 4096) -> Float[Tensor, "3 H W"]:
        """See `TrainingViews`. Rays and graph of one chunk of pixels at a time are in memory.

        The model's own chunks may be larger: they are for rendering without a graph.
        """
        coords = self.cameras.get_image_coords(index=(index,))
        height, width, _ = coords.shape

        def colors(start: int) -> Float[Tensor, "n 3"]:
            # Both within, for the second rendering happens within backward().
            chunk = self._rays(index, coords.view(-1, 2)[start : start + rays_per_chunk])
            with self.undisturbed():
                return self._model(chunk.to(self._model.device))["rgb"]

        starts = range(0, height * width, rays_per_chunk)
        rgb = torch.cat([replayed(colors, start, device=self._model.device) for start in starts])
        return rgb.float().view(height, width, 3).permute(2, 0, 1)

    def supervise(self, index: int, image: Float[Tensor, "3 H W"]) -> None:
        unedited = self._dataset[index]["image"]
        rgb = without_background(image, self._on_background(unedited), unedited)
        self._supervision[self._row[index]][..., :3] = rgb


def pictures_of_the_start(
    folder: Path, views: TrainingViews, make: Callable[[int], Float[Tensor, "3 H W"]], progress: str
) -> Callable[[int], Float[Tensor, "3 H W"]]:
    """A picture of each view that is made once, before the scene is edited, and read from the run's folder ever after.

    Args:
        folder: holds all of them, or is not there yet.
        make: makes a view's picture; asked only if the folder is not there.
        progress: label of a progress bar.

    Returns:
        What gives a view's picture, of 8 bits.
    """
    if not folder.is_dir():
        with replacing(folder) as unfinished:
            for index in tqdm(range(len(views)), desc=progress, unit="view"):
                write_image(make(index), unfinished / f"{views.name(index)}.png")
    return lambda index: read_image(folder / f"{views.name(index)}.png")
