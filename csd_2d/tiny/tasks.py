"""Sets of images whose edited versions are known, to edit together.

* scenes: unrelated scenes of the kind the tiny model was trained on, but never drawn in training; the object that an
  instruction names lies in another place in each;
* views: crops of one such scene, a flat one that several cameras see, so that the object lies at another pixel in each.
  Where views show the same place is known;
* video: crops of such a scene along a path, two pixels apart; where they show the same is estimated by optical flow;
* textures: smooth random images, for the exact scores of the analytic prior.
"""

import dataclasses
from itertools import permutations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from csd_2d.closed_form import EDITS, known_answers
from csd_2d.correspondence.flow import FrameFlows
from csd_2d.correspondence.surface import SurfaceCorrespondence
from csd_2d.metrics.fidelity import decibels, error_ghosting
from csd_2d.mixing import FindCorrespondence
from csd_2d.tiny.instructions import INSTRUCTIONS
from csd_2d.tiny.scenes import held_out

SIZE = 64
"""Side of the images: the tiny model's window."""
LEAST_VISIBLE = 0.04
"""Share of the image that an object must cover to be a task."""
CHANGED = 0.04
"""Largest difference of a pixel's channels, in [0, 1], from which on an answer counts as a change."""


@dataclasses.dataclass
class Task:
    """Images to edit together, and what is known of them."""

    prompt: str
    images: Float[Tensor, "n 3 s s"]
    answers: list[Float[Tensor, "n 3 s s"]]
    """Of each image, one tensor for each answer of an ambiguous instruction."""
    points: Float[Tensor, "n 3 s s"] | None = None
    """Place that each pixel shows, if images show the same places: whole numbers of pixels."""
    is_video: bool = False

    def find(self, cell: int) -> FindCorrespondence | None:
        """Find corresponding places, in latent cells of so many pixels, as the task itself would."""
        if self.points is None:
            return None
        if self.is_video:
            return FrameFlows(self.images, cell).correspondence
        above = torch.tensor([0.0, 0.0, 1e4]).expand(len(self.images), 3)
        return SurfaceCorrespondence(F.avg_pool2d(self.points, cell), F.avg_pool2d(self.images, cell), above)


def load_task(name: str, seed: int, count: int) -> Task:
    """Draw the images of a task, such as "scenes: make it night", and their answers. Raises as `check_task`."""
    check_task(name)
    kind, _, prompt = name.partition(": ")
    return {"scenes": _scenes, "views": _views, "video": _video, "textures": _textures}[kind](prompt, seed, count)


KINDS = ("scenes", "views", "video", "textures")


def check_task(name: str) -> None:
    """Check the name of a task. ValueError for another kind of images, or an instruction without a known answer."""
    kind, _, prompt = name.partition(": ")
    if kind not in KINDS:
        raise ValueError(f"unknown task '{name}'; expected KIND: INSTRUCTION with a kind of {', '.join(KINDS)}.")
    instructions = EDITS if kind == "textures" else INSTRUCTIONS
    if prompt not in instructions:
        raise ValueError(f"unknown instruction '{prompt}'; expected one of {', '.join(instructions)}.")


def _drawn(prompt: str, seed: int, count: int, size: int) -> tuple[Tensor, list[Tensor]]:
    """Draw scenes that an instruction fits, and their answers."""
    instruction = INSTRUCTIONS[prompt]
    scenes = held_out(8 * count, size, seed=1000 + seed)
    noun = instruction.object
    shown = torch.ones(len(scenes.images)) if noun is None else scenes.visible[noun].mean((1, 2, 3))
    rows = (shown >= LEAST_VISIBLE).nonzero()[:count, 0]
    return scenes.images[rows], [instruction.answer(scenes, rows, mode) for mode in range(instruction.modes)]


def _scenes(prompt: str, seed: int, count: int) -> Task:
    return Task(prompt, *_drawn(prompt, seed, count, SIZE))


def _views(prompt: str, seed: int, count: int) -> Task:
    """Crop views of one scene, each at a random place."""
    places = torch.randint(SIZE // 3 + 1, (count, 2), generator=torch.Generator().manual_seed(seed))
    return _crops(prompt, seed, places.tolist())


def _video(prompt: str, seed: int, count: int) -> Task:
    """Crop frames of one scene along a path."""
    task = _crops(prompt, seed, [[k, 2 * k] for k in range(count)])
    return dataclasses.replace(task, is_video=True)


def _crops(prompt: str, seed: int, corners: list[list[int]]) -> Task:
    """Crop images of one scene, at the given top and left pixels."""
    wide = SIZE + SIZE // 3
    scenes, answers = _drawn(prompt, seed, 1, wide)
    y, x = torch.meshgrid(torch.arange(float(wide)), torch.arange(float(wide)), indexing="ij")
    points = torch.stack([x, y, torch.zeros_like(x)])[None]

    def crops(picture: Tensor) -> Tensor:
        return torch.cat([picture[..., top : top + SIZE, left : left + SIZE] for top, left in corners])

    return Task(prompt, crops(scenes), [crops(answer) for answer in answers], crops(points))


def _textures(prompt: str, seed: int, count: int) -> Task:
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    images = 0.7 * F.interpolate(coarse, (SIZE, SIZE), mode="bilinear", align_corners=True) + 0.15
    return Task(prompt, images, known_answers(prompt, images))


def measure(edited: Float[Tensor, "n 3 s s"], task: Task) -> dict[str, float]:
    """Compute the figures of one edit.

    Returns:
        agreement: share of the images on the most common answer; psnr to the answer that an image took, in dB; inside,
        the same where that answer differs from the source, and outside; right: share of the images that are nearer to
        an answer than to the unedited image; ghosting, see `error_ghosting`; of views and frames warp_error: mean
        squared difference in corresponding places, times 10,000, over all pairs.
    """
    sources, answers = task.images, torch.stack(task.answers)
    errors = (edited - answers).square().flatten(2).mean(2)
    taken = errors.argmin(0)
    answer = answers[taken, torch.arange(len(taken))]
    changed = ((answer - sources).abs().amax(1, keepdim=True) > CHANGED).expand_as(answer)
    square = (edited - answer).square()
    figures = {
        "agreement": taken.bincount().max().item() / len(taken),
        "psnr": decibels(errors.amin(0)).mean().item(),
        "inside": decibels(square[changed].mean()).item(),
        "right": (errors.amin(0) < (edited - sources).square().flatten(1).mean(1)).float().mean().item(),
        "ghosting": error_ghosting(edited - answer, edited - sources),
    }
    if not changed.all():
        figures["outside"] = decibels(square[~changed].mean()).item()
    if task.points is not None:
        figures["warp_error"] = 1e4 * warp_error(edited, task.points)
    return figures


def warp_error(images: Float[Tensor, "n 3 s s"], points: Float[Tensor, "n 3 s s"]) -> float:
    """Compute the mean squared difference of places that two views show, over all pairs."""
    gaps = []
    for one, other in permutations(range(len(images)), 2):
        right, down = (points[one, :2, 0, 0] - points[other, :2, 0, 0]).long().tolist()
        if right >= 0 and down >= 0:
            shown = images[one][:, : SIZE - down, : SIZE - right]
            gaps.append((shown - images[other][:, down:, right:]).square().mean())
        elif right >= 0:
            shown = images[one][:, -down:, : SIZE - right]
            gaps.append((shown - images[other][:, : SIZE + down, right:]).square().mean())
    return torch.stack(gaps).mean().item()
