"""Whether a model has begun to say the same thing, to loop, or to fall silent: by words, against the base's replies.

Words are those of `align.data.reply_filters.words`: lower-cased, a Chinese or Japanese character each. Figures of
diversity depend on how much text there is, so `flags` compares each pair of replies cut to equally many words.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt

from align.data.reply_filters import words

OPENING_WORDS = 5
SENTENCE_WORDS = 4
"""A sentence with fewer is no boilerplate."""
LOOP_GRAM = 4
LISTED = 5
"""How many of the most frequent openings and sentences are told."""
ENOUGH_REPLIES = 20
"""With fewer replies shares of them say nothing."""

Words = Sequence[str]


@dataclass(frozen=True)
class Often:
    """A text that several replies have."""

    text: str
    replies: int
    share: float


@dataclass(frozen=True)
class Diversity:
    """Replies of one model to a set of prompts."""

    replies: int
    words: float
    """Mean of a reply."""
    distinct: tuple[float | None, float | None, float | None]
    """Different n-grams over all n-grams of all replies, for n = 1, 2, 3; None where no reply has so many words.
    Source: Li et al. 2016, arXiv:1510.03055, section 5.2."""
    repeated_in_reply: float | None
    """Mean over replies of 1 - different 4-grams / 4-grams. Source: Welleck et al. 2019, arXiv:1908.04319, eq. 8."""
    openings: tuple[Often, ...]
    """The most frequent first five words."""
    sentences: tuple[Often, ...]
    """The most frequent whole sentences, counted once a reply."""
    self_similarity: float | None
    """Mean cosine of two replies' sets of word pairs: 0 nothing shared, 1 all the same. None for fewer than two."""
    empty: float
    """Share of replies without a letter or digit."""
    at_cap: float | None
    """Share of replies that the limit of tokens ended; None if that is not known."""


def diversity(replies: Sequence[str], finished: Sequence[bool] | None = None) -> Diversity | None:
    """The figures of one model's replies; None of none. finished: False where the limit of tokens ended a reply."""
    if not replies:
        return None
    if finished is not None and len(finished) != len(replies):
        raise ValueError(f"{len(finished)} marks of an end for {len(replies)} replies")
    listed = [words(reply) for reply in replies]
    looped = [1 - len(set(grams)) / len(grams) for grams in (_grams(one, LOOP_GRAM) for one in listed) if grams]
    openings = (" ".join(one[:OPENING_WORDS]) for one in listed if len(one) >= OPENING_WORDS)
    sentences = (sentence for reply in replies for sentence in _sentences(reply))
    count = len(replies)
    return Diversity(
        count,
        sum(map(len, listed)) / count,
        tuple(distinct(listed, n) for n in (1, 2, 3)),
        sum(looped) / len(looped) if looped else None,
        _most(openings, count),
        _most(sentences, count),
        self_similarity(listed),
        sum(not one for one in listed) / count,
        None if finished is None else sum(not end for end in finished) / count,
    )


def distinct(listed: Sequence[Words], n: int) -> float | None:
    """Different n-grams over all n-grams; None where there is none."""
    counted = Counter(gram for one in listed for gram in _grams(one, n))
    return len(counted) / counted.total() if counted else None


def self_similarity(listed: Sequence[Words]) -> float | None:
    """Mean cosine over pairs of replies that have a word pair, of the sets of their word pairs.

    The sum over pairs is that of one long vector with itself, so any number of replies is done in one pass.
    """
    together: Counter[tuple[str, ...]] = Counter()
    count = 0
    for grams in (set(_grams(one, 2)) for one in listed):
        if grams:
            count += 1
            for gram in grams:
                together[gram] += 1 / sqrt(len(grams))
    if count < 2:
        return None
    return max(sum(weight**2 for weight in together.values()) - count, 0.0) / (count * (count - 1))


@dataclass(frozen=True)
class Flag:
    """A sign of collapse: its name, and a sentence with both models' figures."""

    name: str
    sentence: str


# Each is far outside what two samples of one model differ by (measured in tests on published replies).
DISTINCT_FALL = 0.8
"""Of the base's distinct-2, at equally many words."""
LOOP_RISE = 0.05
OFTEN_SHARE, OFTEN_TIMES = 0.1, 2.0
"""Boilerplate: one reply in ten has it, and at least twice as many as have the base's own most frequent."""
SIMILARITY_RISE, SIMILARITY_TIMES = 0.02, 2.0
EMPTY_RISE = 0.02
CAP_RISE = 0.1


def flags(
    replies: Sequence[str],
    base: Sequence[str],
    finished: Sequence[bool] | None = None,
    base_finished: Sequence[bool] | None = None,
) -> list[Flag]:
    """What has become worse than in the base's replies to the same prompts, in the same order.

    Raises: ValueError if there are not as many replies as the base's, or fewer than ENOUGH_REPLIES.
    """
    if len(replies) != len(base) or len(base) < ENOUGH_REPLIES:
        raise ValueError(f"{len(replies)} replies against {len(base)} of the base; {ENOUGH_REPLIES} each are needed")
    now, before = diversity(replies, finished), diversity(base, base_finished)
    found = [
        *_less_distinct(replies, base),
        *_often("same_opening", "open with", now.openings, before.openings),
        *_often("same_sentence", "say", now.sentences, before.sentences),
        *_rise("loops", "4-grams said before in the same reply", now.repeated_in_reply, before.repeated_in_reply,
               LOOP_RISE),
        *_rise("empty", "empty replies", now.empty, before.empty, EMPTY_RISE),
        *_rise("at_cap", "replies ended by the limit of tokens", now.at_cap, before.at_cap, CAP_RISE),
    ]  # fmt: skip
    return found


def _less_distinct(replies: Sequence[str], base: Sequence[str]) -> list[Flag]:
    pairs = [(words(one), words(other)) for one, other in zip(replies, base, strict=True)]
    cut = [(one[: min(len(one), len(other))], other[: min(len(one), len(other))]) for one, other in pairs]
    ours, theirs = [one for one, _ in cut], [other for _, other in cut]
    found = []
    now, before = distinct(ours, 2), distinct(theirs, 2)
    if now is not None and before is not None and now < DISTINCT_FALL * before:
        found.append(Flag("less_distinct", f"distinct-2 {now:.2f}, base {before:.2f} (at equally many words)"))
    now, before = self_similarity(ours), self_similarity(theirs)
    if now is not None and before is not None and now > max(SIMILARITY_TIMES * before, before + SIMILARITY_RISE):
        found.append(Flag("self_similar", f"replies resemble each other by {now:.2f}, base {before:.2f}"))
    return found


def _often(name: str, verb: str, now: tuple[Often, ...], before: tuple[Often, ...]) -> list[Flag]:
    usual = before[0].share if before else 0.0
    if not now or now[0].share < OFTEN_SHARE or now[0].share < OFTEN_TIMES * usual:
        return []
    return [Flag(name, f'{now[0].share:.0%} of replies {verb} "{now[0].text}", base {usual:.0%} of its own')]


def _rise(name: str, what: str, now: float | None, before: float | None, rise: float) -> list[Flag]:
    # Shares of a few replies are not exact in floats: a rise of just the limit is none.
    if now is None or before is None or now - before <= rise + 1e-9:
        return []
    return [Flag(name, f"{what} {now:.0%}, base {before:.0%}")]


def _grams(listed: Words, n: int) -> list[tuple[str, ...]]:
    return list(zip(*(listed[place:] for place in range(n)), strict=False))


def _sentences(reply: str) -> set[str]:
    parts = re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n", reply)
    return {" ".join(said) for part in parts if len(said := words(part)) >= SENTENCE_WORDS}


def _most(texts: Iterable[str], replies: int) -> tuple[Often, ...]:
    """The most frequent texts that more than one reply has."""
    ranked = sorted(Counter(texts).items(), key=lambda item: (-item[1], item[0]))
    return tuple(Often(text, count, count / replies) for text, count in ranked[:LISTED] if count > 1)
