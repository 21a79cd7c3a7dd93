"""Constitutions, prompts and scripted models, small enough to work out by hand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from align.config.constitution import Constitution, JudgeRules, Principle, Scaffold
from align.config.schema import ConstitutionalStage
from align.constitutional.judging import Judge
from align.constitutional.pairing import Pairing
from align.constitutional.prompts import Critique, Questions
from align.constitutional.revising import Revising
from align.constitutional.rows import Filters, PromptWork, Round, going
from align.constitutional.work import Work
from align.data.records import Message, PromptRow
from align.distributed.runtime import Runtime
from align.generation.fake_speaker import FakeSpeaker
from align.generation.speakers import Ask, Choose, Failed

BAR = "\n|\n"
"""Between the parts of a question, so that a test can take it apart again."""
KINDS = {
    "critique": ("request", "conversation", "reply"),
    "revision": ("request", "conversation", "reply", "critique"),
    "comparison": ("request", "conversation", "first", "second"),
    "thought": ("request", "conversation", "first", "second"),
}
SCAFFOLD = Scaffold(**{kind: BAR.join([kind, *(f"{{{name}}}" for name in parts)]) for kind, parts in KINDS.items()})
LOST = Failed("timeout", "no answer in time")
ALONE = Runtime(0, 1, 0, "cpu")


@dataclass(frozen=True)
class Seen:
    """A question taken apart."""

    kind: str
    """critique, revision, comparison, thought; verdict after a thought; reply: a conversation to be answered."""
    request: str = ""
    """The id of the principle."""
    conversation: str = ""
    reply: str = ""
    critique: str = ""
    first: str = ""
    second: str = ""


def seen(question: Ask | Choose) -> Seen:
    """What is asked, by a constitution of `constitution`."""
    *before, last = question.messages
    kind, *parts = last["content"].split(BAR)
    if kind in KINDS:
        return Seen(kind, **dict(zip(KINDS[kind], parts, strict=True)))
    if last["content"] == SCAFFOLD.verdict:
        _, *parts = before[-2]["content"].split(BAR)
        return Seen("verdict", **dict(zip(KINDS["thought"], parts, strict=True)))
    return Seen("reply", conversation=last["content"])


def principle(id: str, **changes: Any) -> Principle:
    """One whose wording is its id."""
    return Principle(id=id, critique=id, revision=id, comparison=id, **changes)


def constitution(*principles: str | Principle, cot: bool = False, clamp: Any = (0.4, 0.6)) -> Constitution:
    listed = [one if isinstance(one, Principle) else principle(one) for one in principles or ("kind",)]
    return Constitution(
        "test", "1", "none", "For tests.", tuple(listed), scaffold=SCAFFOLD, judge=JudgeRules(cot, clamp)
    )


def row(id: str, *turns: str) -> PromptWork:
    """A prompt; without turns its text is its id. Turns go user, assistant, ..., user."""
    roles = ("user", "assistant")
    messages = tuple(Message(roles[n % 2], text) for n, text in enumerate(turns or (id,)))
    conversation = tuple({"role": one.role, "content": one.content} for one in messages)
    return PromptWork(id, conversation, PromptRow(messages))


def rows(count: int) -> list[PromptWork]:
    return [row(f"p{n}") for n in range(count)]


Say = Callable[[Ask, Seen], str | Failed]
Weigh = Callable[[Choose, Seen], Sequence[float] | Failed]


def speaker(say: Say | None = None, weigh: Weigh | None = None, name: str = "fake") -> FakeSpeaker:
    """A scripted model: it is given each question as it is, and taken apart."""
    said = (lambda ask: say(ask, seen(ask))) if say else (lambda ask: f"reply to {seen(ask).conversation}")
    weighed = (lambda choose: weigh(choose, seen(choose))) if weigh else (lambda choose: (0.0, -1.0))
    return FakeSpeaker(said, weighed, name=name)


def by_kind(**answers: Any) -> Say:
    """A script: an answer, or a function of what is seen, for each kind of question."""

    def say(ask: Ask, question: Seen) -> str | Failed:
        answer = answers[question.kind]
        return answer(question) if callable(answer) else answer

    return say


def stage(**changes: Any) -> ConstitutionalStage:
    """Without filters, and without a judge of revisions, unless asked for."""
    return ConstitutionalStage(**({"filters": [], "judge_revisions": False} | changes))


@dataclass
class Desk:
    """All parts of the stage around models of a test."""

    folder: Path
    stage: ConstitutionalStage
    constitution: Constitution
    generator: FakeSpeaker
    critic: FakeSpeaker | None = None
    judge_speaker: FakeSpeaker | None = None

    def __post_init__(self) -> None:
        self.work = Work(self.folder, ALONE, "test")
        self.questions = Questions(self.constitution)
        self.filters = Filters.of(self.stage, self.constitution.scaffold)
        self.judge = Judge(
            self.questions, self.work, self.judge_speaker or self.generator, seed=self.stage.seed,
            temperature=self.stage.revision_temperature, thought_tokens=self.stage.max_critique_tokens,
        )  # fmt: skip
        parts: dict[str, Any] = {"generator": self.generator, "judge": self.judge, "filters": self.filters}
        self.revising = Revising(self.stage, self.questions, self.work, critic=self.critic or self.generator, **parts)
        self.pairing = Pairing(self.stage, self.questions, self.work, **parts)

    def revise(self, works: Sequence[PromptWork]) -> Sequence[PromptWork]:
        """First replies and all rounds."""
        self.revising.answer(works)
        self.revising.revise(going(works))
        return works


def revised(id: str, *chain: str) -> PromptWork:
    """A prompt with its first reply, and each revision after it that was accepted."""
    work = row(id)
    work.initial, critique = chain[0], Critique("it is wrong", True, True)
    work.rounds = [Round(principle("kind"), before, critique, after) for before, after in pairwise(chain)]
    return work
