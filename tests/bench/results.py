"""What benchmarks share: results that are kept row by row, and a prior that counts."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from csd_2d.io.files import replacing
from csd_2d.prior import Prior


class CountingPrior:
    """Counts the rows a prior estimates the noise of; everything else is the prior's own."""

    def __init__(self, prior: Prior) -> None:
        self._prior, self.rows = prior, 0

    def noise_estimate(self, x_t: Tensor, *args: Any) -> Tensor:
        self.rows += len(x_t)
        return self._prior.noise_estimate(x_t, *args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._prior, name)


class Results:
    """Rows in a JSON file, written after every one.

    Raises:
        ValueError: if the file holds rows of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path, self._content = path, {"settings": settings, "rows": []}
        if path.exists():
            self._content = json.loads(path.read_text(encoding="utf-8"))
            if self._content.get("settings") != json.loads(json.dumps(settings)):
                raise ValueError(f"{path} holds results of other settings; name another file.")

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self._content["rows"]

    def find(self, **key: Any) -> dict[str, Any] | None:
        """Look up the row with these values."""
        return next((row for row in self.rows if key.items() <= row.items()), None)

    def holds(self, **key: Any) -> bool:
        return self.find(**key) is not None

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with replacing(self._path) as temporary:
            temporary.write_text(json.dumps(self._content, indent=1), encoding="utf-8")
