"""`logs/rank-<n>.log` in the run folder: what each rank of a launch says, so that a run of many can be read afterwards.

A launcher mixes what all ranks print, and only rank 0 speaks to people. Here every rank has its own file: warnings,
errors with their tracebacks, whatever else it writes to stderr, and what it would have said as rank 0. A run that goes
on appends.
"""

import faulthandler
import logging
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from align.config.redaction import redacted_text

LOGS = "logs"
ERASE = "\x1b[K"
"""What a live line begins with, after its carriage return."""

_OPEN: list["RankLog"] = []


class RankLog:
    """A file of whole lines, each with its time; torn words wait for the rest of their line."""

    def __init__(self, path: Path, rank: int, world_size: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rank, self.path, self._torn = rank, path, ""
        self.file = open(path, "a", encoding="utf-8", errors="replace")
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        self.line(f"started {now}: rank {rank} of {world_size} on {socket.gethostname()}, pid {os.getpid()}")

    def line(self, text: str) -> None:
        """Write one line, or several, without what looks like a key or a password."""
        now = datetime.now().strftime("%H:%M:%S")
        try:
            self.file.writelines(f"{now} {part}\n" for part in redacted_text(text).splitlines())
            self.file.flush()
        except (OSError, ValueError):
            # A full disk must not end a run over its log.
            return

    def write(self, text: str) -> None:
        """What goes to stderr: whole lines are kept, of a line that is rewritten in place its last state."""
        *whole, self._torn = (self._torn + text).split("\n")
        for one in whole:
            words = one.rstrip("\r").rpartition("\r")[2].replace(ERASE, "").rstrip()
            if words:
                self.line(words)
        self._torn = self._torn.rpartition("\r")[2][-2000:]


class _Tee:
    """stderr, of which the log has a copy. All else, such as being a terminal, is stderr's own."""

    def __init__(self, stream: IO[str], log: RankLog) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        self._log.write(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Records(logging.Handler):
    """Warnings that a library logs elsewhere than to stderr, such as DeepSpeed to stdout."""

    def __init__(self, log: RankLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.line(f"{record.levelname} {record.name}: {record.getMessage()}")


@contextmanager
def rank_log(run_dir: Path, rank: int, world_size: int) -> Iterator[None]:
    """Inside, this rank writes its log; nothing for a rank alone. How the block ends is its last entry."""
    if world_size == 1:
        yield
        return
    log = RankLog(run_dir / LOGS / f"rank-{rank}.log", rank, world_size)
    # A crash below Python: NCCL's watchdog, a segmentation fault.
    faulthandler.enable(log.file)
    stderr, moved = sys.stderr, _listen(log)
    _OPEN.append(log)
    try:
        yield
        log.line("ended well")
    except BaseException as error:
        log.line("".join(traceback.format_exception(error)))
        log.line(f"ended with {type(error).__name__}")
        raise
    finally:
        _OPEN.remove(log)
        sys.stderr = stderr
        for handler, undo in moved:
            undo(handler)


def note(text: str) -> None:
    """A line for the log alone: what only rank 0 says aloud."""
    for log in _OPEN:
        log.line(text)


def _listen(log: RankLog) -> list[tuple[Any, Any]]:
    """Copy stderr to the log, that of handlers too that were made before; returns how to undo it for each."""
    stderr, tee = sys.stderr, _Tee(sys.stderr, log)
    sys.stderr = tee  # type: ignore[assignment]
    moved: list[tuple[Any, Any]] = []
    for logger in _loggers():
        for handler in list(logger.handlers):
            if not isinstance(handler, logging.StreamHandler):
                continue
            if handler.stream in (stderr, sys.__stderr__):
                handler.setStream(tee)
                moved.append((handler, lambda handler: handler.setStream(stderr)))
            elif handler.stream in (sys.stdout, sys.__stdout__):
                records = _Records(log)
                logger.addHandler(records)
                moved.append((records, logger.removeHandler))
    return moved


def _loggers() -> list[logging.Logger]:
    known = logging.root.manager.loggerDict.values()
    return [logging.root, *(logger for logger in known if isinstance(logger, logging.Logger))]
