"""From the records that a format makes to those that a slot wants: pairs of a ranking, the best answer, the prompt."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

from align.config.schema import Ties
from align.data.records import (
    Demonstration,
    Message,
    PreferencePair,
    PromptRow,
    Ranking,
    Rated,
    Record,
    RowRefused,
    TextDocument,
    Unpaired,
)

Records = list[Record | RowRefused]

NO_SCORE = "no_score"
NO_SCORE_HERE = {
    Demonstration: "the answer has no number in 'score'",
    PreferencePair: "the two answers have no scores, such as 'score_chosen' and 'score_rejected'",
    Ranking: "the answers are ranked, without 'scores'",
}

READ_AS: dict[type | None, tuple[type, ...]] = {
    None: (TextDocument, Demonstration, PreferencePair, Ranking, Unpaired, PromptRow),
    TextDocument: (TextDocument,),
    Demonstration: (Demonstration, PreferencePair, Ranking, Unpaired),
    PreferencePair: (PreferencePair, Ranking),
    Ranking: (PreferencePair, Ranking),
    Rated: (Demonstration, PreferencePair, Ranking),
    PromptRow: (PromptRow, Demonstration, PreferencePair, Ranking, Unpaired, TextDocument),
}
"""Record that is wanted (None: any, as it is) -> records it can be made from. A ranking may stay a pair."""


def as_wanted(made: Sequence[Record | RowRefused], wanted: type | None, row: Mapping[str, Any], ties: Ties) -> Records:
    """The records of one row as records of the `wanted` type; refusals among them stay where they are."""
    if wanted is PreferencePair:
        return [pair for record in made for pair in _pairs(record, ties)]
    if wanted is Ranking and ties is Ties.drop:
        return [one for record in made for one in ([record] if isinstance(record, Ranking) else _pairs(record, ties))]
    if wanted is Demonstration:
        return [_or_refused(to_demonstration, record) for record in made]
    if wanted is Rated:
        return [_or_refused(to_rated, record) for record in made]
    if wanted is PromptRow:
        prompts = [record if isinstance(record, RowRefused) else to_prompt(record, row) for record in made]
        return prompts if len(prompts) == 1 else _without_copies(prompts)
    return list(made)


def _or_refused(make: Callable[[Record], Record], record: Record | RowRefused) -> Record | RowRefused:
    if isinstance(record, RowRefused):
        return record
    try:
        return make(record)
    except RowRefused as error:
        return error


def _pairs(record: Record | RowRefused, ties: Ties) -> Records:
    """A pair as itself, a ranking as all its pairs; ties are kept or refused one by one."""
    if isinstance(record, RowRefused):
        return [record]
    if isinstance(record, Ranking):
        pairs = pairs_of(record)
    else:
        assert isinstance(record, PreferencePair)
        pairs = [record]
    if ties is Ties.keep:
        return list(pairs)
    return [RowRefused("tie", "no answer is the better one") if pair.tie else pair for pair in pairs]


def pairs_of(ranking: Ranking) -> list[PreferencePair]:
    """Every two answers of a ranking, the better one chosen; equal ranks are a tie."""
    ranked = sorted(zip(ranking.ranks, range(len(ranking.ranks)), ranking.completions, strict=True))
    scores = ranking.scores
    return [
        PreferencePair(
            ranking.prompt, better, worse, p=0.5 if a == b else 1.0, tie=a == b, tools=ranking.tools,
            scores=(scores[i], scores[j]) if scores else None,
        )
        for (a, i, better), (b, j, worse) in combinations(ranked, 2)
    ]  # fmt: skip


def to_demonstration(record: Record) -> Demonstration:
    """A conversation to be learnt: a prompt with its chosen, best or desirable answer.

    Raises: RowRefused if no answer is the best one, or the answer is undesirable.
    """
    if isinstance(record, PreferencePair):
        if record.tie:
            raise RowRefused("tie", "no answer is the better one")
        return Demonstration((*record.prompt, record.chosen), record.tools)
    if isinstance(record, Ranking):
        return Demonstration((*record.prompt, _best(record)), record.tools)
    if isinstance(record, Unpaired):
        if not record.desirable:
            raise RowRefused("undesirable", "the answer is marked as one not to give")
        return Demonstration((*record.prompt, record.completion), record.tools)
    assert isinstance(record, Demonstration)
    return record


def _best(ranking: Ranking) -> Message:
    first = min(ranking.ranks)
    best = [answer for answer, rank in zip(ranking.completions, ranking.ranks, strict=True) if rank == first]
    if len(best) != 1:
        raise RowRefused("tie", f"{len(best)} answers are equally good")
    return best[0]


def to_rated(record: Record) -> Rated:
    """The answers of a record with their scores; of a conversation, its last turn.

    Raises: RowRefused("no_score") unless every answer has one.
    """
    if isinstance(record, Demonstration) and record.score is not None:
        return Rated(record.messages[:-1], record.messages[-1:], (record.score,), record.tools)
    if isinstance(record, PreferencePair) and record.scores is not None:
        return Rated(record.prompt, (record.chosen, record.rejected), record.scores, record.tools)
    if isinstance(record, Ranking) and record.scores is not None:
        return Rated(record.prompt, record.completions, record.scores, record.tools)
    raise RowRefused(NO_SCORE, NO_SCORE_HERE[type(record)])


def to_prompt(record: Record, row: Mapping[str, Any]) -> PromptRow:
    """The conversation up to the turn to be answered; a demonstration's last assistant turn is left out."""
    if isinstance(record, PromptRow):
        return record
    if isinstance(record, TextDocument):
        return PromptRow((Message("user", record.text),), row)
    if isinstance(record, Demonstration):
        messages = record.messages
        answered = bool(messages) and messages[-1].role == "assistant"
        return PromptRow(messages[:-1] if answered else messages, row, record.tools)
    assert isinstance(record, PreferencePair | Ranking | Unpaired)
    return PromptRow(record.prompt, row, record.tools)


def _without_copies(prompts: Records) -> Records:
    """One prompt where several records of a row share it."""
    kept: Records = []
    seen = set()
    for prompt in prompts:
        if isinstance(prompt, PromptRow):
            if prompt.messages in seen:
                continue
            seen.add(prompt.messages)
        kept.append(prompt)
    return kept
