"""Steps whose loss or gradient is no number: skipped by every rank alike, counted, and their rows written down."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from align.config.errors import UserError
from align.tracking.local import json_line, read_metrics
from align.tracking.progress import say

FILE = "nonfinite.jsonl"
"""In the stage's folder: a line {step, rows: [{row, text}]} for each step that was skipped."""
NAMED = 8
"""Rows that are named on the screen."""


def poisoned(loss: Tensor) -> Tensor:
    """The loss as it is if it is finite; else one whose gradient is NaN everywhere.

    The gradient's norm is then NaN on every rank, so all of them skip the step and none has to be asked.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan).to(loss)


class SkippedSteps:
    """Counts the steps of a stage that were skipped, over interruptions too. The same on every rank."""

    def __init__(
        self,
        stage: str,
        file: Path,
        *,
        limit: int,
        resumed_at: int,
        main: bool,
        describe: Callable[[int], str],
        last_good: Callable[[], Path | None],
        alert: Callable[[str, str], None] = lambda title, text: None,
    ):
        """describe: the text of a training row. resumed_at: lines of later steps are forgotten, they come again.
        alert: takes a title and a text."""
        self.stage, self.file, self.limit, self.main = stage, file, limit, main
        self.describe, self.last_good, self.alert = describe, last_good, alert
        known = [line for line in read_metrics(file) if line["step"] <= resumed_at]
        self.count = len(known)
        if main and file.is_file():
            file.write_text("".join(map(json_line, known)), encoding="utf-8")

    def add(self, step: int, rows: Sequence[int]) -> None:
        """A step was skipped. Call it on every rank. Raises: UserError if that was one too many."""
        self.count += 1
        what = self._written(step, rows)
        if self.count > self.limit:
            self._end(what, f"stages.{self.stage}.max_nonfinite_steps={self.limit} is spent")
        said = f"{what}; skipped, {self.count} of {self.limit} allowed"
        say(f"{self.stage}: WARN {said}", active=self.main)
        self.alert(f"{self.stage}: a step was skipped", said)

    def refuse(self, step: int, rows: Sequence[int], why: str) -> None:
        """A step could not be skipped. Call it on every rank. Raises: UserError."""
        self._end(self._written(step, rows), why)

    def _written(self, step: int, rows: Sequence[int]) -> str:
        if self.main:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            line = {"step": step, "rows": [{"row": row, "text": self.describe(row)} for row in rows]}
            with open(self.file, "a", encoding="utf-8") as out:
                out.write(json_line(line))
        named = ", ".join(map(str, rows[:NAMED])) + (f" and {len(rows) - NAMED} more" if len(rows) > NAMED else "")
        return f"step {step}: the loss or its gradient is not finite; training rows {named} (as text in {self.file})"

    def _end(self, what: str, why: str) -> None:
        good = self.last_good()
        left = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        self.alert(f"{self.stage}: ended by steps that are not finite", f"{what}; {why}")
        raise UserError(
            f"{self.stage}: {what}; {why}, so nothing is saved from here on; {left}. "
            f"Lower stages.{self.stage}.learning_rate, or look at the rows with do=preview"
        )
