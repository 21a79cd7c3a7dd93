"""Checkpoints are trusted only when sealed and whole."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from align.config.schema import SFTStage
from align.trainers.best import Best
from align.trainers.checkpoints import (
    SEAL,
    SealCheckpoint,
    checkpoint_step,
    newest_good,
    newest_sealed,
    owes_evaluation,
    remove_newer,
    seal,
    write_digests,
)

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


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "state/rank0.pt"])
def test_a_file_of_the_right_size_with_other_bytes_is_found_by_its_digest(tmp_path, name):
    good, bad = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    for path in (good, bad):
        write_digests(path, 0, 1)
    assert newest_good(tmp_path) == (bad, IDENTITY, [])
    flip(bad / name)
    assert newest_sealed(tmp_path)[0] == bad
    assert newest_good(tmp_path) == (good, IDENTITY, [f"{bad}: {name} is not what was written, passed over"])


def test_every_rank_writes_the_digests_of_its_share_and_sizes_do_where_they_are_missing(tmp_path):
    path = checkpoint(tmp_path, 4)
    for rank in (0, 1):
        write_digests(path, rank, 2)
    first, second = (json.loads((path / f"digests-{rank}.json").read_text()) for rank in (0, 1))
    assert first.keys() | second.keys() == json.loads((path / SEAL).read_text())["files"].keys()
    assert not first.keys() & second.keys() and first and second
    flip(path / "model.safetensors")
    assert newest_good(tmp_path)[0] is None
    for rank in (0, 1):
        (path / f"digests-{rank}.json").unlink()
    assert newest_good(tmp_path)[0] == path


def test_a_seal_put_on_anew_forgets_older_digests(tmp_path):
    path = checkpoint(tmp_path, 4)
    write_digests(path, 0, 1)
    (path / "model.safetensors").write_bytes(b"others!" * 4)
    seal(path, IDENTITY)
    assert newest_good(tmp_path)[0] == path


def test_a_checkpoint_that_is_removed_while_it_is_read_does_no_harm(tmp_path):
    write_digests(tmp_path / "checkpoint-9", 0, 1)
    assert not (tmp_path / "checkpoint-9").exists()


def test_a_save_is_followed_by_digests_and_the_next_one_waits_for_them(tmp_path):
    callback = SealCheckpoint(True, IDENTITY)
    path = checkpoint(tmp_path, 4, sealed=False)
    arguments, state = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=4)
    callback.on_save(arguments, state, None)
    callback.on_step_end(arguments, state, SimpleNamespace(should_save=True))
    assert (path / "digests-0.json").is_file()


def test_an_evaluation_is_owed_where_the_run_was_stopped_before_it(tmp_path):
    path = checkpoint(tmp_path, 4)
    for lines, every, owed in (
        ([], 2, True), ([], 3, False), ([], 0, False), ([{"step": 2, "eval_loss": 1.0}], 2, True),
        ([{"step": 4, "loss": 1.0}], 2, True), ([{"step": 4, "eval_loss": 1.0}], 2, False),
    ):  # fmt: skip
        (path / "trainer_state.json").write_text(json.dumps({"global_step": 4, "log_history": lines}))
        assert owes_evaluation(path, every) is owed
    assert owes_evaluation(None, 0)


def test_the_best_evaluation_is_saved_and_one_that_is_no_number_or_no_better_is_not(tmp_path):
    callback, saved = Best("sft", SFTStage(keep_best=True), active=False, alert=lambda *_: None), []
    state = SimpleNamespace(
        global_step=0, best_metric=None, best_global_step=None, best_model_checkpoint=None, log_history=[]
    )
    for step, loss in ((0, 0.1), (2, float("nan")), (4, 3.0), (6, 2.0), (8, 2.5), (10, 2.0)):
        control = SimpleNamespace(should_save=False)
        state.global_step = step
        callback.on_evaluate(SimpleNamespace(output_dir=str(tmp_path)), state, control, {"eval_loss": loss})
        if control.should_save:
            saved.append(step)
    assert saved == [4, 6]
    assert state.best_metric == 2.0 and state.best_model_checkpoint == str(tmp_path / "checkpoint-6")
    state.best_model_checkpoint = None
    callback.on_train_begin(None, state, None)
    assert state.best_metric is None
