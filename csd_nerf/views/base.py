"""The training views of a scene as images: original, rendered, and as supervision of the scene."""

import hashlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.models.base_model import Model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from csd_2d.io.files import replacing
from csd_2d.io.images import read_image, write_image

FAR = 1e10
"""Depth of pixels that show nothing: splatfacto's far plane."""


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Keep a model in eval mode inside (no jitter, mean appearance, no tuned poses); restores its mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _acquire(lock: threading.Lock) -> None:
    """Acquire a lock in any case; Ctrl-C while waiting is raised afterwards, when the lock is held."""
    interrupt = None
    while True:
        try:
            lock.acquire()
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


@contextmanager
def _in_turn(lock: threading.Lock) -> Iterator[None]:
    with lock:
        yield
    time.sleep(0.001)  # a thread that waits would lose the lock to this one, which asks for it again at once


def replayed(function: Callable[..., Tensor], *args: Any, device: str | torch.device) -> Tensor:
    """Call `function(*args)` without a graph, and again, from the same random state, in the backward pass.

    Torch's other kind of checkpoint keeps the nodes of the graph, and with many small ones these fill the memory.
    Gradients are added to parameters, as by `backward()`; `torch.autograd.grad` does not return them.

    Args:
        device: device of the random state, beside the CPU's.
    """
    # Without an input that wants a gradient none would come back; torch keeps the random state of the inputs' device.
    gate = torch.zeros((), device=device, requires_grad=True)
    return checkpoint(lambda _, *args: function(*args), gate, *args, use_reentrant=True)  # type: ignore[return-value]


def view_name(index: int, file: Path) -> str:
    """Return a unique name for files about a view: two folders of a data set may hold files of one name."""
    return f"{index:04d}_{file.stem}"


class TrainingViews(ABC):
    """The training views of a pipeline. All images are RGB in [0, 1] on the CPU, and may differ in size."""

    def __init__(self, model: Model, dataset: InputDataset, cameras: Cameras) -> None:
        self._model: Any = model
        self._dataset = dataset
        self._turn: Callable[[], AbstractContextManager[None]] = nullcontext
        self.cameras = cameras
        """Cameras of the views, as the data have them."""

    def __len__(self) -> int:
        return len(self._dataset)

    def filename(self, index: int) -> Path:
        """Return the image file of a view."""
        return self._dataset.image_filenames[index]

    def name(self, index: int) -> str:
        """See `view_name`."""
        return view_name(index, self.filename(index))

    def digest(self) -> str:
        """Hash the files of the training images, which tells data sets apart."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(hashlib.sha256(self.filename(index).read_bytes()).digest())
        return digest.hexdigest()

    def surrounds(self, index: int) -> bool:
        """Tell whether a view shows all 360 degrees around its camera, so that its left and right border meet."""
        return int(self.cameras.camera_type[index]) == CameraType.EQUIRECTANGULAR.value

    def positions(self) -> Float[Tensor, "n 3"]:
        """Return the positions of the cameras, in the scene's units."""
        return self.cameras.camera_to_worlds[..., 3].cpu()

    @contextmanager
    def sharing(self, lock: threading.Lock) -> Iterator[None]:
        """Release a lock that is held, inside; views take it again only while they render the scene.

        Other threads, a viewer's for one, then use the scene in between.
        """
        self._turn = partial(_in_turn, lock)
        lock.release()
        try:
            yield
        finally:
            self._turn = nullcontext
            _acquire(lock)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Keep the model in eval mode inside, without settings of a viewer."""
        with self._turn(), self._without_viewer_settings(), eval_mode(self._model):
            yield

    def _without_viewer_settings(self) -> AbstractContextManager[None]:
        return nullcontext()

    @abstractmethod
    def original(self, index: int) -> Float[Tensor, "3 H W"]:
        """Return the image before any edit; transparency is put on the background that the model renders."""

    @abstractmethod
    def render(self, index: int) -> Float[Tensor, "3 H W"]:
        """Render the present scene from the pose the view was trained at, in eval mode."""

    @abstractmethod
    def render_with_gradient(self, index: int) -> Float[Tensor, "3 H W"]:
        """Render the same image on the model's device, differentiable with respect to the model; see `replayed`."""

    @abstractmethod
    def surface(self, index: int, every: int = 1) -> Float[Tensor, "3 h w"]:
        """Compute the point of the scene that each pixel shows, in the scene's coordinates.

        Args:
            every: distance of the rows and columns that are taken; 1: all of them.
        """

    def with_surroundings(self, index: int, image: Float[Tensor, "3 H W"]) -> Float[Tensor, "3 H W"]:
        """Put back what the view shows where it is transparent, which no scene learns."""
        unedited = self._unedited(index)
        if unedited.shape[-1] == 3:
            return image
        return torch.where(unedited[..., 3] > 0, image, self.original(index))

    @abstractmethod
    def _unedited(self, index: int) -> Float[Tensor, "H W c"]:
        """Return the image before any edit, RGB or RGBA."""

    @abstractmethod
    def supervise(self, index: int, image: Float[Tensor, "3 H W"]) -> None:
        """Replace the image that the view is trained on.

        Alpha stays, and the background that `original` put behind it is removed again: training adds its own.
        """

    def training_state(self) -> dict[str, Any]:
        """Return the state of the scene's training, beside tensors of the model and the optimizers."""
        return {}

    def load_training_state(self, state: dict[str, Any]) -> None:  # noqa: B027  there is nothing by default
        """Restore what `training_state` returned."""


def without_background(
    image: Float[Tensor, "3 H W"], original: Float[Tensor, "3 H W"], unedited: Float[Tensor, "H W c"]
) -> Float[Tensor, "H W 3"]:
    """Compute the colors which, put on the background of `original`, show `image`.

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


def initial_pictures(
    folder: Path, views: TrainingViews, make: Callable[[int], Float[Tensor, "3 H W"]], progress: str
) -> Callable[[int], Float[Tensor, "3 H W"]]:
    """Make a picture of each view once, before the scene is edited; afterwards it is read from the run's folder.

    Args:
        folder: holds all of them, or does not exist yet.
        make: makes a view's picture; called only if the folder does not exist.
        progress: label of a progress bar.

    Returns:
        A function that reads a view's picture, of 8 bits.
    """
    if not folder.is_dir():
        with replacing(folder) as unfinished:
            for index in tqdm(range(len(views)), desc=progress, unit="view"):
                write_image(make(index), unfinished / f"{views.name(index)}.png")
    return lambda index: read_image(folder / f"{views.name(index)}.png")
