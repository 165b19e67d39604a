"""Optical flow between images, warping and visibility; the correspondence of a video's frames."""

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from csd_2d.correspondence import Correspondence
from csd_2d.errors import EditWarning
from csd_2d.hub import in_torch_cache
from csd_2d.latents import TensorFile

Pair = tuple[int, int]
"""Numbers of two frames."""
PairOfFrames = tuple[Tensor, Tensor]
"""Two frames, (3, H, W) each."""
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
        ValueError: if the sizes differ, or the file with RAFT's weights is broken.
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


def flow_method(device: str = "cpu") -> str:
    """Name what `optical_flow` estimates flow with here."""
    return "dense inverse search" if _raft(device) is None else "RAFT"


def check_flow() -> None:
    """Check that optical flow can be estimated here. ImportError if not, as `optical_flow` raises."""
    still = torch.zeros(3, SMALLEST, SMALLEST)
    optical_flow(still, still)


@cache
def flow_is_available() -> bool:
    """Tell whether optical flow can be estimated here; warns, once, if not."""
    try:
        check_flow()
    except ImportError as error:
        what = "frames of a video will share colors, but will not follow its motion"
        warnings.warn(f"{what}: {error}", EditWarning, stacklevel=2)
        return False
    return True


RAFT = {"raft_large": "raft_large_C_T_SKHT_V2-ff5fadd5.pth", "raft_small": "raft_small_C_T_V2-01064c6d.pth"}
"""Files of torchvision's weights; asking torchvision for their names takes seconds."""


@cache
def _raft(device: str) -> nn.Module | None:
    """Load torchvision's RAFT, preferably the large one; None if the weights of neither are here."""
    for name, file in RAFT.items():
        path = in_torch_cache(file)
        if path.is_file() and find_spec("torchvision") is not None:
            from torchvision.models import optical_flow as models

            model = getattr(models, name)()
            try:
                model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            except Exception as error:  # a broken file surfaces as anything from EOFError to UnpicklingError
                raise ValueError(f"{path} does not hold RAFT's weights; remove it.") from error
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


ALIKE = 0.04
"""Difference in color, in [0, 1], at which two pixels no longer count as the same thing."""


def likeness(a: Float[Tensor, "*n 3 H W"], b: Float[Tensor, "*n 3 H W"]) -> Float[Tensor, "*n 1 H W"]:
    """Compute how surely pixels of two images show the same thing, by their colors: from 1, for equal ones, to 0.

    Flow alone does not say so: between images that have nothing in common it takes any values.
    """
    return (-(a - b).square().mean(-3, keepdim=True) / (2 * ALIKE**2)).exp()


APART = 0.25
"""Standard deviation, in cells, of the flow of a cell's pixels at which they no longer count as moving together."""


class FrameFlows:
    """Correspondence of a video's frames by the optical flow between those that are `OFFSETS` apart.

    Frames are read once, in order, and no more of them are in memory than the largest offset. Flow is kept in an
    unnamed file, at latent resolution: 6 bytes a cell for each ordered pair.

    Args:
        frames: the unedited frames, of one size in whole cells, RGB in [0, 1].
        cell: pixels per latent cell along one side.
        device: where flow is estimated.
        map_pairs: applies the estimate to pairs of frames, in order; several processes may share them out.
        file: where flow is kept.

    Raises:
        ImportError: as `optical_flow` raises.
    """

    OFFSETS = (1, 2, 4, 8)

    def __init__(
        self,
        frames: Iterable[Float[Tensor, "3 H W"]],
        cell: int,
        device: str | torch.device = "cpu",
        map_pairs: Callable[[Callable[[PairOfFrames], Tensor], Iterator[PairOfFrames]], Iterable[Tensor]] = map,
        file: TensorFile | None = None,
    ) -> None:
        self._cell, self._device = cell, device
        self._rows: dict[Pair, int] = {}
        self._file = file or TensorFile()
        for flows in map_pairs(self._both_ways, self._pairs(frames)):
            self._file.append(flows.half())
        self._flows = self._file.map() if self._rows else torch.empty(0)

    def _pairs(self, frames: Iterable[Tensor]) -> Iterator[PairOfFrames]:
        recent: deque[Tensor] = deque(maxlen=max(self.OFFSETS))
        for b, frame in enumerate(frames):
            for offset in self.OFFSETS:
                if offset <= b:
                    self._rows[b - offset, b] = len(self._rows)
                    yield recent[-offset], frame
            recent.append(frame)

    def _both_ways(self, pair: PairOfFrames) -> Float[Tensor, "2 3 h w"]:
        images = torch.stack(pair).to(self._device)
        forward, backward = optical_flow(*images), optical_flow(*images.flip(0))
        flows = torch.stack([forward, backward])
        seen = torch.stack([visible(forward, backward), visible(backward, forward)])
        seen = seen * likeness(images, warp(images.flip(0), flows))
        return torch.cat(self._of_cells(images, flows, seen), 1).cpu()

    def _of_cells(
        self, images: Float[Tensor, "2 3 H W"], flows: Float[Tensor, "2 2 H W"], seen: Float[Tensor, "2 1 H W"]
    ) -> tuple[Float[Tensor, "2 2 h w"], Float[Tensor, "2 1 h w"]]:
        """Take the flow of each cell from what is visible of it, in cells.

        A cell whose pixels move apart, or that looks different where it is said to arrive, follows nothing: it holds
        the rim of something that moves, and would carry values from there to what lies behind.
        """
        flows = flows / self._cell

        def pooled(values: Tensor) -> Tensor:
            return F.avg_pool2d(values, self._cell)

        share = pooled(seen)
        flow = pooled(seen * flows) / share.clamp(min=1e-6)
        spread = pooled(seen * flows.square()).sum(1, keepdim=True) / share.clamp(min=1e-6)
        apart = (spread - flow.square().sum(1, keepdim=True)).clamp(min=0)
        cells = pooled(images)
        alike = likeness(cells, warp(cells.flip(0), flow))
        return flow, share * alike * (-apart / (2 * APART**2)).exp()

    def between(self, a: int, b: int) -> tuple[Float[Tensor, "2 h w"], Float[Tensor, "1 h w"]] | None:
        """Look up the flow from frame a to frame b in latent cells, and the share of each cell of a visible in b.

        None if the frames are not `OFFSETS` apart.
        """
        row = self._rows.get((min(a, b), max(a, b)))
        if row is None:
            return None
        known = self._flows[row, int(a > b)].float()
        return known[:2], known[2:]

    def correspondence(self, indices: Sequence[int]) -> Correspondence:
        """Match some of the frames by the flow between them."""
        rows = {index: row for row, index in enumerate(indices)}

        def averaged(values: Float[Tensor, "n c h w"], ranks: Int[Tensor, " n"] | None = None) -> Tensor:
            order = None if ranks is None else ranks.tolist()
            means = torch.stack([self._mean(values, order, rows, index) for index in indices])
            self._file.release()
            return means

        return averaged

    def _mean(
        self, values: Float[Tensor, "n c h w"], ranks: list[int] | None, rows: dict[int, int], receiver: int
    ) -> Float[Tensor, "c h w"]:
        """Average the values that all frames have in one frame's places.

        Args:
            rows: of the frames in `values`.
            receiver: number of the frame.
        """
        own = values[rows[receiver]]
        if ranks is None:
            total, weight = own.clone(), torch.ones_like(own[:1])
            for _, value, seen in self._seen(values, rows, receiver):
                total += seen * value
                weight += seen
            return total / weight
        # One behind the other, from the lowest rank to its own: what a place shows surely hides the values behind. Were
        # these weights of a mean, those of far lower ranks would count however unsure it is that they show the place.
        total, open_share = torch.zeros_like(own), torch.ones_like(own[:1])
        before = ((ranks[row], value, seen) for row, value, seen in self._seen(values, rows, receiver))
        for rank, value, seen in sorted(before, key=lambda one: one[0]):
            if rank < ranks[rows[receiver]]:
                total += open_share * seen * value
                open_share = open_share * (1 - seen)
        return total + open_share * own

    def _seen(
        self, values: Float[Tensor, "n c h w"], rows: dict[int, int], receiver: int
    ) -> Iterator[tuple[int, Float[Tensor, "c h w"], Float[Tensor, "1 h w"]]]:
        """Find each other frame's row, its values in the receiver's places, and how surely it shows these."""
        for sender in (receiver + sign * offset for offset in self.OFFSETS for sign in (-1, 1)):
            if sender in rows and (known := self.between(receiver, sender)) is not None:
                flow, seen = (part.to(values) for part in known)
                yield rows[sender], warp(values[rows[sender]], flow), seen
