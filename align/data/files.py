"""Local files to rows, one reader a file type; every failure names the file and the line reached."""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from align.config.errors import UserError
from align.data.records import Origin

Rows = Iterator[tuple[Origin, dict[str, Any]]]
COMPRESSED = (".gz", ".zst")


def file_type(path: Path) -> str:
    """The suffix that says how to read a file, without `.gz` or `.zst`: `pairs.jsonl.gz` is `.jsonl`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def is_data_file(path: Path) -> bool:
    """True for the types that `read_file` reads, but for Markdown: in a folder of data that is its README."""
    return path.is_file() and file_type(path) in READERS and path.suffix != ".md" and not path.name.startswith(".")


def read_file(path: Path) -> Rows:
    """The rows of one file with their origins.

    Raises: UserError for an unknown type, a damaged file, or a file without rows.
    """
    reader = READERS.get(file_type(path))
    if reader is None:
        raise UserError(f"{path}: cannot read this file type; use one of {', '.join(sorted(READERS))} (also .gz, .zst)")
    rows = 0
    for origin, row in reader(path):
        rows += 1
        if isinstance(row, str):
            row = {"text": row}
        if not isinstance(row, dict):
            raise UserError(f"{origin}: a row must be an object with named fields, found {type(row).__name__}")
        yield origin, row
    if not rows:
        raise UserError(f"{path}: the file is empty: it holds no rows")


def row_count(path: Path) -> int | None:
    """Rows of a file where they can be counted without parsing: the lines of plain JSONL, Parquet's own count."""
    kind = file_type(path)
    if kind == ".parquet":
        import pyarrow.parquet as parquet
        from pyarrow import ArrowException

        try:
            return parquet.read_metadata(path).num_rows
        except (ArrowException, OSError):
            return None  # the reader says what is wrong with it
    if kind not in (".jsonl", ".ndjson") or path.suffix.lower() in COMPRESSED:
        return None
    with open(path, "rb") as handle:
        return sum(block.count(b"\n") for block in iter(lambda: handle.read(1 << 20), b""))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines counted from 1, decoded as UTF-8 without a byte order mark; only line feeds end a line."""
    number = 0
    stream = _byte_lines(path)
    while True:
        try:
            line = next(stream, None)
        except (OSError, EOFError, zlib.error, *_zst_errors()) as error:
            raise _damaged(path, number, error) from error
        if line is None:
            return
        number += 1
        yield number, _decoded(path, number, line)


def _byte_lines(path: Path) -> Iterator[bytes]:
    """Lines with their line feeds, decompressed by the file's suffix. Raises: EOFError if an archive is cut."""
    suffix = path.suffix.lower()
    with gzip.open(path, "rb") if suffix == ".gz" else open(path, "rb") as handle:
        yield from _zst_lines(path, handle) if suffix == ".zst" else handle


def _zst_lines(path: Path, handle: IO[bytes]) -> Iterator[bytes]:
    """Frame by frame: zstandard's own reader ends at a cut frame without a word (0.25, seen 2026-11)."""
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{path}: .zst files need `pip install zstandard`") from error
    frame, rest = None, b""
    while chunk := handle.read(1 << 20):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            rest += frame.decompress(chunk)
            chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        *lines, rest = rest.split(b"\n")
        yield from (line + b"\n" for line in lines)
    if frame is not None:
        raise EOFError
    if rest:
        yield rest


def _zst_errors() -> tuple[type[Exception], ...]:
    try:
        import zstandard
    except ImportError:
        return ()
    return (zstandard.ZstdError,)


def _decoded(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 text ({error.reason}); convert the file to UTF-8") from error


def _damaged(path: Path, line: int, error: Exception) -> UserError:
    if isinstance(error, EOFError):
        return UserError(f"{path}: the file is truncated: it ends after line {line}; copy or download it again")
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(f"{path}: cannot be read: {error.strerror}")
    return UserError(f"{path}: not a sound {path.suffix} file (after line {line}): {error}; copy it again")


def _read_jsonl(path: Path) -> Rows:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        # A number of more than 4,300 digits is a ValueError of another kind.
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not JSON: {error}") from error
        yield Origin(str(path), number), row


def _read_json(path: Path) -> Rows:
    text = "".join(line for _, line in _lines(path))
    if not text.strip():
        return
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; one object a line is JSONL: rename it to .jsonl" if error.msg == "Extra data" else ""
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}{hint}") from error
    # A number of more than 4,300 digits is a ValueError of another kind.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    for index, row in enumerate(content if isinstance(content, list) else [content], start=1):
        yield Origin(str(path), index, has_lines=False), row


def _read_csv(path: Path) -> Rows:
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if file_type(path) == ".tsv" else ","
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        while header is not None:
            first_line = reader.line_num + 1
            cells = next(reader, None)
            if cells is None:
                return
            if not cells:
                continue
            if len(cells) != len(header):
                raise UserError(f"{path}:{first_line}: {len(cells)} cells where the header has {len(header)} columns")
            yield Origin(str(path), first_line), dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not CSV: {error}") from error


def _read_text(path: Path) -> Rows:
    """A .txt or .md file is one document; its line breaks are text."""
    text = "".join(line for _, line in _lines(path))
    if text.strip():
        yield Origin(str(path), 1), {"text": text}


def _read_parquet(path: Path) -> Rows:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    number = 0
    try:
        with parquet.ParquetFile(path) as handle:
            for batch in handle.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Origin(str(path), number, has_lines=False), row
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: not a sound Parquet file (after row {number}): {first_line_of(error)}") from error


def _read_arrow(path: Path) -> Rows:
    import datasets

    try:
        table = datasets.Dataset.from_file(str(path))
    except Exception as error:
        raise UserError(f"{path}: not an Arrow file of the datasets library: {first_line_of(error)}") from error
    for index, row in enumerate(table, start=1):
        yield Origin(str(path), index, has_lines=False), row


def first_line_of(error: Exception) -> str:
    """An error's first line, or its type where it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_text,
    ".md": _read_text,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
