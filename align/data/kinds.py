"""The kinds of rows that slots hold: what each is made from, when it is sound, and its columns once tokenised."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from align.data import fit, held_out
from align.data.formats import Format, Record, to_demonstration, to_prompt
from align.data.quality import check_demonstration, check_pair, check_text
from align.data.records import BadRow, Demonstration, Origin, PreferencePair, PromptRow, RowRefused, TextDocument
from align.data.template import Template

FIRST_CHARACTERS = 200

IDS = pa.list_(pa.int32())
MASKED = pa.schema({"input_ids": IDS, "labels": IDS})
PAIRS = pa.schema(
    {"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS, "p": pa.float64(), "margin": pa.float64()}
)

Columns = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """What one slot needs: which record, when it is sound, what decides its place, and its columns."""

    slot: str
    record: type
    check: Callable[[Any], None]
    first_turn: Callable[[Any], str]
    encode: Callable[[Template, Sequence[Any]], list[Columns | RowRefused]]
    tokens: Callable[[Columns], int]
    schema: pa.Schema


def sound_record(
    row_format: Format, wanted: type, check: Callable[[Any], None], origin: Origin, row: Any
) -> Record | BadRow:
    """The row as the record that the slot needs, checked, or why it cannot be one."""
    try:
        record: Record = row_format.read(row)
        if wanted is Demonstration:
            record = to_demonstration(record)
        elif wanted is PromptRow:
            record = to_prompt(record, row)
        check(record)
    except RowRefused as error:
        return BadRow(origin, error.reason, error.detail, row)
    return record


def _encode_demonstrations(template: Template, rows: Sequence[Demonstration]) -> list[Columns | RowRefused]:
    results = template.encode_demonstrations([row.messages for row in rows])
    return [
        result if isinstance(result, RowRefused) else {"input_ids": result[0], "labels": result[1]}
        for result in results
    ]


def _encode_pairs(template: Template, rows: Sequence[PreferencePair]) -> list[Columns | RowRefused]:
    results = template.encode_pairs([(row.prompt, row.chosen, row.rejected) for row in rows])
    return [
        result if isinstance(result, RowRefused) else dict(zip(PAIRS.names, (*result, row.p, row.margin), strict=True))
        for row, result in zip(rows, results, strict=True)
    ]


def _encode_texts(template: Template, rows: Sequence[TextDocument]) -> list[Columns | RowRefused]:
    return [{"input_ids": ids} for ids in template.encode_texts([row.text for row in rows])]


DEMONSTRATIONS = Kind(
    "demonstrations",
    Demonstration,
    check_demonstration,
    lambda row: held_out.first_turn(row.messages),
    _encode_demonstrations,
    fit.demonstration_tokens,
    MASKED,
)
PREFERENCES = Kind(
    "preferences",
    PreferencePair,
    check_pair,
    lambda row: held_out.first_turn(row.prompt),
    _encode_pairs,
    fit.pair_tokens,
    PAIRS,
)
TEXT = Kind(
    "text",
    TextDocument,
    check_text,
    lambda row: row.text[:FIRST_CHARACTERS],
    _encode_texts,
    fit.demonstration_tokens,
    MASKED,
)
RECORDS = {
    "text": TextDocument,
    "demonstrations": Demonstration,
    "preferences": PreferencePair,
    "prompts": PromptRow,
}
"""Slot -> the record that its rows become."""
