"""Instructions that a program can check, over a file of prompts: strict and loose accuracy, of prompts and of each.

Rows are those of IFEval's files: `instruction_id_list`, names of kinds, perhaps with a language before them (`en:`),
and `kwargs`, the settings of each. Strict: the reply as it is. Loose: the reply, or it without its first line, its last
line, its asterisks, or any of these together; whichever keeps the instruction.
Source: Zhou et al. 2023, arXiv:2311.07911, section 2.2.

A kind that is not known, or a setting that is missing, is counted and named; nothing passes unseen. A prompt that holds
one is left out of the accuracy of prompts, since nobody knows whether it was followed.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.config.errors import UserError
from align.evaluation.instruction_kinds import KINDS
from align.evaluation.intervals import Values
from align.evaluation.languages import MARKS
from align.losses.calibration import Share, share_of

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Instruction:
    """One instruction of a prompt."""

    kind: str
    settings: Mapping[str, Any]
    fault: str | None = None
    """Why it cannot be checked."""


@dataclass(frozen=True)
class Followed:
    """How instructions were followed."""

    prompts_strict: Share | None
    """Prompts of which every instruction is kept; None if no prompt could be checked."""
    prompts_loose: Share | None
    instructions_strict: Share | None
    instructions_loose: Share | None
    by_kind: dict[str, Share]
    """Strict."""
    unknown: dict[str, int]
    """What could not be checked -> how many instructions."""
    prompts_left_out: int
    strict: Values
    """(prompts,) 1, 0, or NaN where one was left out; what a paired change is made of."""
    loose: Values


def read_instructions(row: Row, where: str = "") -> list[Instruction]:
    """The instructions of a row. Raises: UserError with `where` (file:line) if the row has another form."""
    names, settings = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(names, list) or not isinstance(settings, list) or len(names) != len(settings):
        raise UserError(f"{where or 'row'}: needs instruction_id_list and kwargs, two lists of equal length")
    found = []
    for name, given in zip(names, settings, strict=True):
        kind = ":".join(str(name).split(":")[-2:])
        kept = {key: value for key, value in (given or {}).items() if value is not None}
        found.append(Instruction(kind, kept, _fault(kind, kept)))
    return found


def _fault(kind: str, settings: Mapping[str, Any]) -> str | None:
    """Why an instruction cannot be checked: an empty reply shows which settings its check asks for."""
    if kind not in KINDS:
        return f"{kind}: unknown kind"
    if kind == "language:response_language" and settings.get("language") not in MARKS:
        return f"{kind}: unknown language {settings.get('language')}"
    try:
        KINDS[kind](settings, "x")
    except KeyError as missing:
        return f"{kind}: no {missing.args[0]}"
    except (ValueError, TypeError, AttributeError) as wrong:
        return f"{kind}: {wrong}"
    return None


def is_kept(instruction: Instruction, reply: str) -> bool:
    """Whether a reply as it is keeps an instruction; an empty one keeps none."""
    assert instruction.fault is None, instruction.fault
    return bool(reply.strip()) and KINDS[instruction.kind](instruction.settings, reply)


def loosened(reply: str) -> list[str]:
    """The reply, and it without first line, last line and asterisks in every combination: eight texts."""
    lines = reply.split("\n")
    cuts = [lines, lines[1:], lines[:-1], lines[1:-1]]
    texts = ["\n".join(cut).strip() for cut in cuts]
    return [reply, *texts[1:], *(text.replace("*", "") for text in [reply, *texts[1:]])]


def follow(rows: Sequence[Row], replies: Sequence[str]) -> Followed:
    """Replies (rows,) against the instructions of their rows. Raises: UserError for a row of another form."""
    strict, loose = np.full((2, len(rows)), np.nan)
    each_strict: list[float] = []
    each_loose: list[float] = []
    by_kind: dict[str, list[float]] = {}
    unknown: Counter[str] = Counter()
    for place, (row, reply) in enumerate(zip(rows, replies, strict=True)):
        listed = read_instructions(row, f"row {place + 1}")
        unknown.update(one.fault for one in listed if one.fault)
        known = [one for one in listed if not one.fault]
        texts = loosened(reply)
        kept = [is_kept(one, reply) for one in known]
        kept_loosely = [any(is_kept(one, text) for text in texts) for one in known]
        for one, right in zip(known, kept, strict=True):
            by_kind.setdefault(one.kind, []).append(float(right))
        each_strict += map(float, kept)
        each_loose += map(float, kept_loosely)
        if listed and len(known) == len(listed):
            strict[place], loose[place] = all(kept), all(kept_loosely)
    judged = np.isfinite(strict)
    return Followed(
        _share(strict[judged]),
        _share(loose[judged]),
        _share(each_strict),
        _share(each_loose),
        {kind: share_of(right) for kind, right in sorted(by_kind.items())},
        dict(unknown),
        int((~judged).sum()),
        strict,
        loose,
    )


def _share(right: Sequence[float]) -> Share | None:
    return share_of(np.asarray(right, dtype=np.float64)) if len(right) else None
