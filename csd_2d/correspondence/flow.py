"""Optical flow between images, warping and visibility; the correspondence of a video's frames."""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from csd_2d.correspondence import Correspondence

Pair = tuple[int, int]
"""Numbers of two frames."""
SMALLEST = 128
"""Shortest side, in pixels, that flow is estimated at: what RAFT needs, and patches of 8 px (DIS) can move in."""


@torch.no_grad()
def optical_flow(a: Float[Tensor, "3 H W"], b: Float[Tensor, "3 H W"]) -> Float[Tensor, "2 H W"]:
    """Estimate how far each pixel of `a` has moved in `b`, in pixels: (dx, dy), right and down.

    RAFT (Teed & Deng, arXiv 2003.12039), where torchvision's weights lie in torch.hub's cache; nothing is downloaded.
    Elsewhere dense inverse search (Kroeger et al., arXiv 1603.03590), from OpenCV. Small images are enlarged first.

    Args:
        a, b: RGB in [0, 1], of one size.

    Raises:
        ValueError: if the sizes differ.
        ImportError: without RAFT's weights and OpenCV.

    Example:
        >>> a = torch.rand(3, 12, 16, generator=torch.Generator().manual_seed(0))
        >>> a = F.interpolate(a[None], (96, 128), mode="bicubic")[0].clamp(0, 1)
        >>> flow = optical_flow(a, a.roll(3, dims=-1))
        >>> [round(value) for value in flow.flatten(1).median(1).values.tolist()]
        [3, 0]
    """
    if a.shape != b.shape:
        raise ValueError(f"flow needs two images of one size, got {tuple(a.shape)} and {tuple(b.shape)}.")
    height, width = a.shape[-2:]
    shortest = min(height, width)
    enlarged = (side * max(SMALLEST, shortest) // shortest for side in (height, width))
    size = [-(-side // 8) * 8 for side in enlarged]  # RAFT takes multiples of 8 px
    pair = F.interpolate(torch.stack([a, b]), size, mode="bilinear", antialias=True)
    model = _raft(str(a.device))
    flow = _dense_inverse_search(pair) if model is None else model(*(2 * pair - 1)[:, None])[-1][0]
    flow = F.interpolate(flow[None], (height, width), mode="bilinear", antialias=True)[0]
    return flow * flow.new_tensor([width / size[1], height / size[0]])[:, None, None]


def check_flow() -> None:
    """Check that optical flow can be estimated here. ImportError if not, as `optical_flow` raises."""
    still = torch.zeros(3, SMALLEST, SMALLEST)
    optical_flow(still, still)


@cache
def _raft(device: str) -> nn.Module | None:
    """Load torchvision's RAFT, preferably the large one; None if the weights of neither are here."""
    try:
        from torchvision.models import optical_flow as models
    except ImportError:
        return None
    for build, weights in (
        (models.raft_large, models.Raft_Large_Weights.DEFAULT),
        (models.raft_small, models.Raft_Small_Weights.DEFAULT),
    ):
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        if path.is_file():
            model = build()
            model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            return model.to(device).eval().requires_grad_(False)
    return None


def _dense_inverse_search(pair: Float[Tensor, "2 3 H W"]) -> Float[Tensor, "2 H W"]:
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            'optical flow needs OpenCV where RAFT\'s weights are not cached: pip install "csd-edit[flow]".'
        ) from error
    rgb = (pair.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    a, b = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in rgb)
    still = np.zeros((*a.shape, 2), np.float32)
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(a, b, still)
    return torch.from_numpy(np.asarray(flow)).permute(2, 0, 1).to(pair)


def warp(values: Float[Tensor, "*n c H W"], flow: Float[Tensor, "*n 2 H W"]) -> Float[Tensor, "*n c H W"]:
    """Sample values of an image b at the pixels of an image a: out(p) = values(p + flow(p)).

    Bilinear; beyond the border the border's values are repeated.

    Args:
        values: anything that lies on b's pixels.
        flow: from a to b, see `optical_flow`.

    Example:
        >>> flow = torch.stack([torch.ones(1, 3), torch.zeros(1, 3)])
        >>> warp(torch.tensor([[[1.0, 2.0, 3.0]]]), flow)
        tensor([[[2., 3., 3.]]])
    """
    height, width = flow.shape[-2:]
    x, y = _landing(flow).unbind(-3)
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    sampled = F.grid_sample(
        values.reshape(-1, *values.shape[-3:]),
        grid.reshape(-1, height, width, 2),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return sampled.view(values.shape)


def _landing(flow: Float[Tensor, "*n 2 H W"]) -> Float[Tensor, "*n 2 H W"]:
    """Compute p + flow(p), as (x, y) in pixels, 0 in the middle of the first."""
    height, width = flow.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=flow.device), torch.arange(width, device=flow.device), indexing="ij"
    )
    return flow + torch.stack([x, y])


def visible(forward: Float[Tensor, "*n 2 H W"], backward: Float[Tensor, "*n 2 H W"]) -> Float[Tensor, "*n 1 H W"]:
    """Mark pixels of a that are visible in b too with 1, those hidden there or out of the picture with 0.

    A pixel is visible if the flow back returns to it: |f(p) + g(p + f(p))|^2 < 0.01 (|f|^2 + |g|^2) + 0.5
    (Sundaram, Brox & Keutzer, ECCV 2010, section 3.2).

    Args:
        forward, backward: flow f from a to b, and g from b to a, in pixels.

    Example:
        >>> right = torch.stack([torch.full((1, 4), 2.0), torch.zeros(1, 4)])
        >>> visible(right, -right).tolist()
        [[[1.0, 1.0, 0.0, 0.0]]]
    """
    height, width = forward.shape[-2:]
    x, y = _landing(forward).unbind(-3)
    inside = (x > -0.5) & (x < width - 0.5) & (y > -0.5) & (y < height - 0.5)
    returned = warp(backward, forward)
    gap = (forward + returned).square().sum(-3)
    length = forward.square().sum(-3) + returned.square().sum(-3)
    return (inside & (gap < 0.01 * length + 0.5)).unsqueeze(-3).to(forward)


class FrameFlows:
    """Correspondence of a video's frames by optical flow, estimated when frames first meet in a step, and kept.

    Frames further apart than `REACH` count as showing nothing in common. Flow of the others is kept at latent
    resolution, 12 bytes a cell for each ordered pair.

    Args:
        frames: the unedited frames, of one size in whole cells, RGB in [0, 1].
        cell: pixels per latent cell along one side.
        device: where flow is estimated; it is kept on the CPU.
        map_pairs: applies the estimate to pairs of frames, in order; several processes may share them out.
    """

    REACH = 12

    def __init__(
        self,
        frames: Sequence[Float[Tensor, "3 H W"]],
        cell: int,
        device: str | torch.device = "cpu",
        map_pairs: Callable[[Callable[[Pair], Tensor], Sequence[Pair]], Iterable[Tensor]] = map,
    ) -> None:
        self._frames, self._cell, self._device, self._map = frames, cell, device, map_pairs
        self._known: dict[Pair, Float[Tensor, "3 h w"]] = {}

    def flow(self, a: int, b: int) -> Float[Tensor, "2 H W"]:
        """Estimate the flow from frame a to frame b, in pixels."""
        return optical_flow(*(self._frames[index].to(self._device) for index in (a, b)))

    def between(self, a: int, b: int) -> tuple[Float[Tensor, "2 h w"], Float[Tensor, "1 h w"]]:
        """Look up the flow from frame a to frame b in latent cells, and the share of each cell of a visible in b."""
        self._estimate([(a, b)])
        return self._known[a, b][:2], self._known[a, b][2:]

    def _estimate(self, pairs: Iterable[Pair]) -> None:
        """Estimate the flow of pairs of frames, in both directions, unless it is known."""
        missing = list(dict.fromkeys((min(pair), max(pair)) for pair in pairs if pair not in self._known))
        for (a, b), both in zip(missing, self._map(self._both_ways, missing), strict=True):
            self._known[a, b], self._known[b, a] = both.unbind()

    def _both_ways(self, pair: Pair) -> Float[Tensor, "2 3 h w"]:
        forward, backward = self.flow(*pair), self.flow(*reversed(pair))
        flows = torch.stack([forward, backward])
        seen = torch.stack([visible(forward, backward), visible(backward, forward)])
        pooled = F.avg_pool2d(torch.cat([flows, seen], 1), self._cell).cpu()
        return torch.cat([pooled[:, :2] / self._cell, pooled[:, 2:]], 1)

    def correspondence(self, indices: Sequence[int]) -> Correspondence:
        """Match some of the frames by the flow between them."""
        self._estimate((a, b) for a in indices for b in indices if 0 < abs(a - b) <= self.REACH)

        def moved(values: Tensor, receiver: int) -> tuple[Tensor, Tensor]:
            here = indices[receiver]
            near = [row for row, sender in enumerate(indices) if 0 < abs(sender - here) <= self.REACH]
            arrived, valid = values.clone(), torch.zeros_like(values[:, :1])
            valid[receiver] = 1
            if near:
                maps = zip(*(self.between(here, indices[row]) for row in near), strict=True)
                flows, seen = (torch.stack(rows).to(values) for rows in maps)
                arrived[near], valid[near] = warp(values[near], flows), seen
            return arrived, valid

        return moved
