"""Tokenised rows, written down as they come in, then split into rows to train on and held-out rows.

Of each record only a few numbers stay in memory; the tokens go to disk at once and are read back batch by batch.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from align.data import fit, held_out
from align.data.bad_rows import BadRows
from align.data.cache import TABLES
from align.data.kinds import TEXT, Columns, Encoded, Kind
from align.data.records import BadRow, Origin, Record, RowRefused
from align.data.report import RowReport
from align.data.template import Template
from align.data.walk import Walked

if TYPE_CHECKING:
    import datasets

ALL = "all.arrow"
"""Every row, before the split; removed by it."""


class EncodedRows:
    """The rows of a slot on their way into `folder`, with what decides their split."""

    def __init__(self, kind: Kind, template: Template, max_tokens: int, folder: Path, bad_rows: BadRows):
        self.kind, self.template, self.max_tokens, self.folder = kind, template, max_tokens, folder
        self.bad_rows = bad_rows
        self.positions, self.pieces, self.copies = array("d"), array("i"), array("i")
        self.tokens_lost = 0
        self._sink = pa.OSFile(str(folder / ALL), "wb")
        self._writer = pa.ipc.new_stream(self._sink, kind.schema)

    def add(self, batch: Sequence[Walked], weight: float) -> list[tuple[Origin, Record]]:
        """Tokenise the sound records of a batch; the others are written down as bad. Returns the records kept."""
        records = [(row, record) for row in batch for record in row.records]
        encoded = iter(self.kind.encode(self.template, [one for _, one in records if not isinstance(one, BadRow)]))
        kept: list[tuple[Origin, Record]] = []
        columns: list[Columns] = []
        for row, record in records:
            if isinstance(record, BadRow):
                self.bad_rows.add(record)
                continue
            try:
                pieces = self._fitting(next(encoded))
            except RowRefused as error:
                self.bad_rows.add(BadRow(row.origin, error.reason, error.detail, row.row))
                continue
            columns += pieces
            kept.append((row.origin, record))
            self.pieces.append(len(pieces))
            self.positions.append(held_out.position(self.kind.first_turn(record)))
            self.copies.append(_copies(weight, row.origin, len(self.copies)))
        self._writer.write_table(pa.Table.from_pylist(columns, schema=self.kind.schema))
        return kept

    def _fitting(self, result: Encoded) -> list[Columns]:
        """The pieces of a row; text is cut here. Raises: RowRefused if one is too long."""
        if isinstance(result, RowRefused):
            raise result
        if self.kind is TEXT:
            return fit.text_pieces(result[0]["input_ids"], self.max_tokens)
        longest = max(map(self.kind.tokens, result))
        if longest > self.max_tokens:
            self.tokens_lost += sum(map(fit.trained_tokens, result))
        fit.refuse_too_long(longest, self.max_tokens)
        return result

    def split(self, fraction: float, report: RowReport) -> None:
        """Write `train.arrow` and `held_out.arrow`; the report gets their counts, tokens and digest."""
        self._writer.close()
        self._sink.close()
        pieces, copies = np.array(self.pieces, dtype=np.int64), np.array(self.copies, dtype=np.int64)
        rows_out = np.array(held_out.held_out_rows(self.positions, fraction), dtype=bool)
        chosen = np.repeat(rows_out, pieces)
        if self.kind is TEXT and len(pieces) < held_out.TOO_FEW_ROWS:
            rows_out = np.zeros(len(pieces), dtype=bool)
            chosen = np.array(held_out.held_out_tails(self.pieces, fraction), dtype=bool)
        report.held_out = int(rows_out.sum())
        report.sampled_out = int((copies[~rows_out] == 0).sum())
        report.kept = len(rows_out) - report.held_out - report.sampled_out
        report.copies = int(np.maximum(copies[~rows_out] - 1, 0).sum())
        report.pieces, report.pieces_held_out = len(chosen), int(chosen.sum())
        self._write_parts(chosen, np.where(chosen, 0, np.repeat(copies, pieces)), report)
        (self.folder / ALL).unlink()

    def _write_parts(self, chosen: np.ndarray, times: np.ndarray, report: RowReport) -> None:
        """`chosen`: which rows are held out; `times`: how often each is trained on in an epoch."""
        parts = {name: _Part(self.folder / f"{name}.arrow", self.kind.schema) for name in TABLES}
        with pa.OSFile(str(self.folder / ALL)) as source, pa.ipc.open_stream(source) as reader:
            start = 0
            for batch in reader:
                here = slice(start, start + batch.num_rows)
                parts["train"].write(batch.take(np.repeat(np.arange(batch.num_rows), times[here])))
                parts["held_out"].write(batch.filter(pa.array(chosen[here])))
                start = here.stop
        for part in parts.values():
            part.close()
        report.tokens = parts["train"].token_counts()
        report.digest = hashlib.sha256("".join(parts[name].digest() for name in TABLES).encode()).hexdigest()


def _copies(weight: float, origin: Origin, index: int) -> int:
    """How often a record of a source of this weight is trained on in an epoch; a fraction is decided by a hash."""
    whole = int(weight)
    if weight == whole:
        return whole
    return whole + (held_out.position(f"{origin} {index}") < weight - whole)


class _Part:
    """One table on its way to disk, counted and digested as it goes."""

    def __init__(self, path: Path, schema: pa.Schema):
        self.sink = pa.OSFile(str(path), "wb")
        self.writer = pa.ipc.new_stream(self.sink, schema)
        self.digests = {name: (hashlib.sha256(), hashlib.sha256()) for name in schema.names}
        self.tokens: Counter[str] = Counter({name: 0 for name in schema.names if name.endswith("_ids")})
        self.trained: int | None = 0 if "labels" in schema.names else None

    def write(self, batch: pa.RecordBatch) -> None:
        self.writer.write_batch(batch)
        for name, (lengths, values) in self.digests.items():
            column = batch.column(name)
            while pa.types.is_list(column.type):
                lengths.update(pc.list_value_length(column).to_numpy().astype("<i4").tobytes())
                column = pc.list_flatten(column)
            values.update(_content(column))
            if name in self.tokens:
                self.tokens[name] += len(column)
            if name == "labels":
                self.trained += pc.sum(pc.not_equal(column, fit.NOT_TRAINED)).as_py() or 0

    def close(self) -> None:
        self.writer.close()
        self.sink.close()

    def token_counts(self) -> dict[str, int]:
        """Tokens by column; for masked rows all tokens and trained ones."""
        if self.trained is not None:
            return {"all": self.tokens["input_ids"], "trained": self.trained}
        return {name.removesuffix("_ids"): count for name, count in self.tokens.items()}

    def digest(self) -> str:
        """Of the rows' content, whatever their batches."""
        return "".join(one.hexdigest() for pair in self.digests.values() for one in pair)


def largest_token(rows: "datasets.Dataset") -> int:
    """The largest token id in any row; 0 without rows."""
    columns = [rows.data.column(name) for name in rows.column_names if name.endswith("_ids")]
    chunks = (chunk for column in columns for chunk in column.chunks)
    return max((pc.max(_flat(chunk)).as_py() or 0 for chunk in chunks), default=0)


def _content(column: pa.Array) -> bytes:
    """The bytes of a flat column; texts by their UTF-8 and lengths."""
    if pa.types.is_string(column.type):
        texts = [text.encode() for text in column.to_pylist()]
        return b"".join(len(text).to_bytes(8, "little") + text for text in texts)
    return column.to_numpy(zero_copy_only=False).tobytes()


def _flat(column: pa.Array) -> pa.Array:
    """The values of a column of lists, or of lists of lists."""
    while pa.types.is_list(column.type):
        column = pc.list_flatten(column)
    return column


def token_lengths(rows: "datasets.Dataset", column: str) -> np.ndarray:
    """Tokens of each row in a column of token ids."""
    return np.concatenate(
        [np.empty(0, np.int64), *(pc.list_value_length(c).to_numpy() for c in rows.data.column(column).chunks)]
    )


def answer_lengths(rows: "datasets.Dataset") -> tuple[np.ndarray, np.ndarray]:
    """Tokens of every answer in `completion_ids`, rows in order, and of the longest answer of each row."""
    every, longest = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for chunk in rows.data.column("completion_ids").chunks:
        lengths = pc.list_value_length(pc.list_flatten(chunk)).to_numpy()
        every.append(lengths)
        if len(chunk):
            starts = np.concatenate([[0], np.cumsum(pc.list_value_length(chunk).to_numpy())[:-1]])
            longest.append(np.maximum.reduceat(lengths, starts))
    return np.concatenate(every), np.concatenate(longest)
