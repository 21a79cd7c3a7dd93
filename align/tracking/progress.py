"""One live line for long work: rewritten in place on a terminal, a plain line now and then elsewhere."""

import sys
import time

PLAIN_EVERY_SECONDS = 10.0


class Progress:
    """Counts towards `total` and shows rate and time left. Silent unless `active` (rank 0)."""

    def __init__(self, label: str, total: int, *, active: bool = True, done: int = 0) -> None:
        self.label, self.total, self.active = label, total, active
        self.started_at, self.start_count = time.monotonic(), done
        self.shown_at = float("-inf")
        self.live = sys.stderr.isatty()

    def show(self, done: int, note: str = "") -> None:
        """Say where the work stands. `note` is shown as given: a loss, a rate."""
        if not self.active:
            return
        now = time.monotonic()
        last = done >= self.total
        if not (last or now - self.shown_at >= (0.1 if self.live else PLAIN_EVERY_SECONDS)):
            return
        self.shown_at = now
        text = f"{self.label}  {done}/{self.total}{'  ' + note if note else ''}  {self._time_left(done, now)}"
        if self.live:
            sys.stderr.write("\r\x1b[K" + text + ("\n" if last else ""))
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def _time_left(self, done: int, now: float) -> str:
        elapsed = now - self.started_at
        fresh = done - self.start_count
        if done >= self.total:
            return f"took {clock(elapsed)}"
        return f"ETA {clock(elapsed / fresh * (self.total - done))}" if fresh > 0 else "ETA ?"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def say(text: str, *, active: bool = True) -> None:
    """One line to a person, on stderr, from rank 0."""
    if active:
        print(text, file=sys.stderr, flush=True)
