"""The members of a sweep: what each was and how it ended, in a file in its own run folder.

Members may run one after the other in one process, or at the same time on machines that share the folder.
"""

import re
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from align import artifacts
from align.tracking.local import read_metrics

MEMBER = "member.json"


class State(str, Enum):
    """How far a member is."""

    running = "running"
    """Or ended without a word: killed."""
    done = "done"
    failed = "failed"
    pruned = "pruned"


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    sweep: str
    """Digest of the sweep's command line: the same command goes on with the same sweep."""
    name: str
    """The values that are its own."""
    folder: Path
    state: State = State.running
    says: str = ""
    """Why it failed or was pruned."""
    figure: float | None = None
    """Of a search: what this member got."""

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = {key: value for key, value in asdict(self).items() if key != "folder"}
        artifacts.write_json(self.folder / MEMBER, kept | {"state": self.state.value})


def read_member(folder: Path) -> Member | None:
    """The member whose run folder this is; None if the run is no sweep's."""
    found = artifacts.read_json(folder / MEMBER)
    return None if found is None else Member(**found | {"folder": folder, "state": State(found["state"])})


def members_of(sweep: str, parent: Path) -> list[Member]:
    """All members of a sweep so far whose run folders lie in `parent`, by name, numbers by their size."""
    paths = sorted(parent.glob(f"*/{MEMBER}"), key=lambda path: _with_numbers(path.parent.name))
    found = map(read_member, (path.parent for path in paths))
    return [member for member in found if member is not None and member.sweep == sweep]


def _with_numbers(name: str) -> list[tuple[float, str]]:
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", name)
    return [(float(part), "") if n % 2 else (0.0, part) for n, part in enumerate(parts)]


def curves_of_others(run_dir: Path, stage: str, figure: str) -> list[dict[int, float]]:
    """Step -> figure of the evaluations of a stage, of each other member of the sweep that is done with all of it."""
    own = read_member(run_dir)
    if own is None:
        return []
    others = [m for m in members_of(own.sweep, run_dir.parent) if m.state is State.done and m.folder != run_dir]
    return [evaluations(read_metrics(other.folder / stage / "metrics.jsonl"), figure) for other in others]


def evaluations(lines: list[dict[str, Any]], figure: str) -> dict[int, float]:
    """Step -> figure, of the lines that have it."""
    return {line["step"]: float(line[figure]) for line in lines if isinstance(line.get(figure), int | float)}


def wandb_names(run_dir: Path, recipe: str) -> tuple[str, str]:
    """(group, first part of the names of runs) at wandb: the members of a sweep make a group of their own."""
    member = read_member(run_dir)
    return (recipe, recipe) if member is None else (f"{recipe} sweep {member.sweep[:6]}", member.name or recipe)
