"""The supervised phase: a first reply, then rounds of critique and revision by principles that are drawn for it.

Source: Bai et al. 2022, arXiv:2212.08073, section 3. Unlike there, a critique may find no flaw, which ends the rounds,
and a revision is looked at before it takes the place of the reply that it is to improve.
"""

from collections.abc import Iterator, Sequence

from align.config.constitution import Principle
from align.config.schema import ConstitutionalStage
from align.constitutional.drawing import draw_principles, seed_of
from align.constitutional.judging import Judge, Pair
from align.constitutional.prompts import Chat, Questions
from align.constitutional.rows import Asked, Filters, PromptWork, Round, going
from align.constitutional.work import Work
from align.generation.speakers import Ask, Failed, Said, Speaker

BETTER = 0.5
"""The probability above which a revision is better than what it revises."""


class Revising:
    """Takes prompts through first replies and rounds, a step for all of them at a time."""

    def __init__(
        self,
        stage: ConstitutionalStage,
        questions: Questions,
        work: Work,
        *,
        generator: Speaker,
        critic: Speaker,
        judge: Judge,
        filters: Filters,
    ):
        self.stage, self.questions, self.work = stage, questions, work
        self.generator, self.critic, self.judge, self.filters = generator, critic, judge, filters

    def answer(self, rows: Sequence[PromptWork]) -> None:
        """First replies to the prompts that are going; one whose reply has a fault is left out."""
        rows = going(rows)
        asks = [self._ask(row, "initial", row.conversation, self.stage.max_new_tokens) for row in rows]
        for row, said in self._said("initial", "generator", rows, asks):
            if isinstance(said, Failed):
                row.drop(f"initial_{said.reason}", said.detail)
                continue
            row.initial = said.text
            fault = self.filters.fault(row.conversation, said.text, finished=said.finished)
            if fault is not None:
                row.drop(f"initial_{fault}")

    def revise(self, rows: Sequence[PromptWork]) -> None:
        """All rounds of the prompts that are going."""
        every, count = self.questions.constitution.principles, self.stage.rounds
        drawn = {row.id: draw_principles(every, count, self.stage.draw, self._seed("draw", row)) for row in rows}
        for number in range(count):
            left = [row for row in going(rows) if not row.ended]
            self._criticise(left, [drawn[row.id][number] for row in left], number)
            flawed = [row for row in left if row.rounds[-1].fault is None and row.rounds[-1].critique.flaw]
            self._revise(flawed, number)
            if self.stage.judge_revisions:
                self._judge([row for row in flawed if row.rounds[-1].accepted], number)

    def _criticise(self, rows: Sequence[PromptWork], principles: Sequence[Principle], number: int) -> None:
        step = f"critique_{number + 1}"
        chats = [
            self.questions.critique(row.conversation, row.current, principle)
            for row, principle in zip(rows, principles, strict=True)
        ]
        asks = [
            self._ask(row, step, chat, self.stage.max_critique_tokens) for row, chat in zip(rows, chats, strict=True)
        ]
        answers = self._said(step, "critic", rows, asks)
        for (row, said), principle in zip(answers, principles, strict=True):
            failed = isinstance(said, Failed)
            now = Round(principle, row.current, self.questions.read_critique("" if failed else said.text))
            # The reply as it stands is as good as it was: only this round is lost.
            now.fault = f"critique_{said.reason}" if failed else None
            row.rounds.append(now)

    def _revise(self, rows: Sequence[PromptWork], number: int) -> None:
        step, asks = f"revision_{number + 1}", []
        for row in rows:
            now = row.rounds[-1]
            chat = self.questions.revision(row.conversation, now.reply, now.critique.text, now.principle)
            asks.append(self._ask(row, step, chat, self.stage.max_new_tokens))
        for row, said in self._said(step, "generator", rows, asks):
            now = row.rounds[-1]
            if isinstance(said, Failed):
                now.fault = f"revision_{said.reason}"
                continue
            now.revision = said.text
            now.fault = self.filters.fault(row.conversation, said.text, finished=said.finished, initial=now.reply)

    def _judge(self, rows: Sequence[PromptWork], number: int) -> None:
        """Leave out revisions that are no better by the principle that asked for them."""
        pairs = [
            Pair(row, row.rounds[-1].revision or "", row.rounds[-1].reply, "round", (row.rounds[-1].principle,))
            for row in rows
        ]
        self.judge.decide(f"judge_revision_{number + 1}", pairs)
        for row, pair in zip(rows, pairs, strict=True):
            now = row.rounds[-1]
            now.verdict = pair.verdict
            row.asked += pair.asked
            if pair.fault is not None:
                now.fault = pair.fault
            elif pair.verdict is not None and pair.verdict.p <= BETTER:
                now.fault = "judged_worse"

    def _said(
        self, step: str, role: str, rows: Sequence[PromptWork], asks: Sequence[Ask]
    ) -> Iterator[tuple[PromptWork, Said | Failed]]:
        """Rows with their answers, which are kept for the trace."""
        speaker = self.critic if role == "critic" else self.generator
        for row, ask, said in zip(rows, asks, self.work.say(step, speaker, asks), strict=True):
            if not isinstance(said, Failed):
                row.asked.append(Asked(step, role, ask, said))
            yield row, said

    def _ask(self, row: PromptWork, step: str, question: Chat, limit: int) -> Ask:
        temperature = self.stage.temperature if step == "initial" else self.stage.revision_temperature
        return Ask(row.id, question, self._seed(step, row), temperature, limit)

    def _seed(self, step: str, row: PromptWork) -> int:
        return seed_of(self.stage.seed, step, row.id)
