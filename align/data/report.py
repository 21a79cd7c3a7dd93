"""What became of the rows of a slot, in numbers: for people, for the manifest, and row by row on disk."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from align.data.fit import TOO_LONG
from align.data.quality import count_reasons
from align.data.records import BadRow, Origin


@dataclass
class RowReport:
    """Counts of rows (text: documents). read = kept + held_out + all dropped."""

    slot: str
    formats: dict[str, str] = field(default_factory=dict)
    """Source path -> the format it was read as."""
    read: int = 0
    kept: int = 0
    """Rows to train on."""
    held_out: int = 0
    """Rows kept out of training."""
    pieces: int = 0
    """Text only: pieces of at most max_tokens that the documents make, held-out ones included."""
    pieces_held_out: int = 0
    max_tokens: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    """Tokens of the rows to train on, by column; `trained` for labels."""
    tokens_lost: int = 0
    """Trained tokens of the rows left out as too long."""
    borders_cut: int = 0
    """Rows where a token would have crossed the border of prompt and completion; it was split there."""
    digest: str = ""
    """sha256 of the tokenised rows, in order."""
    bad_rows: list[BadRow] = field(default_factory=list)
    """Rows left out, too long ones included."""

    @property
    def dropped(self) -> dict[str, int]:
        """Reason -> rows left out, the most frequent first."""
        return count_reasons(self.bad_rows)

    def counts(self) -> dict[str, Any]:
        """For the manifest: read, kept, held_out, and dropped by reason."""
        return {"read": self.read, "kept": self.kept, "held_out": self.held_out, "dropped": self.dropped}

    def lines(self) -> list[str]:
        """For people: what was read as what, what was left out and why, how many tokens are trained on."""
        lines = [f"data.{self.slot}: {path} read as {name}" for path, name in self.formats.items()]
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.dropped.items())
        use = f"{self.kept:,} prompts" if self.slot == "prompts" else f"{self.kept:,} to train on"
        held_out = "" if self.slot == "prompts" else f", {self.held_out:,} held out"
        left_out = f"{len(self.bad_rows):,} left out" + (f" ({reasons})" if reasons else "")
        lines.append(f"{self.read:,} rows: {use}{held_out}, {left_out}")
        if self.pieces > self.kept + self.held_out:
            lines.append(
                f"cut into {self.pieces:,} pieces of at most {self.max_tokens:,} tokens, "
                f"{self.pieces_held_out:,} of them held out"
            )
        if self.tokens:
            counts = ", ".join(f"{name} {count:,}" for name, count in self.tokens.items())
            lines.append(f"tokens to train on: {counts}")
        if TOO_LONG in self.dropped:
            lines.append(
                f"longer than max_tokens={self.max_tokens}: {self.dropped[TOO_LONG]:,} rows with "
                f"{self.tokens_lost:,} answer tokens"
            )
        if self.borders_cut:
            lines.append(f"{self.borders_cut:,} rows were split into tokens at the border of prompt and answer")
        return lines

    def write_bad_rows(self, path: Path) -> None:
        """The rows left out, line by line; no file if there are none."""
        write_bad_rows(self.bad_rows, path)

    def as_json(self) -> dict[str, Any]:
        """The whole report as JSON values; what JSON cannot hold inside a bad row becomes text."""
        return json.loads(json.dumps(asdict(self), default=str))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "RowReport":
        """The report that `as_json` gave."""
        bad_rows = [BadRow(Origin(**bad.pop("origin")), **bad) for bad in value.pop("bad_rows")]
        return cls(**value, bad_rows=bad_rows)


def write_bad_rows(bad_rows: Sequence[BadRow], path: Path) -> None:
    """JSON lines of {origin, reason, detail, row}; no file if no row was left out."""
    if not bad_rows:
        path.unlink(missing_ok=True)
        return
    with open(path, "w", encoding="utf-8") as file:
        for bad in bad_rows:
            line = {"origin": str(bad.origin), "reason": bad.reason, "detail": bad.detail, "row": bad.row}
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
