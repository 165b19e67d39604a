"""Which training views are edited together in a round."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Selection = Literal["random", "spread", "near"]


class ViewRounds:
    """Batches of views without end; every view gets its turn before any is drawn again.

    Args:
        positions: of the cameras.
        size: views in a batch; 0 takes all.
        selection: `random` (the paper's, arXiv 2307.04787, D.3), `spread`: a batch covers the cameras' positions as
            evenly as possible, `near`: a batch is a view and its nearest neighbors.
        generator: source of what is random.

    Example:
        >>> line = torch.arange(6.0)[:, None] * torch.tensor([[1.0, 0.0, 0.0]])
        >>> a, b = next(ViewRounds(line, 2, "near", torch.Generator().manual_seed(0)))
        >>> abs(a - b)
        1
    """

    def __init__(
        self, positions: Float[Tensor, "n 3"], size: int, selection: Selection, generator: torch.Generator
    ) -> None:
        self._distances = torch.cdist(positions.double(), positions.double())
        self.size = size
        """Views of the next batches; 0 takes all."""
        self._selection, self._generator = selection, generator
        self.waiting: list[int] = []
        """Views still to come before any comes again."""

    def __next__(self) -> list[int]:
        batch: list[int] = []
        size = min(self.size or len(self._distances), len(self._distances))
        while len(batch) < size:
            if not self.waiting:
                self.waiting = list(range(len(self._distances)))
            batch.append(self._pick([view for view in self.waiting if view not in batch], batch))
            self.waiting.remove(batch[-1])
        return batch

    def _pick(self, candidates: list[int], batch: list[int]) -> int:
        """Choose the next view of a batch."""
        if not batch or self._selection == "random":
            return candidates[int(torch.randint(len(candidates), (), generator=self._generator))]
        if self._selection == "near":
            return candidates[int(self._distances[candidates, batch[0]].argmin())]
        return candidates[int(self._distances[candidates][:, batch].min(1).values.argmax())]


def farthest_points(positions: Float[Tensor, "n 3"], count: int) -> list[int]:
    """Choose points that cover all positions: each next one is the farthest from those before it.

    Source: Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985. The first point is arbitrary,
    but always the same.

    Returns:
        Their indices, at most `count`.

    Example:
        >>> sorted(farthest_points(torch.tensor([[0.0, 0, 0], [0.1, 0, 0], [8.9, 0, 0], [9, 0, 0]]), 4))
        [0, 1, 2, 3]
    """
    return next(ViewRounds(positions.cpu(), count, "spread", torch.Generator().manual_seed(0)))
