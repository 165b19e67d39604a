"""Training instructions of the tiny model, each with several wordings and its answers in closed form."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from csd_2d.closed_form import EDITS, HUES, NEW_COLORS, ImageEdit, normalized, recolor
from csd_2d.tiny.scenes import OBJECTS, Scenes

SMALLEST_OBJECT = 0.015
"""Minimum share of the image that an object must cover to be named in an instruction."""

_LOOKS = ("make it {}", "turn it {}", "make the picture {}", "what if it were {}", "let it be {}", "{}")
_TIMES = ("make it {}", "turn it into {}", "what if it were {}", "let it be {}", "show it in {}", "{}")
_PAINTS = ("paint it {}", "color it {}", "tint everything {}", "paint the picture {}", "give it a {} tint", "all in {}")
_NEW_OBJECT_COLORS = ("paint the {} a new color", "give the {} another color", "change the color of the {}")
_REMOVALS = ("remove the {}", "take the {} away", "remove the {} from the picture", "no {}")
_BOX_FOR_BALL = ("turn the ball into a box", "replace the ball with a box", "make the ball a box", "a box for the ball")
_HATS = ("put a hat on the ball", "give the ball a hat", "the ball with a hat", "let the ball wear a hat")
_SUNS = ("let the sun shine", "make the sun shine", "put the sun in the sky", "add a sun")
_OBJECT_PAINTS = ("make the {} {}", "turn the {} {}", "paint the {} {}", "color the {} {}", "let the {} be {}")


def _fill(templates: Sequence[str], *words: str) -> list[str]:
    return [template.format(word) for word in words for template in templates]


_WORDINGS: dict[str, list[str]] = {
    "make it night": [*_fill(_TIMES, "night"), "turn day into night", "as if it were midnight"],
    "make it sunset": [*_fill(_TIMES, "sunset"), "put it in evening light", "as the sun goes down"],
    "make it black and white": [*_fill(_LOOKS, "black and white", "grey"), "take the colors away"],
    "make it sepia": [*_fill(_LOOKS, "sepia"), "make it an old photograph", "give it a sepia tone"],
    "make it foggy": [*_fill(_LOOKS, "foggy", "misty"), "put it in fog", "let fog come up"],
    "make it snowy": [*_fill(_LOOKS, "snowy"), *_fill(_TIMES, "winter"), "cover it with snow", "let it snow"],
    "make it spring": _fill(_TIMES, "spring"),
    "make it summer": _fill(_TIMES, "summer"),
    "make it autumn": _fill(_TIMES, "autumn", "fall"),
    "invert the colors": ["invert the colors", "invert it", "make it a negative", "swap light and dark", "invert"],
    "turn it into a pencil sketch": [
        *("turn it into a pencil sketch", "make it a pencil sketch", "draw it with a pencil", "pencil sketch"),
        *("make it a drawing", "sketch it"),
    ],
    "paint it a new color": ["paint it a new color", "give it another color", "paint it", "change the color"],
    "change the season": ["change the season", "make it another season", "show it in another season"],
    **{f"paint it {color}": _fill(_PAINTS, color) for color in HUES},
}


@dataclass(frozen=True)
class Instruction:
    """One edit that the model is trained on."""

    name: str
    """The wording that tables and reports use."""
    wordings: tuple[str, ...]
    answers: tuple[ImageEdit, ...]
    """Several if the instruction is ambiguous; all are then equally frequent."""
    share: float
    """Sampling weight relative to the other instructions."""
    object: str | None = None
    """The object that is named; None: the whole image."""
    change: str | None = None
    """Structural change, one of `csd_2d.tiny.scenes.CHANGES`; the answer is then the scene drawn with it."""

    @property
    def modes(self) -> int:
        """Number of answers."""
        return max(len(self.answers), 1)

    def fits(self, scenes: Scenes) -> Tensor:
        """Find the scenes that show what the instruction names, and can be drawn with its change; (n,) bool."""
        if self.change is not None and scenes.redraw is None:
            return torch.zeros(len(scenes.images), dtype=torch.bool, device=scenes.images.device)
        if self.object is None:
            return torch.ones(len(scenes.images), dtype=torch.bool, device=scenes.images.device)
        return scenes.visible[self.object].mean((1, 2, 3)) >= SMALLEST_OBJECT

    def answer(self, scenes: Scenes, rows: Tensor, mode: int = 0) -> Float[Tensor, "k 3 s s"]:
        """Compute the edited images of the scenes at `rows`, in [0, 1]; `mode` selects one of the answers."""
        if self.change is not None:
            assert scenes.redraw is not None
            return scenes.redraw(self.change)[rows]
        images = scenes.images[rows]
        edited = self.answers[mode](images)
        if self.object is not None:
            edited = torch.lerp(images, edited, scenes.visible[self.object][rows])
        return edited.clamp(0, 1)


def _instructions() -> dict[str, Instruction]:
    # Higher shares for what is harder to learn: ambiguous instructions have several answers, and paints differ from
    # each other by a single word.
    shares = {"paint it a new color": 4.0, "change the season": 6.0, **{f"paint it {color}": 1.5 for color in HUES}}
    whole = [
        Instruction(name, tuple(_WORDINGS[name]), tuple(edits), shares.get(name, 1.0)) for name, edits in EDITS.items()
    ]
    objects = [
        Instruction(
            f"make the {noun} {color}",
            tuple(template.format(noun, color) for template in _OBJECT_PAINTS),
            (recolor(hue),),
            share=1.0,
            object=noun,
        )
        for noun in OBJECTS
        for color, hue in HUES.items()
    ]
    ambiguous = [
        Instruction(
            f"paint the {noun} a new color",
            tuple(template.format(noun) for template in _NEW_OBJECT_COLORS),
            tuple(recolor(HUES[color]) for color in NEW_COLORS),
            share=2.0,
            object=noun,
        )
        for noun in OBJECTS
    ]
    structural = [
        *(
            Instruction(f"remove the {noun}", tuple(_fill(_REMOVALS, noun)), (), 4.0, noun, f"without {noun}")
            for noun in OBJECTS
        ),
        Instruction("turn the ball into a box", _BOX_FOR_BALL, (), 6.0, "ball", "box for ball"),
        Instruction("put a hat on the ball", _HATS, (), 6.0, "ball", "hat"),
        Instruction("let the sun shine", _SUNS, (), 3.0, None, "sun"),
    ]
    return {instruction.name: instruction for instruction in whole + objects + ambiguous + structural}


INSTRUCTIONS = _instructions()
"""Name -> instruction."""

STRUCTURAL = {
    wording for instruction in INSTRUCTIONS.values() if instruction.change for wording in instruction.wordings
}
"""Wordings of the instructions that change the structure."""

WORDINGS = sorted({wording for instruction in INSTRUCTIONS.values() for wording in instruction.wordings})
"""All training prompts; the tokenizer is trained on them."""


def unknown_words(prompt: str) -> list[str]:
    """List the words of a prompt that occur in no training prompt.

    Example:
        >>> unknown_words("Turn the ball into a pencil")
        []
        >>> unknown_words("make him a clown")
        ['him', 'clown']
    """
    known = {word for wording in WORDINGS for word in wording.split()}
    return [word for word in normalized(prompt).split() if word not in known]


def draw_edits(
    scenes: Scenes, generator: torch.Generator, object_share: float = 1.0, structure_share: float = 1.0
) -> tuple[Float[Tensor, "n 3 s s"], list[str]]:
    """Draw for each scene an instruction that fits it, in a random wording, and compute its answer.

    Args:
        object_share, structure_share: factors on the shares of the instructions that name an object, and of those that
            change the structure.

    Returns:
        The answers, drawn at random where there are several, and the wordings.
    """
    known = list(INSTRUCTIONS.values())
    fits = torch.stack([instruction.fits(scenes) for instruction in known], 1).cpu()
    shares = torch.tensor(
        [
            instruction.share * (structure_share if instruction.change else object_share if instruction.object else 1.0)
            for instruction in known
        ]
    )
    # Draw indices on the CPU, whatever the device, so that the same seed gives the same instructions.
    cpu_generator = torch.Generator().manual_seed(
        int(torch.randint(2**40, (), generator=generator, device=generator.device))
    )
    drawn = torch.multinomial(fits * shares, 1, generator=cpu_generator)[:, 0]
    choices = torch.randint(2**30, (len(drawn), 2), generator=cpu_generator)
    targets = torch.empty_like(scenes.images)
    wordings = [""] * len(drawn)
    for number in drawn.unique().tolist():
        instruction = known[number]
        modes = choices[:, 0] % instruction.modes
        for mode in range(instruction.modes):
            rows = ((drawn == number) & (modes == mode)).nonzero()[:, 0]
            if len(rows):
                targets[rows] = instruction.answer(scenes, rows.to(targets.device), mode)
        for row in (drawn == number).nonzero()[:, 0].tolist():
            wordings[row] = instruction.wordings[int(choices[row, 1]) % len(instruction.wordings)]
    return targets, wordings
