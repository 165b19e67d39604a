r"""Does the memory of `csd video` grow with the length of the video?

For each length and prior a process of its own edits a video of moving shapes, written here, and tells the most memory
it held; the first row is a process that loads everything and edits two frames. `ratio` is the peak of the longest video
over that of the shortest but the two frames. A third of the frames is drawn for a step, so all are drawn several times.

    python -m tests.bench.video_memory --output video_memory.json
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import torch
import tyro
from torch import Tensor

from csd_2d.io.video import Clip, Streamed, write_clip


def shapes(count: int, height: int, width: int) -> Clip:
    """Three colored discs that circle over a slanted ramp of gray; a new place in every frame."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")

    def frames() -> Iterator[Tensor]:
        for index in range(count):
            image = (0.5 + 0.2 * x + 0.2 * y).expand(3, -1, -1).clone()
            for disc in range(3):
                angle = torch.tensor(0.1 * index + 2.1 * disc)
                inside = (x - 0.6 * angle.cos()).square() + (y - 0.6 * angle.sin()).square() < 0.05
                image[:, inside] = torch.eye(3)[disc, :, None]
            yield image

    return Clip(Streamed([(height, width)] * count, frames), Fraction(24))


def measure(video: Path, prior: str, steps: int) -> dict[str, float]:
    """In this process: the most memory it held, in MB, and seconds, of one edit."""
    from csd_2d.cli import main as csd

    start = time.monotonic()
    prompt = ["--prompt", "make it night", "--prior", prior, "--device", "cpu", "--steps", str(steps)]
    csd(["video", str(video), str(video.with_name("edited.mp4")), *prompt])
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return {"peak_mb": round(int(line.split()[1]) / 1024, 1), "seconds": round(time.monotonic() - start, 1)}


def main(
    output: Path,
    counts: tuple[int, ...] = (2, 24, 200),
    size: tuple[int, int] = (96, 54),
    steps: int = 4,
    priors: tuple[str, ...] = ("analytic", "tiny"),
) -> None:
    """Measures every prior at every number of frames and writes a table as JSON."""
    rows = []
    for prior in priors:
        for count in counts:
            with tempfile.TemporaryDirectory(dir=output.absolute().parent) as folder:  # /tmp may itself be memory
                video = Path(folder) / "shapes.mp4"
                write_clip(shapes(count, size[1], size[0]), video)
                code = (
                    "import json, pathlib; from tests.bench.video_memory import measure; "
                    f"print(json.dumps(measure(pathlib.Path({str(video)!r}), {prior!r}, {steps})))"
                )
                done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
            rows.append({"prior": prior, "frames": count, **json.loads(done.stdout.splitlines()[-1])})
            print(rows[-1], flush=True)
    peaks = {(row["prior"], row["frames"]): row["peak_mb"] for row in rows}
    ratios = {prior: round(peaks[prior, counts[-1]] / peaks[prior, counts[-2]], 3) for prior in priors}
    output.write_text(json.dumps({"size": size, "steps": steps, "rows": rows, "ratio": ratios}, indent=1))
    print(ratios)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
