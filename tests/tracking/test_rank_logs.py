"""Every rank of a launch keeps what it says in a file of its own, and prints what it would have printed anyway."""

import logging
import re
import sys

import pytest

from align.tracking.progress import START_OF_LINE, say
from align.tracking.rank_logs import rank_log


@pytest.fixture
def log(tmp_path):
    """The lines of rank 1's log, without their times."""

    def lines() -> list[str]:
        text = (tmp_path / "logs/rank-1.log").read_text()
        assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in text.splitlines())
        return [line[9:] for line in text.splitlines()]

    return lines


def test_what_goes_to_stderr_is_kept_and_still_goes_there(tmp_path, log, capsys):
    with rank_log(tmp_path, 1, 2):
        print("torn ", end="", file=sys.stderr)
        print("and whole", file=sys.stderr)
    assert "torn and whole" in log()
    assert "torn and whole\n" in capsys.readouterr().err


def test_the_log_says_who_and_when_and_a_second_run_appends(tmp_path, log):
    for _ in range(2):
        with rank_log(tmp_path, 1, 2):
            pass
    started = [line for line in log() if re.match(r"started \d{4}-\d\d-\d\dT.*: rank 1 of 2 on \S+, pid \d+$", line)]
    assert len(started) == 2
    assert log().count("ended well") == 2


def test_an_error_is_kept_with_its_traceback(tmp_path, log):
    with pytest.raises(ZeroDivisionError), rank_log(tmp_path, 1, 2):
        1 / 0  # noqa: B018
    assert any("in test_an_error_is_kept_with_its_traceback" in line for line in log())
    assert log()[-1] == "ended with ZeroDivisionError"


def test_of_a_live_line_its_last_state_is_kept(tmp_path, log):
    with rank_log(tmp_path, 1, 2):
        for step in (1, 2, 3):
            sys.stderr.write(f"{START_OF_LINE}sft step {step}/3")
        sys.stderr.write("\n")
    assert [line for line in log() if "step" in line] == ["sft step 3/3"]


def test_what_only_rank_0_says_aloud_is_in_every_log(tmp_path, log, capsys):
    with rank_log(tmp_path, 1, 2):
        say("sft: going on from step 5", active=False)
    assert "sft: going on from step 5" in log()
    assert capsys.readouterr().err == ""


def test_loggers_that_were_there_before_are_heard(tmp_path, log):
    to_stderr, to_stdout = logging.getLogger("early.err"), logging.getLogger("early.out")
    handlers = (logging.StreamHandler(sys.stderr), logging.StreamHandler(sys.stdout))
    for logger, handler in zip((to_stderr, to_stdout), handlers, strict=True):
        logger.propagate = False
        logger.setLevel(logging.INFO)  # its own: a sweep run earlier in this process may have set the root's
        logger.addHandler(handler)
    before = handlers[0].stream
    with rank_log(tmp_path, 1, 2):
        to_stderr.warning("from the first")
        to_stdout.warning("from the second")
        to_stdout.info("too quiet")
    assert "from the first" in log()
    assert "WARNING early.out: from the second" in log()
    assert not any("too quiet" in line for line in log())
    assert handlers[0].stream is before and to_stdout.handlers == [handlers[1]]


def test_a_password_does_not_get_into_a_log(tmp_path, log):
    with rank_log(tmp_path, 1, 2):
        print("connecting to https://me:hunter2secret@host/", file=sys.stderr)
    assert "hunter2secret" not in "\n".join(log())
    assert any("connecting to https://me" in line for line in log())


def test_a_process_alone_writes_no_log(tmp_path):
    with rank_log(tmp_path, 0, 1):
        print("here", file=sys.stderr)
    assert list(tmp_path.iterdir()) == []
