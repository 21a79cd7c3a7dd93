"""`do=convert`: any input that can be read, written as canonical JSONL, with an account of every row."""

import gzip
import json
import os
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import IO, Any

from align.config.errors import UserError
from align.config.keys import SLOTS
from align.config.schema import DataConfig, Rankings, RunConfig
from align.data.bad_rows import BadRows, enforce_policy
from align.data.canonical import canonical
from align.data.converting import as_wanted
from align.data.prepare import slot_sources
from align.data.quality import check_record
from align.data.records import BadRow, PreferencePair, Ranking, Record, RowRefused
from align.data.report import CHOSEN_REASONS, RowReport
from align.data.sources import Source
from align.data.walk import walk
from align.tracking.progress import Progress, say

SLOT_ORDER = ("preferences", "demonstrations", "prompts", "text")


def run_convert(config: RunConfig) -> None:
    """Write the rows of the one slot that is given to `out`; rows left out go to a file beside it.

    Raises: UserError without `out`, with one that exists, with no slot or several, or by the policy for bad rows.
    """
    out = _free_path(config.out)
    slot = _slot(config)
    report = RowReport(slot, BadRows(Path(f"{out}.bad_rows.jsonl")))
    partial = out.with_name(f"{out.name}.partial")
    written: Counter[str] = Counter()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _opened(partial, out) as file:
            for source in slot_sources(config.data, slot):
                written += _convert(source, config.data, report, file)
        report.bad_rows.close()
        enforce_policy(report.bad_rows, report.made, config.data, allowed=CHOSEN_REASONS)
        if not written:
            raise UserError(f"data.{slot}: none of {report.read} rows can be read; see {report.bad_rows.path}")
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"out={out}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    _say(report, written, out)


def _free_path(out: str | None) -> Path:
    if not out:
        raise UserError("out is not set; name the file to write: out=rows.jsonl")
    path = Path(out).expanduser()
    if path.suffixes[-1:] not in ([".jsonl"], [".gz"]) or (path.suffix == ".gz" and path.suffixes[-2:-1] != [".jsonl"]):
        raise UserError(f"out={out}: canonical rows are JSONL; name it {path.stem}.jsonl or {path.stem}.jsonl.gz")
    if path.exists():
        raise UserError(f"out={out}: exists already and is not overwritten; delete it or name another file")
    return path


def _slot(config: RunConfig) -> str:
    """The one slot that holds something of its own: slots that only repeat another do not count."""
    data = config.data
    values = {"preferences": data.preferences, "demonstrations": data.demonstrations}
    values |= {"prompts": data.prompts, "text": data.text}
    read = {SLOTS[name] for name in config.run} or set(SLOT_ORDER)
    found: dict[str, Any] = {}
    for slot in SLOT_ORDER:
        if slot in read and values[slot] and values[slot] not in found.values():
            found[slot] = values[slot]
    if len(found) != 1:
        several = f"{', '.join(f'data.{slot}' for slot in found)} are set" if found else "no slot is set"
        raise UserError(f"{several}; name the one input to convert, such as data.preferences=FILE")
    return next(iter(found))


def _opened(partial: Path, out: Path) -> IO[str]:
    if out.suffix == ".gz":
        return gzip.open(partial, "wt", encoding="utf-8", errors="surrogatepass")
    return open(partial, "w", encoding="utf-8", errors="surrogatepass")


def _convert(source: Source, data: DataConfig, report: RowReport, file: IO[str]) -> Counter[str]:
    """Write one source's rows; returns how many records of each kind."""
    row_format, batches = walk(source, None, check_record, data)
    report.formats[source.path] = row_format.name
    written: Counter[str] = Counter()
    progress = Progress(f"converting {source.path}", None, passing=True, unit="rows")
    for row in chain.from_iterable(batches):
        report.read += 1
        for record in row.records:
            for one in _expanded(record, data):
                report.made += 1
                if isinstance(one, BadRow | RowRefused):
                    bad = one if isinstance(one, BadRow) else BadRow(row.origin, one.reason, one.detail, row.row)
                    report.bad_rows.add(bad)
                else:
                    file.write(json.dumps(canonical(one), ensure_ascii=False) + "\n")
                    written[type(one).__name__] += 1
        progress.show(report.read)
    progress.close()
    return written


def _expanded(record: Record | BadRow, data: DataConfig) -> list[Record | BadRow | RowRefused]:
    if not isinstance(record, Ranking | PreferencePair):
        return [record]
    return as_wanted([record], PreferencePair if data.rankings is Rankings.pairs else Ranking, {}, data.ties)


def _say(report: RowReport, written: Counter[str], out: Path) -> None:
    report.kept = written.total()
    for path, name in report.formats.items():
        say(f"data.{report.slot}: {path} read as {name}")
    kinds = ", ".join(f"{count:,} {name}" for name, count in written.most_common())
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in report.dropped.items())
    left_out = f"{len(report.bad_rows):,} left out" + (f" ({reasons}): see {report.bad_rows.path}" if reasons else "")
    made = "" if report.made == report.read else f" that make {report.made:,} records"
    print(f"{report.read:,} rows read{made}, {left_out}")
    print(f"{out}: {kinds}")
