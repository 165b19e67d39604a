"""Particles with latents of their own: frames of a video, views of a scene. In memory, or in files."""

import mmap
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LatentStack:
    """Particles with a latent each.

    Args:
        source: latents of the unedited images.
        start: latents to start from, which the edit changes in place if they are fp32; not those of `source`. Default:
            a copy of `source`.
        device: where the particles of a step go. Default: where `source` lies.
    """

    def __init__(
        self,
        source: Float[Tensor, "n c h w"],
        *,
        start: Float[Tensor, "n c h w"] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self._device = source.device if device is None else device
        self._source = source.detach().float()
        # Master latents stay fp32 whatever the model computes in: fp16 loses updates below 1e-3.
        self.latents = self._source.clone() if start is None else start.detach().float()
        # One parameter for each particle, so that a step has gradients of those alone that it drew.
        self._parameters = [nn.Parameter(latent) for latent in self.latents]

    def __len__(self) -> int:
        return len(self._parameters)

    def _select(self, stack: Tensor, indices: Sequence[int]) -> Tensor:
        return stack[list(indices)].to(self._device)

    def render(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        return torch.stack([self._parameters[index] for index in indices]).to(self._device)

    def source(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        return self._select(self._source, indices)

    def parameters(self) -> Iterable[nn.Parameter]:
        return self._parameters


class TensorFile:
    """Stores tensors of one shape in an unnamed temporary file, which is deleted when the process ends.

    Args:
        folder: where the file lies. Default: the system's folder for temporary files, which may itself be memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._mapping: mmap.mmap | None = None

    def append(self, values: Float[Tensor, "..."]) -> None:
        """Write one more tensor; before `map` only."""
        self._shape, self._dtype = values.shape, values.dtype
        self._file.write(values.detach().cpu().contiguous().numpy().data)

    def map(self) -> Float[Tensor, "n ..."]:
        """Map all of them as one tensor, which is read from the file, and written to it, as it is used."""
        self._file.flush()
        self._mapping = mmap.mmap(self._file.fileno(), 0)
        return torch.frombuffer(self._mapping, dtype=self._dtype).view(-1, *self._shape)

    def release(self) -> None:
        """Drop the pages read or written so far from this process's memory; the file keeps them."""
        if self._mapping is not None and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._mapping.madvise(mmap.MADV_DONTNEED)


class MappedStack(LatentStack):
    """A `LatentStack` in files. Only the particles of a step are in memory, and on the device.

    Args:
        source, start: see `LatentStack`; `start` is edited in place.
        device: where the particles of a step go.
    """

    def __init__(self, source: TensorFile, start: TensorFile, device: str | torch.device) -> None:
        self._files = (source, start)
        super().__init__(source.map(), start=start.map(), device=device)

    def render(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        return self._released(super().render(indices))

    def _select(self, stack: Tensor, indices: Sequence[int]) -> Tensor:
        return self._released(super()._select(stack, indices))

    def _released(self, selected: Tensor) -> Tensor:
        for file in self._files:
            file.release()
        return selected
