"""The kinds of rows that slots hold: what each is made from, when it is sound, and its columns once tokenised."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from align.data import fit, held_out
from align.data.findings import split_answers
from align.data.quality import check_demonstration, check_pair, check_record, check_text
from align.data.records import Demonstration, PreferencePair, PromptRow, Ranking, RowRefused, TextDocument
from align.data.template import Template

FIRST_CHARACTERS = 200

IDS = pa.list_(pa.int32())
MASKED = pa.schema({"input_ids": IDS, "labels": IDS})
PAIRS = pa.schema(
    {"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS, "p": pa.float64(), "margin": pa.float64()}
)

TREES = pa.schema(
    {
        "prompt_ids": IDS,
        "completion_ids": pa.list_(IDS),
        "ranks": pa.list_(pa.float64()),
        "p": pa.float64(),
        "margin": pa.float64(),
    }
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


def _encode_comparisons(template: Template, rows: Sequence[PreferencePair | Ranking]) -> list[Encoded]:
    """A pair as its two answers, the chosen one first; a ranking as it is, with p = 1."""
    results = template.encode_trees([(*split_answers(row), row.tools) for row in rows])
    return [
        result if isinstance(result, RowRefused) else _tree_columns(row, *result)
        for row, result in zip(rows, results, strict=True)
    ]


def _tree_columns(row: PreferencePair | Ranking, prompt: list[int], answers: list[list[int]]) -> Encoded:
    if len(set(map(tuple, answers))) < len(answers):
        return RowRefused("answers_equal", "two answers have the same tokens")
    ranked = isinstance(row, Ranking)
    ranks = list(row.ranks) if ranked else [0.0, 1.0]
    # A tie has no better side for a margin to favour.
    p, margin = (1.0, 0.0) if ranked else (row.p, row.margin if row.p != 0.5 else 0.0)
    return [{"prompt_ids": prompt, "completion_ids": answers, "ranks": ranks, "p": p, "margin": margin}]


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
COMPARISONS = Kind(
    "preferences",
    Ranking,
    check_record,
    lambda row: held_out.first_turn(row.prompt),
    _encode_comparisons,
    fit.tree_tokens,
    TREES,
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
