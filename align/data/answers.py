"""Rows of any format as prompts with their answers, in token ids: what a reward model scores."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from align.config.schema import DataConfig
from align.data import fit
from align.data.findings import split_answers
from align.data.prepare import slot_sources
from align.data.quality import check_record
from align.data.records import BadRow, Origin, PreferencePair, Ranking, Record, RowRefused
from align.data.report import RowReport
from align.data.template import Answers, Ids, Template
from align.data.walk import walk


@dataclass(frozen=True)
class AnsweredRow:
    """One prompt with its answers. `ranks` (smaller is better) and `p` are there where the row compares them."""

    origin: Origin
    row: Any
    prompt: Ids
    answers: list[Ids]
    ranks: tuple[float, ...] | None
    p: float


def answered_rows(
    data: DataConfig, slot: str, template: Template, max_tokens: int, report: RowReport
) -> Iterator[AnsweredRow]:
    """The rows of a slot that hold answers and fit; the report counts all of them and keeps those left out."""
    for source in slot_sources(data, slot):
        row_format, batches = walk(source, None, check_record, data)
        report.formats[source.path] = row_format.name
        for batch in batches:
            report.read += len(batch)
            records = [(row, record) for row in batch for record in row.records]
            report.made += len(records)
            sides = [_sides(record) for _, record in records]
            encoded = iter(template.encode_trees([side for side in sides if not isinstance(side, RowRefused)]))
            for (row, record), side in zip(records, sides, strict=True):
                tree = side if isinstance(side, RowRefused) else _fitting(next(encoded), max_tokens)
                if isinstance(record, BadRow):
                    report.bad_rows.add(record)
                elif isinstance(tree, RowRefused):
                    report.bad_rows.add(BadRow(row.origin, tree.reason, tree.detail, row.row))
                else:
                    report.kept += 1
                    yield AnsweredRow(row.origin, row.row, *tree, *_verdict(record))


def _sides(record: Record | BadRow) -> Answers | RowRefused:
    prompt, answers = ((), ()) if isinstance(record, BadRow) else split_answers(record)
    return (prompt, answers, record.tools) if answers else RowRefused("no_answer", "there is no answer to score")


def _verdict(record: Record) -> tuple[tuple[float, ...] | None, float]:
    if isinstance(record, PreferencePair):
        return ((0.0, 1.0) if record.p != 0.5 else (0.0, 0.0)), record.p
    return (record.ranks, 1.0) if isinstance(record, Ranking) else (None, 1.0)


def _fitting(tree: tuple[Ids, list[Ids]] | RowRefused, max_tokens: int) -> tuple[Ids, list[Ids]] | RowRefused:
    if isinstance(tree, RowRefused):
        return tree
    tokens = len(tree[0]) + max(map(len, tree[1]))
    if tokens > max_tokens:
        return RowRefused(fit.TOO_LONG, f"{tokens} tokens, max_tokens={max_tokens}")
    return tree
