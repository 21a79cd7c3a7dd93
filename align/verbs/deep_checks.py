"""The checks that take a reading of their own: near duplicates, and overlap with what models are judged by."""

import tempfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from align.config.errors import UserError
from align.config.schema import DataConfig, OnBadRows
from align.data import held_out
from align.data.findings import Finding, Findings
from align.data.kinds import DEMONSTRATIONS, PREFERENCES, TEXT, Kind
from align.data.near_duplicates import NearDuplicates
from align.data.overlap import Overlap
from align.data.prepare import MEANT, prepare_prompts, slot_sources
from align.data.prompt_rows import PROMPTS as PROMPT_ROWS
from align.data.quality import check_prompt
from align.data.records import BadRow, Origin, PromptRow, Record
from align.data.sources import Source
from align.data.walk import walk
from align.tracking.progress import Progress

KINDS = {kind.slot: kind for kind in (TEXT, DEMONSTRATIONS, PREFERENCES, PROMPT_ROWS)}
HELD_OUT = "the held-out rows"
PROMPTS = "the prompts of evaluate"
EMBEDDED_PROMPTS = "tiny:prompts"

Batches = Iterator[tuple[list[Origin], list[Record]]]


def prompt_findings(data: DataConfig, rows: int) -> list[Finding]:
    """What stands out in `data.prompts`, near duplicates included. `rows` are there to be read."""
    quick = Findings()
    with tempfile.TemporaryDirectory(prefix="align-check-") as scratch:
        near = NearDuplicates(data.near_duplicate_threshold, Path(scratch))
        for origins, records in _sound(data, "prompts", PromptRow, check_prompt, "looking for near duplicates", rows):
            quick.add(origins, records)
            near.add(origins, records)
        return [*quick.results(), near.results()]


def deep_findings(data: DataConfig, slot: str, rows: int, *, judged_by_prompts: bool) -> list[Finding]:
    """Near duplicates in a trained slot, and its overlap with held-out rows, with `data.evaluation_sets` and, if the
    run evaluates on prompts of their own, with those.

    Rows that are too long for training are looked at too. `rows` are there to be read.
    """
    kind, trained = KINDS[slot], _as_trained(data, slot)
    with tempfile.TemporaryDirectory(prefix="align-check-") as scratch:
        near = NearDuplicates(data.near_duplicate_threshold, Path(scratch))
        positions = array("d")
        for origins, records in _kind_batches(trained, kind, "looking for near duplicates", rows):
            near.add(origins, records)
            positions.extend(held_out.position(kind.first_turn(record)) for record in records)
        found = [near.results()]
    few_documents = kind is TEXT and len(positions) < held_out.TOO_FEW_ROWS
    out = [False] * len(positions) if few_documents else held_out.held_out_rows(positions, data.held_out_fraction)
    return found + _overlap(data, kind, out, rows, judged_by_prompts=judged_by_prompts)


def _overlap(data: DataConfig, kind: Kind, out: list[bool], rows: int, *, judged_by_prompts: bool) -> list[Finding]:
    """`out`: which of the sound records are held out, in the order of reading."""
    found, trained = evaluation_sources(data), _as_trained(data, kind.slot)
    short = [_short(source.path) for source in found]
    sets = {name if short.count(name) == 1 else source.path: source for name, source in zip(short, found, strict=True)}
    judged_by_prompts = judged_by_prompts and _paths(data, "prompts") != _paths(trained, kind.slot)
    names = [*([HELD_OUT] if any(out) else []), *sets, *([PROMPTS] if judged_by_prompts else [])]
    if not names:
        return []
    overlap = Overlap(names)
    for name, source in sets.items():
        _add_set(overlap, name, source, data)
    if judged_by_prompts:
        overlap.add_reference(PROMPTS, _answered_prompts(data))
    if any(out):
        for _, records in _split(_kind_batches(trained, kind, "reading held-out rows", rows), out, held=True):
            overlap.add_reference(HELD_OUT, records)
    for origins, records in _split(_kind_batches(trained, kind, "looking for overlap", rows), out, held=False):
        overlap.scan(origins, records)
    return overlap.results()


def _as_trained(data: DataConfig, slot: str) -> DataConfig:
    """The data with the prompts that PPO trains on, which in the embedded world are not those of evaluate."""
    return replace(data, prompts=MEANT.get(str(data.prompts), data.prompts)) if slot == "prompts" else data


def _paths(data: DataConfig, slot: str) -> set[str]:
    return {source.path for source in slot_sources(data, slot)}


def _answered_prompts(data: DataConfig) -> list[PromptRow]:
    """The prompts that the evaluate stage chooses from: held-out ones, or all where none is held out."""
    rows = prepare_prompts(replace(data, on_bad_rows=OnBadRows.drop)).rows
    places = [held_out.position(held_out.first_turn(row.messages)) for row in rows]
    out = held_out.held_out_rows(places, data.held_out_fraction)
    if _paths(data, "prompts") == {EMBEDDED_PROMPTS} or not any(out):
        return rows
    return [row for row, held in zip(rows, out, strict=True) if held]


def evaluation_sources(data: DataConfig) -> list[Source]:
    """The sources of `data.evaluation_sets`; none if it is not set."""
    return slot_sources(data, "evaluation_sets") if data.evaluation_sets else []


def _short(path: str) -> str:
    """A file with its folder only."""
    return "/".join(Path(path).parts[-2:])


def _add_set(overlap: Overlap, name: str, source: Source, data: DataConfig) -> None:
    """Raises: UserError if no row of the set can be read, because then nothing was compared."""
    readable = 0
    _, batches = walk(source, None, _accept, data)
    for batch in batches:
        records = [record for row in batch for record in row.records if not isinstance(record, BadRow)]
        overlap.add_reference(name, records)
        readable += len(records)
    if not readable:
        raise UserError(f"{source.where}={source.path}: none of its rows can be read; name its format with format=")


def _accept(record: Any) -> None:
    """A set to compare with need not be sound."""


def _split(batches: Batches, out: list[bool], *, held: bool) -> Batches:
    """Only the records that are held out, or only the others."""
    start = 0
    for origins, records in batches:
        mine = [n for n in range(len(records)) if out[start + n] is held]
        start += len(records)
        yield [origins[n] for n in mine], [records[n] for n in mine]


def _kind_batches(data: DataConfig, kind: Kind, label: str, rows: int) -> Batches:
    return _sound(data, kind.slot, kind.record, kind.check, label, rows)


def _sound(data: DataConfig, slot: str, wanted: type, check: Callable[[Any], None], label: str, rows: int) -> Batches:
    """The sound records of a slot, batch after batch, with a progress line."""
    progress = Progress(f"{slot}: {label}", rows, passing=True, unit="rows")
    done = 0
    for source in slot_sources(data, slot):
        for batch in walk(source, wanted, check, data)[1]:
            pairs = [(row.origin, one) for row in batch for one in row.records if not isinstance(one, BadRow)]
            yield [origin for origin, _ in pairs], [record for _, record in pairs]
            done += len(batch)
            progress.show(done)
    progress.close()
