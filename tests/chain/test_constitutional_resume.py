"""kill -9 the making of constitutional data, retype the command: the same files, byte for byte; so do other batches."""

import json
import os
from pathlib import Path

import pytest

from align.chain import run_chain
from align.config.store import compose_run
from tests.chain.runs import finish, kill_when
from tests.constitutional.whole import FILES

COMMAND = ["+recipe=constitutional", "precision=fp32"]
STAGE = {
    "max_prompts": 12, "pairs": "all", "samples": 3, "temperatures": "[1.5]", "judge_principles": 2,
    "helpful_ratio": 0.5, "max_critique_tokens": 24, "max_new_tokens": 40,
}  # fmt: skip


def command(**changes: object) -> list[str]:
    return [*COMMAND, *(f"stages.constitutional.{key}={value}" for key, value in (STAGE | changes).items())]


def stage_dir(folder: Path) -> Path:
    return folder / "runs/constitutional/constitutional"


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (stage_dir(folder) / name).read_bytes() for name in FILES}


def answers(folder: Path, step: str) -> int:
    """Whole lines of a step's journal."""
    file = stage_dir(folder) / "journal" / f"{step}-0.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def in_this_process(folder: Path, **changes: object) -> dict[str, bytes]:
    """The files of a run in `folder`, which is where it runs: the page names its run folder."""
    folder.mkdir()
    before = Path.cwd()
    os.chdir(folder)
    try:
        run_chain(compose_run(command(**changes)).config)
    finally:
        os.chdir(before)
    return contents(folder)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, bytes]:
    return in_this_process(tmp_path_factory.mktemp("runs") / "uninterrupted", batch_size=4)


def test_data_killed_at_any_moment_ends_as_if_it_never_was(uninterrupted, tmp_path):
    again = command(batch_size=4)
    # In the middle of the first replies, and of the last verdicts.
    kill_when(lambda: answers(tmp_path, "initial") > 0, tmp_path, *again)
    assert answers(tmp_path, "initial") < STAGE["max_prompts"]
    kill_when(lambda: answers(tmp_path, "judge") > 0, tmp_path, *again)
    assert answers(tmp_path, "judge") < json.loads(uninterrupted["report.json"])["steps"]["judge"]["calls"]
    assert not (stage_dir(tmp_path) / "demonstrations.jsonl").exists()
    finish(tmp_path, *again)
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batches_of_one_and_of_eight_make_the_same_files(tmp_path, temperature):
    settings = {"temperature": temperature, "revision_temperature": temperature, "temperatures": f"[{temperature},1.5]"}
    one, eight = (in_this_process(tmp_path / str(size), batch_size=size, **settings) for size in (1, 8))
    assert one == eight


def test_the_uninterrupted_run_has_what_could_differ(uninterrupted):
    """Else the tests above would show nothing."""
    report = json.loads(uninterrupted["report.json"])
    assert report["prompts"] == STAGE["max_prompts"] and report["demonstrations"]["helpful_mixed_in"] > 0
    assert report["pairs"]["judged"] > 3 and report["rounds"]["accepted"] > 0
    texts = [json.loads(line)["targets"] for line in uninterrupted["trace.jsonl"].decode().splitlines()]
    assert len({text for listed in texts for text in listed}) > 3
    assert 0 < len({p for p in report["pairs"]["p"] if p != 0.5})
