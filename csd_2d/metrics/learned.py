"""Metrics by learned networks: CLIP, LPIPS and style. The formulas are plain functions of embeddings.

Networks come from a hub or a local folder. Where one cannot be had, loading it raises, and says why.
"""

import math
from http.client import HTTPException
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any, Literal
from urllib.request import urlopen

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from csd_2d.hub import HUB_TIMEOUT, hub_refusal, in_torch_cache, reason

CLIP_MODELS = {
    "paper": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
    "small": "openai/clip-vit-base-patch32",
}
"""Names for CLIP models: the OpenCLIP ViT-bigG-14 of the paper (10 GB), and one of 0.6 GB."""
_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of RGB, as OpenAI trained CLIP; OpenCLIP's models take the same."""


def clip_directional(
    source: Float[Tensor, "n d"],
    edited: Float[Tensor, "n d"],
    source_caption: Float[Tensor, " d"],
    target_caption: Float[Tensor, " d"],
) -> Float[Tensor, " n"]:
    """Compute how much images change as captions do: cos(E(edited) - E(source), E(target) - E(source caption)).

    Gal et al., StyleGAN-NADA, arXiv 2108.00946, eq. 2. Captions describe the images; instructions do not.

    Args:
        source, edited, source_caption, target_caption: unit vectors of `Clip`.
    """
    return torch.cosine_similarity(edited - source, (target_caption - source_caption)[None], dim=-1)


def similarity(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Compute the cosine of embeddings, pair by pair."""
    return torch.cosine_similarity(a, b, dim=-1)


def consistency(embeddings: Float[Tensor, "n d"]) -> Float[Tensor, " n-1"]:
    """Compute the cosine of each frame's or novel view's embedding and the next one's."""
    return similarity(embeddings[:-1], embeddings[1:])


def direction_consistency(source: Float[Tensor, "n d"], edited: Float[Tensor, "n d"]) -> Float[Tensor, " n-1"]:
    """Compute how alike consecutive frames were changed: the cosine of E(edited) - E(source) of both.

    Haque et al., Instruct-NeRF2NeRF, arXiv 2303.12789, section 4.
    """
    return consistency(edited - source)


class Clip:
    """A CLIP model in transformers' format.

    Args:
        name: one of `CLIP_MODELS`, a folder, or a hub id.
        local_files_only: use only models that are on this machine.

    Raises:
        OSError: if there is no such model here, or it cannot be downloaded, or is not whole.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu", local_files_only: bool = False) -> None:
        place = CLIP_MODELS.get(name, name)
        folder = Path(place).is_dir()
        refusal = None if folder or local_files_only else hub_refusal(place)
        try:
            model, self._tokenizer = _read_clip(place, device, folder or local_files_only or refusal is not None)
        except Exception as error:  # a broken file surfaces as anything from KeyError to SafetensorError
            if refusal is not None:
                why = f"model {place} is not on this machine, and the hub does not give it: {reason(refusal)}"
            else:
                why = f"{'folder' if folder else 'model'} {place} is no CLIP model that can be read: {reason(error)}"
            raise OSError(f"{why}.") from error
        self._model: Any = model.eval().requires_grad_(False).to(device)
        self._device = device
        self.size: int = self._model.config.vision_config.image_size

    @torch.no_grad()
    def image(self, image: Float[Tensor, "3 H W"]) -> Float[Tensor, " d"]:
        """Embed an image, RGB in [0, 1], as a unit vector.

        Resized and cropped in the middle, as CLIP was trained. Of a picture wider than two squares, a panorama, that
        would leave most out: there it is the direction of the mean over squares that cover it.
        """
        squares = _squares(image, self.size)
        pixels = (squares - squares.new_tensor(_MEAN)[:, None, None]) / squares.new_tensor(_DEVIATION)[:, None, None]
        hidden = self._model.vision_model(pixel_values=pixels.to(self._device, self._model.dtype)).pooler_output
        embeddings = F.normalize(self._model.visual_projection(hidden).float().cpu(), dim=-1)
        return F.normalize(embeddings.mean(0), dim=-1)

    @torch.no_grad()
    def text(self, text: str) -> Float[Tensor, " d"]:
        """Embed a caption as a unit vector; what is longer than the model takes is cut off."""
        tokens = self._tokenizer(text, truncation=True, return_tensors="pt").to(self._device)
        hidden = self._model.text_model(**tokens).pooler_output
        return F.normalize(self._model.text_projection(hidden)[0].float().cpu(), dim=-1)


def _read_clip(place: str, device: str | torch.device, local_files_only: bool) -> tuple[Any, Any]:
    """Read the model and its tokenizer. ValueError for weights that are not all there, which would be random."""
    if local_files_only and not Path(place).is_dir():
        from huggingface_hub import try_to_load_from_cache

        if not isinstance(try_to_load_from_cache(place, "config.json"), str):  # before an import of seconds
            raise ValueError("the hub's cache does not hold it")
    from transformers import AutoTokenizer, CLIPModel

    half = torch.device(device).type == "cuda"
    options: dict[str, Any] = {"local_files_only": local_files_only}
    read: Any = CLIPModel.from_pretrained(
        place, dtype=torch.float16 if half else torch.float32, output_loading_info=True, **options
    )
    model, found = read
    lacking = sorted([*found["missing_keys"], *found["mismatched_keys"]], key=str)
    if lacking:
        raise ValueError(f"it lacks {len(lacking)} weights of a CLIPModel, such as {lacking[0]}")
    return model, AutoTokenizer.from_pretrained(place, **options)


def _squares(image: Float[Tensor, "3 H W"], side: int) -> Float[Tensor, "n 3 side side"]:
    height, width = image.shape[-2:]
    scale = side / min(height, width)
    size = (max(side, round(scale * height)), max(side, round(scale * width)))
    resized = F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)
    longest = max(size)
    count = 1 if longest <= 2 * side else math.ceil(longest / side)
    starts = [(longest - side) // 2] if count == 1 else torch.linspace(0, longest - side, count).round().int().tolist()
    dim = -2 if size[0] > size[1] else -1
    return torch.stack([resized.narrow(dim, start, side) for start in starts])


def windows_across(image: Float[Tensor, "3 H W"]) -> Float[Tensor, "n 3 s s"]:
    """Cut a panorama into squares side by side; what is left at the end is left out."""
    side = min(image.shape[-2:])
    dim = -1 if image.shape[-1] >= image.shape[-2] else -2
    return torch.stack([image.narrow(dim, i * side, side) for i in range(image.shape[dim] // side)])


class Lpips:
    """LPIPS (Zhang et al., arXiv 1801.03924, version 0.1), by torchmetrics.

    Args:
        network: whose features are compared: AlexNet's, or VGG-16's.
        local_files_only: use weights only if they lie in torch.hub's cache.

    Raises:
        ImportError: without torchmetrics or torchvision.
        OSError: without the network's weights.
    """

    def __init__(
        self,
        device: str | torch.device = "cpu",
        local_files_only: bool = False,
        network: Literal["alex", "vgg"] = "alex",
    ) -> None:
        # Read here, and once more by torchmetrics, which would run code that a file holds.
        _weights({"alex": "alexnet", "vgg": "vgg16"}[network], local_files_only)
        try:  # after the weights, for it takes seconds to import
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
        except ImportError as error:
            raise ImportError('LPIPS needs torchmetrics: pip install "csd-edit[metrics]".') from error
        distance = LearnedPerceptualImagePatchSimilarity(net_type=network, normalize=True)
        self._network, self._device = distance.eval().requires_grad_(False).to(device), device

    @torch.no_grad()
    def __call__(self, a: Float[Tensor, "3 H W"], b: Float[Tensor, "3 H W"]) -> float:
        """Compute the distance of two images, RGB in [0, 1], each side at least 64 px; smaller ones are enlarged."""
        pair = torch.stack([a, b])
        scale = 64 / min(a.shape[-2:])
        if scale > 1:  # AlexNet leaves nothing of smaller ones
            pair = F.interpolate(pair, scale_factor=scale, mode="bilinear").clamp(0, 1)
        return self._network(*pair.clamp(0, 1)[:, None].to(self._device)).item()


class Style:
    """Gram matrices of VGG-19's first layers, from torchvision: those that SyncDiffusion's own measure takes.

    Args, Raises: as `Lpips`, of VGG-19.
    """

    LAYERS = (0, 2, 5, 7, 10)
    """The first five convolutions, before their ReLU: conv1_1, 1_2, 2_1, 2_2, 3_1."""

    def __init__(self, device: str | torch.device = "cpu", local_files_only: bool = False) -> None:
        weights = _weights("vgg19", local_files_only)
        from torchvision.models import vgg19  # after the weights, for it takes seconds to import

        with torch.device("meta"):  # weights that would be replaced take seconds to draw
            network = vgg19()
        network.load_state_dict(weights, assign=True)
        layers = [nn.ReLU() if isinstance(layer, nn.ReLU) else layer for layer in network.features.children()]
        self._layers = nn.Sequential(*layers[: self.LAYERS[-1] + 1]).eval().requires_grad_(False).to(device)
        self._device = device

    @torch.no_grad()
    def grams(self, image: Float[Tensor, "3 H W"]) -> list[Float[Tensor, "c c"]]:
        """Compute the Gram matrix of each layer, over the number of its numbers."""
        mean, deviation = image.new_tensor([0.485, 0.456, 0.406]), image.new_tensor([0.229, 0.224, 0.225])
        values = ((image - mean[:, None, None]) / deviation[:, None, None])[None].to(self._device)
        found = []
        for index, layer in enumerate(self._layers):
            values = layer(values)
            if index in self.LAYERS:
                flat = values[0].flatten(1)
                found.append((flat @ flat.T / flat.numel()).cpu())
        return found


def intra_style(grams: list[list[Float[Tensor, "c c"]]]) -> float:
    """Compute how much the styles of a panorama's windows differ.

    The mean over all pairs of the sum over layers of the mean squared difference of Gram matrices (Lee et al.,
    SyncDiffusion, arXiv 2306.05178, Intra-Style-L; their code adds the pairs up instead, so that its figure grows with
    the width).

    Args:
        grams: of each window, see `Style`; at least 2.
    """
    pairs = list(combinations(grams, 2))
    return sum(float((a - b).square().mean()) for one, other in pairs for a, b in zip(one, other, strict=True)) / len(
        pairs
    )


def intra_lpips(windows: Float[Tensor, "n 3 s s"], distance: Any) -> float:
    """Compute the mean LPIPS of all pairs of a panorama's windows (Intra-LPIPS; SyncDiffusion, see `intra_style`).

    Args:
        distance: `Lpips` on VGG-16, as theirs.
    """
    pairs = list(combinations(windows, 2))
    return sum(distance(a, b) for a, b in pairs) / len(pairs)


WEIGHTS = {
    "alexnet": "alexnet-owt-7be5be79.pth",
    "vgg16": "vgg16-397923af.pth",
    "vgg19": "vgg19-dcbb9e9d.pth",
}
"""Files of torchvision's weights. To ask torchvision for their names takes seconds: longer than to measure a video."""


def _weights(network: str, local_files_only: bool) -> dict[str, Tensor]:
    """Read torchvision's weights from torch.hub's cache, where they are downloaded to.

    The cache is the folder hub/checkpoints in the one that TORCH_HOME names.

    Raises:
        ImportError: without torchvision.
        OSError: if they cannot be had.
    """
    if find_spec("torchvision") is None:
        raise ImportError('the metric needs torchvision: pip install "csd-edit[metrics]".')
    path = in_torch_cache(WEIGHTS[network])
    url = f"https://download.pytorch.org/models/{path.name}"
    absent = f"{path.name} is not in torch.hub's cache, {path.parent}"
    if not path.is_file():
        if local_files_only:
            raise OSError(f"{absent}, and nothing is downloaded.")
        try:
            urlopen(url, timeout=HUB_TIMEOUT).close()  # the download itself would wait for minutes
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.split("-")[-1])
        except (OSError, RuntimeError, HTTPException) as error:  # RuntimeError: other content than expected
            raise OSError(f"{absent}, and could not be downloaded ({error}).") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file surfaces as anything from EOFError to UnpicklingError
        raise OSError(f"{path} cannot be read as weights ({type(error).__name__}).") from error
