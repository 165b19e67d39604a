"""Measure an edit: every metric that applies to it, or why it could not be computed."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from csd_2d.correspondence.flow import flow_method
from csd_2d.metrics import learned
from csd_2d.metrics.consistency import GHOST_SIDE, Motion, ghosting, seam, source_motion, warp_error, wrap_seam
from csd_2d.metrics.fidelity import decibels
from csd_2d.metrics.structure import edge_similarity, shift, ssim

Kind = Literal["images", "panorama", "video", "scene"]
"""Images without an order; an image of overlapping crops; frames; novel views along a path through a scene."""

FLOW_SIDE = 512
"""Longest side, in pixels, at which frames of a video are compared along their motion."""
GHOSTS = 16
"""Largest number of images among which ghosts are looked for, evenly spread."""


@dataclass
class Subject:
    """What is measured: images before and after an edit, RGB in [0, 1], in pairs of one size."""

    kind: Kind
    before: Sequence[Float[Tensor, "3 _ _"]]
    """Read once, in order, as are all of the others."""
    after: Sequence[Float[Tensor, "3 _ _"]]
    captions: tuple[str, str] | None = None
    """Describe the images before and after the edit; not the instruction."""
    masks: Sequence[Float[Tensor, "1 _ _"]] | None = None
    """What the edit was allowed to change, 1; where it is 0, nothing should change."""
    answers: Sequence[Sequence[Float[Tensor, "3 _ _"]]] = ()
    """Right answers, one for each image; several if the instruction has several."""
    motions: Sequence[Motion] | None = None
    """Of a scene: where the surfaces that a view shows lie in the next one, by the source's depth."""
    wrap: bool = False
    """The panorama is of 360 degrees."""
    seam_every: int | None = None
    """Of a panorama: distance in pixels of the places where crops may end. Default: a quarter of its height."""


@dataclass(frozen=True)
class Row:
    """One metric of an edit."""

    name: str
    definition: str
    good: str
    """Which values are good."""
    value: float | None = None
    """Mean over images or pairs; None: see `missing`."""
    source: float | None = None
    """The same of the unedited images, where that makes sense."""
    values: list[float] = field(default_factory=list)
    """Of each image, or of each and the next one; NaN where it is undefined, as the outlines of a black picture."""
    source_values: list[float] = field(default_factory=list)
    missing: str | None = None
    """Why there is no value."""


@dataclass(frozen=True)
class Evaluation:
    """The metrics of an edit."""

    kind: Kind
    images: int
    rows: list[Row]
    seconds: float

    def value(self, name: str) -> float | None:
        """Look up the value of a metric; None if it does not apply, or is not available."""
        return next((row.value for row in self.rows if row.name == name), None)


@dataclass(frozen=True)
class _Metric:
    name: str
    good: str
    definition: str
    kinds: tuple[Kind, ...] = ("images", "panorama", "video", "scene")


_ORDERED: tuple[Kind, ...] = ("video", "scene")
_FLAT: tuple[Kind, ...] = ("images", "panorama", "video")
"""Kinds that masks and answers can be given for."""
_METRICS = (
    _Metric(
        "CLIP directional",
        "higher",
        "cos(E(edit) - E(source), E(target caption) - E(source caption)): the change is what the captions say.",
    ),
    _Metric("CLIP image similarity", "higher", "cos(E(edit), E(source)): the content stays."),
    _Metric("CLIP consistency", "higher", "cos(E(f_k), E(f_k+1)) of consecutive images.", _ORDERED),
    _Metric(
        "direction consistency",
        "higher",
        "cos of E(edit) - E(source) of consecutive images: all are changed alike (Instruct-NeRF2NeRF).",
        _ORDERED,
    ),
    _Metric("LPIPS to the source", "lower", "Learned perceptual distance of edit and source (AlexNet)."),
    _Metric("LPIPS between frames", "lower", "The same of consecutive images.", _ORDERED),
    _Metric("intra-LPIPS", "lower", "Mean LPIPS (VGG-16) of all pairs of square windows side by side.", ("panorama",)),
    _Metric("intra-style", "lower", "The same of VGG-19's Gram matrices: windows have one style.", ("panorama",)),
    _Metric(
        "warp error",
        "lower",
        "Mean squared difference of consecutive frames along the optical flow of the source, where it is visible.",
        ("video",),
    ),
    _Metric(
        "reprojection error",
        "lower",
        "Mean squared difference of consecutive views in the places that both show, by the source scene's depth.",
        ("scene",),
    ),
    _Metric(
        "seam",
        "near the source's",
        "Differences of neighboring pixels where crops may end, over those near there; 1: no seam.",
        ("panorama",),
    ),
    _Metric("wrap seam", "near 1", "The same where the left border meets the right one.", ("panorama",)),
    _Metric("SSIM to the source", "higher", "Structural similarity of luma (Wang et al.)."),
    _Metric("edges", "higher", "Correlation of the outlines of edit and source, at any contrast."),
    _Metric("shift", "near 0", "Pixels by which the picture moved: phase correlation in windows."),
    _Metric("zoom", "near 1", "Factor by which the picture grew, from the same windows."),
    _Metric(
        "ghosting",
        "near 0",
        "Largest correlation of an image's new detail with the detail of another one's source; about 0.1 is chance.",
        ("images", "video", "scene"),
    ),
    _Metric("change", "", "Mean absolute difference of edit and source, RGB in [0, 1]."),
    _Metric("change inside", "", "The same inside of the mask.", _FLAT),
    _Metric("change outside", "near 0", "The same where the mask is black.", _FLAT),
    _Metric("PSNR outside", "higher", "In dB, where the mask is black; at most 120.", _FLAT),
    _Metric("agreement", "higher", "Share of the images on the most common answer.", _FLAT),
    _Metric("PSNR to the answer", "higher", "In dB, to the answer that each image is nearest to.", _FLAT),
)
NEEDS = {
    "CLIP directional": "it needs --source-caption and --target-caption, which describe the images before and after.",
    "reprojection error": "it needs a scene, seen by cameras without distortion.",
    "wrap seam": "it needs --wrap, for images of 360 degrees.",
    "ghosting": "it needs at least two images.",
    "change inside": "it needs --mask.",
    "change outside": "it needs --mask.",
    "PSNR outside": "it needs --mask.",
    "agreement": "it needs --answer.",
    "PSNR to the answer": "it needs --answer.",
}
"""What metrics want beside the images."""
UNDEFINED = {
    "warp error": "nothing is visible in two consecutive frames.",
    "reprojection error": "no place is visible in two consecutive views.",
    "seam": "the pictures are flat where crops may end.",
    "wrap seam": "the pictures are flat at their borders.",
    "edges": "the pictures have no outlines.",
    "shift": "no edit shows enough of what the source shows there, or the pictures are smaller than 32 px.",
    "zoom": "no edit shows enough of what the source shows there, or the pictures are smaller than 32 px.",
    "change inside": "no mask is white anywhere.",
    "change outside": "no mask is black anywhere.",
    "PSNR outside": "no mask is black anywhere.",
}
"""Why no image has a value."""


Network = TypeVar("Network")


class Learned:
    """The learned networks of metrics, each loaded when it is first asked for.

    Args:
        clip: see `csd_2d.metrics.learned.Clip`; None leaves CLIP out.
        local_files_only: never download.
        without_clip: why CLIP is left out.
    """

    def __init__(
        self,
        clip: str | None = "paper",
        device: str | torch.device = "cpu",
        local_files_only: bool = False,
        without_clip: str = "left out by --clip none.",
    ) -> None:
        self._clip, self._device, self._local = clip, device, local_files_only
        self._without_clip = without_clip
        self._loaded: dict[str, Any] = {}
        self.missing: dict[str, str] = {}
        """Why networks could not be loaded."""

    def clip(self) -> learned.Clip | None:
        """Load CLIP; None if it cannot be had, see `missing`."""
        name = self._clip
        if name is None:
            self.missing["clip"] = self._without_clip
            return None
        return self._load("clip", lambda: learned.Clip(name, self._device, self._local))

    def lpips(self, network: Literal["alex", "vgg"] = "alex") -> learned.Lpips | None:
        """Load LPIPS; None if it cannot be had, see `missing`."""
        return self._load(f"lpips {network}", lambda: learned.Lpips(self._device, self._local, network))

    def style(self) -> learned.Style | None:
        """Load the style network; None if it cannot be had, see `missing`."""
        return self._load("style", lambda: learned.Style(self._device, self._local))

    def _load(self, name: str, build: Callable[[], Network]) -> Network | None:
        if name not in self._loaded and name not in self.missing:
            try:
                self._loaded[name] = build()
            except (ImportError, OSError, ValueError) as error:
                # Of a library's paragraph on how to get online, the first sentence says what happened.
                why = str(error).strip().splitlines()[0]
                self.missing[name] = f"{why} --clip takes a folder, too." if name == "clip" else why
        return self._loaded.get(name)


def evaluate(subject: Subject, networks: Learned | None = None, progress: str | None = None) -> Evaluation:
    """Compute every metric that applies to a kind of edit; those that cannot be computed say why.

    One pair of images at a time is in memory, and the one before it.

    Args:
        networks: default: none are downloaded, and CLIP is left out.
        progress: label of a progress bar.

    Raises:
        ValueError: if there are no images, or numbers or sizes of images, masks and answers differ, or an image holds
            values that are no numbers.

    Example:
        >>> frames = list(torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
        >>> round(evaluate(Subject("images", frames, frames)).value("change"), 2)
        0.0
    """
    start = time.monotonic()
    _check_counts(subject)
    networks = networks or Learned(None, local_files_only=True)
    for load in (networks.clip, networks.lpips):  # before the progress bar, whose ETA that would spoil
        load()
    meter = _Meter(subject, networks)
    total = len(subject.before)
    for index, pictures in enumerate(tqdm(_together(subject), progress, total, disable=progress is None, unit="image")):
        meter.add(index, *pictures)
    meter.finish()
    rows = [meter.row(metric) for metric in _METRICS if subject.kind in metric.kinds]
    return Evaluation(subject.kind, total, rows, round(time.monotonic() - start, 2))


def _check_counts(subject: Subject) -> None:
    count = len(subject.before)
    if not count:
        raise ValueError("there are no images to measure.")
    parts = {"edited images": subject.after}
    parts |= {"masks": subject.masks} if subject.masks is not None else {}
    parts |= {f"images of answer {number}": answer for number, answer in enumerate(subject.answers, 1)}
    for name, images in parts.items():
        if len(images) != count:
            raise ValueError(f"there must be as many {name} as images before the edit; got {len(images)} and {count}.")


_Pictures = tuple[Tensor, Tensor, Tensor | None, list[Tensor]]


def _together(subject: Subject) -> Iterator[_Pictures]:
    masks = [None] * len(subject.before) if subject.masks is None else subject.masks
    rows = zip(subject.before, subject.after, masks, *subject.answers, strict=True)
    for index, (before, after, mask, *answers) in enumerate(rows):
        others = [("the edit", after), ("the mask", mask), *(("an answer", answer) for answer in answers)]
        for name, picture in [("the source", before), *others]:
            if picture is not None and not picture.isfinite().all():
                raise ValueError(f"{name} of image {index + 1} holds values that are no numbers.")
            if picture is not None and picture.shape[-2:] != before.shape[-2:]:
                sizes = [f"{image.shape[-1]}x{image.shape[-2]}" for image in (picture, before)]
                raise ValueError(
                    f"{name} of image {index + 1} is {sizes[0]} px, the source {sizes[1]} px; resize it to the source."
                )
        yield before, after, mask, answers


class _Meter:
    """Metrics of the images seen so far."""

    def __init__(self, subject: Subject, networks: Learned) -> None:
        self._subject, self._networks = subject, networks
        self._values: dict[str, list[float]] = defaultdict(list)
        self._source_values: dict[str, list[float]] = defaultdict(list)
        self._missing = dict(NEEDS)
        self._embeddings: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._answer_errors: list[list[float]] = []
        self._small: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._ghosts_every = -(-len(subject.before) // GHOSTS)
        self._previous: tuple[Tensor, Tensor] | None = None

    def add(self, index: int, before: Tensor, after: Tensor, mask: Tensor | None, answers: list[Tensor]) -> None:
        kind = self._subject.kind
        self._structure(before, after)
        self._change(before, after, mask)
        if answers:
            self._answer_errors.append([(answer - after).square().mean().item() for answer in answers])
        if (clip := self._networks.clip()) is not None:
            for embeddings, image in zip(self._embeddings, (before, after), strict=True):
                embeddings.append(clip.image(image))
        if (lpips := self._networks.lpips()) is not None:
            self._note("LPIPS to the source", lpips(before, after))
        if kind == "panorama":
            self._seams(before, after)
        elif index % self._ghosts_every == 0:
            for kept, image in zip(self._small, (before, after), strict=True):
                kept.append(_reduced(image, GHOST_SIDE))
        if kind in _ORDERED and self._previous is not None:
            self._pair(index, *self._previous, before, after)
        self._previous = before, after

    def _note(self, name: str, value: float, source: float | None = None) -> None:
        self._values[name].append(value)
        if source is not None:
            self._source_values[name].append(source)

    def _structure(self, before: Tensor, after: Tensor) -> None:
        self._note("SSIM to the source", ssim(before, after))
        self._note("edges", edge_similarity(before, after))
        moved = shift(before, after)
        self._note("shift", moved.length if moved.windows else math.nan)
        self._note("zoom", moved.zoom if moved.windows else math.nan)

    def _change(self, before: Tensor, after: Tensor, mask: Tensor | None) -> None:
        difference = after - before
        self._note("change", difference.abs().mean().item())
        if mask is None:
            return
        weight = mask.expand_as(difference)
        # Means over nothing are NaN.
        self._note("change inside", ((difference.abs() * weight).sum() / weight.sum()).item())
        outside = difference[weight == 0]
        self._note("change outside", outside.abs().mean().item())
        self._note("PSNR outside", decibels(outside.square().mean()).item())

    def _seams(self, before: Tensor, after: Tensor) -> None:
        every = self._subject.seam_every or max(1, min(before.shape[-2:]) // 4)
        self._try("seam", lambda: (seam(after, every), seam(before, every)))
        if self._subject.wrap:
            self._note("wrap seam", wrap_seam(after), wrap_seam(before))
        windows = [learned.windows_across(image) for image in (after, before)]
        if len(windows[0]) < 2:
            for name in ("intra-LPIPS", "intra-style"):
                self._missing[name] = "the picture is not twice as wide as high."
            return
        if (lpips := self._networks.lpips("vgg")) is not None:
            self._note("intra-LPIPS", *(learned.intra_lpips(some, lpips) for some in windows))
        if (style := self._networks.style()) is not None:
            grams = [[style.grams(window) for window in some] for some in windows]
            self._note("intra-style", *(learned.intra_style(some) for some in grams))

    def _pair(self, index: int, before: Tensor, after: Tensor, next_before: Tensor, next_after: Tensor) -> None:
        """Compare a frame or view with the next one."""
        if (lpips := self._networks.lpips()) is not None:
            self._note("LPIPS between frames", lpips(after, next_after), lpips(before, next_before))
        if before.shape != next_before.shape:
            self._missing["warp error"] = self._missing["reprojection error"] = "frames differ in size."
            return
        motions = self._subject.motions
        if self._subject.kind == "video":
            pictures = [_reduced(image, FLOW_SIDE) for image in (before, next_before, after, next_after)]
            self._try("warp error", lambda: _along(source_motion(pictures[0], pictures[1]), *pictures))
        elif motions is not None:
            found = _along(motions[index - 1], before, next_before, after, next_after)
            self._note("reprojection error", *found)

    def _try(self, name: str, compute: Callable[[], tuple[float, float | None]]) -> None:
        if name in self._missing:
            return
        try:
            self._note(name, *compute())
        except (ImportError, ValueError) as error:
            self._missing[name] = str(error)

    def finish(self) -> None:
        if len(self._small[0]) > 1:
            self._values["ghosting"] = ghosting(*self._small)
        self._clip()
        if self._answer_errors:
            errors = torch.tensor(self._answer_errors)
            best, taken = errors.min(1)
            self._note("agreement", taken.bincount().max().item() / len(taken))
            self._values["PSNR to the answer"] = decibels(best).tolist()

    def _clip(self) -> None:
        clip = self._networks.clip()
        if clip is None or not self._embeddings[0]:
            return
        before, after = (torch.stack(embeddings) for embeddings in self._embeddings)
        self._values["CLIP image similarity"] = learned.similarity(after, before).tolist()
        if self._subject.captions is not None:
            captions = [clip.text(caption) for caption in self._subject.captions]
            self._values["CLIP directional"] = learned.clip_directional(before, after, *captions).tolist()
        if self._subject.kind in _ORDERED and len(before) > 1:
            self._values["CLIP consistency"] = learned.consistency(after).tolist()
            self._source_values["CLIP consistency"] = learned.consistency(before).tolist()
            self._values["direction consistency"] = learned.direction_consistency(before, after).tolist()

    def row(self, metric: _Metric) -> Row:
        values, source = self._values.get(metric.name, []), self._source_values.get(metric.name, [])
        if not values:
            missing = self._why_missing(metric.name)
            return Row(metric.name, metric.definition, metric.good, missing=missing)
        mean, source_mean = (_mean(some) for some in (values, source))
        if mean is None:
            return Row(
                metric.name, metric.definition, metric.good, missing=UNDEFINED.get(metric.name, "it is undefined.")
            )
        definition = metric.definition
        if metric.name == "warp error":
            definition = f"{definition} Flow: {flow_method()}."
        return Row(metric.name, definition, metric.good, mean, source_mean, values, source)

    def _why_missing(self, name: str) -> str:
        networks = {
            "CLIP": "clip",
            "direction": "clip",
            "LPIPS": "lpips alex",
            "intra-LPIPS": "lpips vgg",
            "intra-style": "style",
        }
        why = self._networks.missing.get(networks.get(name.split()[0], ""))
        # What keeps all of a network's metrics away is of more use than what this one lacks, too.
        return why or self._missing.get(name) or "there are fewer than two images."


def _mean(values: list[float]) -> float | None:
    known = [value for value in values if math.isfinite(value)]
    return fmean(known) if known else None


def _reduced(image: Float[Tensor, "3 H W"], longest: int) -> Float[Tensor, "3 h w"]:
    height, width = image.shape[-2:]
    scale = longest / max(height, width)
    if scale >= 1:
        return image
    size = (max(1, round(scale * height)), max(1, round(scale * width)))
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def _along(
    motion: Motion, before: Tensor, next_before: Tensor, after: Tensor, next_after: Tensor
) -> tuple[float, float]:
    """Compute the warp error of the edited pair, and of the source's."""
    flow, seen = (part[None] for part in motion)
    pairs = ((after, next_after), (before, next_before))
    edited, source = (warp_error(torch.stack(pair), flow, seen) for pair in pairs)
    return edited, source
