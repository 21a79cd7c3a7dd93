"""`metrics.jsonl`: one object a logged step, each metric under the name the code gives it."""

import json
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends to a stage's metrics.jsonl. Only rank 0 makes one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def keep_until(self, step: int) -> None:
        """Forget lines after `step` and a torn last line: a resumed stage writes those steps again."""
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        temporary.replace(self.path)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Append one step's metrics."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics.jsonl, oldest first; a line torn by an interruption is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines
