"""From sources to records, batch after batch: every row read becomes the records that a slot needs, or a bad row."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from align.config.errors import UserError
from align.config.schema import DataConfig
from align.data.files import Rows
from align.data.formats import Format, as_records, find_format, named_format
from align.data.records import BadRow, Origin, Record, RowRefused
from align.data.sources import Source, read_rows

BATCH_ROWS = 1024
SNIFFED_ROWS = 100


@dataclass(frozen=True)
class Walked:
    """One row as it was read and what it became: one record for most formats, several for trees and rankings."""

    origin: Origin
    row: Any
    records: tuple[Record | BadRow, ...]


def walk(
    source: Source, wanted: type | None, check: Callable[[Any], None], data: DataConfig
) -> tuple[Format, Iterator[list[Walked]]]:
    """The format of a source, and its rows in batches; `wanted` None leaves records as their format makes them.

    `check` raises RowRefused for a record that may not be used.
    Raises: UserError if no format fits, or two do.
    """
    row_format, rows = with_format(source, wanted)
    return row_format, _walk(row_format, rows, wanted, check, data)


def _walk(
    row_format: Format, rows: Rows, wanted: type | None, check: Callable[[Any], None], data: DataConfig
) -> Iterator[list[Walked]]:
    while batch := list(islice(rows, BATCH_ROWS)):
        yield [Walked(origin, row, _sound(row_format, wanted, check, origin, row, data)) for origin, row in batch]


def _sound(
    row_format: Format, wanted: type | None, check: Callable[[Any], None], origin: Origin, row: Any, data: DataConfig
) -> tuple[Record | BadRow, ...]:
    try:
        made = as_records(row_format, wanted, row, ties=data.ties)
    except RowRefused as error:
        return (BadRow(origin, error.reason, error.detail, row),)
    return tuple(_checked(record, check, origin, row) for record in made)


def _checked(record: Record | RowRefused, check: Callable[[Any], None], origin: Origin, row: Any) -> Record | BadRow:
    try:
        if isinstance(record, RowRefused):
            raise record
        check(record)
    except RowRefused as error:
        return BadRow(origin, error.reason, error.detail, row)
    return record


def with_format(source: Source, wanted: type | None) -> tuple[Format, Rows]:
    """The format of a source, named or found in its first rows, and all its rows."""
    rows = read_rows(source)
    where = f"{source.where}={source.path}"
    if source.format != "auto":
        return named_format(source.format, wanted, source.where), rows
    first = list(islice(rows, SNIFFED_ROWS))
    if not first:
        raise UserError(f"{where}: it holds no rows")
    return find_format([row for _, row in first], wanted, where), chain(first, rows)
