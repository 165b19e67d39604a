"""The InstructPix2Pix that ships with the package, as a prior."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from csd_2d import tiny
from csd_2d.priors.instruct_pix2pix import InstructPix2PixPrior
from csd_2d.tiny.instructions import INSTRUCTIONS, unknown_words


class TinyPrior(InstructPix2PixPrior):
    """Noise estimates of the tiny model, which follows a fixed list of instructions.

    Args: see `DiffusersPrior`.
    """

    default_model = str(tiny.MODEL)
    guidance_scale = tiny.GUIDANCE_SCALE
    image_guidance_scale = tiny.IMAGE_GUIDANCE_SCALE

    def encode_text(self, prompts: Sequence[str]) -> Any:
        """Encode the prompts and, last, the empty prompt.

        Raises:
            ValueError: if a prompt holds a word that the model was not trained on.
        """
        check_words(prompts)
        return super().encode_text(prompts)


def check_words(prompts: Sequence[str]) -> None:
    """Check that the model was trained on all words of some prompts. ValueError if not; it names the nearest."""
    if unknown := [word for prompt in prompts for word in unknown_words(prompt)]:
        nearest = get_close_matches(" ".join(prompts), INSTRUCTIONS, n=5, cutoff=0)
        raise ValueError(
            f"the tiny model was never taught the words {', '.join(map(repr, unknown))}; the nearest of its "
            f"{len(INSTRUCTIONS)} instructions are: {'; '.join(nearest)} (all: README, 'The tiny model'). The prior "
            "ip2p follows any instruction."
        )
