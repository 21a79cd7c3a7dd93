"""One live line for long work: rewritten in place on a terminal, a plain line now and then elsewhere."""

import os
import shutil
import sys
import time

from align.config.redaction import redacted_text
from align.tracking.rank_logs import note

PLAIN_EVERY_SECONDS = 10.0
LIVE_EVERY_SECONDS = 0.1
START_OF_LINE = "\r\x1b[K"
"""Back to the first column, and the rest of the line cleared."""


class Progress:
    """Counts towards `total` (None: not known) and shows the time left. Silent unless `active` (rank 0).

    `passing` is for work within other work: its line goes when it is done, and short work has no plain lines at all.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        *,
        active: bool = True,
        done: int = 0,
        passing: bool = False,
        unit: str = "",
    ) -> None:
        self.label, self.total, self.active, self.passing = label, total, active, passing
        self.unit = f"{unit} " if unit else ""
        self.live = is_terminal()
        self.start_count = done
        self.started_at = time.monotonic()
        self.shown_at = self.started_at if passing else float("-inf")
        self.finished = False

    def show(self, done: int, note: str = "") -> None:
        """Say where the work stands. `note` is shown as given: a loss, a rate. Done work is shown once."""
        if not self.active or self.finished:
            return
        now = time.monotonic()
        self.finished = self.total is not None and done >= self.total
        if not self.finished and now - self.shown_at < (LIVE_EVERY_SECONDS if self.live else PLAIN_EVERY_SECONDS):
            return
        self.shown_at = now
        if self.finished and self.passing:
            _write(START_OF_LINE if self.live else "")
            return
        count = f"{self.unit}{done}" + ("" if self.total is None else f"/{self.total}")
        parts = [self.label, count, note, self._time(done, now)]
        text = "  ".join(part for part in parts if part)
        if self.live:
            # A line that wraps cannot be rewritten in place.
            text = START_OF_LINE + text[: shutil.get_terminal_size().columns - 1]
        _write(text if self.live and not self.finished else text + "\n")

    def show_of(self, done: int, total: int | None) -> None:
        """As `show`, for work whose size is known only once it has begun."""
        self.total = total
        self.show(done)

    def close(self) -> None:
        """Clear the live line of passing work that is over, whatever it came to."""
        if self.active and self.passing and self.live and not self.finished:
            _write(START_OF_LINE)
        self.finished = True

    def _time(self, done: int, now: float) -> str:
        elapsed = now - self.started_at
        fresh = done - self.start_count
        if self.total is None:
            return f"{fresh / elapsed:.0f}/s" if elapsed > 0 else ""
        if done >= self.total:
            return f"took {clock(elapsed)}"
        return f"ETA {clock(elapsed / fresh * (self.total - done))}" if fresh > 0 else "ETA ?"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def say(text: str, *, active: bool = True) -> None:
    """One line to a person, on stderr, from rank 0; a live line that stands there makes room for it.

    The log of a rank that is not `active` has it too.
    """
    if not active:
        note(text)
    else:
        _write(f"{START_OF_LINE if is_terminal() else ''}{redacted_text(text)}\n")


def is_terminal() -> bool:
    """Whether stderr is a screen on which a line can be rewritten."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
