"""metrics.jsonl: a line a step, and a line an event. Lines of steps that are to be made again are taken out."""

import json
import os
from pathlib import Path
from typing import Any


class Metrics:
    """The file, opened for a run that has made `step` steps."""

    def __init__(self, path: Path, step: int):
        self.path = path
        self._cut(step)
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def _cut(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a killed run
            if row.get("step", row.get("to_step", 0)) <= step:
                kept.append(line)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(k + "\n" for k in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def write(self, row: dict[str, Any]) -> None:
        """A line."""
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def rewind(self, step: int, event: dict[str, Any]) -> None:
        """Back to `step`, because of an event."""
        self.file.close()
        self._cut(step)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self.write(event)

    def close(self) -> None:
        """No more is written."""
        self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; a half-written last line is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows
