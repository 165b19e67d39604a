"""One edit by several processes, on one machine or on many, as torchrun starts them:

    torchrun --nproc-per-node 2 -m csd_2d.cli panorama river.jpg night.png --prompt "make it night"

Each process has the whole model and asks it about its share of a step's particles. Of images of their own it holds
only its share; of a canvas it holds a copy, whose gradients are added up. All draw the same timesteps, batches and
noise. What is exchanged (scores, what the kernel compares, gradients of a canvas) is little beside the U-Net's work, so
that it goes through main memory, by gloo, whatever the devices are. Without `joined` there is one process.
"""

import hashlib
import importlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

from csd_2d.particles import LatentStack, Particles

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others. One that ended is noticed at once, this is for one that hangs."""

_joined = False


class LostRankError(ConnectionError):
    """Another process of this edit ended, or does not answer."""


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _joined else 1


def rank() -> int:
    """This process's number, from 0. The first is the one that prints and writes."""
    return dist.get_rank() if _joined else 0


def named(program: str) -> str:
    """A program's name in its messages, from which process they come where it is not the first."""
    number = os.environ.get("RANK", "0")
    return program if number == "0" else f"{program}, process {number}"


@contextmanager
def joined(timeout: timedelta = TIMEOUT) -> Iterator[None]:
    """Inside, the processes that torchrun started work on one edit; the CUDA device is this process's own.

    Raises:
        LostRankError: inside, if another process ends or does not answer, so that this one does not wait for ever.
    """
    global _joined
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "RANK" not in os.environ:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    # Optimisers import it, and a group that exists by then stays in its default arguments: it would outlive its
    # destruction, and its threads the interpreter, which now and then aborts the process.
    importlib.import_module("torch.distributed.nn.functional")
    before = signal.signal(signal.SIGTERM, _told_to_end)
    try:
        try:
            dist.init_process_group("gloo", timeout=timeout)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise LostRankError(f"the processes of this edit did not find each other: {reason}") from error
        _joined = True
        yield
    finally:
        _joined = False
        if dist.is_initialized():
            dist.destroy_process_group()
        signal.signal(signal.SIGTERM, before)


_RESUME = "the same command with --resume goes on from half a minute before, or less"


def _told_to_end(*_: object) -> None:
    # torchrun tells all others to end when one has ended, and they may notice it only by that.
    raise LostRankError(f"told to end, as torchrun does when another process of this edit has ended; {_RESUME}.")


@contextmanager
def _exchange() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        how = "did not answer in time" if "timed out" in str(error).lower() else "ended"
        raise LostRankError(f"another process of this edit {how}; {_RESUME}.") from error


def share(count: int, rank: int) -> range:
    """Which of so many particles a process takes: neighbours, as many as any other, to within one."""
    return range(count * rank // size(), count * (rank + 1) // size())


def held(count: int) -> range:
    """Which of so many images of their own this process holds.

    Raises:
        ValueError: if there are fewer images than processes.
    """
    if count < size():
        raise ValueError(f"{size()} processes are more than the {count} images to edit; start at most {count}.")
    return share(count, rank())


def is_shared_out(particles: Particles) -> bool:
    """Whether each process holds only its own of the particles."""
    return isinstance(particles, LatentStack) and len(particles.held) < len(particles)


class Division:
    """Who evaluates which particles of a step.

    Args:
        indices: the particles that take part in the step.
    """

    def __init__(self, particles: Particles, indices: Sequence[int]) -> None:
        self._indices = list(indices)
        self._shared_out = is_shared_out(particles)
        if self._shared_out:
            held = (share(len(particles), rank) for rank in range(size()))
            self._rows = [[row for row, index in enumerate(indices) if index in mine] for mine in held]
        else:
            self._rows = [list(share(len(indices), rank)) for rank in range(size())]
        self.mine = self._rows[rank()]
        """Rows of the step that this process evaluates."""

    def of_mine(self, look: Callable[[Sequence[int]], Any]) -> Any:
        """What `look`, e.g. `particles.source`, has of the particles that this process evaluates."""
        if self._shared_out:
            return look([self._indices[row] for row in self.mine])
        # Crops are looked at as a whole: how much one counts depends on the others.
        whole = look(self._indices)
        return whole if whole is None or size() == 1 else whole[self.mine]

    def gather(self, mine: Float[Tensor, "m ..."]) -> Float[Tensor, "n ..."]:
        """The same of all particles of the step, from what each process has of its own."""
        return _gather(mine, self._rows)


def _gather(mine: Shaped[Tensor, "m ..."], rows: Sequence[Sequence[int]]) -> Shaped[Tensor, "n ..."]:
    """What all processes have, each process's put in its rows."""
    if size() == 1:
        return mine
    # All parts of one size: gloo exchanges no others.
    padded = torch.zeros(max(map(len, rows)), *mine.shape[1:], dtype=mine.dtype)
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in rows]
    with _exchange():
        dist.all_gather(parts, padded)
    whole = mine.new_empty(sum(map(len, rows)), *mine.shape[1:])
    for part, places in zip(parts, rows, strict=True):
        whole[places] = part[: len(places)].to(mine.device)
    return whole


def numbers(particles: Particles) -> int:
    """How many latent numbers a particle has."""
    return particles.source([particles.held[0] if isinstance(particles, LatentStack) else 0]).numel()


def digests(particles: Particles) -> list[bytes]:
    """What tells one set of particles from another before any edit: of each image, or each grid of crops."""
    parameters = list(particles.parameters())
    if isinstance(particles, LatentStack):  # each has a parameter of its own
        digests = [_digest(particles, [index], [own]) for index, own in zip(particles.held, parameters, strict=True)]
    else:
        digests = [_digest(particles, indices, parameters) for indices in particles.rounds()]
    if is_shared_out(particles):
        mine = torch.tensor([[*digest] for digest in digests])
        digests = _gather(mine, [share(len(particles), rank) for rank in range(size())]).tolist()
    return [bytes(digest) for digest in digests]


def _digest(particles: Particles, indices: Sequence[int], parameters: Sequence[Tensor]) -> bytes:
    """Of what they show, which prompts apply where, and, by the gradient, what of them may change and how much."""
    changing = torch.autograd.grad(particles.render(indices).sum(), parameters)
    digest = hashlib.sha256()
    for values in (particles.source(indices), particles.shares(indices), *changing):
        if values is not None:
            digest.update(values.cpu().numpy().tobytes())
    return digest.digest()


def whole_parameters(particles: Particles) -> list[Tensor]:
    """Parameters of all processes put together, on the first; the others get what they have."""
    parameters = [parameter.detach() for parameter in particles.parameters()]
    if not is_shared_out(particles):
        return parameters
    return to_first(parameters, [parameters[0].shape] * len(particles)) or parameters


@torch.no_grad()
def load_parameters(particles: Particles, whole: Sequence[Tensor]) -> None:
    """Each process takes its own from what `whole_parameters` gave."""
    mine = whole[particles.held.start : particles.held.stop] if isinstance(particles, LatentStack) else whole
    for parameter, values in zip(particles.parameters(), mine, strict=True):
        parameter.copy_(values)


def of_each(value: int) -> list[int]:
    """What each of the processes gives."""
    return _gather(torch.tensor([value]), [[rank] for rank in range(size())]).tolist()


def sum_gradients(particles: Particles) -> None:
    """Adds up over the processes the gradients of what each holds a copy of."""
    if size() == 1 or is_shared_out(particles):
        return
    for parameter in particles.parameters():
        if parameter.grad is None:  # not drawn, by any process
            continue
        total = parameter.grad.cpu()
        with _exchange():
            dist.all_reduce(total)
        parameter.grad.copy_(total)


def to_first(mine: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Tensors of all processes, in order, on the first's CPU; the others get none.

    Args:
        mine: fp32, those that `share` gives this process.
        shapes: of all.
    """
    if size() == 1:
        return list(mine)
    with _exchange():
        if rank() > 0:
            for tensor in mine:
                dist.send(tensor.cpu().contiguous(), 0)
            return []
        received = []
        for sender in range(1, size()):
            for index in share(len(shapes), sender):
                received.append(torch.empty(*shapes[index]))
                dist.recv(received[-1], sender)
    return [*(tensor.cpu() for tensor in mine), *received]
