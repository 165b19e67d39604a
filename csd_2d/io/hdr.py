"""High dynamic range and wide gamut to what models were trained on: BT.709 colors of a standard display.

Signals are those of ITU-R BT.2100, light is in nits (cd/m²). A display of standard range shows white at 203 nits, which
is where BT.2408 puts the white of a sheet of paper in an HDR picture.
"""

from functools import cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Transfer = Literal["PQ", "HLG", "SDR"]
Primaries = Literal["BT.709", "BT.2020", "P3"]

PEAK = 1000.0
"""Nits that a picture reaches which does not say: the nominal peak of HLG, and what most PQ is mastered for."""
WHITE = 203.0
"""Nits of white, and the peak, of standard range."""
GAMMA = 2.4
"""Exponent of a standard display, ITU-R BT.1886."""

# BT.2100, table 4.
_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
# BT.2100, table 5.
_A = 0.17883277
_B, _C = 1 - 4 * _A, 0.5 - _A * np.log(4 * _A)
_LUMINANCE = (0.2627, 0.6780, 0.0593)

_CHROMATICITIES: dict[Primaries, tuple[tuple[float, float], ...]] = {
    "BT.709": ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    "BT.2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    "P3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
"""x and y of red, green and blue; white is D65 for all."""
_D65 = (0.3127, 0.3290)


def pq_to_nits(signal: Tensor) -> Tensor:
    """Compute light from a perceptual quantizer's signal in [0, 1]: BT.2100's PQ EOTF."""
    power = signal.clamp(0, 1) ** (1 / _M2)
    return 10000 * ((power - _C1).clamp(min=0) / (_C2 - _C3 * power)) ** (1 / _M1)


def nits_to_pq(nits: Tensor) -> Tensor:
    """Compute the perceptual quantizer's signal in [0, 1] from light: the inverse of `pq_to_nits`."""
    power = (nits.clamp(0, 10000) / 10000) ** _M1
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2


def hlg_to_scene(signal: Tensor) -> Tensor:
    """Compute light of the scene in [0, 1] from a hybrid log-gamma signal in [0, 1]: BT.2100's inverse OETF."""
    signal = signal.clamp(0, 1)
    return torch.where(signal <= 0.5, signal**2 / 3, (((signal - _C) / _A).exp() + _B) / 12)


def compressed(nits: Tensor, peak: float, white: float = WHITE) -> Tensor:
    """Compress light of up to `peak` nits into that of a display of `white` nits: the EETF of BT.2390, section 5.4.1.

    Up to a knee light stays; from there a Hermite spline of the PQ signal leads to `white`. Black stays black.
    """
    scale = float(nits_to_pq(torch.tensor(peak, dtype=torch.float64)))
    top = float(nits_to_pq(torch.tensor(white, dtype=torch.float64))) / scale
    if top >= 1:
        return nits.clamp(max=white)
    knee = 1.5 * top - 0.5
    signal = (nits_to_pq(nits) / scale).clamp(max=1)
    t = (signal - knee) / (1 - knee)
    spline = (
        (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * top
    )  # fmt: skip
    return torch.where(signal < knee, nits, pq_to_nits(spline * scale)).clamp(max=white)


@cache
def to_bt709(primaries: Primaries) -> Float[Tensor, "3 3"]:
    """Compute the matrix that takes linear RGB of some primaries to those of BT.709, as in BT.2087."""

    def to_xyz(name: Primaries) -> np.ndarray:
        columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in (*_CHROMATICITIES[name], _D65)]).T
        return columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])

    return torch.from_numpy(np.linalg.solve(to_xyz("BT.709"), to_xyz(primaries))).float()


@cache
def _light(transfer: Transfer) -> np.ndarray:
    """Tabulate light for every 16-bit signal: nits of PQ, of standard range, or the scene's light of HLG."""
    signal = torch.linspace(0, 1, 65536, dtype=torch.float64)
    curves = {"PQ": pq_to_nits, "HLG": hlg_to_scene, "SDR": lambda signal: WHITE * signal**GAMMA}
    return curves[transfer](signal).float().numpy()


def to_standard(codes: np.ndarray, transfer: Transfer, primaries: Primaries, peak: float = PEAK) -> Tensor:
    """Convert an image to standard range and the colors of BT.709; what these cannot show is clipped.

    Args:
        codes: R'G'B' signals of 16 bits, (H, W, 3).
        peak: nits of the brightest place of a PQ picture.

    Returns:
        R'G'B' in [0, 1], (3, H, W), for a display of BT.1886.

    Note:
        Light is compressed by the largest of red, green and blue, which keeps hue, and needs no clipping above.
    """
    light = torch.from_numpy(_light(transfer)[codes])
    if transfer == "HLG":  # from the scene's light to that of a display, BT.2100's OOTF
        luminance = light @ torch.tensor(_LUMINANCE)
        light, peak = light * (PEAK * luminance**0.2)[..., None], PEAK
    light = (light @ to_bt709(primaries).T).clamp(min=0)
    if transfer != "SDR":
        brightest = light.amax(-1, keepdim=True).clamp(min=1e-6)
        light *= compressed(brightest, peak) / brightest
    return (light / WHITE).clamp(0, 1).pow(1 / GAMMA).permute(2, 0, 1)
