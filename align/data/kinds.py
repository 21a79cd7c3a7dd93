"""The kinds of rows that slots hold: what each is made from, when it is sound, and its columns once tokenised."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from align.data import fit, held_out
from align.data.quality import check_demonstration, check_pair, check_text
from align.data.records import Demonstration, PreferencePair, PromptRow, RowRefused, TextDocument
from align.data.template import Template

FIRST_CHARACTERS = 200

IDS = pa.list_(pa.int32())
MASKED = pa.schema({"input_ids": IDS, "labels": IDS})
PAIRS = pa.schema(
    {"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS, "p": pa.float64(), "margin": pa.float64()}
)

Columns = dict[str, Any]
Encoded = list[Columns] | RowRefused
"""A record's tokens, in one piece or several, or why it cannot be used."""


@dataclass(frozen=True)
class Kind:
    """What one slot needs: which record, when it is sound, what decides its place, and its columns."""

    slot: str
    record: type
    check: Callable[[Any], None]
    first_turn: Callable[[Any], str]
    encode: Callable[[Template, Sequence[Any]], list[Encoded]]
    tokens: Callable[[Columns], int]
    schema: pa.Schema


def _encode_demonstrations(template: Template, rows: Sequence[Demonstration]) -> list[Encoded]:
    return [
        result
        if isinstance(result, RowRefused)
        else [{"input_ids": input_ids, "labels": labels} for input_ids, labels in result]
        for result in template.encode_demonstrations(rows)
    ]


def _encode_pairs(template: Template, rows: Sequence[PreferencePair]) -> list[Encoded]:
    results = template.encode_pairs(rows)
    return [
        result
        if isinstance(result, RowRefused)
        else [dict(zip(PAIRS.names, (*result, row.p, row.margin), strict=True))]
        for row, result in zip(rows, results, strict=True)
    ]


def _encode_texts(template: Template, rows: Sequence[TextDocument]) -> list[Encoded]:
    return [[{"input_ids": ids}] for ids in template.encode_texts([row.text for row in rows])]


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
