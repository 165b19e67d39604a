"""Random scenes, drawn in batches: textured, shaded shapes over gradients and noise. The only training data."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

OBJECTS = ("ball", "box", "cone")
"""Objects that an instruction can name; a scene contains at most one of each."""
CHANGES = (*(f"without {name}" for name in OBJECTS), "box for ball", "hat", "sun")
"""Structural changes with which a scene can be drawn again: an object is missing, a box replaces the ball, the ball has
a hat, or the sun shines."""
_SHARPNESS = 0.6
"""Steepness of outlines per half pixel; the transition from outside to inside takes about two pixels."""


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes."""

    images: Float[Tensor, "n 3 s s"]
    """RGB in [0, 1]."""
    visible: dict[str, Float[Tensor, "n 1 s s"]]
    """For each of `OBJECTS`, the visible coverage of each pixel, in [0, 1]."""
    redraw: Callable[[str], Float[Tensor, "n 3 s s"]] | None = None
    """Draws the same scenes with one of `CHANGES`; all else stays, down to the grain. None: they were not drawn."""

    @property
    def masks(self) -> Float[Tensor, "n 3 s s"]:
        """The coverages in one tensor, in the order of `OBJECTS`."""
        return torch.cat([self.visible[name] for name in OBJECTS], 1)


class _Painter:
    """A batch of canvases on which random layers are composited back to front, all drawn from one generator.

    Coordinates are in [-1, 1], with x to the right and y down. A structural change draws nothing from the generator, so
    that the rest of a scene stays the same with and without it.
    """

    def __init__(self, count: int, size: int, generator: torch.Generator, change: str | None = None) -> None:
        self.count, self.size, self.generator, self.change = count, size, generator, change
        self.device = generator.device
        line = (torch.arange(size, device=self.device) + 0.5) * (2 / size) - 1
        self.y, self.x = line[:, None].expand(size, size), line[None].expand(size, size)
        self.canvas = torch.zeros(count, 3, size, size, device=self.device)
        self.visible: dict[str, Tensor] = {}

    def uniform(self, low: float = 0.0, high: float = 1.0, channels: int = 1) -> Float[Tensor, "n channels 1 1"]:
        shape = (self.count, channels, 1, 1)
        return low + (high - low) * torch.rand(shape, generator=self.generator, device=self.device)

    def chance(self, probability: float) -> Float[Tensor, "n 1 1 1"]:
        return (self.uniform() < probability).float()

    def color(self, darkest: float = 0.08) -> Float[Tensor, "n 3 1 1"]:
        """Draw colors of any hue, mostly muted as in photographs."""
        hue, saturation, value = self.uniform(), self.uniform() ** 1.7, self.uniform(darkest, 1)
        offsets = torch.tensor([0.0, 2 / 3, 1 / 3], device=self.device)[:, None, None]
        pure = ((6 * ((hue + offsets) % 1) - 3).abs() - 1).clamp(0, 1)
        return value * torch.lerp(torch.ones_like(pure), pure, saturation)

    def noise(
        self, channels: int = 1, smoothest: float = 2.2, roughest: float = 0.6
    ) -> Float[Tensor, "n channels s s"]:
        """Draw noise with a 1 / f^beta spectrum, beta from 0.6 (sand) to 2.2 (clouds); mean 0, standard deviation 1."""
        frequency = torch.fft.fftfreq(self.size, device=self.device)
        radius = torch.hypot(frequency[:, None], frequency[None, : self.size // 2 + 1].abs()).clamp(min=1 / self.size)
        white = torch.randn(self.count, channels, self.size, self.size, generator=self.generator, device=self.device)
        spectrum = torch.fft.rfft2(white) * radius ** -self.uniform(roughest, smoothest)
        field = torch.fft.irfft2(spectrum, s=(self.size, self.size))
        field = field - field.mean((-2, -1), keepdim=True)
        return field / field.std((-2, -1), keepdim=True)

    def stripes(self) -> Float[Tensor, "n 1 s s"]:
        """Draw waves or bars in any direction, in [-1, 1]."""
        angle, pace = self.uniform(0, math.pi), self.uniform(4, 22)
        wave = torch.sin(pace * (self.x * angle.cos() + self.y * angle.sin()) + self.uniform(0, 2 * math.pi))
        return torch.where(self.uniform() < 0.5, wave, wave.sign())

    def textured(self, color: Tensor) -> Float[Tensor, "n 3 s s"]:
        """Draw a surface of one color, mostly with grain and sometimes with a pattern in a second color."""
        pattern = (0.5 + 0.5 * self.stripes()) * self.chance(0.3) * self.uniform(0.2, 1)
        surface = torch.lerp(color.expand(-1, -1, self.size, self.size), self.color(), pattern)
        return surface * (1 + self.chance(0.7) * self.uniform(0.0, 0.35) * self.noise())

    def inside(self, distance: Tensor) -> Float[Tensor, "n 1 s s"]:
        """Compute the anti-aliased coverage of the region whose signed distance to the outline is positive."""
        return torch.sigmoid(_SHARPNESS * self.size * distance)

    def cover(self, coverage: Tensor, layer: Tensor, name: str | None = None) -> None:
        """Composite a layer over the canvas."""
        self.canvas = torch.lerp(self.canvas, layer, coverage)
        self.visible = {other: visible * (1 - coverage) for other, visible in self.visible.items()}
        if name is not None:
            self.visible[name] = coverage

    def backdrop(self) -> None:
        """Draw a gradient in any direction; in some scenes, ground below a wavy horizon, or soft colored noise."""
        angle = self.uniform(0, 2 * math.pi)
        ramp = 0.5 + 0.5 * (self.x * angle.cos() + self.y * angle.sin()) / 1.4
        self.canvas = torch.lerp(self.color().expand_as(self.canvas), self.color(), ramp)
        horizon = self.uniform(-0.6, 0.9) + 0.08 * self.noise().mean(-2, keepdim=True) * self.size**0.5
        ground = self.inside(self.y - horizon) * self.chance(0.5)
        self.cover(ground, self.textured(self.color()))
        self.canvas = self.canvas + self.chance(0.5) * self.uniform(0, 0.1) * self.noise(3, roughest=1.0)

    def sun(self) -> None:
        """Draw a sun with its glow in the upper right corner, and warm everything behind the objects."""
        warm = self.canvas.new_tensor([1.0, 0.85, 0.45])[:, None, None]
        distance = torch.hypot(self.x - 0.58, self.y + 0.58)
        glow = 0.55 * (-(distance / 0.5).square()).exp()
        self.canvas = torch.lerp(self.canvas * (0.75 + 0.35 * warm), warm.expand_as(self.canvas), glow)
        self.cover(self.inside(0.24 - distance).expand(self.count, 1, -1, -1), warm.expand_as(self.canvas))

    def blob(self) -> None:
        """Draw hills, clouds or foliage: the region where a noise field is high."""
        coverage = self.inside((self.noise(roughest=1.5) - self.uniform(-0.5, 1.5)) * self.uniform(0.02, 0.2))
        self.cover(coverage * self.chance(0.5), self.textured(self.color()))

    def _local_coordinates(self) -> tuple[Tensor, Tensor]:
        """Compute coordinates relative to a random center and slightly rotated axes."""
        u, v = self.x - self.uniform(-0.65, 0.65), self.y - self.uniform(-0.65, 0.65)
        turn = self.uniform(-0.5, 0.5)
        return u * turn.cos() + v * turn.sin(), v * turn.cos() - u * turn.sin()

    def patterned(self, dark: Tensor) -> Float[Tensor, "n 3 s s"]:
        """Draw a grainy surface of one color, bright enough to be painted, darkened where the pattern `dark` is 1."""
        grain = 1 + self.chance(0.7) * self.uniform(0.0, 0.2) * self.noise()
        return self.color(darkest=0.4) * grain * (1 - self.uniform(0.35, 0.6) * dark)

    def ball(self, present: Tensor) -> None:
        """Draw a smooth ball with a highlight and a dark rim."""
        u, v = self._local_coordinates()
        radius = self.uniform(0.2, 0.55)
        distance = torch.hypot(u, v)
        depth = (1 - (distance / radius).square()).clamp(min=0).sqrt()
        side, above = self.uniform(-0.7, 0.7), self.uniform(0.2, 0.8)
        light = (u / radius * side - v / radius * above + depth * (1 - side**2 - above**2).clamp(min=0.05).sqrt()) * 1.1
        shade = (0.35 + 0.75 * light.clamp(0, 1)) * (0.4 + 0.6 * depth)
        gloss = light.clamp(0, 1) ** 20 * self.uniform(0.4, 0.8)
        surface = self.patterned(torch.zeros_like(shade))
        if self.change == "box for ball":
            self._box_for_ball(u / radius, v / radius, surface, present)
            return
        self.cover(self.inside(radius - distance) * present, surface * shade + gloss, "ball")
        if self.change == "hat":
            self._hat(u / radius, v / radius, present)

    def _box_for_ball(self, u: Tensor, v: Tensor, surface: Tensor, present: Tensor) -> None:
        """Draw a box of the ball's place, size and color. Coordinates are in radii of the ball."""
        above = -0.7 - v
        front = torch.minimum(0.85 - u.abs(), 0.85 - (v - 0.15).abs())
        top = torch.minimum(0.85 - (u - 0.5 * above).abs(), torch.minimum(above, 0.35 - above))
        coverage = torch.maximum(self.inside(0.4 * front), self.inside(0.4 * top))
        checkered = self.inside(0.1 * (5 * u).sin() * (5 * v).sin())
        shade = (0.75 + 0.35 * self.inside(0.4 * top)) * (1 - 0.5 * checkered)
        self.cover(coverage * present, surface * shade, "ball")

    def _hat(self, u: Tensor, v: Tensor, present: Tensor) -> None:
        """Draw a black top hat with a red band on the ball. Coordinates are in radii of the ball."""
        brim = torch.minimum(0.95 - u.abs(), 0.13 - (v + 0.85).abs())
        crown = torch.minimum(0.55 - u.abs(), 0.45 - (v + 1.35).abs())
        band = self.inside(0.4 * torch.minimum(crown, 0.13 - (v + 1.08).abs()))
        black, red = (self.canvas.new_tensor(color)[:, None, None] for color in ([0.06] * 3, [0.75, 0.08, 0.1]))
        coverage = torch.maximum(self.inside(0.4 * brim), self.inside(0.4 * crown))
        self.cover(coverage * present, torch.lerp(black, red, band))

    def box(self, present: Tensor) -> None:
        """Draw a box with a checkered front and a sheared top of different brightness."""
        u, v = self._local_coordinates()
        width, height, rise = self.uniform(0.2, 0.45), self.uniform(0.2, 0.45), self.uniform(0.08, 0.25)
        front = torch.minimum(width - u.abs(), height - v.abs())
        above = -height - v
        top = torch.minimum(width - (u - self.uniform(-1.2, 1.2) * above).abs(), torch.minimum(above, rise - above))
        shade = self.uniform(0.6, 1.0) + self.inside(top) * self.uniform(0.1, 0.5)
        coverage = torch.maximum(self.inside(front), self.inside(top))
        squares = 2 * math.pi / self.uniform(0.3, 0.45)
        checkered = self.inside((squares * u).sin() * (squares * v).sin() * 0.1)
        self.cover(coverage * present, self.patterned(checkered) * shade, "box")

    def cone(self, present: Tensor) -> None:
        """Draw a cone with dark bands around it."""
        u, v = self._local_coordinates()
        width, height = self.uniform(0.25, 0.5), self.uniform(0.3, 0.6)
        down = (v + height) / (2 * height)  # 0 at the tip, 1 at the base
        half = (width * down).clamp(min=1e-3)
        base = 0.12 * width * (1 - (u / width).square()).clamp(min=0).sqrt()
        across = (u / half).clamp(-1, 1)
        shade = 0.65 + 0.45 * (across * self.uniform(-1, 1) + 0.3 * (1 - across**2).sqrt())
        coverage = self.inside(torch.minimum(torch.minimum(half - u.abs(), height + base - v), v + height))
        banded = self.inside((2 * math.pi / self.uniform(0.28, 0.4) * v).sin() * 0.1)
        self.cover(coverage * present, self.patterned(banded) * shade, "cone")

    def light(self) -> None:
        """Apply directional light, tint, exposure and contrast to the whole image, then a camera's blur and grain."""
        angle = self.uniform(0, 2 * math.pi)
        slope = 1 + self.uniform(0, 0.45) * (self.x * angle.cos() + self.y * angle.sin())
        tint = 1 + 0.12 * (2 * self.uniform(channels=3) - 1)
        exposed = (self.canvas * slope * tint * self.uniform(0.6, 1.35)).clamp(1e-4, 1)
        self.canvas = _blurred(exposed ** self.uniform(0.6, 1.6), self.chance(0.5) * self.uniform(0.2, 1.2))
        grain = torch.randn(self.canvas.shape, generator=self.generator, device=self.device)
        self.canvas = (self.canvas + self.chance(0.5) * self.uniform(0, 0.03) * grain).clamp(0, 1)


def _blurred(images: Float[Tensor, "n c h w"], deviation: Float[Tensor, "n 1 1 1"]) -> Float[Tensor, "n c h w"]:
    """Blur each image with a Gaussian of its own standard deviation, in pixels."""
    offsets = torch.arange(-3, 4, device=images.device)
    taps = (-offsets.square() / (2 * deviation.flatten(1).square() + 1e-4)).exp()
    taps = (taps / taps.sum(1, keepdim=True)).repeat_interleave(images.shape[1], 0)[:, None]
    flat = F.pad(images.flatten(0, 1)[None], [3] * 4, mode="replicate")
    flat = F.conv2d(flat, taps[..., None, :], groups=len(taps))
    return F.conv2d(flat, taps[..., :, None], groups=len(taps)).view_as(images)


def draw_scenes(count: int, size: int, generator: torch.Generator, change: str | None = None) -> Scenes:
    """Draw a batch of scenes on the generator's device.

    Each of `OBJECTS` is in about six of ten scenes. The whole batch shares one depth order.

    Args:
        size: side of the images in pixels.
        change: one of `CHANGES`. From a generator in the same state, the scenes are otherwise those without it.

    Example:
        >>> scenes = draw_scenes(2, 64, torch.Generator().manual_seed(0))
        >>> scenes.images.shape, sorted(scenes.visible)
        (torch.Size([2, 3, 64, 64]), ['ball', 'box', 'cone'])
    """
    state = generator.get_state()

    def redraw(change: str) -> Float[Tensor, "n 3 s s"]:
        again = torch.Generator(generator.device)
        again.set_state(state)
        return draw_scenes(count, size, again, change).images

    painter = _Painter(count, size, generator, change)
    painter.backdrop()
    painter.blob()
    painter.blob()
    if change == "sun":
        painter.sun()
    for i in torch.randperm(len(OBJECTS), generator=generator, device=generator.device).tolist():
        present = painter.chance(0.6)
        getattr(painter, OBJECTS[i])(present=0 * present if change == f"without {OBJECTS[i]}" else present)
    painter.light()
    return Scenes(painter.canvas, painter.visible, redraw)


def held_out(count: int, size: int, seed: int = 0) -> Scenes:
    """Draw scenes that no training step draws: training seeds are below 2^62."""
    return draw_scenes(count, size, torch.Generator().manual_seed(2**62 + seed))
