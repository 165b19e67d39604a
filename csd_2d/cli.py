"""The `csd` command."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import tyro

from csd_2d import ranks
from csd_2d.config import EditConfig, check_replaced
from csd_2d.errors import one_sentence
from csd_2d.generate import GENERATE, generate
from csd_2d.io.images import IMAGE_SUFFIXES, LOSSY_SUFFIXES, check_fits, read_image, read_picture, write_image
from csd_2d.io.masks import read_mask
from csd_2d.loss import check_prompt
from csd_2d.metrics.consistency import wrap_seam
from csd_2d.presets import load_preset
from csd_2d.prior import Prior
from csd_2d.priors.loading import DEFAULT_MODEL, EDITORS, check_prior, load_prior

if TYPE_CHECKING:
    import torch

    from csd_2d.csd import Step
    from csd_2d.evaluate import Subject
    from csd_2d.io.video import Clip


@dataclass
class PriorOptions:
    """Options of the diffusion model."""

    prior: str | None = None
    """`tiny` (ships with csd: 64 px windows, a fixed list of instructions), `ip2p` (InstructPix2Pix from the hub,
    follows any), `analytic` (exact scores of closed-form edits), `sd` (text-to-image Stable Diffusion), or a folder or
    hub id with a diffusers pipeline: InstructPix2Pix, also XL or CosXL-Edit, Stable Diffusion, also XL, or FLUX.1
    Kontext. Default: ip2p where there is a CUDA device, tiny elsewhere; of `csd generate` sd."""
    source_prompt: str | None = None
    """For text-to-image models: describes the images before the edit; the prompt then describes them after it."""
    device: str | None = None
    """Torch device. Default: cuda where there is one, else cpu."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Precision of the model. Default: float16 on cuda, else float32. Latents are float32 in any case."""
    micro_batch: int = 8
    """Rows the U-Net takes at once: fewer need less memory and give the same result."""
    offload: bool = False
    """Keep the networks of the model that are not in use in main memory."""
    local_files_only: bool = False
    """Use only models that are already on this machine; never contact the hub."""
    compile: bool = False
    """Compile the model with torch.compile: faster steps, but the first ones take minutes."""
    attention: str | None = None
    """How FLUX computes attention: a backend of diffusers, e.g. flash or sage, which has to be installed."""

    def load(self, prompts: Sequence[str], default: str | None = None) -> Prior:
        import torch

        check_prompt(prompts)  # before minutes go into loading a model
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        name = self.prior or default or ("ip2p" if device.startswith("cuda") else "tiny")
        if self.prior is None and ranks.rank() == 0:
            print(f"prior: {name} on {device} (--prior chooses another)", file=sys.stderr)
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        for prompt in prompts:
            check_prior(name, prompt)
        return load_prior(
            name,
            device=device,
            dtype=dtype,
            micro_batch=self.micro_batch,
            offload=self.offload,
            local_files_only=self.local_files_only,
            source_prompt=self.source_prompt,
            compile=self.compile,
            attention=self.attention,
        )


@dataclass
class RunOptions:
    """Options of all commands that run a model."""

    prompt: tuple[str, ...]
    """Instruction that says what to change, or for text-to-image models what to show. A panorama takes several, one for
    each region."""
    model: Annotated[PriorOptions, tyro.conf.arg(name="")] = field(default_factory=PriorOptions)
    preset: str = "default"
    """Source of the defaults below: a name in configs/, or a .yaml file. `paper` is the published algorithm; for a
    panorama, add --no-fade and a --stride of a quarter of the window."""
    edit: Annotated[EditConfig, tyro.conf.arg(name="")] = field(default_factory=EditConfig)
    resume: bool = False
    """Continue the same command where it was interrupted. Its state lies beside OUT, in OUT.unfinished, and is removed
    when the edit is done."""
    watch: Annotated[int | None, tyro.conf.arg(metavar="[PORT]")] = None
    """Serve a page, on this machine only, that shows the picture or the frames while they are edited, and can end the
    edit. Without a number at port 8080."""

    @contextmanager
    def watched(
        self, title: str, prior: Prior, before: "Sequence[torch.Tensor]", keys: Sequence[int] | None = None
    ) -> "Iterator[Callable[[Step], object] | None]":
        """Serve the page inside, if it is wanted; yields what an edit calls after every step."""
        if self.watch is None:
            yield None
            return
        if not 0 < self.watch < 1 << 16:
            raise ValueError(f"--watch takes a port from 1 to 65535, got {self.watch}.")
        if ranks.rank() > 0:  # all processes ask each other whether to end
            yield lambda step: False
            return
        from csd_2d.watch import Watch

        with Watch(self.watch, title, self.edit.steps, prior, before, keys) as page:
            print(f"csd: {page.message()}", file=sys.stderr)
            yield page.on_step

    @contextmanager
    def resumable(self, output: Path) -> Iterator[Path]:
        """Yield the file that keeps the state of the edit until the output is written, which is when the block ends.

        Without `--resume` the state of an older edit is deleted.

        Raises:
            ValueError: if there is nothing to go on with.
        """
        path = output.with_name(output.name + ".unfinished")
        if self.resume and not path.exists():
            raise ValueError(f"nothing to resume: there is no {path}.")
        if not self.resume and path.exists():
            print(f"csd: beginning anew, without --resume; {path} of an interrupted edit is deleted.", file=sys.stderr)
            path.unlink(missing_ok=True)  # another process may have come first
        try:
            yield path
        except KeyboardInterrupt as error:
            if path.exists():  # it is first written after half a minute
                raise KeyboardInterrupt("the same command with --resume goes on") from error
            raise
        if ranks.rank() == 0:
            path.unlink(missing_ok=True)


@dataclass
class Options(RunOptions):
    """Options of all commands that edit."""

    mask: Path | None = None
    """Image of the input's size: white where the edit may change it, black where it must stay bit for bit. For a video
    one image, or a folder with one for each frame."""
    feather: float = 4.0
    """Width in pixels of the mask's soft border, inside the white part."""


@dataclass
class Panorama:
    """Edit an image of any size, typically a wide one, through overlapping crops that agree with each other.

    Example: csd panorama river.jpg night.png --prompt "make it night"
    """

    input: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IN")]
    """Image to edit."""
    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Image to write, of the same size; the name's ending sets the format."""
    options: Annotated[Options, tyro.conf.arg(name="")]
    regions: tuple[Path, ...] | None = None
    """With several prompts: for each of them an image of the input's size, white where it applies. Where they overlap
    prompts mix; where all are black nothing changes, with a border as soft as --feather says. Default: vertical stripes
    of one width, from left to right."""
    blend_regions: bool = False
    """Mix prompts cell by cell. Off: as published, by how much of a crop each region covers."""
    wrap: bool = False
    """For 360 degree images: the left and the right border are neighbors."""
    stride: int | None = None
    """Largest distance between crops in latent cells (of 8 px in Stable Diffusion). Default: three quarters of the
    model's window; the paper takes a quarter."""
    fade: bool = True
    """Crops fade into each other, and their grid is shifted from step to step. Off: they count alike and stay in place,
    as published, which leaves seams and changes borders less."""

    def run(self) -> str:
        from csd_2d.panorama import edit_panorama

        _check_image_output(self.output, self.input)
        options, picture = self.options, read_picture(self.input)
        image = picture.rgb
        _say_lost(self.input, self.output, picture.carried.lost_in(self.output.suffix), options.mask)
        if not self.wrap and b"equirectangular" in (picture.carried.xmp or b""):
            _say(f"{self.input} says that it is a 360 degree image; --wrap makes its left and right border fit.")
        height, width = image.shape[-2:]
        check_fits(self.output, height, width)
        mask = None if options.mask is None else read_mask(options.mask, (height, width), options.feather)
        regions = None if self.regions is None else [read_mask(path, (height, width)) for path in self.regions]
        prior = options.model.load(options.prompt)
        watched = options.watched(f"panorama {self.input.name}", prior, [image])
        with options.resumable(self.output) as resume, watched as on_step:
            edited = edit_panorama(
                image,
                prior,
                options.prompt,
                options.edit,
                on_step,
                progress="editing",
                resume=resume,
                stride=self.stride,
                mask=mask,
                regions=regions,
                feather=options.feather,
                blend_regions=self.blend_regions,
                wrap=self.wrap,
                fade=self.fade,
            )
            if ranks.rank() == 0:
                write_image(edited, self.output, picture)
        if self.wrap and ranks.rank() == 0:
            print(f"seam at the border: {wrap_seam(edited):.2f}, the source's {wrap_seam(image):.2f} (1: none)")
        return f"{self.output} ({width}x{height} px)"


@dataclass
class Video:
    """Edit all frames of a video together. It may be of any length: only the frames of one step are in memory.

    Example: csd video dance.mp4 dance_sepia.mp4 --prompt "make it sepia"
    """

    input: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IN")]
    """Video file, or folder with its frames as images."""
    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Video file to write, or a folder for PNG frames. Size, frame times and sound stay."""
    options: Annotated[Options, tyro.conf.arg(name="")]
    start: float = 0.0
    """Second at which the part to edit begins; the rest is left out."""
    end: float | None = None
    """Second at which it ends. Default: with the video."""
    fps: float | None = None
    """Frames a second of a folder. Default: 24."""
    keyframes: int = 1
    """Edit every n-th frame only; those between follow the source's optical flow (pip install
    "csd-edit[flow]"). Less work and less flicker; but places that no keyframe shows are only recolored."""

    def run(self) -> str:
        from csd_2d.io.video import check_video_output, read_clip, read_masks, write_clip
        from csd_2d.keyframes import key_indices
        from csd_2d.video import edit_video

        scratch = _check_output(self.output, self.input)
        clip = read_clip(self.input, self.start, self.end, self.fps)
        check_video_output(self.output, clip)
        _say_what_is_lost(clip, self.output)
        options = self.options
        masks = None if options.mask is None else read_masks(options.mask, clip, options.feather)
        if len(options.prompt) != 1:
            raise ValueError(f"a video takes one prompt, got {len(options.prompt)}.")
        prior = options.model.load(options.prompt)
        keys = key_indices(len(clip.frames), self.keyframes) if self.keyframes > 1 else None
        watched = options.watched(f"video {self.input.name}", prior, clip.frames, keys)
        with options.resumable(self.output) as resume, watched as on_step:
            edited = edit_video(
                clip,
                prior,
                options.prompt[0],
                options.edit,
                masks,
                on_step,
                progress="editing",
                resume=resume,
                keyframes=self.keyframes,
                scratch=scratch,
            )
            if ranks.rank() == 0:
                write_clip(edited, self.output, progress="writing")
        if ranks.rank() == 0:
            self._print_flicker(clip, read_clip(self.output), prior.device)
        return f"{self.output} ({len(edited.frames)} frames)"

    def _print_flicker(self, source: "Clip", edited: "Clip", device: "torch.device | str" = "cpu") -> None:
        from csd_2d.metrics.consistency import flicker

        if len(source.frames) < 2 or len({*source.sizes}) > 1:
            return
        try:
            before, after = flicker(source.frames, edited.frames, len(source.frames), device=device)
        except ImportError:  # no optical flow
            return
        hint = "; --keyframes 4 lowers it" if after > before and self.keyframes == 1 else ""
        print(f"flicker: {after:.1f} gray levels, the source's {before:.1f}{hint}")


def _say(sentence: str) -> None:
    if ranks.rank() == 0:
        print(f"csd: {sentence}", file=sys.stderr)


def _say_lost(source: Path, output: Path, lost: Sequence[str], mask: Path | None = None) -> None:
    """Say, before any work is done, what of the input the output cannot keep."""
    lost = list(lost)
    if mask is not None and output.suffix.lower() in LOSSY_SUFFIXES:
        lost.append("what the mask keeps is compressed with loss")
    if lost:
        _say(f"{output} will not keep all of {source}: {'; '.join(lost)}.")


def _say_what_is_lost(clip: "Clip", output: Path) -> None:
    """Print what of a clip is changed or cannot be kept; sound that cannot is dropped."""
    from csd_2d.io.video import sound_fits, what_is_lost

    for sentence in (*clip.notes, *what_is_lost(clip, output)):
        _say(sentence)
    if clip.sound is not None and not sound_fits(clip.sound, output):
        clip.sound = None


@dataclass
class Generate:
    """Make an image from text alone, typically a wide one, with a text-to-image model.

    Several prompts share it in vertical stripes, from left to right. Of the options below, baseline and image guidance
    scale are always noise and the guidance scale.

    Example: csd generate alps.png --prompt "a photo of the Alps at dawn" --width 2048
    """

    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Image to write; the name's ending sets the format."""
    options: Annotated[RunOptions, tyro.conf.arg(name="")]
    height: int | None = None
    """In pixels. Default: the model's window."""
    width: int | None = None
    """In pixels. Default: four of the model's windows."""
    wrap: bool = False
    """For 360 degree images: the left and the right border fit together."""
    stride: int | None = None
    """Largest distance between crops in latent cells (of 8 px in Stable Diffusion). Default: three quarters of the
    model's window."""

    def run(self) -> str:
        import torch

        from csd_2d.priors.text_to_image import TextToImagePrior

        _check_image_output(self.output)
        options = self.options
        if options.model.source_prompt is not None:
            raise ValueError("csd generate has no source; leave --source-prompt out.")
        edits_images = f"the prior '{options.model.prior}' edits images; csd generate needs a text-to-image model."
        if options.model.prior in EDITORS:
            raise ValueError(edits_images)
        prior = options.model.load(options.prompt, default="sd")
        if not isinstance(prior, TextToImagePrior):
            raise ValueError(edits_images)
        gray = torch.full(
            (3, self.height or prior.window * prior.cell, self.width or 4 * prior.window * prior.cell), 0.5
        )
        check_fits(self.output, *gray.shape[-2:])
        watched = options.watched(f"generate {self.output.name}", prior, [gray])
        with options.resumable(self.output) as resume, watched as on_step:
            image = generate(
                prior,
                options.prompt,
                self.height,
                self.width,
                options.edit,
                self.stride,
                self.wrap,
                on_step,
                progress="generating",
                resume=resume,
            )
            if ranks.rank() == 0:
                write_image(image, self.output)
        return f"{self.output} ({image.shape[-1]}x{image.shape[-2]} px)"


@dataclass
class Demo:
    """Make a small 3D scene, train it, edit it and film both. Takes a few minutes on two CPU cores, offline.

    Needs nerfstudio (pip install "csd-edit[nerf]").
    """

    output: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="OUT")] = None
    """Folder for the results, new or empty. Default: csd_demo, or csd_demo_2 and so on where that is taken."""
    prompt: str = "make it night"
    """What to change, as one of the instructions whose answer is known; another one lists them."""
    seed: int = 0
    """Seed of the training and of the edit."""
    preset: str = "default"
    """Settings of the edit: a name in configs/, such as `paper`, or a .yaml file."""
    guidance_scale: float | None = None
    """Text guidance scale omega_y. Default: the tiny model's, 1."""

    def run(self) -> str:
        if ranks.size() > 1:
            raise ValueError("csd demo runs in one process.")
        demo = _scene_command("demo", "csd demo")
        names = (Path(f"csd_demo_{i}" if i > 1 else "csd_demo") for i in count(1))
        output = self.output or next(name for name in names if not name.exists())
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise ValueError(f"output {output} exists and is not an empty folder.")
        _check_output(output)
        return str(demo(output, self.prompt, self.seed, self.preset, self.guidance_scale))


@dataclass
class Eval:
    """Measure an edit: fidelity, consistency, structure. Prints a table; writes report.json and report.html to DIR.

    What is measured: two images (a panorama if twice as wide as high), two videos or folders of frames, or two runs of
    nerfstudio, RUN/config.yml, of which novel views are rendered along a path between the training cameras.

    Example: csd eval river.jpg night.png --output report
    """

    before: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="BEFORE")]
    """Image, video, folder of images, or config.yml of a run: before the edit."""
    after: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="AFTER")]
    """The same after the edit: as many images, of the same sizes, in the same order."""
    output: Path
    """Folder for report.json and report.html."""
    source_caption: str | None = None
    """Describes the images before the edit ("a photo of a river by day"); with the target's, for CLIP directional."""
    target_caption: str | None = None
    """Describes them after it ("a photo of a river at night"); not the instruction."""
    mask: Path | None = None
    """Image, or folder with one for each frame: white where the edit was allowed to change something."""
    answer: tuple[Path, ...] = ()
    """Right answers, where they are known: like AFTER, one for each answer that the instruction has."""
    kind: Literal["images", "panorama", "video"] | None = None
    """How images belong together. Default: what they look like; a folder of images of one size is a video."""
    wrap: bool = False
    """The panorama is of 360 degrees: also measure the seam at its border."""
    seam_every: int | None = None
    """Distance in pixels of the places where crops of a panorama may end. Default: a quarter of its height."""
    views: int = 24
    """Novel views to render of a scene."""
    clip: str = "paper"
    """CLIP model: `paper` (OpenCLIP ViT-bigG-14, 10 GB), `small` (ViT-B/32, 0.6 GB), a folder or hub id with one in
    transformers' format, or `none`."""
    device: str | None = None
    """Torch device. Default: cuda where there is one, else cpu."""
    local_files_only: bool = False
    """Use only models that are already on this machine; never contact the hub."""

    def run(self) -> str:
        import torch

        from csd_2d.evaluate import Learned, evaluate
        from csd_2d.report import terminal_table, write_report

        if (self.source_caption is None) != (self.target_caption is None):
            raise ValueError("--source-caption and --target-caption go together; the other one is missing.")
        _check_output(self.output / "report.html")
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        subject = self._subject(device)
        if self.clip != "none":
            print(f"CLIP: {self.clip} (--clip small takes 0.6 GB, none leaves it out)", file=sys.stderr)
        networks = Learned(None if self.clip == "none" else self.clip, device, self.local_files_only)
        evaluation = evaluate(subject, networks, progress="measuring")
        unused = () if subject.kind == "scene" else ("views",)
        settings = {k: value for k, value in vars(self).items() if value not in (None, (), False) and k not in unused}
        title = self.target_caption or f"{_shown(self.before)} → {_shown(self.after)}"
        write_report(evaluation, subject, self.output, title, settings | {"device": device})
        print(terminal_table(evaluation))
        if evaluation.value("change") == 0:
            _say("the edit changes nothing: BEFORE and AFTER are alike.")
        return str(self.output / "report.html")

    def _subject(self, device: str) -> "Subject":
        from csd_2d.evaluate import Subject
        from csd_2d.io.video import read_masks

        captions = (self.source_caption, self.target_caption) if self.source_caption and self.target_caption else None
        if self.before.suffix == ".yml" or (self.before / "config.yml").is_file():
            if self.mask is not None or self.answer or self.kind is not None or self.wrap:
                raise ValueError(
                    "--mask, --answer, --kind and --wrap are for images; a scene is measured without them."
                )
            novel_views = _scene_command("novel-views", "csd eval of a run")
            return replace(novel_views(self.before, self.after, self.views, device), captions=captions)
        clips = [_read_images(path) for path in (self.before, self.after, *self.answer)]
        wide = self.wrap or self.seam_every is not None
        kind = self.kind or _kind(self.before, clips[0], wide)
        if wide and kind != "panorama":
            raise ValueError(f"--wrap and --seam-every are for panoramas; {self.before} is taken for {kind}.")
        if self.seam_every is not None and self.seam_every < 2:
            raise ValueError(f"seam-every must be at least 2 px, got {self.seam_every}.")
        masks = None if self.mask is None else read_masks(self.mask, clips[0], 0.0)
        return Subject(
            kind,
            *(clip.frames for clip in clips[:2]),
            captions=captions,
            masks=masks,
            answers=[clip.frames for clip in clips[2:]],
            wrap=self.wrap,
            seam_every=self.seam_every,
        )


def _shown(path: Path) -> str:
    """Name an input: of a run the method and the time, which its folders are named after."""
    run = path.absolute().parent if path.name == "config.yml" else path
    return f"{run.parent.name} {run.name}" if run != path else path.name


def _read_images(path: Path) -> "Clip":
    from csd_2d.io.video import VIDEO_SUFFIXES, Clip, read_clip

    single = not path.is_dir() and path.suffix.lower() not in VIDEO_SUFFIXES
    return Clip([read_image(path)]) if single else read_clip(path)


def _kind(path: Path, clip: "Clip", wide: bool) -> Literal["images", "panorama", "video"]:
    """Guess how images belong together; `wide`: an option says that an image is a panorama."""
    if len(clip.frames) == 1 and not path.is_dir():
        height, width = clip.sizes[0]
        return "panorama" if wide or width >= 2 * height else "images"
    return "video" if len({*clip.sizes}) == 1 else "images"


def _scene_command(name: str, what: str) -> Callable[..., Any]:
    """Load a function of the scenes' package. They build on this one, which finds them as it would a plug-in.

    Raises:
        ImportError: without nerfstudio.
    """
    if find_spec("nerfstudio") is None:
        raise ImportError(f'{what} needs nerfstudio: pip install "csd-edit[nerf]".')
    (command,) = entry_points(group="csd.commands", name=name)
    return command.load()


@dataclass
class Ablate:
    """Edit with several variants, over inputs and seeds, and compare them: tables, a trade-off plot, raw rows.

    The same command goes on after an interruption: what is measured already is not measured again.

    Example: csd ablate paper-ablation-tiny --output study
    """

    study: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="STUDY")]
    """Name of a study in configs/studies, or a .yaml file like those."""
    output: Path
    """Folder for table.md, rows.csv, tradeoff.png and pictures/."""
    data: Path = Path(".")
    """Folder that the paths of the study's inputs are relative to."""
    jobs: int = 1
    """Processes that share the edits out. Each loads the models."""
    seeds: int | None = None
    """Number of repetitions. Default: the study's."""
    clip: str | None = None
    """CLIP model, see csd eval. Default: the study's."""
    device: str | None = None
    """Torch device. Default: cuda where there is one, else cpu."""
    local_files_only: bool = False
    """Use only models that are already on this machine; never contact the hub."""

    def run(self) -> str:
        import torch

        from csd_2d.ablate import load_study, run_study, table

        if self.jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {self.jobs}.")
        _check_output(self.output / "table.md")
        given = {name: value for name, value in (("seeds", self.seeds), ("clip", self.clip)) if value is not None}
        study = replace(load_study(self.study), **given)
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            rows = run_study(study, self.output, self.data, self.jobs, device, self.local_files_only, "editing")
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt("the same command goes on") from error
        print(table(study, rows))
        return str(self.output)


def _check_image_output(path: Path, source: Path | None = None) -> None:
    """Check, before any work is done, that an image can be written at `path`, and the source does not lie there."""
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"output {path} must end in one of {', '.join(IMAGE_SUFFIXES)}.")
    _check_output(path, source)
    if path.is_dir():
        raise ValueError(f"output {path} is a folder, but its name ends like an image file's.")


def _check_output(path: Path, source: Path | None = None) -> Path:
    """Check, before any work is done, that `path` can be written, and the source does not lie there.

    Returns:
        The existing folder in or below which the output will lie.
    """
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"output {path} cannot be written: {existing} is no folder one can write in.")
    if source is not None and source.exists() and path.exists() and path.samefile(source):
        raise ValueError(f"output {path} is the input itself; name another.")
    return existing


_DESCRIPTION = f"""Edit a set of images together, from one sentence, so that they stay consistent.

Two models to begin with: `--prior tiny` comes with csd, runs on any computer and follows a list of instructions;
`--prior ip2p` ({DEFAULT_MODEL}) follows any and wants a GPU. `csd COMMAND --help` explains the options.
"""


WATCH_PORT = 8080
"""Where the page of `--watch` is by default."""

Command = Panorama | Video | Generate | Demo | Eval | Ablate


def _with_port(arguments: Sequence[str]) -> list[str]:
    """Add the port that `--watch` leaves out: options of tyro take a value always."""
    following = [*arguments[1:], "--"]
    return [
        part
        for argument, after in zip(arguments, following, strict=True)
        for part in ([argument, str(WATCH_PORT)] if argument == "--watch" and not after.isdigit() else [argument])
    ]


def _parse(arguments: Sequence[str] | None) -> Command:
    arguments = _with_port(sys.argv[1:] if arguments is None else arguments)
    for argument in arguments:
        if argument.startswith("--"):
            check_replaced(argument[2:].removeprefix("no-").partition("=")[0].replace("-", "_"))
    # The preset sets the defaults of other options, so it is looked up before they are parsed.
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--preset", default="default")
    preset = peek.parse_known_args(arguments)[0].preset
    todo = tyro.MISSING
    options = Options(todo, edit=load_preset(preset))
    # Steps and noise levels of presets are for pictures that exist already.
    from_noise = {name: getattr(GENERATE, name) for name in ("steps", "min_timestep", "max_timestep")}
    generating = RunOptions(todo, edit=replace(load_preset(preset, GENERATE), **from_noise))
    command = tyro.cli(
        Annotated[Panorama, tyro.conf.subcommand("panorama", default=Panorama(todo, todo, options))]
        | Annotated[Video, tyro.conf.subcommand("video", default=Video(todo, todo, options))]
        | Annotated[Generate, tyro.conf.subcommand("generate", default=Generate(todo, generating))]
        | Annotated[Demo, tyro.conf.subcommand("demo")]
        | Annotated[Eval, tyro.conf.subcommand("eval")]
        | Annotated[Ablate, tyro.conf.subcommand("ablate")],
        prog="csd",
        description=_DESCRIPTION,
        args=arguments,
    )
    return cast(Command, command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the `csd` command: one sentence and exit code 1 for errors a user can mend, 130 after Ctrl-C."""
    try:
        with one_sentence(ranks.named("csd")), ranks.joined():
            command = _parse(arguments)
            start = time.monotonic()
            result = command.run()
            if ranks.rank() == 0:
                print(f"wrote {result} in {time.monotonic() - start:.0f} s")
    except KeyboardInterrupt as interrupt:
        print(f"{ranks.named('csd')}: {'; '.join(['interrupted', *interrupt.args])}.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
