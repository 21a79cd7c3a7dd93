"""A rank that is dead, frozen, stuck, failed or never started ends every rank within the timeout, and is named."""

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from align.config.errors import RankLost
from align.distributed.meeting import is_running, ranks_text
from tests.launching import free_port

pytestmark = pytest.mark.timeout(300)
HERE = Path(__file__).resolve().parent
LOST = RankLost.exit_code
TIMEOUT, LONG = 12, 80
"""Seconds, as `deepspeed.timeout_seconds`: to wait for, and so long that what ends sooner has not waited for it."""


@dataclass
class Ended:
    """What became of a rank. seconds: from the last one's first round to its end."""

    code: int
    output: str
    seconds: float


slow = pytest.mark.skipif(not os.environ.get("ALIGN_SLOW_TESTS"), reason="starts ranks; set ALIGN_SLOW_TESTS=1")


def launch(
    kind: str, folder: Path, *, ranks: int = 2, only: list[int] | None = None, timeout: float = TIMEOUT
) -> list[Ended]:
    """Run all ranks, or `only` these, to their ends; no launcher, which would end the others itself."""
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, str(HERE / "watched_ranks.py"), kind, str(timeout), str(folder)],
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank - min(only or [0])), "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(HERE.parents[1]),
            },
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in only or range(ranks)
    ]  # fmt: skip
    return gather(started, folder, frozen=1 if kind == "frozen" else None)


def gather(started: list[subprocess.Popen], folder: Path, frozen: int | None) -> list[Ended]:
    ended: dict[int, float] = {}
    deadline = time.monotonic() + 200
    try:
        while len(ended) < len(started) - (frozen is not None):
            assert time.monotonic() < deadline, f"only {sorted(ended)} have ended"
            for rank, process in enumerate(started):
                if process.poll() is not None:
                    ended.setdefault(rank, time.time())
            time.sleep(0.02)
    finally:
        for process in started:
            process.kill()
    begun = max((file.stat().st_mtime for file in folder.iterdir()), default=0.0)
    return [Ended(p.wait(), p.communicate()[0], ended.get(r, begun) - begun) for r, p in enumerate(started)]


def says(rank: Ended) -> str:
    """The line that a person reads."""
    [line] = re.findall(r"^align: (.*)", rank.output, re.MULTILINE)
    return line


@slow
def test_ranks_that_do_their_work_end_well_and_say_nothing(tmp_path):
    ends = launch("none", tmp_path)
    assert [end.code for end in ends] == [0, 0]
    assert not any("align:" in end.output for end in ends)


def test_a_killed_rank_is_named_at_once_and_ends_the_others(tmp_path):
    first, killed, last = launch("killed", tmp_path, ranks=3, timeout=LONG)
    assert (first.code, killed.code, last.code) == (LOST, -9, LOST)
    assert re.search(r"rank 1 \(\S+, pid \d+\) died", says(first))
    assert "the same command goes on" in says(first)
    assert "lost: rank 1" in last.output and "align:" not in last.output, "one line a host"
    assert max(first.seconds, last.seconds) < LONG / 2


def test_the_death_of_rank_0_is_named_too(tmp_path):
    killed, *others = launch("rank 0 killed", tmp_path, ranks=3, timeout=LONG)
    assert [killed.code, *(end.code for end in others)] == [-9, LOST, LOST]
    assert all("lost: rank 0" in end.output for end in others)
    assert max(end.seconds for end in others) < LONG / 2


def test_a_frozen_rank_ends_the_others_within_the_timeout(tmp_path):
    first, _ = launch("frozen", tmp_path)
    assert first.code == LOST
    assert re.search(r"rank 1 \(\S+, pid \d+\) not heard of", says(first))
    assert first.seconds < 2 * TIMEOUT


def test_a_rank_that_lives_but_does_not_come_is_named_with_its_place_and_ended(tmp_path):
    ends = launch("asleep", tmp_path)
    assert [end.code for end in ends] == [LOST] * 2
    assert re.search(r"rank 1 \(.*\) alive, but not .* at tests/distributed/watched_ranks.py:\d+", says(ends[0]))


def test_why_one_rank_failed_is_said_by_the_others(tmp_path):
    first, refused = launch("refused", tmp_path, timeout=LONG)
    assert (first.code, refused.code) == (LOST, 2)
    assert re.search(r"rank 1 \(.*\) failed: row 7 is empty; mend it", says(first))
    assert first.seconds < LONG / 2


@slow
def test_what_all_ranks_refuse_is_nobodys_loss(tmp_path):
    ends = launch("all refused", tmp_path, timeout=LONG)
    assert [end.code for end in ends] == [2, 2]
    assert not any("align:" in end.output for end in ends)


def test_one_rank_told_to_stop_stops_the_others_without_an_error(tmp_path):
    ends = launch("told", tmp_path)
    assert [end.code for end in ends] == [0, 0]
    assert "left: stopped by SIGTERM" in says(ends[0])


def test_a_rank_that_never_started_is_named(tmp_path):
    first, second = launch("none", tmp_path, ranks=3, only=[0, 1], timeout=5)
    assert (first.code, second.code) == (LOST, LOST)
    assert "rank 2 of 3 not started after 5 s" in says(first)
    assert "here: rank 0" in says(first)


@slow
def test_a_rank_0_that_never_started_is_named(tmp_path):
    [second] = launch("none", tmp_path, only=[1], timeout=3)
    assert second.code == LOST
    assert re.search(r"rank 1 on \S+ has not reached rank 0 at 127.0.0.1:\d+ in 3 s .*refused", says(second))


@slow
def test_a_rank_that_is_busy_for_long_before_the_start_is_waited_for(tmp_path):
    assert [end.code for end in launch("late", tmp_path, timeout=5)] == [0, 0]


def test_ranks_are_written_as_people_write_them():
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([8, 9, 10, 0, 15]) == "ranks 0, 8-10, 15"


def test_a_process_that_nobody_has_buried_is_dead():
    process = subprocess.Popen(["sleep", "100"])
    assert is_running(process.pid)
    process.kill()
    deadline = time.monotonic() + 5
    while is_running(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(process.pid), "killed, and not waited for"
    process.wait()
