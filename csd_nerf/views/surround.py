"""Views of 360 degrees: their left and right border are neighbors."""

import torch
from jaxtyping import Float
from torch import Tensor

from csd_2d.panorama import pad_circular


def extended(image: Float[Tensor, "c H W"], margin: int) -> Float[Tensor, "c H _"]:
    """Continue a view of 360 degrees beyond both borders, so that whatever edits it sees their neighbors."""
    return pad_circular(image[None], margin)[0] if margin else image


def joined(image: Float[Tensor, "c H _"], margin: int) -> Float[Tensor, "c H W"]:
    """Undo `extended` after an edit, which changed each border and the other border's margin, its copy, differently.

    Over the margin the copy fades in, up to one half at the border itself. There the right border then ends in what the
    left one begins with.

    Example:
        >>> view = torch.arange(6.0)[None, None]
        >>> torch.equal(joined(extended(view, 2), 2), view)
        True
    """
    if not margin:
        return image
    width = image.shape[-1] - 2 * margin
    view = image[..., margin : margin + width].clone()
    share = 0.5 + 0.5 * torch.arange(margin).to(image) / margin  # of the view itself, from the border inwards
    left, right = slice(0, margin), slice(width - margin, width)
    view[..., left] = torch.lerp(image[..., margin + width :], view[..., left], share)
    view[..., right] = torch.lerp(image[..., :margin], view[..., right], share.flip(0))
    return view
