"""A prompt on its way through the stage, and all that was said about it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from align.config.constitution import Principle, Scaffold
from align.config.schema import ConstitutionalStage
from align.constitutional.prompts import Chat, Critique
from align.constitutional.verdicts import Verdict
from align.data.records import PromptRow
from align.data.reply_filters import FILTERS, Judged, Limits
from align.generation.speakers import Ask, Choose, Chosen, Said

EVERY_FILTER = "all"


@dataclass(frozen=True)
class Asked:
    """A question that was answered, for the trace."""

    step: str
    role: str
    """generator, critic or judge."""
    ask: Ask | Choose
    answer: Said | Chosen


@dataclass
class Round:
    """A critique and what became of it."""

    principle: Principle
    reply: str
    """What was criticised."""
    critique: Critique
    revision: str | None = None
    fault: str | None = None
    """Why the revision is left out: a filter's name, `judged_worse` or why there is none. None: it is accepted."""
    verdict: Verdict | None = None
    """Of the revision against the reply before it."""

    @property
    def accepted(self) -> bool:
        return self.revision is not None and self.fault is None

    @property
    def criticised(self) -> bool:
        """Whether there was a critique at all."""
        return self.fault is None or not self.fault.startswith("critique_")


@dataclass
class PromptWork:
    """One prompt. What has a `fault` goes no further."""

    id: str
    conversation: Chat
    row: PromptRow
    initial: str = ""
    fault: str | None = None
    """Why the prompt is left out, such as `initial_empty`."""
    detail: str = ""
    rounds: list[Round] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)

    @property
    def accepted(self) -> list[Round]:
        return [one for one in self.rounds if one.accepted]

    @property
    def current(self) -> str:
        """The newest reply that was accepted."""
        return self.accepted[-1].revision if self.accepted else self.initial  # type: ignore[return-value]

    @property
    def ended(self) -> bool:
        """Whether a critique found nothing more."""
        return bool(self.rounds) and not self.rounds[-1].critique.flaw

    def drop(self, fault: str, detail: str = "") -> None:
        self.fault, self.detail = fault, detail


@dataclass(frozen=True)
class Filters:
    """The chosen filters, with the limits and wording that they compare with."""

    names: tuple[str, ...]
    limits: Limits

    @classmethod
    def of(cls, stage: ConstitutionalStage, scaffold: Scaffold) -> "Filters":
        names = tuple(FILTERS) if EVERY_FILTER in stage.filters else tuple(stage.filters)
        return cls(names, Limits(scaffold=scaffold))

    def fault(self, conversation: Chat, reply: str, *, finished: bool, initial: str = "") -> str | None:
        """The first fault of a reply that is filtered for."""
        *before, last = conversation
        judged = Judged(
            prompt=last["content"],
            initial=initial,
            reply=reply,
            finished=finished,
            conversation="\n".join(turn["content"] for turn in before),
        )
        return next((name for name in FILTERS if name in self.names and FILTERS[name](judged, self.limits)), None)


def going(rows: Sequence[PromptWork]) -> list[PromptWork]:
    """Prompts that are not left out."""
    return [row for row in rows if row.fault is None]


def counted(values: Any) -> dict[str, int]:
    """How often each comes, most frequent first."""
    return dict(Counter(values).most_common())
