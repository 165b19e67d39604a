"""An InstructPix2Pix pipeline with random weights, small enough for a CPU, in the format diffusers saves and loads."""

import string
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENS = 77
"""Length of an encoded prompt, start and end marks included."""


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows the letters and two merges."""
    letters = string.ascii_lowercase + string.digits + ",."
    merges = [("i", "t</w>"), ("m", "a")]
    symbols = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    vocabulary = {symbol: i for i, symbol in enumerate([*symbols, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def tiny_pipeline(unet_channels: int = 8, prediction_type: str = "epsilon") -> StableDiffusionInstructPix2PixPipeline:
    """The components of timbrooks/instruct-pix2pix with a few 10,000 weights, always the same.

    A latent cell is 4 px, the window 16 cells. All components have the kinds of layers the large ones have, cross
    attention among them, so that whatever is fed to the wrong place changes the result.
    """
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=unet_channels,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=2,
        )
        vae = AutoencoderKL(
            sample_size=64,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            norm_num_groups=4,
            latent_channels=4,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    return StableDiffusionInstructPix2PixPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=EulerAncestralDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_tiny_pipeline(folder: Path, unet_channels: int = 8, prediction_type: str = "epsilon") -> Path:
    """Saves the tiny pipeline as safetensors and returns the folder."""
    tiny_pipeline(unet_channels, prediction_type).save_pretrained(folder, safe_serialization=True)
    return folder
