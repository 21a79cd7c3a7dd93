"""The kinds of rows that slots hold: what each is made from, when it is sound, and its columns once tokenised."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from align.data import fit, held_out
from align.data.findings import split_answers
from align.data.quality import check_demonstration, check_pair, check_rated, check_record, check_text
from align.data.records import Demonstration, PreferencePair, PromptRow, Ranking, Rated, RowRefused, TextDocument
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
        "scores": pa.list_(pa.float64()),
    }
)
"""`scores`: the data's own, larger is better; NaN for answers without one. `ranks` follow them where they are."""

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


def _encode_trees(template: Template, rows: Sequence[PreferencePair | Ranking | Rated]) -> list[Encoded]:
    """A pair as its two answers, the chosen one first; a ranking and rated answers as they are, with p = 1."""
    results = template.encode_trees([(*split_answers(row), row.tools) for row in rows])
    return [
        result if isinstance(result, RowRefused) else _tree_columns(row, *result)
        for row, result in zip(rows, results, strict=True)
    ]


def _tree_columns(row: PreferencePair | Ranking | Rated, prompt: list[int], answers: list[list[int]]) -> Encoded:
    if len(set(map(tuple, answers))) < len(answers):
        return RowRefused("answers_equal", "two answers have the same tokens")
    # A tie has no better side for a margin to favour.
    p, margin = (row.p, row.margin if row.p != 0.5 else 0.0) if isinstance(row, PreferencePair) else (1.0, 0.0)
    scores = [math.nan] * len(answers) if row.scores is None else list(row.scores)
    return [dict(zip(TREES.names, (prompt, answers, _ranks(row), p, margin, scores), strict=True))]


def _ranks(row: PreferencePair | Ranking | Rated) -> list[float]:
    if isinstance(row, PreferencePair):
        return [0.0, 1.0]
    return list(row.ranks) if isinstance(row, Ranking) else [-score for score in row.scores]


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
    _encode_trees,
    fit.tree_tokens,
    TREES,
)
RATINGS = Kind(
    "preferences",
    Rated,
    check_rated,
    lambda row: held_out.first_turn(row.prompt),
    _encode_trees,
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
    "helpful": Demonstration,
    "preferences": PreferencePair,
    "prompts": PromptRow,
}
"""Slot -> the record that its rows become."""
