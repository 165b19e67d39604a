"""Time and memory of an edit with a model of InstructPix2Pix's size.

Weights are random (nothing is downloaded), the architecture is that of timbrooks/instruct-pix2pix: what an edit costs
does not depend on what the weights say. All settings are measured in one run:

    python -m tests.bench.ip2p_cost --device cuda --output ip2p_cost.json
"""

import json
import resource
import time
from pathlib import Path

import torch
import tyro
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from csd_2d import EditConfig, LatentStack
from csd_2d.edit import edit
from csd_2d.priors.instruct_pix2pix import InstructPix2PixPrior
from tests.tiny_pipeline import tiny_tokenizer


def full_size_pipeline(dtype: torch.dtype) -> StableDiffusionInstructPix2PixPipeline:
    """Stable Diffusion 1.5's components with InstructPix2Pix's eight input channels: 860 million random weights."""
    tokenizer = tiny_tokenizer()
    return StableDiffusionInstructPix2PixPipeline(
        vae=AutoencoderKL(
            sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        ).to(dtype),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        ).to(dtype),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=64, in_channels=8, cross_attention_dim=768).to(dtype),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


class TimedPrior(InstructPix2PixPrior):
    """Adds up the seconds and rows of the U-Net."""

    seconds = 0.0
    rows = 0

    def noise_estimate(self, *args, **kwargs):
        _synchronize(self.device)
        start = time.monotonic()
        estimate = super().noise_estimate(*args, **kwargs)
        _synchronize(self.device)
        self.seconds += time.monotonic() - start
        self.rows += len(estimate)
        return estimate


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak_memory(device: torch.device) -> float:
    """GB: of the GPU since the last reset, or of this process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main(
    output: Path,
    device: str = "cuda",
    dtype: str | None = None,
    steps: int = 10,
    pixels: int = 512,
    batches: tuple[int, ...] = (1, 4, 8, 16),
    micro_batches: tuple[int, ...] = (4, 16),
) -> None:
    """Measures seconds per step, the U-Net's share of them, and peak memory."""
    pipeline = full_size_pipeline(getattr(torch, dtype or ("float16" if device == "cuda" else "float32")))
    rows = []
    for offload in (False, True):
        for batch in batches:
            for micro_batch in micro_batches:
                prior = TimedPrior(pipeline, device, offload=offload, micro_batch=micro_batch)
                if device == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                images = torch.rand(1, 3, pixels, pixels, device=device)
                with torch.no_grad():
                    source = prior.encode(images).expand(batch, -1, -1, -1)
                particles = LatentStack(source)
                config = EditConfig(steps=steps, batch=0, lr=1e-3)
                edit(particles, prior, "it", EditConfig(steps=1, batch=0, lr=1e-3))  # warms up
                prior.seconds, prior.rows = 0.0, 0
                start = time.monotonic()
                edit(particles, prior, "it", config)
                _synchronize(prior.device)
                seconds = time.monotonic() - start
                with torch.no_grad():
                    prior.decode(particles.latents[:1].detach())
                rows.append(
                    {
                        "particles": batch,
                        "micro_batch": micro_batch,
                        "offload": offload,
                        "unet_rows_per_particle": prior.rows / steps / batch,
                        "seconds_per_step": round(seconds / steps, 3),
                        "unet_share": round(prior.seconds / seconds, 3),
                        "peak_memory_gb": round(_peak_memory(prior.device), 2),
                    }
                )
                print(rows[-1], flush=True)
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    output.write_text(json.dumps({"device": name, "pixels": pixels, "rows": rows}, indent=1))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
