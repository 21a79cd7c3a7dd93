"""From a slot of the config to tokenised rows, ready to train on, with an account of every row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from align.config.errors import UserError
from align.config.schema import DataConfig
from align.data import cache, fit
from align.data.encoded import EncodedRows
from align.data.files import Rows
from align.data.formats import Format, find_format, named_format
from align.data.kinds import DEMONSTRATIONS, PREFERENCES, RECORDS, TEXT, Kind, sound_record
from align.data.quality import check_prompt, enforce_policy
from align.data.records import BadRow, Origin, PromptRow
from align.data.report import RowReport
from align.data.sources import Source, parse_slot, read_rows, source_files, source_inputs
from align.data.template import Template

BATCH_ROWS = 1024
SNIFFED_ROWS = 100


@dataclass
class Prepared:
    """Tokenised rows of one slot: `input_ids labels`, or `prompt_ids chosen_ids rejected_ids p margin`."""

    train: datasets.Dataset
    held_out: datasets.Dataset
    report: RowReport
    inputs: list[dict[str, str]]
    """{name, path, digest} of each file, hub data set or embedded set."""


@dataclass
class PreparedPrompts:
    """Prompts in file order, each with the row it came from."""

    rows: list[PromptRow]
    read: int
    report: RowReport
    inputs: list[dict[str, str]]


def prepare_demonstrations(data: DataConfig, template: Template, max_tokens: int, cache_dir: Path | None) -> Prepared:
    """`data.demonstrations` as `input_ids` and `labels` (-100: not trained); of a pair, the chosen answer."""
    return _prepare(DEMONSTRATIONS, data, template, max_tokens, cache_dir)


def prepare_preferences(data: DataConfig, template: Template, max_tokens: int, cache_dir: Path | None) -> Prepared:
    """`data.preferences` as `prompt_ids`, `chosen_ids`, `rejected_ids`, `p`, `margin`."""
    return _prepare(PREFERENCES, data, template, max_tokens, cache_dir)


def prepare_text(data: DataConfig, template: Template, max_tokens: int, cache_dir: Path | None) -> Prepared:
    """`data.text` as `input_ids` and equal `labels`; a longer document becomes consecutive pieces, nothing is lost."""
    return _prepare(TEXT, data, template, max_tokens, cache_dir)


def prepare_prompts(data: DataConfig, max_prompts: int | None = None) -> PreparedPrompts:
    """The first `max_prompts` sound rows of `data.prompts`, not tokenised: each model brings its own tokenizer.

    Raises: UserError for bad rows by the policy of `data`, or if no prompt is left.
    """
    sources = _sources(data, "prompts")
    report, rows = RowReport("prompts"), []
    for source in sources:
        row_format, found = _with_format(source, PromptRow)
        report.formats[source.path] = row_format.name
        for origin, row in found:
            if max_prompts is not None and len(rows) == max_prompts:
                break
            report.read += 1
            record = sound_record(row_format, PromptRow, check_prompt, origin, row)
            (report.bad_rows if isinstance(record, BadRow) else rows).append(record)
    enforce_policy(report.bad_rows, report.read, data)
    report.kept = len(rows)
    if not rows:
        raise UserError(f"data.prompts: none of {report.read} rows is a prompt that can be used")
    return PreparedPrompts(rows, report.read, report, _inputs(sources, "prompts"))


def check_slot(data: DataConfig, slot: str) -> None:
    """Prove that every source of a slot is there (a hub id only looks like one) and its format is known. Reads no row.

    Raises: UserError.
    """
    for source in _sources(data, slot):
        source_files(source)
        if source.format != "auto":
            named_format(source.format, RECORDS[slot], source.where)


def slot_digests(data: DataConfig, slot: str) -> list[dict[str, str]]:
    """{name, path, digest} of a slot's files and embedded sets as they are now, without the hub's."""
    return _inputs(_sources(data, slot), slot, with_hub=False)


def _sources(data: DataConfig, slot: str) -> list[Source]:
    slots = {
        "text": data.text,
        "demonstrations": data.demonstrations,
        "preferences": data.preferences,
        "prompts": data.prompts,
    }
    return parse_slot(slots[slot], slot, format=data.format, split=data.split)


def _inputs(sources: Sequence[Source], slot: str, *, with_hub: bool = True) -> list[dict[str, str]]:
    found = chain.from_iterable(source_inputs(source, with_hub=with_hub) for source in sources)
    return [{"name": f"data.{slot}", "path": entry.path, "digest": entry.digest} for entry in found]


def _prepare(kind: Kind, data: DataConfig, template: Template, max_tokens: int, cache_dir: Path | None) -> Prepared:
    """Rows from the cache if they are there; else read, checked, tokenised, fitted, split, and put there."""
    sources = _sources(data, kind.slot)
    if kind is not TEXT:
        template.chat  # noqa: B018  proven before the first row is read
    inputs = _inputs(sources, kind.slot)
    key = cache.cache_key(
        slot=kind.slot,
        sources=[(source.path, source.format, source.split, source.take) for source in sources],
        inputs=inputs,
        template=template.digest,
        max_tokens=max_tokens,
        held_out_fraction=data.held_out_fraction,
        policy=[data.on_bad_rows.value, data.max_bad_fraction],
    )
    if cache_dir is None or not cache.is_cached(cache_dir, key):
        tables, report = _tokenise(kind, sources, data, template, max_tokens)
        if cache_dir is None:
            return Prepared(_dataset(tables["train"]), _dataset(tables["held_out"]), report, inputs)
        cache.save(cache_dir, key, tables, report)
    rows, report = cache.load(cache_dir, key)
    return Prepared(rows["train"], rows["held_out"], report, inputs)


def _dataset(table: pa.Table) -> datasets.Dataset:
    return datasets.Dataset(datasets.table.InMemoryTable(table))


def _tokenise(
    kind: Kind, sources: Sequence[Source], data: DataConfig, template: Template, max_tokens: int
) -> tuple[dict[str, pa.Table], RowReport]:
    """Every row of the sources as columns in `train` or `held_out`, or in the report with a reason."""
    report = RowReport(kind.slot, max_tokens=max_tokens)
    borders_cut = template.borders_cut
    bad_rows: list[BadRow] = []
    encoded = EncodedRows(kind, template, max_tokens)
    for source in sources:
        row_format, rows = _with_format(source, kind.record)
        report.formats[source.path] = row_format.name
        for batch in _batches(rows):
            report.read += len(batch)
            records = [sound_record(row_format, kind.record, kind.check, *row) for row in batch]
            bad_rows += encoded.add(batch, records)
    report.borders_cut = template.borders_cut - borders_cut
    report.tokens_lost = encoded.tokens_lost
    report.bad_rows = bad_rows
    enforce_policy([bad for bad in bad_rows if bad.reason != fit.TOO_LONG], report.read, data)
    return encoded.split(data.held_out_fraction, report), report


def _batches(rows: Rows) -> Iterator[list[tuple[Origin, Any]]]:
    while batch := list(islice(rows, BATCH_ROWS)):
        yield batch


def _with_format(source: Source, wanted: type) -> tuple[Format, Rows]:
    """The format of a source, named or found in its first rows, and all its rows."""
    rows = read_rows(source)
    if source.format != "auto":
        return named_format(source.format, wanted, source.where), rows
    first = list(islice(rows, SNIFFED_ROWS))
    if not first:
        raise UserError(f"{source.where}={source.path}: it holds no rows")
    where = f"{source.where}={source.path}"
    return find_format([row for _, row in first], wanted, where), chain(first, rows)
