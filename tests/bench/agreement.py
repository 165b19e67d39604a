r"""Do particles agree on one answer to an ambiguous instruction, and how close do they come to it?

Every particle gets "paint it a new color", six equally likely answers. Reported for each variant and number of
particles N, over seeds: the share of particles on the most common answer (1/6 would be chance for N -> infinity), and
the PSNR of each particle to the exact answer it took.

    python tests/bench/agreement.py --frames FOLDER --output agreement.json
    python tests/bench/agreement.py --counts 48 --batch 8 --seeds 10 \
        --variants default "clean, normalized, bandwidth x100" --output batches.json
    python tests/bench/agreement.py --prior tiny --images scenes --counts 8 --seeds 10 --output learned.json
    python tests/bench/agreement.py --prior tiny --images scenes --counts 8 --seeds 2 --prompt "make it night" \
        --variants "SVGD off" "consensus 0.5" "consensus 0.7" default "consensus 0.9" --output night.json

The particles are smooth random images, scenes that the tiny model never saw, or --frames of a video. --batch makes a
step take a part of the particles.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro

from csd_2d import EditConfig, load_preset
from csd_2d.closed_form import known_answers
from csd_2d.image_set import edit_images
from csd_2d.io.video import read_clip
from csd_2d.metrics.fidelity import agreement
from csd_2d.prior import Prior
from csd_2d.priors.loading import load_prior
from csd_2d.tiny.scenes import held_out

PROMPT = "paint it a new color"
DEFAULT = EditConfig()
PAPER = load_preset("paper")
ONE_PHASE = dataclasses.replace(DEFAULT, consensus_fraction=0.0)
PLAIN = dataclasses.replace(ONE_PHASE, bandwidth_scale=1.0)
VARIANTS = {
    "SVGD off": dataclasses.replace(DEFAULT, svgd=False),
    "SVGD off, one phase": dataclasses.replace(ONE_PHASE, svgd=False),
    "SVGD off, shared noise": dataclasses.replace(DEFAULT, svgd=False, noise="shared"),
    "paper": PAPER,
    "paper, clean kernel": dataclasses.replace(PAPER, kernel_input="clean"),
    "paper, shared noise": dataclasses.replace(PAPER, noise="shared"),
    "paper, rows normalized": dataclasses.replace(PAPER, normalize_rows=True, lr=1.0),
    "clean, normalized": PLAIN,
    "clean, normalized, bandwidth x10": dataclasses.replace(PLAIN, bandwidth_scale=10.0),
    "clean, normalized, bandwidth x100": dataclasses.replace(PLAIN, bandwidth_scale=100.0),
    "two phases, SVGD in both": dataclasses.replace(DEFAULT, bandwidth_scale=1.0),
    **{f"consensus {share}": dataclasses.replace(DEFAULT, consensus_fraction=share) for share in (0.5, 0.7, 0.9)},
    "default": DEFAULT,
}


def _smooth_images(count: int, height: int, width: int, seed: int) -> torch.Tensor:
    coarse = torch.rand(count, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True) * 0.7 + 0.15


def _measure(images: torch.Tensor, prior: Prior, prompt: str, config: EditConfig) -> tuple[float, float]:
    """Share of particles on the most common answer; mean PSNR in dB to the answer each took."""
    edited = torch.stack(edit_images(list(images), prior, prompt, config))
    share, psnr = agreement(edited, known_answers(prompt, images))
    return share, psnr.mean().item()


def main(
    output: Path,
    frames: Path | None = None,
    images: Literal["smooth", "scenes"] = "smooth",
    prior: str = "analytic",
    prompt: str = PROMPT,
    seeds: int = 20,
    steps: int = 60,
    counts: tuple[int, ...] = (1, 2, 4, 8, 16),
    batch: int = 0,
    variants: tuple[str, ...] = tuple(VARIANTS),
    height: int = 27,
    width: int = 48,
) -> None:
    """Measures every variant and writes a table as JSON."""
    torch.set_num_threads(1)
    model = load_prior(prior)
    clip = None
    if frames is not None:
        clip = F.interpolate(torch.stack(list(read_clip(frames).frames)), (height, width), mode="area")
    rows = []
    for name in variants:
        for count in counts:
            start = time.monotonic()
            results = []
            for seed in range(seeds):
                config = dataclasses.replace(VARIANTS[name], steps=steps, batch=batch, seed=seed)
                if clip is not None:
                    particles = clip[:: max(len(clip) // count, 1)][:count]
                elif images == "scenes":
                    particles = held_out(count, 64, seed).images
                else:
                    particles = _smooth_images(count, height, width, seed)
                results.append(_measure(particles, model, prompt, config))
            shares, psnr = torch.tensor(results).unbind(1)
            rows.append(
                {
                    "variant": name,
                    "particles": count,
                    "agreement": round(shares.mean().item(), 3),
                    "agreement_std": round(shares.std().item(), 3) if seeds > 1 else None,
                    "psnr": round(psnr.mean().item(), 1),
                    "seconds": round(time.monotonic() - start, 1),
                }
            )
            print(rows[-1], flush=True)
    output.write_text(
        json.dumps(
            {"prompt": prompt, "prior": prior, "seeds": seeds, "steps": steps, "batch": batch, "rows": rows}, indent=1
        )
    )


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
