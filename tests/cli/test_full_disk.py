"""A disk that is full or closed, through the command line: one line, nothing that looks complete, and a way on."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from align.artifacts import damaged_outputs, read_manifest
from tests.cli.own_files import command, finished, looks_complete, pairs, refusal, save_model, write_rows

Disk = Callable[..., Path]
ROOM_FOR_ALL = "size=20m"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("own") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "pairs.jsonl", pairs(30))


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    """A function that mounts a file system in memory with the options given, or mounts it anew with others."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> Path:
        mounted = ["remount"] if os.path.ismount(folder) else []
        words = ["mount", "-t", "tmpfs", "-o", ",".join([*mounted, *options]), "tmpfs", str(folder)]
        try:
            done = subprocess.run(words, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no `mount` here")
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted (needs root): {done.stderr.splitlines()[0]}")
        return folder

    yield mount
    # Rows are mapped into memory from it, so it is busy as long as their objects live.
    if os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def assert_goes_on(capsys, arguments: list[str], stage_dir: Path) -> str:
    _, errors = finished(capsys, arguments)
    manifest = read_manifest(stage_dir)
    assert manifest.steps == 2 and damaged_outputs(stage_dir, manifest) == []
    assert not list(stage_dir.glob("*.partial"))
    return errors


NO_CHECKPOINT, EVERY_STEP = "stages.dpo.save_every=0", "stages.dpo.save_every=1"
# A checkpoint takes about 560 kB (weights 160, optimizer 320), a policy 190 kB, all else in a run folder 20 kB.
FULL = {
    "at once": ("size=4k", [NO_CHECKPOINT], False),
    "while the policy is saved": ("size=150k", [NO_CHECKPOINT], False),
    "after the adapter, while the policy is saved": ("size=200k", [NO_CHECKPOINT, "peft=lora"], False),
    "while the first checkpoint is written": ("size=350k", [EVERY_STEP], False),
    "while the second checkpoint is written": ("size=750k", [EVERY_STEP], True),
}


@pytest.mark.parametrize(("size", "settings", "resumes"), FULL.values(), ids=FULL.keys())
def test_a_disk_that_fills_up_leaves_nothing_complete(size, settings, resumes, disk, model, rows, tmp_path, capsys):
    folder = disk(size)
    arguments = command(model, rows, folder, f"cache_dir={tmp_path / 'cache'}", *settings)
    line = refusal(capsys, arguments)
    assert line == f"align: {folder / 'run'}: the disk is full; free some space and type the same command to go on"
    assert looks_complete(folder) == []
    disk(ROOM_FOR_ALL)
    errors = assert_goes_on(capsys, arguments, folder / "run/dpo")
    assert ("dpo: going on from step 1" in errors) == resumes


def test_a_full_cache_is_named_and_leaves_no_rows(disk, model, rows, tmp_path, capsys):
    folder = disk("size=8k")
    arguments = command(model, rows, tmp_path, f"cache_dir={folder}")
    assert f"cache_dir={folder}: the tokenised rows cannot be written there (No space" in refusal(capsys, arguments)
    assert [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "locks"] == []
    assert looks_complete(tmp_path) == []
    disk(ROOM_FOR_ALL)
    assert_goes_on(capsys, arguments, tmp_path / "run/dpo")


def test_a_closed_run_folder_is_refused_before_anything_runs(disk, model, rows, tmp_path, capsys):
    folder = disk("ro")
    line = refusal(capsys, command(model, rows, tmp_path, f"run_dir={folder / 'run'}"))
    assert f"{folder / 'run'}: not writable (Read-only file system); use another run_dir" in line
    assert not (tmp_path / "cache").exists()


def test_a_closed_cache_is_named(disk, model, rows, tmp_path, capsys):
    folder = disk("ro")
    line = refusal(capsys, command(model, rows, tmp_path, f"cache_dir={folder / 'cache'}"))
    assert f"cache_dir={folder / 'cache'}: the tokenised rows cannot be written there (Read-only" in line
    assert looks_complete(tmp_path) == []


def test_a_folder_without_permission_is_refused(model, rows, tmp_path, capsys):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "run").mkdir(mode=0o500)
    assert "not writable (Permission denied)" in refusal(capsys, command(model, rows, tmp_path))
