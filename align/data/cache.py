"""Tokenised rows on disk, found again by what they were made from; a folder is complete or not there."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from filelock import FileLock

from align.config.errors import UserError
from align.data.report import RowReport

if TYPE_CHECKING:
    import datasets

CODE_VERSION = 3
"""Raise when the same inputs give other tokens, columns or reports."""

TABLES = ("train", "held_out")
REPORT = "report.json"
BAD_ROWS = "bad_rows.jsonl"
HEAD_START_SECONDS = 30.0


def cache_key(**parts: Any) -> str:
    """Digest of everything that decides the tokenised rows, this code and the tokenizing library included."""
    parts |= {"code": CODE_VERSION, "transformers": transformers.__version__}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def is_cached(cache_dir: Path, key: str) -> bool:
    """Whether rows of this key are there, complete."""
    return (_folder(cache_dir, key) / REPORT).is_file()


def fill(cache_dir: Path, key: str, write: Callable[[Path], RowReport]) -> None:
    """Have `write` put tables and bad rows into a folder beside, then rename it; nothing if the rows are there.

    One process of a machine works, the others wait for it; no process group is needed.
    Raises: UserError if the disk does not take the rows.
    """
    target = _folder(cache_dir, key)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(cache_dir, key):
            if not is_cached(cache_dir, key):
                _write_folder(target, write)
    except OSError as error:
        if is_cached(cache_dir, key):
            return
        reason = os.strerror(error.errno) if error.errno else error
        raise UserError(
            f"cache_dir={cache_dir}: the tokenised rows cannot be written there ({reason}); free some space, or "
            "use another cache_dir"
        ) from error


@contextmanager
def _one_at_a_time(cache_dir: Path, key: str) -> Iterator[None]:
    """The first local rank goes first, because it is the one that shows progress."""
    lock = Path(cache_dir).expanduser() / "locks" / key
    lock.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + HEAD_START_SECONDS
    while os.environ.get("LOCAL_RANK", "0") != "0" and not lock.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    with FileLock(lock):
        yield


def _write_folder(target: Path, write: Callable[[Path], RowReport]) -> None:
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        report = write(partial)
        (partial / REPORT).write_text(json.dumps(report.as_json(), ensure_ascii=False), encoding="utf-8")
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load(cache_dir: Path, key: str) -> tuple[dict[str, "datasets.Dataset"], RowReport]:
    """The tables, mapped from disk, and the report."""
    # A second with pandas, which a plan of rows that are not there yet does without.
    import datasets

    folder = _folder(cache_dir, key)
    content = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    tables = {name: datasets.Dataset.from_file(str(folder / f"{name}.arrow")) for name in TABLES}
    return tables, RowReport.from_json(content, folder / BAD_ROWS)


def _folder(cache_dir: Path, key: str) -> Path:
    return Path(cache_dir).expanduser() / "rows" / key
