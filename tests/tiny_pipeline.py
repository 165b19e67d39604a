"""Pipelines with random weights, small enough for a CPU, in the format diffusers saves and loads."""

import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

TOKENS = 77
"""Length of an encoded prompt, start and end marks included."""


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows the letters and two merges."""
    letters = string.ascii_lowercase + string.digits + ",."
    merges = [("i", "t</w>"), ("m", "a")]
    symbols = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    vocabulary = {symbol: i for i, symbol in enumerate([*symbols, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def tiny_unet(channels: int, **options: Any) -> UNet2DConditionModel:
    """A U-Net for windows of 16 cells."""
    return UNet2DConditionModel(
        **{
            "sample_size": 16,
            "in_channels": channels,
            "out_channels": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            **options,
        }
    ).eval()


def tiny_vae(**options: Any) -> AutoencoderKL:
    """An autoencoder with 4 px to a cell."""
    return AutoencoderKL(
        sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        **options,
    ).eval()


def tiny_text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """What CLIP's text encoders of 16 features have in common."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def tiny_scheduler(prediction_type: str = "epsilon") -> EulerAncestralDiscreteScheduler:
    """Stable Diffusion's schedule."""
    return EulerAncestralDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        prediction_type=prediction_type,
    )


def tiny_pipeline(unet_channels: int = 8, prediction_type: str = "epsilon") -> StableDiffusionInstructPix2PixPipeline:
    """The components of timbrooks/instruct-pix2pix with a few 10,000 weights, always the same.

    A latent cell is 4 px, the window 16 cells. All components have the kinds of layers the large ones have, cross
    attention among them, so that whatever is fed to the wrong place changes the result.
    """
    return StableDiffusionInstructPix2PixPipeline(
        **_components(unet_channels, prediction_type), requires_safety_checker=False
    )


def tiny_text_to_image(prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """The components of Stable Diffusion, as small."""
    return StableDiffusionPipeline(**_components(4, prediction_type), requires_safety_checker=False)


def _components(unet_channels: int, prediction_type: str) -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "unet": tiny_unet(unet_channels),
            "vae": tiny_vae(),
            "text_encoder": CLIPTextModel(tiny_text_config(tokenizer)).eval(),
            "tokenizer": tokenizer,
            "scheduler": tiny_scheduler(prediction_type),
            "safety_checker": None,
            "feature_extractor": None,
        }


def tiny_xl(cosxl: bool = False) -> StableDiffusionXLInstructPix2PixPipeline:
    """The components of InstructPix2Pix XL or, with another schedule and another empty prompt, of CosXL-Edit."""
    scheduler = (
        EDMEulerScheduler(
            sigma_min=0.002,
            sigma_max=120.0,
            sigma_data=1.0,
            prediction_type="v_prediction",
            sigma_schedule="exponential",
        )
        if cosxl
        else tiny_scheduler()
    )
    return StableDiffusionXLInstructPix2PixPipeline(
        **_xl_components(8),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=not cosxl,
        is_cosxl_edit=cosxl,
        add_watermarker=False,
    )


def tiny_text_to_image_xl() -> StableDiffusionXLPipeline:
    """The components of Stable Diffusion XL."""
    return StableDiffusionXLPipeline(**_xl_components(4), scheduler=tiny_scheduler(), add_watermarker=False)


def _xl_components(unet_channels: int) -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    text_config = tiny_text_config(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "unet": tiny_unet(
                unet_channels,
                cross_attention_dim=2 * text_config.hidden_size,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + text_config.projection_dim,
            ),
            "vae": tiny_vae(scaling_factor=0.13025),
            "text_encoder": CLIPTextModel(text_config).eval(),
            "text_encoder_2": CLIPTextModelWithProjection(text_config).eval(),
            "tokenizer": tokenizer,
            "tokenizer_2": tokenizer,
        }


def tiny_kontext(shifted: bool = True) -> FluxKontextPipeline:
    """The components of FLUX.1 Kontext; a token is 8 px."""
    tokenizer = tiny_tokenizer()
    pieces = [
        "<pad>",
        "</s>",
        "<unk>",
        *string.ascii_lowercase,
        *(f"\u2581{c}" for c in string.ascii_lowercase),
        "\u2581",
    ]
    tokenizer_2 = T5TokenizerFast(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0, additional_special_tokens=[])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        )
        vae = tiny_vae(scaling_factor=0.3611, shift_factor=0.1159)
        text_encoder = CLIPTextModel(tiny_text_config(tokenizer))
        text_encoder_2 = T5EncoderModel(
            T5Config(vocab_size=len(tokenizer_2), d_model=24, d_kv=8, d_ff=32, num_heads=2, num_layers=1)
        )
    return FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=shifted, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
        ),
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2.eval(),
        tokenizer_2=tokenizer_2,
        transformer=transformer.eval(),
    )


def save_tiny_pipeline(folder: Path, unet_channels: int = 8, prediction_type: str = "epsilon") -> Path:
    """Saves the tiny pipeline as safetensors and returns the folder."""
    tiny_pipeline(unet_channels, prediction_type).save_pretrained(folder, safe_serialization=True)
    return folder
