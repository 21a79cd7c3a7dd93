"""What the doctor says: a line a question, and the table of them."""

import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from align.config.redaction import redacted_text

OK, WARN, FAIL = "ok", "warn", "fail"
LEVELS = (OK, WARN, FAIL)
"""From best to worst."""
NARROWEST = 80


@dataclass(frozen=True)
class Line:
    """One question and its answer: `level` is ok, warn or fail; `todo` says what to do unless it is ok."""

    name: str
    level: str
    found: str
    todo: str = ""
    details: Any = None
    """More for the JSON file, as JSON types."""


def worst(lines: Sequence[Line]) -> str:
    """The worst level of all; ok of none."""
    return max((line.level for line in lines), key=LEVELS.index, default=OK)


def over_ranks(by_rank: dict[int, list[Line]], hosts: dict[int, str]) -> list[Line]:
    """The lines of all ranks as one list: each at its worst, naming the ranks that have it so if not all do.

    by_rank: rank -> its lines. A name may be missing on some ranks: only one rank a machine asks what concerns the
    machine.
    """
    names = list(dict.fromkeys(line.name for lines in by_rank.values() for line in lines))
    answers = {
        name: [(rank, line) for rank in by_rank for line in by_rank[rank] if line.name == name] for name in names
    }
    return [_over_ranks(answers[name], hosts) for name in names]


def _over_ranks(answers: list[tuple[int, Line]], hosts: dict[int, str]) -> Line:
    level = worst([line for _, line in answers])
    bad = [(rank, line) for rank, line in answers if line.level == level]
    first = bad[0][1]
    if level == OK or len(bad) == len(answers) == 1:
        return first
    if len(bad) == len(answers):
        return replace(first, found=f"all asked: {first.found}")
    which = ", ".join(f"{rank} ({hosts[rank]})" for rank, _ in bad)
    return replace(first, found=f"rank {which}: {first.found}")


def table(lines: Sequence[Line]) -> str:
    """The lines for a terminal: level, name, what was found, and below what to do."""
    width = max((len(line.name) for line in lines), default=0)
    columns = max(NARROWEST, shutil.get_terminal_size((120, 24)).columns)
    rows = []
    for line in lines:
        head = f"{line.level:<4}  {line.name:<{width}}  "
        rows += _wrapped(head, redacted_text(line.found), columns)
        if line.level != OK and line.todo:
            rows += _wrapped(" " * (len(head) - 2) + "→ ", redacted_text(line.todo), columns)
    return "\n".join(rows)


def _wrapped(head: str, text: str, columns: int) -> list[str]:
    return textwrap.wrap(
        text, columns, initial_indent=head, subsequent_indent=" " * len(head), break_long_words=False,
        break_on_hyphens=False,
    ) or [head.rstrip()]  # fmt: skip
