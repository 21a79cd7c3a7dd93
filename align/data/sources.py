"""A slot of the config to sources, and a source to rows: files, folders, globs, hub data sets, the embedded world."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from align.config.errors import UserError
from align.data.files import READERS, Rows, file_type, first_line_of, is_data_file, read_file, row_count
from align.data.records import Origin

SLOTS = ("text", "demonstrations", "preferences", "prompts", "helpful")
SOURCE_KEYS = ("path", "format", "split", "take", "weight", "columns")
TINY = "tiny:"
MOST_COPIES = 100
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """One place that rows come from. `where` is its config key."""

    path: str
    format: str
    split: str
    take: int | None
    """The first rows in file order; None is all."""
    where: str
    weight: float = 1.0
    """How often an epoch passes over its rows: 2 is twice, 0.5 every second one, chosen by a hash."""
    columns: tuple[tuple[str, str], ...] = ()
    """(field that a format knows, where it is in these rows: a name, or a path such as `instances.0.output`)."""

    @property
    def key(self) -> list[Any]:
        """What decides which rows come from it, and how they are read."""
        return [self.path, self.format, self.split, self.take, self.weight, list(self.columns)]


@dataclass(frozen=True)
class SourceInput:
    """What a source was when it was read: sha256 of a file's bytes or of embedded rows, or `hub:<revision>`."""

    path: str
    digest: str


def parse_slot(slot: Any, name: str, *, format: str, split: str) -> list[Source]:
    """The sources of the slot `data.<name>`: a path, a dictionary, or a list of these.

    Raises: UserError for an empty slot, a wrong key (with a near match) or a wrong type.
    """
    where = f"data.{name}"
    if slot is None or slot == "" or slot == []:
        raise UserError(f"{where} is not set; give a file, a folder, a hub id or tiny:{name}")
    if isinstance(slot, str | dict):
        return [_parse_source(slot, where, format, split)]
    if isinstance(slot, list | tuple):
        return [_parse_source(item, f"{where}[{index}]", format, split) for index, item in enumerate(slot)]
    raise UserError(f"{where}={slot!r}: a path or a list of sources was expected, found {type(slot).__name__}")


def _parse_source(item: Any, where: str, format: str, split: str) -> Source:
    if isinstance(item, str):
        item = {"path": item}
    if not isinstance(item, dict):
        raise UserError(f"{where}: a source is a path or {{path, format, split, take}}, found {type(item).__name__}")
    for key in item:
        if key not in SOURCE_KEYS:
            near = difflib.get_close_matches(str(key), SOURCE_KEYS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{where}: a source has no key {key!r} (it takes {', '.join(SOURCE_KEYS)}){hint}")
    path, take = item.get("path"), item.get("take")
    if not isinstance(path, str) or not path:
        raise UserError(f"{where}: a source needs a path")
    if take is not None and (not isinstance(take, int) or isinstance(take, bool) or take < 1):
        raise UserError(f"{where}.take={take!r}: a number of rows from 1 up was expected")
    weight = item.get("weight", 1)
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight <= MOST_COPIES:
        raise UserError(f"{where}.weight={weight!r}: passes over its rows in an epoch, above 0 and up to {MOST_COPIES}")
    columns = _columns(item.get("columns") or {}, where)
    return Source(path, item.get("format") or format, item.get("split") or split, take, where, float(weight), columns)


def _columns(columns: Any, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(columns, dict) or not all(isinstance(path, str) and path for path in columns.values()):
        raise UserError(f"{where}.columns={columns!r}: a field of these rows for each name, such as {{prompt: Goal}}")
    return tuple((str(name), path) for name, path in columns.items())


def source_files(source: Source) -> list[Path]:
    """The local files of a source, sorted; empty for hub data sets and the embedded world.

    Raises: UserError if the source is a path that leads nowhere.
    """
    if source.path.startswith(TINY):
        _tiny_kind(source)
        return []
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _folder_files(source, path)
    if path.exists():
        return [path]
    if any(character in source.path for character in "*?["):
        return _glob_files(source, path)
    if is_hub_id(source.path):
        return []
    raise UserError(f"{source.where}={source.path}: no such file{_near_sibling(path)}")


def is_hub_id(path: str) -> bool:
    """Whether a path that does not exist reads as `organisation/name`; a path with a data suffix never does."""
    return HUB_ID.fullmatch(path) is not None and file_type(Path(path)) not in READERS


def _tiny_kind(source: Source) -> str:
    from align.world.generator import SLOTS as KINDS

    kind = source.path.removeprefix(TINY)
    if kind not in KINDS:
        known = ", ".join(TINY + name for name in KINDS)
        raise UserError(f"{source.where}={source.path}: the embedded data has {known}")
    return kind


def _folder_files(source: Source, folder: Path) -> list[Path]:
    """Data files at any depth. Beside other data, .txt files are notes (SOURCE.txt, LICENSE.txt), not rows."""
    files = sorted(file for file in folder.rglob("*") if is_data_file(file) and not _hidden(file, folder))
    if (folder / "state.json").is_file():  # written by datasets' save_to_disk: the rest is bookkeeping
        files = [file for file in files if file_type(file) == ".arrow"]
    structured = [file for file in files if file_type(file) != ".txt"]
    if not files:
        raise UserError(f"{source.where}={source.path}: the folder holds no data files ({', '.join(sorted(READERS))})")
    return structured or files


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _glob_files(source: Source, pattern: Path) -> list[Path]:
    anchor = Path(pattern.anchor) if pattern.anchor else Path()
    files = sorted(file for file in anchor.glob(str(pattern.relative_to(anchor))) if file.is_file())
    if not files:
        raise UserError(f"{source.where}={source.path}: no file matches the pattern")
    return files


def _near_sibling(path: Path) -> str:
    """` ; did you mean X?`: from the files beside it, or the folders beside its missing folder."""
    while not path.parent.is_dir():
        path = path.parent
    near = difflib.get_close_matches(path.name, sorted(entry.name for entry in path.parent.iterdir()), n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else f" (nothing like it in {path.parent.resolve()})"


def read_rows(source: Source) -> Rows:
    """The rows of a source with their origins, in file order, at most `take`, with its columns renamed."""
    rows = islice(_all_rows(source), source.take)
    return ((origin, _renamed(row, source.columns)) for origin, row in rows) if source.columns else rows


def _renamed(row: dict[str, Any], columns: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """The row with fields under the names that formats know; a field that is not there stays missing."""
    taken = {path if path in row else path.split(".")[0] for _, path in columns}
    renamed = {name: value for name, value in row.items() if name not in taken}
    for name, path in columns:
        try:
            renamed[name] = row[path] if path in row else _at(row, path)
        except (KeyError, IndexError, TypeError, ValueError):
            renamed.pop(name, None)
    return renamed


def _at(row: Any, path: str) -> Any:
    for part in path.split("."):
        row = row[int(part)] if isinstance(row, list) else row[part]
    return row


def expected_rows(source: Source) -> int | None:
    """How many rows a source has, counted without reading them; None where that takes reading them."""
    if source.path.startswith(TINY):
        return None
    counts = [row_count(path) for path in source_files(source)] or [None]
    if None in counts:
        return None
    return min(sum(counts), source.take) if source.take else sum(counts)


def _all_rows(source: Source) -> Rows:
    if source.path.startswith(TINY):
        yield from _tiny_rows(source)
        return
    files = source_files(source)
    if files:
        for file in files:
            yield from read_file(file)
    else:
        for index, row in enumerate(_hub_data(source), start=1):
            yield Origin(source.path, index, has_lines=False), row


def _tiny_rows(source: Source) -> Rows:
    from align.world import generator

    for index, row in enumerate(generator.rows(_tiny_kind(source)), start=1):
        yield Origin(source.path, index, has_lines=False), row


def _hub_data(source: Source) -> Any:
    """A hub data set's split, from the local hub cache where it is there.

    Raises: UserError if the hub cannot be reached or has no such data set or split.
    """
    import datasets

    try:
        return datasets.load_dataset(source.path, split=source.split)
    except Exception as error:
        raise UserError(
            f"{source.where}={source.path}: no such local file, and split {source.split!r} of the hub data set cannot "
            f"be loaded ({type(error).__name__}: {first_line_of(error)}); check name and network, or give a file"
        ) from error


def source_inputs(source: Source, *, with_hub: bool = True) -> Iterator[SourceInput]:
    """What a source is made of, with digests; hub data sets are left out unless `with_hub`, which may load them."""
    if source.path.startswith(TINY):
        from align.world import generator

        yield SourceInput(source.path, generator.digest(generator.rows(_tiny_kind(source))))
        return
    files = source_files(source)
    for file in files:
        yield SourceInput(str(file), _file_digest(file))
    if not files and with_hub:
        yield SourceInput(source.path, f"hub:{hub_revision(_hub_data(source))}")


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def hub_revision(data: Any) -> str:
    """The commit a hub data set was taken at, or a digest of its rows where it does not say."""
    for url in getattr(data.info, "download_checksums", None) or {}:
        if match := re.search(r"@([0-9a-f]{40})", url):
            return match.group(1)
    digest = hashlib.sha256()
    for row in data:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()
