"""The progress line: in place on a terminal, now and then elsewhere, from one rank."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from align.tracking import progress
from align.tracking.progress import Progress, clock, say

REPO = Path(__file__).resolve().parents[2]
CLEAR = progress.START_OF_LINE


class Screen(io.StringIO):
    """A stderr that says whether it is a terminal."""

    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def time_passes(monkeypatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def plain(monkeypatch) -> Screen:
    screen = Screen(terminal=False)
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=screen))
    return screen


@pytest.fixture
def terminal(monkeypatch) -> Screen:
    screen = Screen(terminal=True)
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=screen))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    return screen


def test_elsewhere_the_first_the_last_and_one_in_ten_seconds_are_shown(plain, time_passes):
    line = Progress("sft", 40, unit="step")
    for step in range(1, 41):
        time_passes.now += 1
        line.show(step, f"loss {step}")
    shown = plain.getvalue().splitlines()
    assert shown[0] == "sft  step 1/40  loss 1  ETA 0:39"
    assert [text.split()[2] for text in shown] == ["1/40", "11/40", "21/40", "31/40", "40/40"]
    assert shown[-1] == "sft  step 40/40  loss 40  took 0:40"
    assert "\r" not in plain.getvalue() and "\x1b" not in plain.getvalue()


def test_on_a_terminal_one_line_is_rewritten_in_place_and_ended_once(terminal, time_passes):
    line = Progress("sft", 3)
    for step in (1, 2, 3, 3):
        time_passes.now += 1
        line.show(step)
    assert terminal.getvalue() == f"{CLEAR}sft  1/3  ETA 0:02{CLEAR}sft  2/3  ETA 0:01{CLEAR}sft  3/3  took 0:03\n"


def test_a_line_is_cut_before_it_would_wrap(terminal, time_passes):
    Progress("sft", 3).show(1, "loss 0.1234  1,234,567 tokens/s and more")
    assert len(terminal.getvalue().removeprefix(CLEAR)) == 39


def test_what_is_said_meanwhile_has_a_line_of_its_own(terminal, time_passes):
    Progress("sft", 3).show(1)
    say("sft: held-out loss 0.5")
    assert terminal.getvalue().endswith(f"{CLEAR}sft: held-out loss 0.5\n")


def test_other_ranks_are_silent(terminal):
    Progress("sft", 3, active=False).show(3)
    say("sft", active=False)
    assert terminal.getvalue() == ""


def test_time_left_counts_from_where_a_resumed_stage_went_on(plain, time_passes):
    line = Progress("sft", 100, done=90)
    time_passes.now += 5
    line.show(95)
    assert plain.getvalue() == "sft  95/100  ETA 0:05\n"


def test_work_within_other_work_leaves_nothing_behind(terminal, time_passes):
    line = Progress("judging", 30, passing=True)
    for batch in range(1, 31):
        time_passes.now += 1
        line.show(batch)
    assert f"{CLEAR}judging  29/30  ETA 0:01" in terminal.getvalue()
    assert terminal.getvalue().endswith(CLEAR)


def test_short_work_within_other_work_has_no_plain_lines(plain, time_passes):
    line = Progress("judging", 3, passing=True)
    for batch in (1, 2, 3):
        time_passes.now += 1
        line.show(batch)
    assert plain.getvalue() == ""


def test_a_dumb_terminal_gets_plain_lines(terminal, time_passes, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    Progress("sft", 1).show(1)
    assert terminal.getvalue() == "sft  1/1  took 0:00\n"


def test_a_real_terminal_is_recognised():
    code = "from align.tracking.progress import Progress; p = Progress('sft', 2); p.show(1); p.show(2)"
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(REPO)}
    subprocess.run([sys.executable, "-c", code], stderr=theirs, env=environment, timeout=60, check=True)
    os.close(theirs)
    with open(ours, "rb", buffering=0) as screen:
        seen = screen.read(4096).decode()
    assert seen.startswith(f"{CLEAR}sft  1/2")
    assert seen.endswith("took 0:00\r\n")
    assert seen.count("\n") == 1


def test_seconds_are_shown_as_a_clock():
    assert [clock(5.4), clock(65), clock(3661)] == ["0:05", "1:05", "1:01:01"]
