"""Rows left out: counted by reason in memory, written one by one to a file, so that a million of them take no room."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from align.config.errors import UserError
from align.config.schema import DataConfig, OnBadRows
from align.data.records import BadRow, Origin

SHOWN_ROWS = 3
LISTED_ROWS = 20
"""Row numbers that a report lists of each reason; the file has all of them."""


@dataclass
class BadRows:
    """What was left out. The file has a line {origin, reason, detail, row} for each; it is there only if any is."""

    path: Path = field(compare=False)
    counts: Counter[str] = field(default_factory=Counter)
    first: list[dict[str, str]] = field(default_factory=list)
    """The first ones of each reason: {origin, reason, detail}."""
    origins: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> where the first of them were found."""
    _file: IO[str] | None = field(default=None, compare=False)

    def add(self, bad: BadRow) -> None:
        """Count a row and write it down."""
        line = {"origin": str(bad.origin), "reason": bad.reason, "detail": bad.detail}
        self.counts[bad.reason] += 1
        if self.counts[bad.reason] <= SHOWN_ROWS:
            self.first.append(line)
        listed = self.origins.setdefault(bad.reason, [])
        if len(listed) < LISTED_ROWS:
            listed.append(line["origin"])
        if self._file is None:
            self._file = open(self.path, "w", encoding="utf-8", errors="backslashreplace")
        self._file.write(json.dumps(line | {"row": bad.row}, ensure_ascii=False, default=str) + "\n")

    def close(self) -> None:
        """Finish the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __len__(self) -> int:
        return self.counts.total()

    def __iter__(self) -> Iterator[BadRow]:
        """All rows, from the file."""
        self.close()
        if not self.counts:
            return
        with open(self.path, encoding="utf-8") as file:
            for text in file:
                line = json.loads(text)
                yield BadRow(Origin.parse(line["origin"]), line["reason"], line["detail"], line["row"])

    @property
    def by_reason(self) -> dict[str, int]:
        """Reason -> rows, the most frequent first."""
        return dict(self.counts.most_common())

    def write(self, path: Path) -> None:
        """Copy the file to `path`; if no row was left out, there is none afterwards."""
        self.close()
        if not self.counts:
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.path, path)

    def as_json(self) -> dict[str, Any]:
        """All but the rows themselves, for a report beside the file."""
        return {"counts": dict(self.counts), "first": self.first, "origins": self.origins}

    @classmethod
    def from_json(cls, value: dict[str, Any], path: Path) -> "BadRows":
        """What `as_json` gave, with its file."""
        return cls(path, Counter(value["counts"]), value["first"], value["origins"])


class TooManyBadRows(UserError):
    """More rows are bad than the policy allows; `bad_rows` are all of them."""

    def __init__(self, message: str, bad_rows: BadRows):
        super().__init__(message)
        self.bad_rows = bad_rows


def enforce_policy(bad_rows: BadRows, read: int, data: DataConfig, *, allowed: tuple[str, ...] = ()) -> None:
    """Stop when `data.on_bad_rows=error` and more than `data.max_bad_fraction` of the rows read are bad.

    `allowed` are reasons that a user chose (a length, ties), and so no fault of the data.
    Raises: TooManyBadRows naming the reasons with counts, the first rows, and how to go on.
    """
    counts = {reason: count for reason, count in bad_rows.by_reason.items() if reason not in allowed}
    bad = sum(counts.values())
    if data.on_bad_rows is not OnBadRows.error or bad <= data.max_bad_fraction * read:
        return
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts.items())
    shown = [line for line in bad_rows.first if line["reason"] not in allowed][:SHOWN_ROWS]
    first = "; ".join(f"{line['origin']}: {line['reason']}: {line['detail']}" for line in shown)
    more = f"; and {bad - len(shown)} more" if bad > len(shown) else ""
    raise TooManyBadRows(
        f"{bad} of {read} rows cannot be used ({reasons}): {first}{more}. More than data.max_bad_fraction="
        f"{data.max_bad_fraction:g}; mend the rows, or leave them out with data.on_bad_rows=drop",
        bad_rows,
    )
