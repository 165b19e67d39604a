"""Mode *distill*: the direction of CSD-Edit goes straight into the scene, through encoder and renderer."""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from csd_2d.edit import EditConfig, EditRun, StepInfo
from csd_2d.images import common_size, pad
from csd_2d.particles import NoiseMode, stack_batch, stack_noise
from csd_2d.priors import Prior
from csd_nerf.scene import TrainingViews


class SceneParticles:
    """Training views as particles whose parameters are the scene's.

    Memory does not grow with the number of views that are rendered at once: neither the renderer nor the encoder keeps
    a graph of more than a chunk of rays, or one view; both run a second time when the gradient comes back.

    Args:
        parameters: what is optimised.
    """

    def __init__(self, views: TrainingViews, prior: Prior, parameters: Iterable[nn.Parameter]) -> None:
        self._views, self._prior, self._parameters = views, prior, list(parameters)
        originals = [views.original(index) for index in range(len(views))]
        self._size = common_size([image.shape[-2:] for image in originals], prior.cell)
        with torch.no_grad():
            padded = [self._padded(image).to(prior.device) for image in originals]
            self._source = torch.cat([prior.encode(image) for image in padded])
            self._condition = torch.cat([prior.condition(image) for image in padded])

    def _padded(self, image: Float[Tensor, "3 _ _"]) -> Float[Tensor, "1 3 H W"]:
        return pad(image[None], *self._size)

    def __len__(self) -> int:
        return len(self._views)

    @property
    def default_batch(self) -> int:
        return stack_batch(len(self))

    def rounds(self) -> list[list[int]]:
        return [list(range(len(self)))]

    def render(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        def latents(image: Tensor) -> Tensor:
            return self._prior.encode(self._padded(image).to(self._prior.device))

        rendered = (self._views.render_with_gradient(index) for index in indices)
        return torch.cat([checkpoint(latents, image, use_reentrant=False) for image in rendered])  # type: ignore[misc]

    def source(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        return self._source[list(indices)]

    def condition(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        return self._condition[list(indices)]

    def shares(self, indices: Sequence[int]) -> None:
        return None

    def noise(self, indices: Sequence[int], mode: NoiseMode, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
        return stack_noise(self.source(indices), mode, generator)

    def transport(self, indices: Sequence[int]) -> None:
        return None

    def parameters(self) -> Iterable[nn.Parameter]:
        return self._parameters


class Distillation:
    """The scene's loss at every training step.

    Args:
        load_prior: called at the first step, so that rendering a scene never loads a diffusion model.
        parameters: what is optimised.
    """

    def __init__(
        self,
        views: TrainingViews,
        load_prior: Callable[[], Prior],
        prompt: str,
        edit: EditConfig,
        parameters: Iterable[nn.Parameter],
    ) -> None:
        self._views, self._load_prior, self._prompt, self._edit = views, load_prior, prompt, edit
        self._parameters = list(parameters)
        self._run: EditRun | None = None

    def loss(self, step: int) -> tuple[Float[Tensor, ""], StepInfo]:
        """See `EditRun.loss`."""
        if self._run is None:
            prior = self._load_prior()
            particles = SceneParticles(self._views, prior, self._parameters)
            self._run = EditRun(particles, prior, self._prompt, self._edit)
        return self._run.loss(step)
