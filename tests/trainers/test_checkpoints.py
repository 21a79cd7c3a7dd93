"""Checkpoints are trusted only when sealed and whole."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from align.trainers.checkpoints import SEAL, SealCheckpoint, checkpoint_step, newest_sealed, remove_newer, seal

IDENTITY = {"world_size": 1, "rows": "0123"}


def checkpoint(folder: Path, step: int, *, sealed: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "state").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights" * step)
    (path / "state" / "rank0.pt").write_bytes(b"moments" * step)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if sealed:
        seal(path, IDENTITY)
    return path


def cut(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])


def test_the_newest_is_the_one_with_the_most_steps_not_the_last_by_name(tmp_path):
    for step in (8, 9, 10):
        checkpoint(tmp_path, step)
    assert newest_sealed(tmp_path) == (tmp_path / "checkpoint-10", IDENTITY, [])


DAMAGES = {
    "without a seal": lambda path: (path / SEAL).unlink(),
    "with half a seal": lambda path: cut(path / SEAL),
    "with a seal of another shape": lambda path: (path / SEAL).write_text("[]"),
    "with a cut file": lambda path: cut(path / "model.safetensors"),
    "with a cut file of one rank": lambda path: cut(path / "state" / "rank0.pt"),
    "without one of its files": lambda path: (path / "model.safetensors").unlink(),
    "without anything": lambda path: [file.unlink() for file in path.rglob("*") if file.is_file()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_newer_one_is_passed_over_and_named(tmp_path, damage):
    good, bad = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    DAMAGES[damage](bad)
    assert newest_sealed(tmp_path) == (good, IDENTITY, [f"{bad}: half-written or damaged, passed over"])


def test_where_none_stands_the_stage_starts_again(tmp_path):
    bad = checkpoint(tmp_path, 4, sealed=False)
    found, _, passed_over = newest_sealed(tmp_path)
    assert found is None
    assert passed_over == [f"{bad}: half-written or damaged, passed over"]
    assert newest_sealed(tmp_path / "none") == (None, {}, [])
    assert checkpoint_step(found) == 0


def test_what_is_newer_than_the_one_taken_up_is_removed_and_what_is_older_stays(tmp_path):
    old, taken = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    debris = [checkpoint(tmp_path, 6), checkpoint(tmp_path, 10, sealed=False)]
    remove_newer(tmp_path, taken)
    assert old.is_dir() and taken.is_dir()
    assert not any(path.exists() for path in debris)
    assert checkpoint_step(taken) == 4
    remove_newer(tmp_path, None)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_checkpoint_is_left_alone(tmp_path):
    taken = checkpoint(tmp_path, 2)
    for name in ("checkpoint-notes", "tmp-checkpoint-8"):
        (tmp_path / name).mkdir()
    assert newest_sealed(tmp_path)[0] == taken
    remove_newer(tmp_path, taken)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-notes", "tmp-checkpoint-8"}


@pytest.mark.parametrize("main", [True, False])
def test_only_rank_0_seals_and_only_after_a_save(tmp_path, main):
    path = checkpoint(tmp_path, 4, sealed=False)
    arguments, state = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=4)
    SealCheckpoint(main, IDENTITY).on_save(arguments, state, None)
    assert (path / SEAL).is_file() is main
    assert newest_sealed(tmp_path)[0] == (path if main else None)
