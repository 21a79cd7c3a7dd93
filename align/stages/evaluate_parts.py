"""What an evaluation has measured already, on disk part by part: an evaluation that is killed goes on from there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from align.artifacts import read_json, write_json
from align.distributed import runtime
from align.distributed.runtime import Runtime

R = TypeVar("R")


@dataclass(frozen=True)
class Parts:
    """JSON values by name, each with the key of all that decides it."""

    folder: Path
    runtime: Runtime

    def get(self, name: str, key: str, compute: Callable[[], Any]) -> Any:
        """The value of a part, on every rank: as it was stored under this key, or computed now.

        Call it on every rank; `compute` runs on all of them or on none, and gives all of them the same.
        """
        path, stored = self.folder / f"{name}.json", None
        if self.runtime.is_main and path.is_file():
            stored = _stored(path, key)
        stored = runtime.from_main(stored)
        if stored is not None:
            return stored["value"]
        value = compute()
        if self.runtime.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, {"key": key, "value": value})
        return value


def _stored(path: Path, key: str) -> dict[str, Any] | None:
    try:
        content = read_json(path)
    except (ValueError, OSError):
        return None
    return content if isinstance(content, dict) and content.get("key") == key else None


def shared(this: Runtime, rows: Sequence[Any], compute: Callable[[Sequence[Any]], Sequence[R]]) -> list[R]:
    """One result a row, in order, on every rank; each rank computes those of its share of the rows."""
    parts = runtime.gather(list(compute(rows[this.rank :: this.world_size])))
    return [parts[place % this.world_size][place // this.world_size] for place in range(len(rows))]
