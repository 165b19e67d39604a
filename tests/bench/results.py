"""What benchmarks share: results that are kept row by row."""

import json
from pathlib import Path
from typing import Any

from csd_2d.io.files import replacing


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
