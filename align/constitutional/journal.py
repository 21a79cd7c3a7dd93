"""Every answer of a model, on disk as soon as it is known: what is paid for once is not asked for again."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def key_of(*parts: Any) -> str:
    """The name of an answer: a digest of all that decides it, as JSON types."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class Journal:
    """The answers to one kind of question: a line each, {"key": ..., ...}, appended by every rank to a file of its own.

    A run that is killed leaves at most one torn line a rank, the last: it is cut off, and asked for again. Files of
    ranks that there are no more count too. All ranks make their journal before any of them adds to it.
    """

    def __init__(self, folder: Path, name: str, rank: int):
        folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^\w.]+", "_", name)
        self.known: dict[str, dict[str, Any]] = {}
        for file in sorted(folder.glob(f"{name}-*.jsonl")):
            self.known |= {line.pop("key"): line for line in whole_lines(file)}
        self.path = folder / f"{name}-{rank}.jsonl"
        cut_torn_line(self.path)
        self.file = open(self.path, "a", encoding="utf-8", errors="surrogatepass")

    def add(self, key: str, answer: Mapping[str, Any]) -> None:
        """Keep an answer; it is in the file when this returns."""
        self.known[key] = dict(answer)
        self.file.write(json.dumps({"key": key, **answer}, ensure_ascii=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def whole_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file's lines; a last line without its end is none."""
    with open(file, "rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield json.loads(line.decode("utf-8", "surrogatepass"))


def cut_torn_line(file: Path) -> None:
    """Take away what stands behind the last line end."""
    if not file.is_file():
        return
    with open(file, "rb+") as content:
        text = content.read()
        content.truncate(text.rfind(b"\n") + 1)
