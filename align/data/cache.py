"""Tokenised rows on disk, found again by what they were made from; a folder is complete or not there."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import transformers

from align.config.errors import UserError
from align.data.report import RowReport

CODE_VERSION = 1
"""Raise when the same inputs give other tokens, columns or reports."""

TABLES = ("train", "held_out")
REPORT = "report.json"


def cache_key(**parts: Any) -> str:
    """Digest of everything that decides the tokenised rows, this code and the tokenizing library included."""
    parts |= {"code": CODE_VERSION, "transformers": transformers.__version__}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def is_cached(cache_dir: Path, key: str) -> bool:
    """Whether rows of this key are there, complete."""
    return (_folder(cache_dir, key) / REPORT).is_file()


def save(cache_dir: Path, key: str, tables: dict[str, pa.Table], report: RowReport) -> None:
    """Write tables and report beside, then rename. If another process was faster, its rows stay: they are the same.

    Raises: UserError if the disk does not take them.
    """
    target = _folder(cache_dir, key)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_folder(target, tables, report)
    except OSError as error:
        if not is_cached(cache_dir, key):
            reason = os.strerror(error.errno) if error.errno else error
            raise UserError(
                f"cache_dir={cache_dir}: the tokenised rows cannot be written there ({reason}); free some space, or "
                "use another cache_dir"
            ) from error


def _write_folder(target: Path, tables: dict[str, pa.Table], report: RowReport) -> None:
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        for name in TABLES:
            _write_table(partial / f"{name}.arrow", tables[name])
        (partial / REPORT).write_text(json.dumps(report.as_json(), ensure_ascii=False), encoding="utf-8")
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load(cache_dir: Path, key: str) -> tuple[dict[str, datasets.Dataset], RowReport]:
    """The tables, mapped from disk, and the report."""
    folder = _folder(cache_dir, key)
    report = RowReport.from_json(json.loads((folder / REPORT).read_text(encoding="utf-8")))
    return {name: datasets.Dataset.from_file(str(folder / f"{name}.arrow")) for name in TABLES}, report


def _folder(cache_dir: Path, key: str) -> Path:
    return Path(cache_dir).expanduser() / "rows" / key


def _write_table(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
