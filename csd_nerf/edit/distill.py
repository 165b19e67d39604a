"""Mode *distill*: CSD-Edit's direction goes through the encoder and the renderer straight into the scene."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from csd_2d.cells import common_size, pad
from csd_2d.config import EditConfig
from csd_2d.correspondence import Correspondence
from csd_2d.csd import Step
from csd_2d.loss import EditLoss
from csd_2d.observer import Observer
from csd_2d.particles import Layout
from csd_2d.prior import Prior
from csd_nerf.edit.steering import Settings
from csd_nerf.views.base import TrainingViews, replayed
from csd_nerf.views.correspondence import view_correspondence

BATCH = 4
"""Views that a step renders by default: every one of them takes as long as a training step of the scene."""


class SceneParticles:
    """Training views as particles whose parameters are the scene's.

    Memory does not grow with the number of views that are rendered at once: the renderer keeps the graph of a chunk of
    rays, the encoder that of one view, and both run a second time in the backward pass.

    Args:
        source: the image that conditions the edit of a view.
        parameters: parameters that are optimized.
    """

    def __init__(
        self,
        views: TrainingViews,
        source: Callable[[int], Tensor],
        prior: Prior,
        parameters: Iterable[nn.Parameter],
    ) -> None:
        self._views, self._prior, self._parameters = views, prior, list(parameters)
        self._picture = source
        sources = [source(index) for index in range(len(views))]
        self._size = common_size([image.shape[-2:] for image in sources], prior.cell)
        with torch.no_grad():
            self._source = torch.cat([prior.encode(self._padded(image).to(prior.device)) for image in sources])

    def _padded(self, image: Float[Tensor, "3 _ _"]) -> Float[Tensor, "1 3 H W"]:
        return pad(image[None], *self._size)

    def __len__(self) -> int:
        return len(self._views)

    def render(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        def latents(image: Tensor) -> Tensor:
            return self._prior.encode(self._padded(image).to(self._prior.device))

        rendered = (self._views.render_with_gradient(index) for index in indices)
        return torch.cat([replayed(latents, image, device=self._prior.device) for image in rendered])

    def source(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        return self._source[list(indices)]

    def correspondence(self, indices: Sequence[int]) -> Correspondence:
        """Match some views by the surfaces that the present scene shows in them."""
        matched = view_correspondence(self._views, self._picture, indices, self._size, self._prior.cell)
        return matched(range(len(indices)))

    def parameters(self) -> Iterable[nn.Parameter]:
        return self._parameters


def cost_of_distilling(edit: EditConfig, views: int) -> str:
    """Estimate what a run will take, in one sentence.

    Args:
        views: number of the scene's views.

    Example:
        >>> cost_of_distilling(EditConfig(steps=1000), 50)
        'Distilling: 1,000 steps, up to 20,000 U-Net evaluations in all; --max-num-iterations lowers both.'
    """
    rendered = edit.steps * min(edit.batch or BATCH, views)
    return (
        f"Distilling: {edit.steps:,} steps, up to {5 * rendered:,} U-Net evaluations in all; --max-num-iterations "
        "lowers both."
    )


class Distillation:
    """The loss of the scene at every training step.

    Args:
        source: the image that conditions the edit of a view.
        load_prior: called at the first step, so that rendering a scene never loads a diffusion model.
        parameters: parameters that are optimized.
        observer: looks at every step.
    """

    def __init__(
        self,
        views: TrainingViews,
        source: Callable[[int], Tensor],
        load_prior: Callable[[], Prior],
        prompt: str,
        edit: EditConfig,
        parameters: Iterable[nn.Parameter],
        observer: Observer | None = None,
    ) -> None:
        self._views, self._source, self._load_prior = views, source, load_prior
        self._observer = observer or Observer(lambda: False)
        self._prompt, self._edit, self._parameters = prompt, edit, list(parameters)

    @cached_property
    def _run(self) -> EditLoss:
        prior = self._load_prior()
        particles = SceneParticles(self._views, self._source, prior, self._parameters)
        names = [self._views.name(index) for index in range(len(self._views))]
        self._observer.begin("distill", names, self._edit.steps, prior.decode)
        edit = self._edit if self._edit.batch else dataclasses.replace(self._edit, batch=min(BATCH, len(particles)))
        return EditLoss(particles, prior, self._prompt, edit, layout=Layout(correspondence=particles.correspondence))

    def steer(self, settings: Settings) -> None:
        """Take over prompt and guidance scales, from the next step on."""
        if self._run.prompt != [settings.prompt]:
            self._run.prompt = settings.prompt
        self._run.steer(settings.edit)

    def next(self) -> tuple[Float[Tensor, ""], Step]:
        """Compute the next step's loss; see `EditLoss.next`."""
        loss, step = self._run.next()
        self._observer.on_step(step)
        return loss, step

    @cached_property
    def _fingerprint(self) -> str:
        """Hash what tells edits apart; not latents, which a GPU need not compute alike in two processes."""
        return repr((self._edit, self._prompt, self._views.digest()))

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the following steps depend on, beside the scene."""
        return {"edit": self._fingerprint, "run": self._run.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. ValueError if it is of another edit."""
        if state["edit"] != self._fingerprint:
            raise ValueError("the data or the settings have changed since the run was interrupted; begin a new run.")
        self._run.load_state_dict(state["run"])
