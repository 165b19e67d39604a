r"""Train the tiny InstructPix2Pix: the tokenizer, the autoencoder, then the text encoder and the U-Net together.

    python -m csd_2d.tiny.train runs/tiny                  # hours on a CPU; after Ctrl-C, the same command resumes
    python -m csd_2d.tiny.train runs/tiny --device cuda --vae-steps 20000 --steps 200000 --batch 256

All training data is generated on the fly. During training, OUT receives checkpoints, sample sheets and loss curves
(`vae_*.png`, `unet_*.png`). At the end it receives `model`, a diffusers folder.
"""

# diffusers' and transformers' annotations are narrower than what their objects accept and return:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportPrivateImportUsage=false

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from diffusers.training_utils import EMAModel
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from csd_2d.errors import one_sentence
from csd_2d.io.files import replacing
from csd_2d.io.images import write_image
from csd_2d.tiny.instructions import STRUCTURAL, WORDINGS, draw_edits
from csd_2d.tiny.scenes import OBJECTS, Scenes, draw_scenes, held_out

TOKENS = 32
"""Length of an encoded prompt, including start and end tokens."""
VOCABULARY = 900
LATENT_CHANNELS = 4
CELL = 2
"""Side of a latent cell in pixels. The best linear map to 4 channels reconstructs photographs of 64 px with 30 dB from
cells of 2x2 pixels, but with 25 dB from 4x4 pixels: too much would be lost before the edit."""

OBJECT_WEIGHT = 6.0
"""Loss weight of the latent cells that objects cover; the weight of all others is 1."""
CHANGE_WEIGHT = 12.0
"""Loss weight of the latent cells in which an instruction changes the structure."""
CHANGED = 0.04
"""Difference of a pixel's channels, in [0, 1], from which on it counts as changed."""
PROBE_WEIGHT = 1.0
"""Loss weight of `ObjectProbe`."""


@dataclass(frozen=True)
class RecipeConfig:
    """Settings of the recipe. The README of the shipped model lists where its training differed from the defaults."""

    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder for checkpoints, images and the model."""
    start: Path | None = None
    """Folder of a finished model to start from. Its tokenizer and autoencoder are kept; its text encoder and U-Net are
    trained further."""
    size: int = 64
    """Side of the training images in pixels; the model's window."""
    vae_steps: int = 3000
    """Optimizer steps of the autoencoder."""
    vae_batch: int = 8
    vae_lr: float = 2e-3
    steps: int = 12000
    """Optimizer steps of the U-Net and the text encoder. It may be changed when resuming; the learning rate decays
    over the last fifth."""
    batch: int = 16
    lr: float = 1e-3
    ema: float = 0.999
    """Decay of the exponential moving average of the weights. The average is what is saved."""
    object_share: float = 2.5
    """Sampling weight of the instructions that name an object; at 1, each is about as frequent as any other."""
    structure_share: float = 1.0
    """Sampling weight of the instructions that change the structure."""
    high_noise: float = 0.5
    """Share of examples whose timestep is drawn from the top quarter; the others are drawn from all timesteps."""
    drop: float = 0.05
    """Share of examples without text; the same share has no image, and the same share neither (Brooks et al. 2023,
    3.2.1)."""
    unet_channels: tuple[int, ...] = (32, 64, 128)
    device: str = "cpu"
    save_every: int = 500
    """Steps between checkpoints."""
    seed: int = 0


# Networks


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """Train a CLIP tokenizer with merges learned from the instructions; it spells unknown words byte by byte.

    A tokenizer that already exists in `folder` is loaded instead, because retraining may number the merges differently.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    if folder.is_dir():
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    letters = sorted(ByteLevel.alphabet())
    symbols = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    blank = CLIPTokenizer(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[], model_max_length=TOKENS)
    learned = blank.train_new_from_iterator([WORDINGS], VOCABULARY, show_progress=False)
    with replacing(folder) as temporary:
        learned.save_pretrained(temporary)
    return learned


def make_vae(size: int) -> AutoencoderKL:
    """Build the autoencoder: 4 latent channels at half the resolution, initialized to a linear map.

    The initial map averages 2x2 pixels. GroupNorm removes the brightness, contrast and color of each image, and a
    network that first has to find a way around that learns slowly. (After 300 steps of 8 images: 31.7 dB from the
    linear initialization, 21.1 dB from a random one.)
    """
    vae = AutoencoderKL(
        sample_size=size,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=1,
        latent_channels=LATENT_CHANNELS,
        mid_block_add_attention=False,
    )
    _init_linear(vae)
    return vae


@torch.no_grad()
def _init_linear(vae: AutoencoderKL) -> None:
    """Initialize the encoder to average pixels and the decoder to repeat them, through all layers.

    Channels 0-2 carry the colors and 3-5 their negatives, because silu(x) - silu(-x) = x. Channels 6 and 7 carry large
    constants of opposite sign, so that GroupNorm divides all images by the same number. Residual branches start at
    zero.
    """
    constant = 8.0
    for block in vae.modules():
        if isinstance(block, ResnetBlock2D):
            nn.init.zeros_(block.conv2.weight)
            nn.init.zeros_(block.conv2.bias)
            if block.conv_shortcut is not None:
                _init_identity(block.conv_shortcut)
        elif isinstance(block, Downsample2D | Upsample2D):
            _init_identity(block.conv)
    for half in (vae.encoder, vae.decoder):
        first, last, scale = half.conv_in, half.conv_out, half.conv_norm_out.weight
        first.weight[:8], first.bias[:8] = 0, 0
        first.bias[6:8] = torch.tensor([constant, -constant])
        scale.fill_(constant * (2 / len(scale)) ** 0.5)
        last.weight[:3], last.bias[:] = 0, 0
        for color in range(3):
            first.weight[color, color, 1, 1], first.weight[3 + color, color, 1, 1] = 1, -1
            last.weight[color, color, 1, 1], last.weight[color, 3 + color, 1, 1] = 1, -1
    for conv in (vae.quant_conv, vae.post_quant_conv):
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
        conv.weight[range(LATENT_CHANNELS), range(LATENT_CHANNELS)] = 1
    vae.quant_conv.bias[LATENT_CHANNELS:] = -6  # log variance: a nearly deterministic posterior


def _init_identity(conv: nn.Conv2d) -> None:
    """Initialize a convolution to pass channels 0-7 through; at stride 2, to average them over 2x2 pixels."""
    conv.weight[:8], conv.bias[:8] = 0, 0
    center = conv.kernel_size[0] // 2
    for channel in range(8):
        if conv.stride[0] == 2:
            conv.weight[channel, channel, :2, :2] = 0.25
        else:
            conv.weight[channel, channel, center, center] = 1


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet(size: int, channels: tuple[int, ...]) -> UNet2DConditionModel:
    """Build the U-Net; text conditions every layer through the time embedding, and the coarsest level by attention.

    Attention at finer levels would cost more than all other layers together. Without text in the time embedding, the
    U-Net ignores the text for the first few thousand steps.
    """
    plain = len(channels) - 1
    return UNet2DConditionModel(
        sample_size=size // CELL,
        in_channels=2 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=(*("DownBlock2D",) * plain, "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", *("UpBlock2D",) * plain),
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=128,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=tuple(width // 32 for width in channels),  # number of heads, despite the name
    )


def make_scheduler() -> DDIMScheduler:
    """Build Stable Diffusion's noise schedule, rescaled to zero terminal SNR, where v prediction is still well posed.

    Without rescaling, 7% of the image remains at the last timestep, and the model learns to read the brightness of the
    image from it. Sampling starts from noise with zero mean, which then reads as medium gray: samples of "change
    the season" favored the two bright ones of its four answers (Lin et al. 2024, arXiv 2305.08891).
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )


def make_pipeline(
    vae: nn.Module, text_encoder: nn.Module, tokenizer: CLIPTokenizer, unet: nn.Module
) -> StableDiffusionInstructPix2PixPipeline:
    return StableDiffusionInstructPix2PixPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


# Examples


def _seed(config: RecipeConfig, stage: int, step: int) -> int:
    """Compute the seed of one step, so that a resumed run draws the same examples as an uninterrupted one."""
    return (config.seed * 2 + stage) * 2**40 + step


@dataclass(frozen=True)
class Pairs(Dataset):
    """Dataset of step -> (sources, targets, wordings, object masks (n, 3, h, w), loss weights (n, 1, h, w)).

    The same step always gives the same examples. With `vae`, images are returned as unscaled latents. The loader's
    process encodes them, in parallel with the training step.
    """

    config: RecipeConfig
    count: int
    stage: int
    vae: AutoencoderKL | None = None

    @torch.no_grad()
    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, list[str], Tensor, Tensor]:
        generator = torch.Generator(self.config.device)
        generator.manual_seed(_seed(self.config, self.stage, step))
        scenes = draw_scenes(self.count, self.config.size, generator)
        targets, wordings = draw_edits(scenes, generator, self.config.object_share, self.config.structure_share)
        weights = _weights(scenes, targets, wordings)
        if self.vae is None:
            return scenes.images, targets, wordings, scenes.masks, weights
        latents = self.vae.encode(2 * torch.cat([scenes.images, targets]) - 1).latent_dist.mode()
        return *latents.chunk(2), wordings, F.avg_pool2d(scenes.masks, CELL), F.avg_pool2d(weights, CELL)


def _loader(pairs: Pairs, steps: Iterable[int]) -> DataLoader:
    # On a CPU, a worker process draws examples during the training step. A GPU draws them faster than a worker could
    # send them.
    workers = 1 if pairs.config.device == "cpu" else 0
    return DataLoader(pairs, batch_size=None, sampler=list(steps), num_workers=workers)


# Training


class _Run:
    """Networks in training, with their loss curve and all state that a resumed run needs."""

    def __init__(self, folder: Path, name: str, networks: dict[str, nn.Module], lr: float, ema: float, steps: int):
        self.folder, self.name, self.networks, self.steps = folder, name, networks, steps
        parameters = [parameter for network in networks.values() for parameter in network.parameters()]
        self.ema = EMAModel(parameters, decay=ema, min_decay=0.0)
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-2)
        self.parameters, self.lr = parameters, lr
        self.losses: list[float] = []
        if self._file.exists():
            self._load()

    @property
    def _file(self) -> Path:
        return self.folder / f"{self.name}.pt"

    def _load(self) -> None:
        state = torch.load(self._file, map_location="cpu", weights_only=True)
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
        self.ema.load_state_dict(state["ema"])
        self.ema.to(self.parameters[0].device)
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses = state["losses"]
        print(f"{self.name}: resuming after step {len(self.losses)}")

    def save(self) -> None:
        state = {
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
        }
        with replacing(self._file) as temporary:
            torch.save(state, temporary)

    def steps_left(self) -> range:
        return range(len(self.losses), self.steps)

    def update(self, loss: Tensor) -> None:
        """Take one optimizer step.

        The learning rate warms up over 200 steps, stays constant, then decays linearly over the last fifth of the run.
        """
        step = len(self.losses)
        factor = min((step + 1) / 200, (self.steps - step) / (self.steps / 5), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * max(factor, 1e-3)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.ema.step(self.parameters)
        self.losses.append(loss.item())

    def checkpoint(self, sheet: Float[Tensor, "3 H W"]) -> None:
        self.save()
        write_image(sheet, self.folder / f"{self.name}_{len(self.losses):06d}.png")
        _plot(self.losses, f"{self.name} loss", self.folder / f"{self.name}_loss.png")


def _plot(losses: list[float], label: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    window = max(len(losses) // 200, 1)
    smooth = torch.tensor(losses)[: len(losses) // window * window].view(-1, window).mean(1)
    axes.plot([window * (i + 1) for i in range(len(smooth))], smooth.tolist())
    axes.set(xlabel="step", ylabel=label, yscale="log")
    axes.grid(alpha=0.3)
    with replacing(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def sheet(rows: Iterable[Float[Tensor, "n 3 s s"]]) -> Float[Tensor, "3 H W"]:
    """Arrange batches of images as the rows of one image, at twice their size."""
    picture = torch.cat([torch.cat(list(row.cpu()), 2) for row in rows], 1)
    return F.interpolate(picture[None], scale_factor=2)[0]


def train_vae(config: RecipeConfig) -> AutoencoderKL:
    """Train the autoencoder on scenes and edited scenes: absolute plus squared error, with a small KL term.

    The scaling factor of the returned autoencoder normalizes latents to standard deviation 1. With `config.start`, the
    autoencoder is loaded instead.
    """
    if config.start is not None:
        return AutoencoderKL.from_pretrained(config.start / "vae").to(config.device).requires_grad_(False)
    torch.manual_seed(config.seed)
    vae = make_vae(config.size).to(config.device)
    run = _Run(config.output, "vae", {"vae": vae}, config.vae_lr, config.ema, config.vae_steps)
    shown = 2 * held_out(12, config.size).images.to(config.device) - 1

    @torch.no_grad()
    def reconstructions() -> Float[Tensor, "n 3 s s"]:
        return vae.decode(vae.encode(shown).latent_dist.mode()).sample

    progress = tqdm(run.steps_left(), desc="autoencoder", unit="step", smoothing=0.02)
    for step, (sources, targets, *_) in zip(
        progress, _loader(Pairs(config, config.vae_batch // 2, stage=0), run.steps_left()), strict=True
    ):
        torch.manual_seed(_seed(config, 0, step))
        images = 2 * torch.cat([sources, targets]) - 1
        posterior = vae.encode(images).latent_dist
        error = vae.decode(posterior.sample()).sample - images
        loss = error.abs().mean() + 2 * error.square().mean() + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        run.update(loss)
        if (step + 1) % config.save_every == 0 or step + 1 == run.steps:
            restored = reconstructions()
            run.checkpoint(sheet([shown / 2 + 0.5, restored.clamp(-1, 1) / 2 + 0.5]))
            progress.set_postfix(psnr=f"{-10 * ((restored - shown) / 2).square().mean().log10():.1f} dB")
    run.ema.copy_to(run.parameters)
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        deviation = vae.encode(2 * held_out(256, config.size).images.to(config.device) - 1).latent_dist.mode().std()
    vae.register_to_config(scaling_factor=round(1 / deviation.item(), 4))
    return vae


def _tokens(tokenizer: CLIPTokenizer, wordings: list[str]) -> Int[Tensor, "n tokens"]:
    return tokenizer(wordings, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids


def drop_conditions(
    wordings: list[str], condition: Float[Tensor, "n c h w"], share: float
) -> tuple[list[str], Float[Tensor, "n c h w"]]:
    """Drop the text of a share of the examples, the image of another share of equal size, and both of a third one."""
    draw = torch.rand(len(wordings))
    drop_text = (draw < share) | ((draw >= 2 * share) & (draw < 3 * share))
    drop_image = (draw >= share) & (draw < 3 * share)
    kept_text = ["" if drop else wording for wording, drop in zip(wordings, drop_text.tolist(), strict=True)]
    return kept_text, condition.masked_fill(drop_image[:, None, None, None].to(condition.device), 0)


def draw_timesteps(count: int, num_timesteps: int, high_noise: float) -> Int[Tensor, " count"]:
    """Draw timesteps: a share `high_noise` of them from the top quarter, the others from the full range.

    At lower noise levels, the many pixels of the noisy target already reveal the answer, and the model learns nothing
    from the text.
    """
    floor = torch.where(torch.rand(count) < high_noise, 0.75, 0.0)
    return (num_timesteps * (floor + (1 - floor) * torch.rand(count))).long()


def _weights(scenes: Scenes, targets: Float[Tensor, "n 3 s s"], wordings: list[str]) -> Float[Tensor, "n 1 s s"]:
    """Compute the loss weights: `OBJECT_WEIGHT` where there is an object, `CHANGE_WEIGHT` where the structure changes.

    What an object instruction teaches is which object it names, and that shows in only a few of many cells. All objects
    are weighted, whatever the instruction, because weights that depend on the answer would bias it where there are
    several. A change of the structure has one answer.
    """
    structural = torch.tensor([wording in STRUCTURAL for wording in wordings], device=targets.device)
    changed = (targets - scenes.images).abs().amax(1, keepdim=True) > CHANGED
    weights = 1 + (OBJECT_WEIGHT - 1) * scenes.masks.sum(1, keepdim=True)
    return torch.where(changed & structural[:, None, None, None], weights.clamp(min=CHANGE_WEIGHT), weights)


class ObjectProbe(nn.Module):
    """Linear probes that predict from the U-Net's inner features where ball, box and cone are.

    They are discarded after training. Without them, a U-Net of this size did not learn in 14,000 steps which object an
    instruction names. That requires both the noun and the shape, and neither is useful before the other is known. The
    probes teach the shapes without the nouns.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self._features: dict[int, Tensor] = {}
        for number, layer in enumerate((unet.mid_block, unet.up_blocks[0])):
            layer.register_forward_hook(lambda _layer, _inputs, output, n=number: self._features.update({n: output}))
        width = unet.config.block_out_channels[-1]
        self.reads = nn.ModuleList(nn.Conv2d(width, len(OBJECTS), 1) for _ in range(2))

    def loss(self, masks: Float[Tensor, "n 3 h w"]) -> Float[Tensor, ""]:
        """Compute the binary cross-entropy of the probes on the features of the U-Net's last forward pass."""
        losses = []
        for number, read in enumerate(self.reads):
            features = self._features.pop(number)
            target = F.adaptive_avg_pool2d(masks, features.shape[-2:])
            losses.append(F.binary_cross_entropy_with_logits(read(features).float(), target))
        return torch.stack(losses).sum()


def train_unet(config: RecipeConfig, vae: AutoencoderKL) -> StableDiffusionInstructPix2PixPipeline:
    """Train the U-Net and the text encoder: v prediction, mean squared error."""
    torch.manual_seed(config.seed + 1)
    if config.start is None:
        tokenizer = make_tokenizer(config.output / "tokenizer")
        text_encoder, unet = make_text_encoder(tokenizer), make_unet(config.size, config.unet_channels)
    else:
        shutil.copytree(config.start / "tokenizer", config.output / "tokenizer", dirs_exist_ok=True)
        tokenizer = make_tokenizer(config.output / "tokenizer")
        text_encoder = CLIPTextModel.from_pretrained(config.start / "text_encoder")
        unet = UNet2DConditionModel.from_pretrained(config.start / "unet")
    text_encoder, unet = text_encoder.to(config.device), unet.to(config.device, memory_format=torch.channels_last)
    probe = ObjectProbe(unet).to(config.device)
    networks = {"unet": unet, "text_encoder": text_encoder, "probe": probe}
    run = _Run(config.output, "unet", networks, config.lr, config.ema, config.steps)
    scheduler = make_scheduler()
    pipeline = make_pipeline(vae, text_encoder, tokenizer, unet)
    shown = held_out(12, config.size)
    answers, wordings = draw_edits(shown, torch.Generator().manual_seed(1), 1.0, config.structure_share)

    def samples() -> Float[Tensor, "n 3 s s"]:
        run.ema.store(run.parameters)
        run.ema.copy_to(run.parameters)
        edited = edit_with_diffusers(pipeline, shown.images, wordings)
        run.ema.restore(run.parameters)
        return edited

    progress = tqdm(run.steps_left(), desc="U-Net", unit="step", smoothing=0.02)
    pairs = Pairs(config, config.batch, stage=1, vae=vae)
    autocast = torch.autocast(config.device, torch.bfloat16, enabled=config.device != "cpu")
    for step, (sources, targets, prompts, masks, weights) in zip(
        progress, _loader(pairs, run.steps_left()), strict=True
    ):
        torch.manual_seed(_seed(config, 1, step))
        prompts, condition = drop_conditions(prompts, sources, config.drop)
        x_0 = targets * vae.config["scaling_factor"]
        noise = torch.randn_like(x_0)
        timesteps = draw_timesteps(len(x_0), len(scheduler), config.high_noise).to(x_0.device)
        x_t = scheduler.add_noise(x_0, noise, timesteps)
        with autocast:
            text = text_encoder(_tokens(tokenizer, prompts).to(config.device))[0]
            estimate = unet(torch.cat([x_t, condition], 1), timesteps, encoder_hidden_states=text).sample
        loss = F.mse_loss(
            estimate.float(), scheduler.get_velocity(x_0, noise, timesteps), weight=weights.expand_as(x_0)
        )
        run.update(loss + PROBE_WEIGHT * probe.loss(masks))
        progress.set_postfix(loss=f"{sum(run.losses[-200:]) / len(run.losses[-200:]):.4f}", refresh=False)
        if (step + 1) % config.save_every == 0 or step + 1 == run.steps:
            run.checkpoint(sheet([shown.images, samples(), answers]))
            print("   ".join(wordings))
    run.ema.copy_to(run.parameters)
    return pipeline


def edit_with_diffusers(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    images: Float[Tensor, "n 3 s s"],
    prompts: list[str],
    guidance_scale: float = 1.0,
    image_guidance_scale: float = 1.0,
    num_inference_steps: int = 20,
    seed: int = 0,
) -> Float[Tensor, "n 3 s s"]:
    """Edit a batch with diffusers' own pipeline, which measures the model alone, without this package's algorithm."""
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(
        prompts,
        image=images,
        guidance_scale=guidance_scale,
        image_guidance_scale=image_guidance_scale,
        num_inference_steps=num_inference_steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    )
    return output.images.float().cpu()


def run_recipe(config: RecipeConfig) -> Path:
    """Train whatever is not trained yet, and return the folder of the finished model."""
    if find_spec("matplotlib") is None:  # failing at the first checkpoint would lose minutes of training
        raise ImportError('the recipe draws its loss curves with matplotlib: pip install "csd-edit[recipe]".')
    config.output.mkdir(parents=True, exist_ok=True)
    pipeline = train_unet(config, train_vae(config))
    # Save in half precision, which rounds weights by at most 0.05% and halves the size. The text encoder stays in full
    # precision because transformers, unlike diffusers, would also load it in half precision.
    for network in (pipeline.vae, pipeline.unet):
        for parameter in network.parameters():
            parameter.data = parameter.data.cpu().half()
    pipeline.text_encoder.cpu()
    folder = config.output / "model"
    with replacing(folder) as temporary:
        pipeline.save_pretrained(temporary, safe_serialization=True)
        # Both libraries store the path a part was loaded from in its files; keep local paths out of the model.
        shutil.copytree(config.output / "tokenizer", temporary / "tokenizer", dirs_exist_ok=True)
        for path in temporary.glob("*/config.json"):
            settings = json.loads(path.read_text())
            settings.pop("_name_or_path", None)
            path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    return folder


def main() -> None:
    with one_sentence("csd_2d.tiny.train"):
        config = tyro.cli(RecipeConfig, description=__doc__)
        print(f"wrote {run_recipe(config)}")


if __name__ == "__main__":
    main()
