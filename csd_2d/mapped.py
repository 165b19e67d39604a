"""Latents in files instead of memory: what a long video costs is what one step draws."""

import mmap
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from csd_2d.particles import LatentStack
from csd_2d.transport import Transport


class TensorFile:
    """Tensors of one shape, one after the other, in a file without a name: nothing is left of it, whatever happens.

    Args:
        folder: where the file lies. Default: the system's folder for temporary files, which may itself be memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._mapping: mmap.mmap | None = None
        self._count = 0

    def append(self, values: Float[Tensor, "..."]) -> None:
        """Writes one more; before `map` only."""
        self._count += 1
        self._shape, self._dtype = values.shape, values.dtype
        self._file.write(values.detach().cpu().contiguous().numpy().data)

    def map(self) -> Float[Tensor, "n ..."]:
        """All of them as one tensor, which is read from the file, and written to it, as it is used."""
        if not self._shape.numel():  # what a model without a source image is conditioned on
            return torch.empty(self._count, *self._shape, dtype=self._dtype)
        self._file.flush()
        self._mapping = mmap.mmap(self._file.fileno(), 0)
        return torch.frombuffer(self._mapping, dtype=self._dtype).view(-1, *self._shape)

    def release(self) -> None:
        """Takes what was read or written out of this process's memory; the file has it."""
        if self._mapping is not None and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._mapping.madvise(mmap.MADV_DONTNEED)


class MappedStack(LatentStack):
    """A `LatentStack` in files. Only what is drawn is in memory, and on the device.

    Args:
        source, condition, start, mask, held, count, transport: see `LatentStack`; `start` is edited in place.
    """

    def __init__(
        self,
        source: TensorFile,
        condition: TensorFile,
        start: TensorFile,
        mask: TensorFile | None,
        device: str | torch.device,
        held: range,
        count: int,
        transport: Callable[[Sequence[int]], Transport] | None = None,
    ) -> None:
        self._files = [file for file in (source, condition, start, mask) if file is not None]
        super().__init__(
            source.map(),
            condition.map(),
            start.map(),
            None if mask is None else mask.map(),
            device=device,
            held=held,
            count=count,
            transport=transport,
        )

    def render(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        return self._released(super().render(indices))

    def _drawn(self, stack: Tensor, indices: Sequence[int]) -> Tensor:
        return self._released(super()._drawn(stack, indices))

    def _released(self, drawn: Tensor) -> Tensor:
        for file in self._files:
            file.release()
        return drawn
