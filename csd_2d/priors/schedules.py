"""Noise schedules of diffusers' schedulers, brought to x_t = alpha x_0 + sigma noise and an estimate of that noise.

Schedulers are read once and never stepped: CSD draws single timesteps in any order.
"""

from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor


class Schedule(Protocol):
    """Input of a network at a timestep, and the noise estimate that its output amounts to."""

    num_timesteps: int

    def alpha_sigma(self, timestep: int) -> tuple[float, float]:
        """Look up alpha and sigma of x_t = alpha x_0 + sigma noise; sigma grows with the timestep."""
        ...

    def network_input(self, x_t: Float[Tensor, "b c h w"], timestep: int) -> tuple[Float[Tensor, "b c h w"], float]:
        """Scale x_t to the network's input, and convert the timestep to the network's time."""
        ...

    def noise(
        self, x_t: Float[Tensor, "b c h w"], output: Float[Tensor, "b c h w"], timestep: int
    ) -> Float[Tensor, "b c h w"]:
        """Convert a network's output to an estimate of the noise in x_t."""
        ...


class VariancePreservingSchedule:
    """alpha^2 + sigma^2 = 1, alpha^2 from the scheduler's table (Ho et al. 2020, arXiv 2006.11239).

    A schedule may end in noise alone (Lin et al. 2024, arXiv 2305.08891). There the estimate is what was put in, and a
    step of CSD on it moves nothing: timesteps beyond the noise that Stable Diffusion's schedule ends in are left out.

    A network that predicts v = alpha noise - sigma x_0 is converted: noise = alpha v + sigma x_t (Salimans & Ho 2022,
    arXiv 2202.00512, appendix D).
    """

    LEAST_ALPHA_SQUARED = 0.0046
    """Stable Diffusion's is 0.00466 at its last timestep."""

    def __init__(self, scheduler: Any) -> None:
        self.alphas_cumprod = scheduler.alphas_cumprod.double().cpu()
        self.num_timesteps = int((self.alphas_cumprod > self.LEAST_ALPHA_SQUARED).sum())
        self._predicts_v = scheduler.config.get("prediction_type") == "v_prediction"

    def alpha_sigma(self, timestep: int) -> tuple[float, float]:
        alpha_squared = self.alphas_cumprod[timestep].item()
        return alpha_squared**0.5, (1 - alpha_squared) ** 0.5

    def network_input(self, x_t: Float[Tensor, "b c h w"], timestep: int) -> tuple[Float[Tensor, "b c h w"], float]:
        return x_t, timestep

    def noise(
        self, x_t: Float[Tensor, "b c h w"], output: Float[Tensor, "b c h w"], timestep: int
    ) -> Float[Tensor, "b c h w"]:
        if not self._predicts_v:
            return output
        alpha, sigma = self.alpha_sigma(timestep)
        return alpha * output + sigma * x_t


class EDMSchedule:
    """x = x_0 + r noise with preconditioned inputs and outputs (Karras et al. 2022, arXiv 2206.00364, eq. 7).

    CSD gets latents scaled to variance preserving, x_t = x / sqrt(1 + r^2): r goes to 120, and with it CSD's step of
    weight sigma^2 would leave every bound. Timesteps are the scheduler's own noise levels, the lowest first.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = type(scheduler).from_config(scheduler.config)  # setting its timesteps leaves the original be
        self._scheduler.set_timesteps(scheduler.config["num_train_timesteps"])
        self._levels = self._scheduler.sigmas[:-1].flip(0).double()
        self.num_timesteps = len(self._levels)

    def alpha_sigma(self, timestep: int) -> tuple[float, float]:
        level = self._levels[timestep].item()
        alpha = (1 + level**2) ** -0.5
        return alpha, level * alpha

    def network_input(self, x_t: Float[Tensor, "b c h w"], timestep: int) -> tuple[Float[Tensor, "b c h w"], float]:
        level, (alpha, _) = self._levels[timestep], self.alpha_sigma(timestep)
        scaled = self._scheduler.precondition_inputs(x_t / alpha, level.item())
        return scaled, self._scheduler.precondition_noise(level).item()

    def noise(
        self, x_t: Float[Tensor, "b c h w"], output: Float[Tensor, "b c h w"], timestep: int
    ) -> Float[Tensor, "b c h w"]:
        level, (alpha, _) = self._levels[timestep].item(), self.alpha_sigma(timestep)
        x = x_t / alpha
        return (x - self._scheduler.precondition_outputs(x, output, level)) / level


class FlowSchedule:
    """Rectified flow, x_t = (1 - s) x_0 + s noise (Liu et al. 2023, arXiv 2209.03003).

    The network predicts the velocity v = noise - x_0, so noise = x_t + (1 - s) v. Timesteps are the times s that the
    scheduler would sample at, with its shift towards strong noise for large images; the lowest first.

    Args:
        tokens: how many tokens an image of the model's size has, which the shift depends on.
    """

    def __init__(self, scheduler: Any, tokens: int) -> None:
        from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift

        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        shift = calculate_shift(tokens, *(scheduler.config[name] for name in names))
        count = scheduler.config["num_train_timesteps"]
        copy = type(scheduler).from_config(scheduler.config)
        copy.set_timesteps(sigmas=torch.linspace(1, 1 / count, count).tolist(), mu=shift)
        self._times = copy.sigmas[:-1].flip(0).double()
        self.num_timesteps = count

    def alpha_sigma(self, timestep: int) -> tuple[float, float]:
        time = self._times[timestep].item()
        return 1 - time, time

    def network_input(self, x_t: Float[Tensor, "b c h w"], timestep: int) -> tuple[Float[Tensor, "b c h w"], float]:
        return x_t, self._times[timestep].item()

    def noise(
        self, x_t: Float[Tensor, "b c h w"], output: Float[Tensor, "b c h w"], timestep: int
    ) -> Float[Tensor, "b c h w"]:
        alpha, _ = self.alpha_sigma(timestep)
        return x_t + alpha * output
