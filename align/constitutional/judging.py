"""The AI-feedback phase: pairs of replies, judged by several principles in both orders.

Source: Bai et al. 2022, arXiv:2212.08073, section 4; both orders: Lee et al. 2023, arXiv:2309.00267.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from align.config.constitution import Principle
from align.constitutional.drawing import seed_of
from align.constitutional.prompts import Chat, Questions
from align.constitutional.rows import Asked, PromptWork
from align.constitutional.verdicts import Order, Verdict, first_slot
from align.constitutional.work import Work
from align.generation.speakers import Ask, Choose, Failed, Speaker


@dataclass
class Pair:
    """Two replies to one prompt."""

    row: PromptWork
    first: str
    second: str
    source: str
    """Where the two come from, for the trace."""
    principles: tuple[Principle, ...]
    verdict: Verdict | None = None
    fault: str | None = None
    """Why there is no verdict. Nothing takes its place."""
    asked: list[Asked] = field(default_factory=list)
    """For the trace: the questions of each principle, as given and swapped, thoughts before choices."""


@dataclass(frozen=True)
class _Question:
    """One order of one principle of one pair."""

    pair: Pair
    principle: Principle
    swapped: bool

    @property
    def replies(self) -> tuple[str, str]:
        pair = self.pair
        return (pair.second, pair.first) if self.swapped else (pair.first, pair.second)


class Judge:
    """Decides pairs by the log-probabilities of the whole candidate answers."""

    def __init__(
        self, questions: Questions, work: Work, speaker: Speaker, *, seed: int, temperature: float, thought_tokens: int
    ):
        """temperature, thought_tokens: of chains of thought, where the constitution asks for them."""
        self.questions, self.work, self.speaker = questions, work, speaker
        self.seed, self.temperature, self.thought_tokens = seed, temperature, thought_tokens
        self.rules = questions.constitution.judge

    def decide(self, step: str, pairs: Sequence[Pair]) -> None:
        """Give each pair its verdict, or the reason why it has none. Call it on every rank with the same pairs."""
        asked = [
            _Question(pair, one, swapped) for pair in pairs for one in pair.principles for swapped in (False, True)
        ]
        chats = self._chats(step, asked)
        kept = [(one, chat) for one, chat in zip(asked, chats, strict=True) if chat is not None]
        chooses = [
            Choose(one.pair.row.id, chat, self.questions.scaffold.candidates, self._seed(step, one))
            for one, chat in kept
        ]
        found: dict[tuple[int, str, bool], float] = {}
        chosen_ones = self.work.choose(step, self.speaker, chooses)
        for (one, _), choose, chosen in zip(kept, chooses, chosen_ones, strict=True):
            if isinstance(chosen, Failed):
                one.pair.fault = one.pair.fault or f"verdict_{chosen.reason}"
                continue
            one.pair.asked.append(Asked(step, "judge", choose, chosen))
            clamp = self.rules.clamp if self.rules.chain_of_thought else None
            found[id(one.pair), one.principle.id, one.swapped] = first_slot(chosen.logps, clamp)
        for pair in pairs:
            if pair.fault is None:
                pair.verdict = Verdict(
                    tuple(
                        Order(one.id, found[id(pair), one.id, False], found[id(pair), one.id, True])
                        for one in pair.principles
                    )
                )

    def _chats(self, step: str, asked: Sequence[_Question]) -> list[Chat | None]:
        """What is asked at last: the comparison, or what follows a chain of thought; None where there is no thought."""
        if not self.rules.chain_of_thought:
            return [self.questions.comparison(one.pair.row.conversation, *one.replies, one.principle) for one in asked]
        first = [self.questions.thought(one.pair.row.conversation, *one.replies, one.principle) for one in asked]
        asks = [
            Ask(one.pair.row.id, chat, self._seed(f"{step}_thought", one), self.temperature, self.thought_tokens)
            for one, chat in zip(asked, first, strict=True)
        ]
        chats: list[Chat | None] = []
        said_ones = self.work.say(f"{step}_thought", self.speaker, asks)
        for one, ask, said in zip(asked, asks, said_ones, strict=True):
            reason = said.reason if isinstance(said, Failed) else "" if said.text else "empty"
            if reason:
                one.pair.fault = one.pair.fault or f"thought_{reason}"
                chats.append(None)
            else:
                one.pair.asked.append(Asked(f"{step}_thought", "judge", ask, said))
                chats.append(self.questions.verdict(ask.messages, said.text))
        return chats

    def _seed(self, step: str, one: _Question) -> int:
        return seed_of(self.seed, step, one.pair.row.id, one.principle.id, one.swapped, *one.replies)
