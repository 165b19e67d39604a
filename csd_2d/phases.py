"""Schedule an edit: the batch, the range of timesteps and the mixing of each step."""

import math
from collections import deque
from dataclasses import dataclass

import torch

from csd_2d.config import EditConfig
from csd_2d.correspondence import everywhere
from csd_2d.csd import Mixing
from csd_2d.kernels import Kernel, RBFKernel
from csd_2d.mixing import SVGD, ColorConsensus, own_scores
from csd_2d.particles import Layout

MAX_STEP_ELEMENTS = 2**23
"""Most elements of latents in a step, 32 MiB: scores that are mixed together are held in memory together, several times
over. It is what 512 particles of 512 px have in Stable Diffusion."""

OWN_BANDWIDTH_SCALE, CORRESPONDING_BANDWIDTH_SCALE = 0.01, 10.0
"""Factors on the median bandwidth in the second phase: so small that each particle follows its own score, and, where
corresponding places are mixed, so large that all count almost alike."""


def default_batch(count: int) -> int:
    """Compute the number of particles a step draws by default: a third (paper: 4 of 12), but 8 at least."""
    return max(8, -(-count // 3))


class Batches:
    """Random batches without end; every particle is drawn equally often, to within one.

    Args:
        rounds: sets of particles; each is used up before the next, drawn at random, is begun. See `Layout.rounds`.
        size: particles in a batch; 0 takes a whole round.
    """

    def __init__(self, rounds: list[list[int]], size: int, generator: torch.Generator) -> None:
        self._rounds, self._generator = rounds, generator
        self._size = min([size, *map(len, rounds)])
        self._queue: deque[int] = deque()
        """Particles still to be drawn in this round, in order."""
        self._rounds_left: list[int] = []
        """Rounds still to come before any repeats; the last is next."""

    def _begin_round(self, batch: list[int]) -> None:
        if not self._rounds_left:
            self._rounds_left = torch.randperm(len(self._rounds), generator=self._generator).tolist()
        particles = self._rounds[self._rounds_left.pop()]
        shuffled = [particles[i] for i in torch.randperm(len(particles), generator=self._generator)]
        # What this batch holds already goes to the end of the next round, so that no batch holds it twice.
        self._queue.extend(sorted(shuffled, key=batch.__contains__))

    def __next__(self) -> list[int]:
        batch: list[int] = []
        if not self._queue:
            self._begin_round(batch)
        size = self._size or len(self._queue)
        while len(batch) < size:
            if not self._queue:
                self._begin_round(batch)
            batch.append(self._queue.popleft())
        return batch

    def state_dict(self) -> tuple[list[int], list[int]]:
        return list(self._queue), list(self._rounds_left)

    def load_state_dict(self, state: tuple[list[int], list[int]]) -> None:
        self._queue, self._rounds_left = deque(state[0]), list(state[1])


@dataclass(frozen=True)
class Phase:
    """A stretch of an edit's steps."""

    batches: Batches
    timesteps: tuple[float, float]
    """Lowest and highest timestep, as shares of the noise schedule."""
    mix: Mixing


class Phases:
    """The two phases of an edit: consensus under strong noise, then refinement under weak noise.

    Args:
        count: number of particles.
        elements: elements per particle.
        num_timesteps: of the prior.
        generator: source of the batches.
        kernel: compares particles in both phases. Default: an RBF kernel with the bandwidths of `config`.
        mixing: mixes scores in both phases. Default: SVGD, or own scores, as `config` says.
    """

    def __init__(
        self,
        config: EditConfig,
        layout: Layout,
        count: int,
        elements: int,
        num_timesteps: int,
        generator: torch.Generator,
        kernel: Kernel | None = None,
        mixing: Mixing | None = None,
    ) -> None:
        self._config = config
        rounds = layout.rounds or [list(range(count))]
        most, longest = max(1, MAX_STEP_ELEMENTS // elements), max(map(len, rounds))
        batch = config.batch
        if batch is None:
            batch = default_batch(count) if layout.batch is None else layout.batch
        batch = min(batch or longest, most)
        self.rows_at_once = min(batch, max(1, most // 16))
        """Particles that go to the prior together, so that a consensus step, which draws many, takes no more memory
        in it than a refinement step."""
        self._num_timesteps = num_timesteps
        self._consensus_steps = math.ceil(config.consensus_fraction * config.steps)
        self._consensus = Phase(
            Batches(rounds, 0 if longest <= most else most, generator),
            (config.phase_boundary, config.max_timestep),
            mixing or _consensus_mixing(config, layout, kernel),
        )
        self._refinement = Phase(
            Batches(rounds, 0 if longest <= batch else batch, generator),
            (config.min_timestep, config.phase_boundary),
            mixing or _refinement_mixing(config, layout, kernel),
        )

    def of_step(self, index: int) -> Phase:
        """Look up the phase of a step."""
        return self._consensus if index < self._consensus_steps else self._refinement

    def timesteps(self, index: int) -> tuple[int, int]:
        """Compute the lowest and the highest timestep of a step."""
        low, high = self.of_step(index).timesteps
        if self._config.schedule == "descending":
            steps, consensus = self._config.steps, self._consensus_steps
            if index < consensus:
                # Slow at first: several answers are open under the strongest noise only.
                low = high = high - (high - low) * (index / consensus) ** 2
            else:
                low = high = max(high - (high - low) * (index - consensus + 1) / max(steps - consensus, 1), low)
        lowest, highest = (round(share * (self._num_timesteps - 1)) for share in (low, high))
        return lowest, highest

    def state_dict(self) -> dict[str, tuple[list[int], list[int]]]:
        return {
            "consensus": self._consensus.batches.state_dict(),
            "refinement": self._refinement.batches.state_dict(),
        }

    def load_state_dict(self, state: dict[str, tuple[list[int], list[int]]]) -> None:
        self._consensus.batches.load_state_dict(state["consensus"])
        self._refinement.batches.load_state_dict(state["refinement"])


def _consensus_mixing(config: EditConfig, layout: Layout, kernel: Kernel | None) -> Mixing:
    if not config.svgd:
        return own_scores
    if config.consensus == "color":
        return ColorConsensus()
    find = layout.correspondence if config.transport in ("first", "both") else None
    # Particles without corresponding places must be mixed, too, or distant ones take different answers.
    extended = None if find is None else lambda indices: everywhere(find(indices))
    kernel = kernel or RBFKernel(bandwidth_scale=config.consensus_bandwidth_scale)
    return SVGD(kernel, config.kernel_input, config.normalize_rows, extended)


def _refinement_mixing(config: EditConfig, layout: Layout, kernel: Kernel | None) -> Mixing:
    if not config.svgd:
        return own_scores
    find = layout.correspondence if config.transport in ("second", "both") else None
    scale = config.bandwidth_scale
    if scale is None:
        scale = OWN_BANDWIDTH_SCALE if find is None else CORRESPONDING_BANDWIDTH_SCALE
    return SVGD(kernel or RBFKernel(bandwidth_scale=scale), config.kernel_input, config.normalize_rows, find)
