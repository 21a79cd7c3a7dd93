"""`metrics.jsonl`: one object a logged step, each metric under the name the code gives it."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def json_line(value: dict[str, Any]) -> str:
    """One line of a JSONL file that any reader takes: a number that is none (NaN, infinity) is null."""
    return json.dumps(_strict(value), ensure_ascii=False, allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _strict(inner) for name, inner in value.items()}
    return [_strict(inner) for inner in value] if isinstance(value, list | tuple) else value


class MetricsLog:
    """Appends to a stage's metrics.jsonl. Only rank 0 makes one.

    A step may have two lines: one of training, and one of the evaluation after it, whose metrics begin with `eval_`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def keep(self, logged: Iterable[dict[str, Any]]) -> None:
        """Forget every line that is not of a step and kind in `logged`, and a torn one: they will be written again.

        `logged` is what the checkpoint that a stage goes on from knows to be logged; empty for a stage that starts.
        """
        known = {_step_and_kind(line) for line in logged}
        kept = [line for line in read_metrics(self.path) if _step_and_kind(line) in known]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(map(json_line, kept)), encoding="utf-8")
        temporary.replace(self.path)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Append one step's metrics."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json_line({"step": step, **metrics}))


def is_evaluation(line: dict[str, Any]) -> bool:
    """Whether a line holds figures on held-out rows."""
    return "eval_loss" in line


def _step_and_kind(line: dict[str, Any]) -> tuple[int, bool]:
    return line["step"], is_evaluation(line)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics.jsonl, oldest first; a line torn by an interruption is left out.

    A figure that was no number (null) is NaN.
    """
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append({name: math.nan if value is None else value for name, value in line.items()})
    return lines
