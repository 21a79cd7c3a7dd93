"""Tokenised rows as they come in, what does not fit left out, then split into rows to train on and held-out rows."""

import hashlib
from collections.abc import Sequence
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from align.data import fit, held_out
from align.data.cache import TABLES
from align.data.kinds import TEXT, Columns, Kind
from align.data.records import BadRow, Origin, RowRefused
from align.data.report import RowReport
from align.data.template import Template


class EncodedRows:
    """Tokenised rows as they come in, with what decides their split."""

    def __init__(self, kind: Kind, template: Template, max_tokens: int):
        self.kind, self.template, self.max_tokens = kind, template, max_tokens
        self.tables: list[pa.Table] = []
        self.positions: list[float] = []
        self.pieces: list[int] = []
        self.tokens_lost = 0

    def add(self, batch: Sequence[tuple[Origin, Any]], records: Sequence[Any]) -> list[BadRow]:
        """Tokenise the sound records of one batch; returns the other rows, and those refused or too long, in order."""
        encoded = iter(self.kind.encode(self.template, [one for one in records if not isinstance(one, BadRow)]))
        bad_rows: list[BadRow] = []
        columns: list[Columns] = []
        for (origin, row), record in zip(batch, records, strict=True):
            if isinstance(record, BadRow):
                bad_rows.append(record)
                continue
            try:
                pieces = self._fitting(next(encoded))
            except RowRefused as error:
                bad_rows.append(BadRow(origin, error.reason, error.detail, row))
                continue
            columns += pieces
            self.pieces.append(len(pieces))
            self.positions.append(held_out.position(self.kind.first_turn(record)))
        self.tables.append(pa.Table.from_pylist(columns, schema=self.kind.schema))
        return bad_rows

    def _fitting(self, result: Columns | RowRefused) -> list[Columns]:
        """The row, or its pieces if it is text. Raises: RowRefused."""
        if isinstance(result, RowRefused):
            raise result
        if self.kind is TEXT:
            return fit.text_pieces(result["input_ids"], self.max_tokens)
        tokens = self.kind.tokens(result)
        if tokens > self.max_tokens:
            self.tokens_lost += fit.trained_tokens(result)
        fit.refuse_too_long(tokens, self.max_tokens)
        return [result]

    def split(self, fraction: float, report: RowReport) -> dict[str, pa.Table]:
        """Tables `train` and `held_out`; the report gets their counts, tokens and digest."""
        rows_out = held_out.held_out_rows(self.positions, fraction)
        chosen = [out for out, pieces in zip(rows_out, self.pieces, strict=True) for _ in range(pieces)]
        if self.kind is TEXT and len(self.pieces) < held_out.TOO_FEW_ROWS:
            rows_out = [False] * len(self.pieces)
            chosen = held_out.held_out_tails(self.pieces, fraction)
        table = pa.concat_tables([self.kind.schema.empty_table(), *self.tables])
        mask = pa.array(chosen, pa.bool_())
        tables = {"train": table.filter(pc.invert(mask)), "held_out": table.filter(mask)}
        report.held_out = sum(rows_out)
        report.kept = len(rows_out) - report.held_out
        if self.kind is TEXT:
            report.pieces, report.pieces_held_out = len(chosen), sum(chosen)
        report.tokens = _count_tokens(tables["train"])
        report.digest = _digest(tables)
        return tables


def _count_tokens(table: pa.Table) -> dict[str, int]:
    """Tokens by column; for masked rows all tokens and trained ones."""
    if "labels" not in table.column_names:
        names = ("prompt", "chosen", "rejected")
        return {name: len(pc.list_flatten(table[f"{name}_ids"])) for name in names}
    labels = pc.list_flatten(table["labels"])
    trained = pc.sum(pc.not_equal(labels, fit.NOT_TRAINED)).as_py() or 0
    return {"all": len(labels), "trained": trained}


def largest_token(rows: datasets.Dataset) -> int:
    """The largest token id in any row; 0 without rows."""
    columns = [rows.data.column(name) for name in rows.column_names if name.endswith("_ids")]
    return max(pc.max(pc.list_flatten(column)).as_py() or 0 for column in columns)


def _digest(tables: dict[str, pa.Table]) -> str:
    """sha256 of the rows' content, whatever their chunks in memory."""
    digest = hashlib.sha256()
    for name in TABLES:
        for column in tables[name].itercolumns():
            if pa.types.is_list(column.type):
                digest.update(pc.list_value_length(column).to_numpy().astype("<i4").tobytes())
                column = pc.list_flatten(column)
            digest.update(column.to_numpy().tobytes())
    return digest.hexdigest()
