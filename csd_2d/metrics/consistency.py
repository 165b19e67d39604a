"""How consistent images are: frames of a video, views of a scene, crops of a panorama, and any set of images."""

import math
from collections.abc import Iterable, Sequence
from itertools import islice, pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from csd_2d.blur import gaussian_blur
from csd_2d.correspondence.flow import optical_flow, visible, warp
from csd_2d.metrics.structure import luma


def warp_error(
    frames: Float[Tensor, "n 3 H W"], flows: Float[Tensor, "m 2 H W"], visible: Float[Tensor, "m 1 H W"]
) -> float:
    """Compute the mean squared difference of consecutive frames in corresponding places.

    Each frame is compared with the next one, warped by the flow of the *source* (Lai et al., ECCV 2018, section 4).

    Args:
        frames: RGB in [0, 1], n = m + 1.
        flows: from each frame to the next one, in pixels.
        visible: places that are seen in the next frame too; others do not count.

    Returns:
        NaN if nothing is visible.

    Example:
        >>> still, seen = torch.zeros(1, 2, 4, 4), torch.ones(1, 1, 4, 4)
        >>> round(warp_error(torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.1)]), still, seen), 4)
        0.01
    """
    gaps = (warp(frames[1:], flows) - frames[:-1]).square().mean(1, keepdim=True)
    return ((gaps * visible).sum() / visible.sum()).item()


def wrap_seam(image: Float[Tensor, "3 H W"], reach: int = 16) -> float:
    """Compare the seam of a 360 degree image with the columns near it.

    The mean absolute difference across the border over that of neighboring columns within `reach` of it; 1: no seam.
    NaN where those columns are all alike.

    Example:
        >>> ramp = torch.linspace(0, 1, 50).expand(3, 4, 50)
        >>> round(wrap_seam(ramp)), round(wrap_seam(torch.cat([ramp, ramp.flip(-1)], -1)))
        (49, 0)
    """
    reach = min(reach, image.shape[-1])
    around = torch.cat([image[..., -reach:], image[..., :reach]], -1)
    steps = around.diff(dim=-1).abs().mean((0, 1))
    near = torch.cat([steps[: reach - 1], steps[reach:]]).mean().item()
    return steps[reach - 1].item() / near if near else math.nan


def flicker(
    source: Iterable[Tensor],
    edited: Iterable[Tensor],
    count: int,
    longest_side: int = 256,
    most_pairs: int = 100,
    device: str | torch.device = "cpu",
) -> tuple[float, float]:
    """Measure how much consecutive frames differ where they show the same: in the source, and after an edit.

    The root of `warp_error` over all pairs, with flow and visibility from the source alone, in gray levels of 255.

    Args:
        count: how many frames there are, at least 2.
        longest_side: larger frames are reduced to this, in pixels.
        most_pairs: of more, as many are looked at, evenly spaced.
    """
    every = -(-(count - 1) // most_pairs)
    errors, pixels = torch.zeros(2), 0.0
    pairs = zip(pairwise(source), pairwise(edited), strict=True)
    for (a, b), after in islice(pairs, 0, None, every):
        height, width = a.shape[-2:]
        scale = min(1.0, longest_side / max(height, width))
        size = (max(1, round(scale * height)), max(1, round(scale * width)))
        frames = torch.stack([a, b, *after]).to(device)
        frames = F.interpolate(frames, size, mode="bilinear", antialias=True)
        flow = optical_flow(frames[0], frames[1])
        seen = visible(flow, optical_flow(frames[1], frames[0]))
        shown = seen.sum().item()
        for row, pair in enumerate((frames[:2], frames[2:])):
            errors[row] += shown * warp_error(pair, flow[None], seen[None]) if shown else 0.0
        pixels += shown
    before, after = (255 * (errors / max(pixels, 1)).sqrt()).tolist()
    return before, after


Motion = tuple[Float[Tensor, "2 H W"], Float[Tensor, "1 H W"]]
"""How far each pixel of an image moved in the next one, in pixels, and whether it is seen there, 1 or 0."""


def source_motion(a: Float[Tensor, "3 H W"], b: Float[Tensor, "3 H W"]) -> Motion:
    """Estimate the motion between two unedited frames by optical flow, forwards and backwards.

    Raises:
        ImportError: as `optical_flow` raises.
    """
    forward = optical_flow(a, b)
    return forward, visible(forward, optical_flow(b, a))


def reprojection(
    points: Float[Tensor, "3 H W"],
    next_points: Float[Tensor, "3 H W"],
    next_camera: Float[Tensor, "3 4"],
    intrinsics: Float[Tensor, "3 3"],
    tolerance: float = 0.03,
) -> Motion:
    """Compute where the surfaces that a view shows lie in the next view, and which of them it shows, too.

    A surface is visible there if it lies in front of that camera, inside of its picture, and no more than `tolerance`
    of its distance behind the surface that is shown there.

    Args:
        points: the point of the scene that each pixel shows, in the scene's coordinates.
        next_points: the same of the next view.
        next_camera: from that camera's coordinates to the scene's; it looks along -z, y is up (OpenGL, nerfstudio).
        intrinsics: in pixels; the middle of the first pixel is at 1/2.

    Example:
        >>> points = torch.stack([torch.tensor([[-1.0, 0.0, 1.0]]), torch.zeros(1, 3), torch.full((1, 3), -2.0)])
        >>> ahead = torch.eye(3, 4)
        >>> k = torch.tensor([[2.0, 0, 1.5], [0, 2.0, 0.5], [0, 0, 1]])
        >>> reprojection(points, points, ahead, k)[0].abs().max().item()
        0.0
    """
    height, width = points.shape[-2:]
    rotation, position = next_camera[:, :3], next_camera[:, 3]
    inside = torch.einsum("ji,jhw->ihw", rotation, points - position[:, None, None])
    depth = -inside[2]
    x = intrinsics[0, 0] * inside[0] / depth.clamp(min=1e-6) + intrinsics[0, 2] - 0.5
    y = -intrinsics[1, 1] * inside[1] / depth.clamp(min=1e-6) + intrinsics[1, 2] - 0.5
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    # Far away, the numbers are beyond what can be sampled; a depth that is no number leads nowhere.
    far = 4.0 * (width + height)
    flow = torch.stack([x - columns, y - rows]).clamp(-far, far).nan_to_num(far)
    distance = (points - position[:, None, None]).norm(dim=0)
    shown = warp((next_points - position[:, None, None]).norm(dim=0)[None], flow)[0]
    seen = (depth > 0) & (x > -0.5) & (x < width - 0.5) & (y > -0.5) & (y < height - 0.5)
    seen &= (distance - shown).abs() <= tolerance * distance
    return flow, seen[None].float()


def seam(image: Float[Tensor, "3 H W"], every: int, reach: int = 8) -> float:
    """Compare the steps across the borders of windows with those near them.

    Mean absolute difference of neighboring pixels across borders, over that of neighboring pixels up to `reach` px from
    one; rows and columns together. 1: no seam; NaN where pixels near borders are all alike.

    Args:
        every: distance of borders in pixels: they lie before each multiple of it.

    Raises:
        ValueError: if the image is too small to have a border, or every is less than 2.

    Example:
        >>> ramp = torch.linspace(0, 1, 64).expand(3, 8, 64)
        >>> round(seam(ramp, 32), 2), round(seam(ramp + 0.1 * (torch.arange(64) >= 32), 32), 1)
        (1.0, 7.3)
    """
    if every < 2:
        raise ValueError(f"the distance of borders must be at least 2 px, got {every}.")
    across, near = [], []
    for dim in (-1, -2):
        steps = image.diff(dim=dim).abs().movedim(dim, -1).flatten(0, -2).mean(0)
        borders = torch.tensor(range(every - 1, len(steps), every), dtype=torch.long)
        if not len(borders):
            continue
        distance = (torch.arange(len(steps))[:, None] - borders).abs().amin(1)
        across.append(steps[borders])
        near.append(steps[(distance > 0) & (distance <= reach)])
    if not across or not sum(map(len, near)):
        raise ValueError(f"an image of {image.shape[-1]}x{image.shape[-2]} px has no borders every {every} px.")
    inside = torch.cat(near).mean().item()
    return torch.cat(across).mean().item() / inside if inside else math.nan


GHOST_SIDE = 96
"""Longest side, in pixels, at which ghosts are looked for."""


def ghosting(sources: Sequence[Float[Tensor, "3 _ _"]], edited: Sequence[Float[Tensor, "3 _ _"]]) -> list[float]:
    """Measure how much of the other images' outlines shows in each edited image.

    The detail (luma without its blur) of an edit is compared with that of each other source, after what both have in
    common with the image's own source, sharpened, blurred or moved by up to 2 px, is taken out: the partial
    correlation, by least squares. Of the other sources the strongest counts. About 0.1 is chance; a ghost of a fifth
    of another image's contrast makes it 0.25 to 0.7, the less the noisier the edit is.

    Args:
        sources, edited: at least 2 of each; the sizes are made alike.

    Returns:
        One number in [0, 1] for each image.
    """
    height, width = sources[0].shape[-2:]
    scale = min(1.0, GHOST_SIDE / max(height, width))
    size = (max(8, round(scale * height)), max(8, round(scale * width)))

    def details(images: Sequence[Tensor]) -> Float[Tensor, "n 1 h w"]:
        small = [F.interpolate(luma(i)[None], size, mode="bilinear", antialias=True) for i in images]
        stack = torch.cat(small).double()
        fine = stack - gaussian_blur(stack, deviation=3.0, reach=7)
        return fine - fine.mean((1, 2, 3), keepdim=True)

    own, after = details(sources), details(edited)
    ghosts = []
    for index in range(len(own)):
        moved = F.unfold(F.pad(own[index : index + 1], (2, 2, 2, 2), mode="replicate"), 5)[0]
        rows = torch.cat([after[index : index + 1], own[:index], own[index + 1 :]]).flatten(1)
        moved = moved - moved.mean(1, keepdim=True)
        squares, vectors = torch.linalg.eigh(moved @ moved.T)
        # Directions in which the moved pictures of a smooth source hardly differ are rounding.
        many = squares > 1e-10 * squares[-1].clamp(min=1e-12)
        basis = (vectors[:, many] / squares[many].sqrt()).T @ moved
        left = rows - rows @ basis.T @ basis
        # What is left of an image that is its source, or of a source that is another one, is rounding.
        left = left * (left.norm(dim=1) > 1e-4 * rows.norm(dim=1))[:, None]
        ghosts.append(torch.cosine_similarity(left[1:], left[:1], dim=1).max().clamp(min=0).item())
    return ghosts
