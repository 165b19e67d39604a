"""Schedule an edit: the batch, the timesteps and the mixing of each step."""

import math
from collections import deque
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from csd_2d.config import EditConfig
from csd_2d.csd import Mixing, NoisedParticles
from csd_2d.kernels import KernelMatrix, RBFKernel
from csd_2d.mixing import SVGD, ColorConsensus, ColorLeader, PlaceConsensus, chained, own_scores, per_prompt
from csd_2d.particles import Layout

MAX_STEP_ELEMENTS = 2**24
"""Most elements of latents in a step, 64 MiB: scores that are mixed together are held in memory together, several times
over. It is what 1,024 particles of 512 px have in Stable Diffusion."""


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


class Schedule:
    """The batch, the timesteps and the mixing of each step of an edit.

    Args:
        count: number of particles.
        elements: elements per particle.
        num_timesteps: of the prior.
        generator: source of the batches.
        mixing: mixes scores in all steps, in place of the rule that `config` names.
    """

    def __init__(
        self,
        config: EditConfig,
        layout: Layout,
        count: int,
        elements: int,
        num_timesteps: int,
        generator: torch.Generator,
        mixing: Mixing | None = None,
    ) -> None:
        self._config, self._last_timestep = config, num_timesteps - 1
        rounds = layout.rounds or [list(range(count))]
        most, longest = max(1, MAX_STEP_ELEMENTS // elements), max(map(len, rounds))
        size = longest if config.batch is None else config.batch
        self._parts = 1 if config.batch is not None or size <= most else -(-size // most)
        self.steps = config.steps * self._parts
        """Steps of the edit: a step that would not fit in memory is taken in parts, at one noise level."""
        size = min(size, -(-size // self._parts), most)
        self.rows_at_once = min(size, max(1, most // 16))
        """Particles that go to the prior together, so that large batches take little more memory than small ones."""
        self._batches = Batches(rounds, 0 if size >= longest else size, generator)
        self._pass = max(longest / size, 1.0)
        """Steps in which every particle takes part once."""
        self._leader = ColorLeader()
        self._rules = (mixing, mixing) if mixing is not None else _rules(config, layout, self._leader)

    def batch(self, index: int) -> list[int]:
        """Draw the particles of a step; steps are asked for in order."""
        # Batches of one pass have one leader. A single batch has all that there is to choose from.
        self._leader.stays = index % math.ceil(self._pass) > 0
        if self._pass == 1:
            self.forget_leader()
        return next(self._batches)

    def forget_leader(self) -> None:
        """Let the next batch choose freely whom to follow."""
        self._leader.known = None

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self._batches.state_dict(), "leader": self._leader.known}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._batches.load_state_dict(state["batches"])
        self._leader.known = state["leader"]

    def learning_rate(self, config: EditConfig) -> float:
        """Compute the learning rate of some settings: by default higher if a step takes some of the particles only."""
        if config.lr is not None or self._parts > 1:
            return config.learning_rate
        return min(config.learning_rate * self._pass, 1.0)

    def ends_parts(self, index: int) -> bool:
        """Tell whether a step is the last of the parts that one of the configuration's steps is taken in."""
        return (index + 1) % self._parts == 0

    def _level(self, index: int) -> float | None:
        """Compute the timestep of a step, as a share of the noise schedule; None: it is drawn."""
        config = self._config
        if config.schedule == "random":
            return None
        # Slow at first: several answers are open under the strongest noise only.
        passed = min(index // self._parts, config.steps - 1) / max(config.steps - 1, 1)
        return config.max_timestep - (config.max_timestep - config.min_timestep) * passed**2

    def timesteps(self, index: int) -> tuple[int, int]:
        """Compute the lowest and the highest timestep of a step; those beyond the last are like the last."""
        level = self._level(index)
        low, high = (self._config.min_timestep, self._config.max_timestep) if level is None else (level, level)
        return round(low * self._last_timestep), round(high * self._last_timestep)

    def mix(
        self, scores: Float[Tensor, "n c h w"], noised: NoisedParticles
    ) -> tuple[Float[Tensor, "n c h w"], KernelMatrix | None]:
        """Mix scores by the rule of their timestep; see `csd_2d.csd.Mixing`."""
        strong, weak = self._rules
        consensus = noised.timestep >= round(self._config.consensus_timestep * self._last_timestep)
        return (strong if consensus else weak)(scores, noised)


def _rules(config: EditConfig, layout: Layout, leader: ColorLeader) -> tuple[Mixing, Mixing]:
    """Choose the rules that mix scores under strong noise, and under weak noise."""
    if config.mixing == "none":
        return own_scores, own_scores
    if config.mixing == "svgd":
        kernel = RBFKernel(bandwidth_scale=config.bandwidth_scale)
        svgd = SVGD(kernel, config.kernel_input, config.normalize_rows)
        return svgd, svgd
    colors = ColorConsensus(remembered=leader)
    if layout.shares is not None:  # each of several prompts has a leader of its own, in each part of a step another
        colors = per_prompt(ColorConsensus(), layout.shares)
    if layout.correspondence is None or not config.matches_places:
        return colors, own_scores
    places = PlaceConsensus(layout.correspondence)
    return chained(colors, replace(places, led=True)), places
