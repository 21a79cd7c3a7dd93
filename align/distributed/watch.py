"""Which ranks are still there: each says so about once a second, and all end, naming the one that is gone.

The ranks meet at the address and port that the launcher gave, before any process group, in a store of torch that rank 0
serves (under torchrun its first agent). A rank that works long, say on its rows, is waited for; one that is dead or cut
off is not. What a collective cannot say (gloo: "Connection closed by peer"; NCCL: nothing at all) is found here.
"""

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist

from align.config.errors import RankLost, Stopped, UserError
from align.distributed.meeting import MeetingPlace, innermost_line, is_running, ranks_text, served_by_agent

GRACE_SECONDS = 5.0
"""Time for the main thread to find out by itself that another rank is gone, and to end in order."""
UNWIND_SECONDS = 20.0
"""Time for ending in order, such as closing files; then the process is ended."""
BROKEN = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe", "timed out waiting")
"""What errors of a collective have in them, whatever their type."""
FAILED, WHO, HERE, BEAT, OVER, WAITING = "failed", "who", "here", "beat", "over", "waiting"


class Watch:
    """One rank's part: says that it is there, hears of the others, ends the process when one of them is gone."""

    def __init__(self, rank: int, world_size: int, timeout_seconds: float, *, number: int = 0) -> None:
        """number: how many watches this process had before. Meets rank 0.

        Raises: RankLost if it cannot be reached within timeout_seconds; UserError for a port that is taken.
        """
        self.rank, self.world_size, self.timeout, self.number = rank, world_size, timeout_seconds, number
        # The store of thousands of ranks must not drown in beats.
        self.beat_seconds = max(min(1.0, timeout_seconds / 10), world_size / 64)
        # How long a collective may take, and a rank be silent: finding out who it is has to fit into the timeout too.
        self.patience_seconds = max(timeout_seconds / 2, timeout_seconds - GRACE_SECONDS - 4 * self.beat_seconds)
        self.lost: dict[str, Any] | None = None
        self._lost_at = self._answered_at = time.monotonic()
        self._ending = False
        self._over = threading.Event()
        self._names: dict[int, str] = {}
        self._local: dict[int, int] = {}
        self._main = threading.main_thread().ident
        self._place = MeetingPlace(f"rank {rank}", timeout_seconds, retry_seconds=self.beat_seconds, number=number)
        try:
            self._store = self._place.enter(serve=rank == 0 and not served_by_agent())
        except RankLost as lost:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"align: {lost}", file=sys.stderr, flush=True)
            raise
        self._store.set(f"{WHO}/{rank}", f"{socket.gethostname()} {os.getpid()}")
        self._store.compare_set(FAILED, "", "null")
        for work in (self._tell_and_hear, self._guard):
            threading.Thread(target=work, name=f"align-{work.__name__}", daemon=True).start()
        atexit.register(self.leave)

    @property
    def has_left(self) -> bool:
        return self._over.is_set()

    def arrive(self) -> None:
        """Wait until every rank is here, as long as those that are not show that they live. Raises: RankLost."""
        self._store.set(f"{HERE}/{self.rank}", "1")
        deadline = time.monotonic() + self.timeout
        while not self._all_there(HERE):
            if time.monotonic() > deadline and not self._all_there(WHO):
                self._blame(self._never_came())
            if self.lost is not None:
                raise self._end_in_order()
            time.sleep(min(0.1, self.beat_seconds))
        self._learn_names()

    def explain(self, error: Exception) -> BaseException:
        """What this rank ends with: its own error, which the others are told, or that another rank is gone."""
        if isinstance(error, RankLost):
            return error
        if not _is_broken_collective(error):
            if self.lost is None:
                self._blame_self(error)
            return error
        if self.lost is None:
            self._find_lost(error)
        return self._end_in_order()

    def leave(self, reason: str = "done") -> None:
        """Say that this rank ends, and stop watching. Rank 0 stays until the others have said so too, or are gone."""
        if self._over.is_set():
            return
        self._over.set()
        # A cable that is out lets a call of the store hang.
        speaking = threading.Thread(target=self._say_over, args=(reason,), daemon=True)
        speaking.start()
        speaking.join(UNWIND_SECONDS / 2)

    # --- who is who

    def _all_there(self, what: str) -> bool:
        return self._store.check([f"{what}/{rank}" for rank in range(self.world_size)])

    def _learn_names(self) -> None:
        found = self._store.multi_get([f"{WHO}/{rank}" for rank in range(self.world_size)])
        hosts = {rank: text.decode().split() for rank, text in enumerate(found)}
        own = hosts[self.rank][0]
        local = {rank: int(pid) for rank, (host, pid) in hosts.items() if host == own and rank != self.rank}
        # Containers may share a host name and not their processes.
        self._local = {rank: pid for rank, pid in local.items() if is_running(pid)}
        self._names = {rank: f"rank {rank} ({host}, pid {pid})" for rank, (host, pid) in hosts.items()}

    def _name(self, rank: int) -> str:
        if rank not in self._names and self._store.check([f"{WHO}/{rank}"]):
            host, pid = self._store.get(f"{WHO}/{rank}").decode().split()
            self._names[rank] = f"rank {rank} ({host}, pid {pid})"
        return self._names.get(rank, f"rank {rank}")

    # --- the two threads: one that may hang in the store, and one that cannot hang

    def _tell_and_hear(self) -> None:
        store, count, heard, changed_at = None, 0, b"", time.monotonic()
        before = (self.rank - 1) % self.world_size
        while not self._over.wait(self.beat_seconds if count else 0):
            try:
                store = store or self._place.enter()
                count += 1
                store.set(f"{BEAT}/{self.rank}", f"{count} {innermost_line(self._main)}")
                self._hear(json.loads(store.get(FAILED)))
                now = self._answered_at = time.monotonic()
                beat = store.get(f"{BEAT}/{before}") if store.check([f"{BEAT}/{before}"]) else b""
                if beat != heard or store.check([f"{OVER}/{before}"]):
                    heard, changed_at = beat, now
                elif beat and now - changed_at > self.patience_seconds:
                    self._blame(self._silent(store, now - changed_at), store)
                self._blame(self._vanished(store), store)
            except (RuntimeError, RankLost):
                store = None
                self._rank_0_gone_if_refused()

    def _guard(self) -> None:
        woken = time.monotonic()
        while not self._over.wait(min(0.2, self.beat_seconds)):
            now = time.monotonic()
            if now - woken > GRACE_SECONDS:
                # Nothing in this process has run meanwhile, so that nobody could be heard.
                self._answered_at, self._lost_at = self._answered_at + now - woken, self._lost_at + now - woken
            woken = now
            if self.lost is None and now - self._answered_at > self.patience_seconds:
                self._rank_0_gone(f"not heard of for {now - self._answered_at:.0f} s: dead, or cut off; no answer at")
            if self.lost is not None and now - self._lost_at > (UNWIND_SECONDS if self._ending else GRACE_SECONDS):
                if not self._ending:
                    self._say_lost()
                sys.stderr.flush()
                # The main thread hangs in a collective, which no exception reaches.
                os._exit(RankLost.exit_code)

    # --- who it is

    def _hear(self, failed: dict[str, Any] | None) -> None:
        if failed is not None and self.lost is None:
            self._lost_at = time.monotonic()
            self.lost = failed

    def _blame(self, failed: dict[str, Any] | None, store: Any = None) -> None:
        """Tell all ranks who is gone, unless that has been said, and take what they were told for it."""
        if failed is not None and self.lost is None:
            told = (store or self._store).compare_set(FAILED, "null", json.dumps(failed))
            self._hear(json.loads(told))

    def _blame_self(self, error: Exception) -> None:
        first = str(error).strip().split("\n")[0]
        text = first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"
        failed = _failed([self.rank], f"rank {self.rank} ({socket.gethostname()}, pid {os.getpid()}) failed: {text}")
        self._try(lambda: self._store.compare_set(FAILED, "null", json.dumps(failed)))

    def _find_lost(self, error: Exception) -> None:
        """Look who is gone now that a collective has failed: quickly, because a launcher will end this rank soon."""
        self._rank_0_gone_if_refused()
        self._try(lambda: self._store.set(f"{WAITING}/{self.rank}", "1"))
        self._try(self._find_lost_in_store)
        if self.lost is None:
            self._rank_0_gone_if_refused()
        if self.lost is None:
            first = str(error).strip().split("\n")[0]
            self._hear({"ranks": [], "text": f"a connection between the ranks broke, all of which answer: {first}"})

    def _find_lost_in_store(self) -> None:
        store = self._place.enter()
        before, deadline = self._beats(store), time.monotonic() + 3.5 * self.beat_seconds
        while self.lost is None and time.monotonic() < deadline:
            self._hear(json.loads(store.get(FAILED)))
            self._blame(self._vanished(store), store)
            time.sleep(0.02)
        if self.lost is None:
            same = [rank for rank, beat in self._beats(store).items() if beat == before[rank]]
            self._blame(self._quiet(store, same) or self._ended(store) or self._absent(store), store)

    def _beats(self, store: Any) -> dict[int, bytes]:
        return dict(enumerate(store.multi_get([f"{BEAT}/{rank}" for rank in range(self.world_size)])))

    def _others(self, store: Any, ranks: Iterable[int]) -> list[int]:
        """Those of `ranks` that are not this one and have not said that they end."""
        return [rank for rank in ranks if rank != self.rank and not store.check([f"{OVER}/{rank}"])]

    def _vanished(self, store: Any) -> dict[str, Any] | None:
        """Ranks of this host whose process is no more; the kernel knows at once."""
        gone = self._others(store, [rank for rank, pid in self._local.items() if not is_running(pid)])
        return _failed(gone, f"{self._list(gone)} died: no process, and no last word") if gone else None

    def _silent(self, store: Any, seconds: float) -> dict[str, Any] | None:
        """All ranks that are as silent as the one before this one."""
        first = self._beats(store)
        time.sleep(2.5 * self.beat_seconds)
        same = [rank for rank, beat in self._beats(store).items() if beat == first[rank]]
        return self._quiet(store, same, f" for {seconds:.0f} s")

    def _quiet(self, store: Any, same: list[int], time_words: str = "") -> dict[str, Any] | None:
        quiet = self._others(store, same)
        words = f"{self._list(quiet)} not heard of{time_words}: dead, or cut off from {self._place.address}"
        return _failed(quiet, words) if quiet else None

    def _absent(self, store: Any) -> dict[str, Any] | None:
        """Ranks that live and have not come to the collective in which the others waited; where they are instead."""
        absent = self._others(store, [r for r in range(self.world_size) if not store.check([f"{WAITING}/{r}"])])
        if not absent:
            return None
        place = store.get(f"{BEAT}/{absent[0]}").decode().partition(" ")[2]
        return _failed(
            absent, f"{self._list(absent)} alive, but not where the others waited; at {place or 'its start'}"
        )

    def _ended(self, store: Any) -> dict[str, Any] | None:
        """Ranks that have left in order while this one had not, such as one that alone was told to stop."""
        ended = [rank for rank in range(self.world_size) if store.check([f"{OVER}/{rank}"])]
        if not ended:
            return None
        reason = store.get(f"{OVER}/{ended[0]}").decode()
        return _failed(ended, f"{self._list(ended)} left: {reason}") | {"stopped": reason.startswith("stopped")}

    def _never_came(self) -> dict[str, Any]:
        missing = [rank for rank in range(self.world_size) if not self._store.check([f"{WHO}/{rank}"])]
        here = sorted(set(range(self.world_size)) - set(missing))
        return _failed(
            missing,
            f"{ranks_text(missing)} of {self.world_size} not started after {self.timeout:.0f} s, or without a way to "
            f"{self._place}; here: {self._list(here)}",
        )

    def _rank_0_gone_if_refused(self) -> None:
        """A port that refuses has lost its process; one that does not answer may come back."""
        if isinstance(self._place.probe(), ConnectionRefusedError) and not self._over.is_set():
            self._rank_0_gone("died: nothing serves")

    def _rank_0_gone(self, how: str) -> None:
        self._hear(_failed([0], f"{self._names.get(0, 'rank 0')} {how} {self._place}"))

    def _list(self, ranks: list[int]) -> str:
        return ", ".join(map(self._name, ranks)) if len(ranks) <= 8 else ranks_text(ranks)

    def _try(self, work: Callable[[], Any]) -> None:
        """Do what may fail or hang when the store is gone; no longer than until it is known who is lost."""

        def attempt() -> None:
            with contextlib.suppress(RuntimeError, RankLost):
                work()

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        deadline = time.monotonic() + UNWIND_SECONDS / 2
        while thread.is_alive() and self.lost is None and time.monotonic() < deadline:
            thread.join(0.02)

    # --- the end

    def _end_in_order(self) -> RankLost | Stopped:
        self._ending, self._lost_at = True, time.monotonic()
        self._say_lost()
        assert self.lost is not None
        return (Stopped if self.lost.get("stopped") else RankLost)(self.lost["text"])

    def _say_lost(self) -> None:
        """One line a host, from its first rank that is left; at once, because a launcher may end this rank."""
        assert self.lost is not None
        if not [rank for rank in self._local if rank < self.rank and rank not in self.lost["ranks"]]:
            print(
                f"align: {self.lost['text']}; every rank stops, the same command goes on", file=sys.stderr, flush=True
            )

    def _say_over(self, reason: str) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.set(f"{OVER}/{self.rank}", reason)
            lost = self.lost["ranks"] if self.lost else []
            waits = [f"{OVER}/{rank}" for rank in range(self.world_size) if rank not in lost]
            # A rank that is lost may live, and has to hear why it ends.
            heard_at = time.monotonic() + (2.5 * self.beat_seconds if self.lost else 0)
            deadline = time.monotonic() + UNWIND_SECONDS / 2
            while self.rank == 0 and time.monotonic() < deadline:
                if time.monotonic() > heard_at and self._store.check(waits):
                    return
                time.sleep(0.05)


def _failed(ranks: list[int], text: str) -> dict[str, Any]:
    return {"ranks": ranks, "text": text}


def _is_broken_collective(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, dist.DistError):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in BROKEN):
            return True
        error = error.__cause__ or error.__context__
    return False
