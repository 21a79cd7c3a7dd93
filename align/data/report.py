"""What became of the rows of a slot, in numbers: for people, for the manifest, for the next run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.data.bad_rows import BadRows
from align.data.fit import TOO_LONG

CHOSEN_REASONS = (TOO_LONG, "tie", "undesirable", "no_score", "unranked", "unanswered", "nothing_to_compare", "deleted")
"""Why rows are left out without being bad: a limit or policy that the user chose, or a tree that nobody finished."""


@dataclass
class RowReport:
    """Counts of rows (text: documents). made = kept + held_out + sampled_out + all dropped."""

    slot: str
    bad_rows: BadRows
    """Rows left out, too long ones included."""
    formats: dict[str, str] = field(default_factory=dict)
    """Source path -> the format it was read as."""
    read: int = 0
    made: int = 0
    """Records that the rows make: one each, but several of a tree or a ranking. A row refused whole counts as one."""
    kept: int = 0
    """Records to train on, each counted once."""
    held_out: int = 0
    """Records kept out of training."""
    sampled_out: int = 0
    """Records left out because their source has a weight below 1."""
    copies: int = 0
    """Further copies of records to train on, because their source has a weight above 1."""
    pieces: int = 0
    """Rows of tokens, held-out ones included: more than records where long text or reasoning is split."""
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
    findings: list[dict[str, Any]] = field(default_factory=list)
    """What the fast checks found, see `align.data.findings`."""

    @property
    def dropped(self) -> dict[str, int]:
        """Reason -> records left out, the most frequent first."""
        return self.bad_rows.by_reason

    def counts(self) -> dict[str, Any]:
        """For the manifest: read, kept, held_out, and dropped by reason."""
        counts = {"read": self.read, "kept": self.kept, "held_out": self.held_out, "dropped": self.dropped}
        return counts if self.made == self.read else {**counts, "made": self.made}

    def lines(self) -> list[str]:
        """For people: what was read as what, what was left out and why, how many tokens are trained on."""
        lines = [f"data.{self.slot}: {path} read as {name}" for path, name in self.formats.items()]
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.dropped.items())
        use = f"{self.kept:,} prompts" if self.slot == "prompts" else f"{self.kept:,} to train on"
        held_out = "" if self.slot == "prompts" and not self.held_out else f", {self.held_out:,} held out"
        left_out = f"{len(self.bad_rows):,} left out" + (f" ({reasons})" if reasons else "")
        made = "" if self.made == self.read else f" that make {self.made:,}"
        lines.append(f"{self.read:,} rows{made}: {use}{held_out}, {left_out}")
        if self.sampled_out or self.copies:
            lines.append(f"by weight: {self.sampled_out:,} left out, {self.copies:,} further copies")
        if self.pieces > self.kept + self.held_out + self.sampled_out:
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
        return lines + [f"WARN {finding['text']}" for finding in self.findings if finding["level"] == "warn"]

    def as_json(self) -> dict[str, Any]:
        """The whole report as JSON values; the bad rows themselves stay in their file."""
        values = {name: value for name, value in vars(self).items() if name != "bad_rows"}
        return values | {"bad_rows": self.bad_rows.as_json()}

    @classmethod
    def from_json(cls, value: dict[str, Any], bad_rows: Path) -> "RowReport":
        """The report that `as_json` gave, with its file of bad rows."""
        return cls(**(value | {"bad_rows": BadRows.from_json(value["bad_rows"], bad_rows)}))
