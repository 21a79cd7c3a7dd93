"""Questions to a model, a step at a time: shared among ranks, known answers taken from the journal."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from align.constitutional.journal import Journal, key_of
from align.distributed import runtime
from align.distributed.runtime import Runtime
from align.generation.speakers import Ask, Choose, Chosen, Failed, Said, Speaker
from align.tracking.progress import Progress

Question = TypeVar("Question", Ask, Choose)
Done = Callable[[int, Any], None]


def role_of(step: str) -> str:
    """Who is asked in a step: generator, critic or judge."""
    return {"critique": "critic", "judge": "judge"}.get(step.split("_")[0], "generator")


@dataclass
class Spent:
    """What a step took. Answers that were known already count too, so a resumed run has the same account."""

    calls: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    """Reason -> questions without an answer."""
    seconds: float = 0.0
    """Of this process, for what was not known yet."""


@dataclass
class Work:
    """Puts questions to speakers. Each method is called on every rank, with the same questions in the same order."""

    folder: Path
    """Of the journals."""
    runtime: Runtime
    label: str
    spent: dict[str, Spent] = field(default_factory=dict)
    """By step."""

    def say(self, step: str, speaker: Speaker, asks: Sequence[Ask]) -> list[Said | Failed]:
        """Every answer, in the order of the questions, on every rank."""
        return self._ask(step, speaker, asks, speaker.say, lambda line: Said(**line))

    def choose(self, step: str, speaker: Speaker, chooses: Sequence[Choose]) -> list[Chosen | Failed]:
        """As `say`, for candidates."""
        return self._ask(
            step, speaker, chooses, speaker.choose, lambda line: Chosen(**{**line, "logps": tuple(line["logps"])})
        )

    def _ask(
        self,
        step: str,
        speaker: Speaker,
        questions: Sequence[Question],
        ask: Callable[[Sequence[Question], Done], None],
        read: Callable[[dict[str, Any]], Any],
    ) -> list[Any]:
        journal = Journal(self.folder, step, self.runtime.rank)
        runtime.barrier()
        # The caller's name for a question decides nothing about its answer.
        keys = [key_of(speaker.name, {**asdict(question), "key": ""}) for question in questions]
        together = _together(speaker, questions)
        groups = _groups(list(dict(zip(keys, questions, strict=True)).items()), together)
        waiting = [group for group in groups if any(key not in journal.known for key, _ in group)]
        answers = {key: read(journal.known[key]) for key in keys if key in journal.known}
        own = waiting[self.runtime.rank :: self.runtime.world_size]
        if waiting:
            calls = own if together else [[one for group in own for one in group]]
            for part in runtime.gather(self._put(step, journal, calls, ask)):
                answers |= part
        journal.close()
        found = [answers[key] for key in keys]
        self._count(step, found)
        return found

    def _put(
        self,
        step: str,
        journal: Journal,
        calls: list[list[tuple[str, Question]]],
        ask: Callable[[Sequence[Question], Done], None],
    ) -> dict[str, Any]:
        """Ask what is this rank's, and keep each answer at once. A failure is not kept: the next run tries again."""
        keys, fresh, lock = [key for call in calls for key, _ in call], {}, Lock()
        progress = Progress(
            f"{self.label}: {step}", len(keys), active=self.runtime.is_main and bool(keys), passing=True
        )
        started, tokens = time.monotonic(), 0
        spent = self.spent.setdefault(step, Spent())

        def keep(key: str, answer: Said | Chosen | Failed) -> None:
            nonlocal tokens
            with lock:
                fresh[key] = answer
                if not isinstance(answer, Failed):
                    journal.add(key, asdict(answer))
                tokens += getattr(answer, "new_tokens", 0)
                seconds = max(time.monotonic() - started, 1e-9)
                rate = f"  {tokens / seconds:,.0f} tokens/s" if tokens else ""
                progress.show(len(fresh), f"{len(fresh) / seconds:,.1f} rows/s{rate}")

        for call in calls:
            ask([question for _, question in call], lambda place, answer, call=call: keep(call[place][0], answer))
        spent.seconds += time.monotonic() - started
        missing = [key for key in keys if key not in fresh]
        assert not missing, f"{step}: the speaker left {len(missing)} questions without an answer"
        return fresh

    def _count(self, step: str, answers: Sequence[Said | Chosen | Failed]) -> None:
        spent = self.spent.setdefault(step, Spent())
        spent.calls += len(answers)
        for answer in answers:
            if isinstance(answer, Failed):
                spent.failed[answer.reason] += 1
            else:
                spent.prompt_tokens += answer.prompt_tokens
                spent.new_tokens += getattr(answer, "new_tokens", 0)


def _together(speaker: Speaker, questions: Sequence[Question]) -> int | None:
    """How many questions make a group that is asked whole or not at all; None: each is asked for itself."""
    return speaker.weighed_together if questions and isinstance(questions[0], Choose) else None


def _groups(questions: list[tuple[str, Question]], together: int | None) -> list[list[tuple[str, Question]]]:
    """Neighbours in groups of `together`; without, each question is a group of its own."""
    size = together or 1
    return [questions[start : start + size] for start in range(0, len(questions), size)]
