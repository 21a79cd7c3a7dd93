"""Which replies are compared: samples of a prompt, a revision with the first reply, or replies to opposite prompts."""

from collections.abc import Sequence
from itertools import combinations
from random import Random

from align.config.constitution import Principle
from align.config.schema import ConstitutionalStage, Draw, PairSource
from align.constitutional.drawing import draw_principles, seed_of
from align.constitutional.judging import Judge, Pair
from align.constitutional.prompts import Chat, Questions, chat
from align.constitutional.rows import Asked, Filters, PromptWork, counted
from align.constitutional.work import Work
from align.generation.speakers import Ask, Failed, Said, Speaker

SAMPLED = (PairSource.all, PairSource.random, PairSource.best_worst)


class Pairing:
    """Makes pairs and has them judged. `left_out` counts the replies and pairs that came to nothing, by reason."""

    def __init__(
        self,
        stage: ConstitutionalStage,
        questions: Questions,
        work: Work,
        *,
        generator: Speaker,
        judge: Judge,
        filters: Filters,
    ):
        self.stage, self.questions, self.work = stage, questions, work
        self.generator, self.judge, self.filters = generator, judge, filters
        self.faults: list[tuple[PromptWork, str, str]] = []
        """(prompt, why, which reply) of replies that are compared with nothing."""

    @property
    def left_out(self) -> dict[str, int]:
        return counted(reason for _, reason, _ in self.faults)

    def pairs(self, rows: Sequence[PromptWork]) -> list[Pair]:
        """Judged pairs; one without a verdict has a `fault`."""
        source = self.stage.pairs
        if source is PairSource.none:
            return []
        if source is PairSource.revision_vs_initial:
            made = self._revisions(rows)
        elif source is PairSource.contrast:
            made = self._contrasts(rows)
        else:
            made = self._sampled(rows)
        self.judge.decide("judge", made)
        return self._extremes(made) if source is PairSource.best_worst else made

    def _revisions(self, rows: Sequence[PromptWork]) -> list[Pair]:
        made = []
        for row in rows:
            if row.accepted and row.current == row.initial:
                self.faults.append((row, "revised_back", "last revision"))
            elif row.accepted:
                made.append(Pair(row, row.current, row.initial, "revision_vs_initial", self._principles(row)))
        return made

    def _sampled(self, rows: Sequence[PromptWork]) -> list[Pair]:
        samples = self._samples(rows)
        made = []
        for row in rows:
            found = list(combinations(samples[row.id], 2))
            if self.stage.pairs is PairSource.random and found:
                found = [found[int(Random(seed_of(self.stage.seed, "pair", row.id)).random() * len(found))]]
            made += [Pair(row, one, other, self.stage.pairs.value, self._principles(row)) for one, other in found]
        return made

    def _samples(self, rows: Sequence[PromptWork]) -> dict[str, list[str]]:
        """Different sound replies to each prompt."""
        temperatures = self.stage.temperatures
        places = [(row, number) for row in rows for number in range(self.stage.samples)]
        asks = [
            Ask(
                row.id, row.conversation, seed_of(self.stage.seed, "sample", row.id, number),
                temperatures[number % len(temperatures)], self.stage.max_new_tokens,
            )
            for row, number in places
        ]  # fmt: skip
        found: dict[str, list[str]] = {row.id: [] for row in rows}
        answers = self.work.say("samples", self.generator, asks)
        for (row, number), ask, said in zip(places, asks, answers, strict=True):
            text = self._sound(row, "samples", ask, said, f"sample {number + 1}")
            if text is not None and text in found[row.id]:
                self.faults.append((row, "sample_repeated", f"sample {number + 1}"))
            elif text is not None:
                found[row.id].append(text)
        return found

    def _contrasts(self, rows: Sequence[PromptWork]) -> list[Pair]:
        """Replies under the positive and the negative system prompt of a principle that has both."""
        usable = [one for one in self.questions.constitution.principles if one.positive]
        asks, principles = [], {}
        for row in rows:
            seed = seed_of(self.stage.seed, "contrast", row.id)
            [principle] = draw_principles(usable, 1, Draw.with_replacement, seed)
            principles[row.id] = principle
            for side in (principle.positive, principle.negative):
                asks.append(
                    Ask(
                        row.id, _under(side, row.conversation), seed_of(seed, side), self.stage.temperature,
                        self.stage.max_new_tokens,
                    )
                )  # fmt: skip
        answers = zip(asks, self.work.say("contrast", self.generator, asks), strict=True)
        made = []
        for row in rows:
            sides = ("positive reply", "negative reply")
            texts = [self._sound(row, "contrast", *next(answers), side) for side in sides]
            if None in texts:
                continue
            if texts[0] == texts[1]:
                self.faults.append((row, "contrast_equal", "both replies"))
                continue
            made.append(Pair(row, *texts, f"contrast {principles[row.id].id}", (principles[row.id],)))
        return made

    def _sound(self, row: PromptWork, step: str, ask: Ask, said: Said | Failed, which: str) -> str | None:
        """The text of a reply that can be compared; one that cannot is counted."""
        if isinstance(said, Failed):
            self.faults.append((row, f"reply_{said.reason}", which))
            return None
        row.asked.append(Asked(step, "generator", ask, said))
        fault = self.filters.fault(row.conversation, said.text, finished=said.finished)
        if fault is not None:
            self.faults.append((row, f"reply_{fault}", which))
            return None
        return said.text

    def _principles(self, row: PromptWork) -> tuple[Principle, ...]:
        """The principles that judge a prompt's pairs: the same for all of them."""
        every = self.questions.constitution.principles
        count = min(self.stage.judge_principles, len(every))
        return tuple(draw_principles(every, count, Draw.without_replacement, seed_of(self.stage.seed, "judge", row.id)))

    def _extremes(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Of each prompt's pairs the one of the reply that wins most against the one that wins least."""
        by_row: dict[str, list[Pair]] = {}
        for pair in pairs:
            by_row.setdefault(pair.row.id, []).append(pair)
        found = [_best_and_worst(listed) for listed in by_row.values()]
        kept = set(map(id, found))
        for pair in pairs:
            if id(pair) not in kept:
                # The trace lists the questions of pairs that are kept with the pair, all others with the prompt.
                pair.row.asked += pair.asked
        return found


def _best_and_worst(pairs: Sequence[Pair]) -> Pair:
    """Raises nothing: a prompt with a pair without verdict gives that pair, and with it the reason."""
    if unjudged := next((pair for pair in pairs if pair.verdict is None), None):
        return unjudged
    wins: dict[str, float] = {}
    for pair in pairs:
        assert pair.verdict is not None
        wins[pair.first] = wins.get(pair.first, 0.0) + pair.verdict.p
        wins[pair.second] = wins.get(pair.second, 0.0) + 1 - pair.verdict.p
    # Ties go to the one that was sampled first.
    best, worst = max(wins, key=lambda text: wins[text]), min(wins, key=lambda text: wins[text])
    if best == worst:
        return pairs[0]
    return next(pair for pair in pairs if {pair.first, pair.second} == {best, worst})


def _under(system: str, conversation: Chat) -> Chat:
    """A conversation below a system prompt; one that has its own keeps it behind."""
    first, *rest = conversation
    if first["role"] != "system":
        return chat(("system", system)) + conversation
    return chat(("system", f"{system}\n\n{first['content']}")) + tuple(rest)
