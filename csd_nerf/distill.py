"""Mode *distill*: the direction of CSD-Edit goes straight into the scene, through encoder and renderer."""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from csd_2d.edit import EditConfig, EditRun, StepInfo
from csd_2d.images import common_size, pad
from csd_2d.particles import NoiseMode, stack_batch, stack_noise
from csd_2d.priors import Prior
from csd_nerf.scene import TrainingViews, replayed


class SceneParticles:
    """Training views as particles whose parameters are the scene's.

    Memory does not grow with the number of views that are rendered at once: neither the renderer nor the encoder keeps
    a graph of more than a chunk of rays, or one view; both run a second time when the gradient comes back.

    Args:
        source: what the edit of a view is conditioned on.
        parameters: what is optimised.
    """

    def __init__(
        self,
        views: TrainingViews,
        source: Callable[[int], Tensor],
        prior: Prior,
        parameters: Iterable[nn.Parameter],
    ) -> None:
        self._views, self._prior, self._parameters = views, prior, list(parameters)
        sources = [source(index) for index in range(len(views))]
        self._size = common_size([image.shape[-2:] for image in sources], prior.cell)
        with torch.no_grad():
            self._source = torch.cat([prior.encode(self._padded(image).to(prior.device)) for image in sources])
            self._condition = prior.condition(self._source)

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
        return torch.cat([replayed(latents, image, device=self._prior.device) for image in rendered])

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


def cost_of_distilling(edit: EditConfig, views: int) -> str:
    """What a run will take, in one sentence.

    Args:
        views: of the scene.

    Example:
        >>> cost_of_distilling(EditConfig(steps=1000), 50)
        'Distilling: 1,000 steps, up to 217,000 U-Net evaluations in all; --max-num-iterations lowers both.'
    """
    together = round(edit.together * edit.steps)
    batch = stack_batch(views) if edit.batch is None else edit.batch or views
    rendered = together * views + (edit.steps - together) * min(batch, views)
    return (
        f"Distilling: {edit.steps:,} steps, up to {5 * rendered:,} U-Net evaluations in all; --max-num-iterations "
        "lowers both."
    )


class Distillation:
    """The scene's loss at every training step.

    Args:
        source: what the edit of a view is conditioned on.
        load_prior: called at the first step, so that rendering a scene never loads a diffusion model.
        parameters: what is optimised.
    """

    def __init__(
        self,
        views: TrainingViews,
        source: Callable[[int], Tensor],
        load_prior: Callable[[], Prior],
        prompt: str,
        edit: EditConfig,
        parameters: Iterable[nn.Parameter],
    ) -> None:
        self._views, self._source, self._load_prior = views, source, load_prior
        self._prompt, self._edit, self._parameters = prompt, edit, list(parameters)

    @cached_property
    def _run(self) -> EditRun:
        prior = self._load_prior()
        particles = SceneParticles(self._views, self._source, prior, self._parameters)
        return EditRun(particles, prior, self._prompt, self._edit)

    def loss(self, step: int) -> tuple[Float[Tensor, ""], StepInfo]:
        """See `EditRun.loss`."""
        return self._run.loss(step)

    @cached_property
    def _fingerprint(self) -> str:
        """Tells edits apart. Not by latents, which a GPU need not compute alike in two processes."""
        return repr((self._edit, self._prompt, self._views.digest()))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the scene."""
        return {"edit": self._fingerprint, "run": self._run.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` returned. ValueError if it is of another edit."""
        if state["edit"] != self._fingerprint:
            raise ValueError("the data or the settings have changed since the run was interrupted; begin a new run.")
        self._run.load_state_dict(state["run"])
