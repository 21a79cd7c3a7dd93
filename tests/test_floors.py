"""The house stands: a room imports only from floors below its own, and each engine stays in its room."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPO

PACKAGE = REPO / "align"
FLOORS = {
    "__main__": 8,
    "cli": 7,
    "chain": 6,
    "verbs": 6,
    "stages": 5,
    "constitutional": 4,
    "trainers": 4,
    "evaluation": 3,
    "generation": 3,
    "losses": 2,
    "models": 2,
    "tracking": 2,
    "data": 1,
    "distributed": 1,
    "artifacts": 1,
    "config": 0,
    "world": 0,
}
ROOMS_OF = {
    "hydra": {"cli", "config"},
    "trl": {"trainers"},
    "deepspeed": {"distributed"},
    "wandb": {"tracking"},
    "vllm": {"generation"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(file: Path) -> str:
    """The first name below `align`: a folder, or a file at the top."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def rooms_imported(file: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(file) if name.startswith("align.")} & set(FLOORS)


def test_every_room_has_a_floor():
    assert {room(file) for file in FILES} - {"__init__"} == set(FLOORS)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_a_room_imports_only_from_floors_below(file):
    own = room(file)
    climbs = {other for other in rooms_imported(file) - {own} if FLOORS[other] >= FLOORS.get(own, 0)}
    assert not climbs, f"{own} (floor {FLOORS.get(own, 0)}) imports {climbs}"


@pytest.mark.parametrize("engine", ROOMS_OF)
def test_an_engine_is_imported_in_its_room_only(engine):
    users = {room(file) for file in FILES if engine in {name.split(".")[0] for name in imported(file)}}
    assert users == ROOMS_OF[engine]


@pytest.mark.parametrize("name", ["utils", "common", "helpers", "base", "misc"])
def test_no_file_is_named_for_nothing(name):
    assert list(PACKAGE.rglob(f"{name}.py")) == []


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_settings_are_read_and_passed_by_name(file):
    """A getattr with a default hides a misspelt key; a splatted config hides which settings are used."""
    configs = ("cfg", "config", "stage")
    for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
        splatted = [k.value.id for k in call.keywords if k.arg is None and isinstance(k.value, ast.Name)]
        assert not set(splatted) & set(configs), f"{file}:{call.lineno}"
        if isinstance(call.func, ast.Name) and call.func.id == "getattr" and len(call.args) == 3:
            assert not (isinstance(call.args[0], ast.Name) and call.args[0].id in configs), f"{file}:{call.lineno}"
