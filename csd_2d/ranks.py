"""One edit by several processes, on one machine or on many, as torchrun starts them:

    torchrun --nproc-per-node 2 -m csd_2d.cli panorama river.jpg night.png --prompt "make it night"

Each process has the whole model and all latents; rows of noise estimates and images to encode or decode are shared out.
All draw the same timesteps, batches and noise, and take the same steps; their devices must be of one kind. The data
they exchange (noise estimates, latents of images) are small beside the U-Net's work, so that they go through main
memory, by gloo, whatever the devices are. Without `joined` there is one process.
"""

import importlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from csd_2d.prior import Branch, Prior

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others. One that ended is noticed at once, this is for one that hangs."""

_joined = False


class LostRankError(ConnectionError):
    """Another process of this edit ended, or does not answer."""


def size() -> int:
    """Count the processes."""
    return dist.get_world_size() if _joined else 1


def rank() -> int:
    """Return this process's number, from 0. The first is the one that prints and writes."""
    return dist.get_rank() if _joined else 0


def named(program: str) -> str:
    """Return a program's name for its messages, with the process's number unless it is the first."""
    number = os.environ.get("RANK", "0")
    return program if number == "0" else f"{program}, process {number}"


@contextmanager
def joined(timeout: timedelta = TIMEOUT) -> Iterator[None]:
    """Join the processes that torchrun started in one edit; the CUDA device is this process's own.

    Raises:
        LostRankError: inside, if another process ends or does not answer, so that this one does not wait for ever.
    """
    global _joined
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "RANK" not in os.environ:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    # Optimizers import it, and a group that exists by then stays in its default arguments: it would outlive its
    # destruction, and its threads the interpreter, which now and then aborts the process.
    importlib.import_module("torch.distributed.nn.functional")
    before = signal.signal(signal.SIGTERM, _raise_lost_rank)
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


_RESUME = "the same command with --resume goes on; at most half a minute is lost"


def _raise_lost_rank(*_: object) -> None:
    # torchrun tells all others to end when one has ended, and they may notice it only by that.
    raise LostRankError(f"told to end, as torchrun does when another process of this edit has ended; {_RESUME}.")


def all_gather(tensor: Shaped[Tensor, "..."]) -> list[Shaped[Tensor, "..."]]:
    """Exchange tensors of one shape and dtype; returns those of all processes, in order, on this one's device."""
    if size() == 1:
        return [tensor]
    sent = tensor.cpu().contiguous()
    received = [torch.empty_like(sent) for _ in range(size())]
    try:
        dist.all_gather(received, sent)
    except RuntimeError as error:
        how = "did not answer in time" if "timed out" in str(error).lower() else "ended"
        raise LostRankError(f"another process of this edit {how}; {_RESUME}.") from error
    return [part.to(tensor.device) for part in received]


def gather_numbers(number: int | float | bool) -> list[float]:
    """Exchange a number; returns those of all processes, in order."""
    return torch.cat(all_gather(torch.tensor([number], dtype=torch.float64))).tolist()


Item = TypeVar("Item")


def shared_map(function: Callable[[Item], Tensor], items: Sequence[Item] | Iterator[Item]) -> Iterator[Tensor]:
    """Map a function over items, in order, on every process; each evaluates it for one item in `size()`.

    Args:
        function: its tensors are all of one shape.
    """
    remaining = iter(items)
    while group := list(islice(remaining, size())):
        # With fewer items left than processes, some evaluate the last one, too: all must exchange the same shape.
        result = function(group[min(rank(), len(group) - 1)])
        yield from all_gather(result)[: len(group)]


def share_rows(prior: Prior) -> Prior:
    """Share out a prior's noise estimates among the processes; with a single process, the prior itself."""
    return prior if size() == 1 else cast(Prior, _SharedRows(prior))


class _SharedRows:
    """A prior whose noise estimates are shared out by rows."""

    def __init__(self, prior: Prior) -> None:
        self._prior = prior

    def __getattr__(self, name: str) -> Any:
        if name == "_prior":  # of a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self._prior, name)

    def noise_estimate(
        self, x_t: Tensor, timestep: int, condition: Tensor, text: Any, branches: Sequence[Branch]
    ) -> Tensor:
        """Estimate some of the rows, and exchange them for the others; see `Prior`."""
        share = -(-len(x_t) // size())
        rows = slice(rank() * share, (rank() + 1) * share)
        estimates = x_t.new_zeros(share, *x_t.shape[1:])
        if len(x_t[rows]):
            made = self._prior.noise_estimate(x_t[rows], timestep, condition[rows], text, branches[rows])
            estimates[: len(made)] = made
        return torch.cat(all_gather(estimates))[: len(x_t)]
