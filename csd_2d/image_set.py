"""Edit a set of images together: frames in memory, views of a scene."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from csd_2d import ranks
from csd_2d.cells import common_size, pad
from csd_2d.config import EditConfig
from csd_2d.csd import Step
from csd_2d.edit import Edit, edit
from csd_2d.latents import LatentStack
from csd_2d.mixing import FindCorrespondence
from csd_2d.particles import Layout
from csd_2d.prior import Prior


class ImageStack:
    """A set of images as particles, one each, and the way back.

    Sizes may differ; all are padded to the largest, never squeezed, and cropped again. Encoding and decoding take one
    image at a time. Several processes (`csd_2d.ranks`) share the images out.

    Args:
        images: the sources, RGB in [0, 1].
        start: images to start from, of the same sizes (a scene's present renders); default: the sources.
        masks: what of each image may change, in [0, 1]; where 0 the source stays bit for bit. The whole image is
            edited, and the result is put in: a model that sees what stays as it was would hold back beside it. Default:
            all.
        correspondence: finds which places of some images show the same thing, see `Layout`; default: not known. Of
            frames of a video, `csd_2d.correspondence.flow.FrameFlows` does.

    Raises:
        ValueError: if there are no images, or masks do not fit them.
    """

    def __init__(
        self,
        images: Sequence[Float[Tensor, "3 _ _"]],
        prior: Prior,
        start: Sequence[Float[Tensor, "3 _ _"]] | None = None,
        masks: Sequence[Float[Tensor, "1 _ _"]] | None = None,
        correspondence: FindCorrespondence | None = None,
    ) -> None:
        if not images:
            raise ValueError("there are no images to edit.")
        if masks is not None and [mask.shape[1:] for mask in masks] != [image.shape[1:] for image in images]:
            raise ValueError("there must be one mask for each image, of its size.")
        self._prior, self._size = prior, common_size([image.shape[-2:] for image in images], prior.cell)
        self._images, self._masks = images, masks
        self.particles = LatentStack(
            self._encoded(prior.encode, images),
            start=None if start is None else self._encoded(prior.encode, start),
        )
        self.layout = Layout(correspondence=correspondence)

    @torch.no_grad()
    def _encoded(self, encode: Callable[[Tensor], Tensor], images: Sequence[Tensor]) -> Tensor:
        padded = (pad(image[None], *self._size).to(self._prior.device) for image in images)
        return torch.cat(list(ranks.shared_map(encode, padded)))

    @torch.no_grad()
    def decode(self) -> list[Float[Tensor, "3 _ _"]]:
        """Decode the edited images, on the CPU, in the sources' sizes."""
        latents = (self.particles.render([index]) for index in range(len(self.particles)))
        return [self._finished(*row) for row in enumerate(ranks.shared_map(self._prior.decode, latents))]

    def _finished(self, index: int, decoded: Float[Tensor, "1 3 _ _"]) -> Float[Tensor, "3 _ _"]:
        image = self._images[index].cpu()
        edited = decoded[0, :, : image.shape[-2], : image.shape[-1]].cpu()
        return edited if self._masks is None else torch.lerp(image, edited, self._masks[index].cpu())


def edit_images(
    images: Sequence[Float[Tensor, "3 _ _"]],
    prior: Prior,
    prompt: str,
    config: EditConfig | None = None,
    on_step: Callable[[Step], object] | None = None,
    progress: str | None = None,
    resume: str | Path | None = None,
    before_step: Callable[[Edit], object] | None = None,
    **stack: Any,
) -> list[Float[Tensor, "3 _ _"]]:
    """Edit a set of images together.

    Args:
        config, on_step, progress, resume, before_step: see `csd_2d.edit.edit`.
        stack: start, masks, correspondence; see `ImageStack`.

    Returns:
        The edited images on the CPU, in the sources' sizes.

    Raises:
        ValueError: as `ImageStack` and `edit` raise.
    """
    edited = ImageStack(images, prior, **stack)
    edit(edited.particles, prior, prompt, config, on_step, progress, resume, before_step, layout=edited.layout)
    return edited.decode()
