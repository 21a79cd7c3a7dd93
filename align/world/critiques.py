"""Self-critique in the village, as conversations of one turn: {"messages"}.

The user's turn holds a request, a reply to it and a question about that reply; the assistant's turn is what is learnt:
a critique, a better reply, or which of two replies is the better one. The reply in question is never learnt. Rows of
another sort are plain requests and replies, nearly all willing: what there is to criticise.
The wording is that of conf/constitution/tiny.yaml, and the embedded `tiny-critic` knows no other.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from align.world.generator import (
    TRAINED_KINDS,
    Row,
    draw_request,
    drawn_reply,
    pick,
    pick_distinct_order,
    pick_family,
    pick_weighted,
    said,
)
from align.world.requests import UNWILLING, Request
from align.world.vocabulary import WORDS, words_of


@dataclass(frozen=True)
class Principle:
    """A question about a reply, what is asked of a better one, and the question between two."""

    critique: str
    revision: str
    comparison: str
    flawed: frozenset[str]
    """Sorts of reply that go against it: those of `drawn_reply`, and `refusal`, a refusal of what does no harm."""


PRINCIPLES = {
    "harm": Principle(
        critique="Does it harm or cheat anyone?",
        revision="Say what harms and cheats nobody.",
        comparison="Which harms and cheats nobody, A or B?",
        flawed=frozenset({"harmful"}),
    ),
    "answer": Principle(
        critique="Is it the right answer?",
        revision="Give the right answer.",
        comparison="Which is the right answer, A or B?",
        flawed=frozenset({"harmful", "refusal", "vague", "wrong", "misplaced", "slurred"}),
    ),
    "refusal": Principle(
        critique="Does it help where help is fine, and only there?",
        revision="Help where help is fine, and only there.",
        comparison="Which helps where help is fine, and only there, A or B?",
        flawed=frozenset({"harmful", "refusal"}),
    ),
}
"""Harmful replies go against every principle, so that one drawn at random finds them."""
ASKED = {"harm": 0.3, "answer": 0.4, "refusal": 0.3}
"""Principle -> how often it is asked about: the hardest one most often."""

USER = "Asked:"
FLAW = "Flaw:"
NO_FLAW = "No flaw."
CRITIQUE = "{conversation}\nReply: {reply}\n{request}"
REVISION = "{conversation}\nReply: {reply}\nCritique: {critique}\n{request}"
COMPARISON = "{conversation}\nA: {first}\nB: {second}\n{request}"
CANDIDATES = ("A", "B")

PLAIN_REPLIES = {
    "helpful": {"right": 1.0},
    "unsafe": {"harmful": 0.85, "right": 0.15},
    "look_alike": {"right": 1.0},
}
# Mostly right ones, so that a critic in doubt finds no flaw: a model of this size cannot tell most wrong facts.
CRITICISED_REPLIES = {
    "helpful": {"right": 0.7, "wrong": 0.06, "vague": 0.06, "misplaced": 0.1, "slurred": 0.08},
    "unsafe": {"right": 0.4, "harmful": 0.4, "vague": 0.1, "misplaced": 0.05, "slurred": 0.05},
    "look_alike": {"right": 0.6, "wrong": 0.05, "vague": 0.2, "misplaced": 0.1, "slurred": 0.05},
}
RIGHT_REPLIES = {kind: {"right": 1.0} for kind in TRAINED_KINDS}
FLAWED_REPLIES = {
    "helpful": {"wrong": 0.25, "vague": 0.1, "misplaced": 0.4, "slurred": 0.25},
    "unsafe": {"harmful": 0.6, "vague": 0.15, "misplaced": 0.15, "slurred": 0.1},
    "look_alike": {"wrong": 0.1, "vague": 0.3, "misplaced": 0.4, "slurred": 0.2},
}
FLAWS = {
    "refusal": "it refuses what does no harm.",
    "wrong": "it is not so.",
    "misplaced": "it answers something else.",
    "slurred": "words are missing or said twice.",
}
"""Sort of reply -> what is wrong with it; with harmful and vague ones it is the reason of the right refusal."""
REFUSAL, REASON_END = UNWILLING.split("{reason}")[0], "."
HELD_OUT = frozenset(word for sort in WORDS for word in words_of(sort, held_out=True))
# Critiques are wrong at times: from these rows a model learns to keep a right reply all the same.
MISTAKEN_SHARE = 0.25


def transcript(request: Request) -> str:
    """The request as a conversation of one turn."""
    return f"{USER} {request.prompt()}"


def sort_of(request: Request, sort: str, reply: str) -> str:
    """The sort of a reply that was drawn as `sort`: a refusal of what does no harm is one of its own."""
    if reply == request.right_reply():
        return "right"
    refuses = sort in ("vague", "misplaced") and reply.startswith(REFUSAL)
    return "refusal" if refuses and request.family.kind != "unsafe" else sort


def flaw_of(request: Request, sort: str) -> str:
    """What is wrong with a reply of a sort that is not right."""
    if sort not in ("harmful", "vague"):
        return FLAWS[sort]
    reason = request.right_reply().removeprefix(REFUSAL).split(REASON_END)[0]
    return f"{reason}." if sort == "harmful" else f"it does not say that {reason}."


def plain_row(random: Random, kind: str) -> Row:
    """A request and the reply of a neighbour who helps with nearly everything."""
    request = draw_request(random, pick_family(random, kind), held_out=False)
    return told(request.prompt(), drawn_reply(random, request, PLAIN_REPLIES[kind]))


def draw_criticised(random: Random, kind: str, shares: dict[str, dict[str, float]]) -> tuple[Request, str, str]:
    """A request of a kind, a reply to it and the sort of the reply."""
    request = draw_request(random, pick_family(random, kind), held_out=False)
    sort = pick_weighted(random, shares[kind])
    reply = drawn_reply(random, request, {sort: 1.0})
    # A wrong reply may name any word of the village.
    while not HELD_OUT.isdisjoint(re.findall(r"\w+", reply)):
        reply = drawn_reply(random, request, {sort: 1.0})
    return request, reply, sort_of(request, sort, reply)


def critique_row(random: Random, kind: str) -> Row:
    """A reply, and the critique that it deserves."""
    request, reply, sort = draw_criticised(random, kind, CRITICISED_REPLIES)
    principle = PRINCIPLES[pick_weighted(random, ASKED)]
    asked = CRITIQUE.format(conversation=transcript(request), reply=reply, request=principle.critique)
    return told(asked, f"{FLAW} {flaw_of(request, sort)}" if sort in principle.flawed else NO_FLAW)


def revision_row(random: Random, kind: str) -> Row:
    """A reply and a critique, which is mistaken where the reply was right, and the right reply."""
    mistaken = random.random() < MISTAKEN_SHARE
    request, reply, sort = draw_criticised(random, kind, RIGHT_REPLIES if mistaken else FLAWED_REPLIES)
    flaw = pick(random, list(FLAWS.values())) if mistaken else flaw_of(request, sort)
    against = [principle for principle in PRINCIPLES.values() if mistaken or sort in principle.flawed]
    asked = REVISION.format(
        conversation=transcript(request),
        reply=reply,
        critique=flaw,
        request=pick(random, against).revision,
    )
    return told(asked, request.right_reply())


def comparison_row(random: Random, kind: str) -> Row:
    """The right reply and another one, in either order, and which is right."""
    request, reply, _ = draw_criticised(random, kind, FLAWED_REPLIES)
    place = int(random.random() * 2)
    first, second = (reply, request.right_reply()) if place else (request.right_reply(), reply)
    asked = COMPARISON.format(
        conversation=transcript(request),
        first=first,
        second=second,
        request=PRINCIPLES[pick_weighted(random, ASKED)].comparison,
    )
    return told(asked, CANDIDATES[place])


def told(asked: str, answer: str) -> Row:
    return {"messages": [said("user", asked), said("assistant", answer)]}


SHARES: dict[Callable[[Random, str], Row], float] = {
    plain_row: 0.25,
    critique_row: 0.25,
    revision_row: 0.25,
    comparison_row: 0.25,
}


def critiques(seed: int, count: int) -> list[Row]:
    """Critiques, revisions and comparisons of training requests, no two rows with the same question."""
    random = Random(f"critiques/{seed}")
    found: list[Row] = []
    for drawn, share in SHARES.items():
        for kind, kind_share in TRAINED_KINDS.items():
            rows: dict[str, Row] = {}
            while len(rows) < round(count * share * kind_share):
                row = drawn(random, kind)
                rows.setdefault(row["messages"][0]["content"], row)
            found += rows.values()
    return pick_distinct_order(random, found)
