r"""How long reading and writing a video takes, beside another version of the code.

Processes of both versions read and write the same clip by turns; figures are the least seconds of all turns.

    git worktree add ../before COMMIT
    python -m tests.bench.video_files --against ../before --output video_files.json
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

MEASURE = """
import json, sys, time
from csd_2d.io.video import Clip, read_clip, write_clip
start = time.monotonic()
clip = read_clip(sys.argv[1])
frames = list(clip.frames)
middle = time.monotonic()
write_clip(Clip(frames, clip.rate), sys.argv[2])
print(json.dumps({"read": middle - start, "write": time.monotonic() - middle}))
"""


def main(
    output: Path,
    against: Path | None = None,
    count: int = 50,
    size: tuple[int, int] = (640, 360),
    turns: int = 3,
) -> None:
    """Measure and write a table as JSON; `against` is a folder with the other version's csd_2d."""
    from csd_2d.io.video import write_clip
    from tests.bench.video_memory import shapes

    here = Path(__file__).parents[2]
    versions = {"this": here} | ({} if against is None else {"against": against.absolute()})
    rows: list[dict[str, str | float]] = []
    with tempfile.TemporaryDirectory(dir=output.absolute().parent) as folder:
        source = Path(folder) / "in.mp4"
        write_clip(shapes(count, size[1], size[0]), source)
        for _ in range(turns):
            for name, root in versions.items():
                arguments = [sys.executable, "-c", MEASURE, str(source), str(Path(folder) / "out.mp4")]
                environment = {**os.environ, "PYTHONPATH": str(root)}
                began = time.monotonic()
                done = subprocess.run(arguments, env=environment, cwd=root, check=True, capture_output=True, text=True)
                figures = json.loads(done.stdout.splitlines()[-1])
                rows.append({"version": name, **figures, "process": time.monotonic() - began})
                print(rows[-1], flush=True)
    least = {
        (name, what): min(float(row[what]) for row in rows if row["version"] == name)
        for name in versions
        for what in ("read", "write")
    }
    ratio = {} if against is None else {
        what: round(least["this", what] / least["against", what], 3) for what in ("read", "write")
    }  # fmt: skip
    output.write_text(json.dumps({"frames": count, "size": size, "rows": rows, "ratio": ratio}, indent=1))
    print(ratio)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
