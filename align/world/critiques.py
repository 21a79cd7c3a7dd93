"""Self-critique in the village, as conversations of one turn: {"messages"}.

The user's turn holds a request, a reply to it and a question about that reply; the assistant's turn is what is learnt:
a critique, a better reply, or which of two replies is the better one. A bad reply is never an assistant's turn.
The wording is that of conf/constitution/tiny.yaml, and the embedded `tiny-critic` knows no other.
"""

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
ASKED = {"harm": 0.2, "answer": 0.6, "refusal": 0.2}
"""Principle -> how often it is asked about: the hardest one most often."""
"""Harmful replies go against every principle, so that one drawn at random finds them."""

USER = "Asked:"
FLAW = "Flaw:"
NO_FLAW = "No flaw."
# A reply comes right below its request, as in the text that the base model has read: it knows there what is to be said.
CRITIQUE = "{conversation}\n{reply}\n{request}"
REVISION = "{conversation}\n{reply}\n{critique}\n{request}"
COMPARISON = "{conversation}\n{first}\n{second}\n{request}"
CANDIDATES = ("A", "B")

PLAIN_REPLIES = {
    "helpful": {"right": 1.0},
    "unsafe": {"harmful": 0.85, "right": 0.15},
    "look_alike": {"right": 1.0},
}
CRITICISED_REPLIES = {
    "helpful": {"right": 0.4, "wrong": 0.25, "vague": 0.05, "misplaced": 0.15, "slurred": 0.15},
    "unsafe": {"right": 0.4, "harmful": 0.3, "vague": 0.1, "misplaced": 0.1, "slurred": 0.1},
    "look_alike": {"right": 0.4, "wrong": 0.15, "vague": 0.15, "misplaced": 0.15, "slurred": 0.15},
}
FLAWS = {
    "refusal": "it refuses what does no harm.",
    "wrong": "it is not so.",
    "misplaced": "it answers something else.",
    "slurred": "words are missing or said twice.",
}
"""Sort of reply -> what is wrong with it; with harmful and vague ones it is the reason of the right refusal."""
REFUSAL, REASON_END = UNWILLING.split("{reason}")[0], "."
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


def draw_criticised(random: Random, kind: str) -> tuple[Request, str, str]:
    """A request of a kind, a reply to it and the sort of the reply."""
    request = draw_request(random, pick_family(random, kind), held_out=False)
    sort = pick_weighted(random, CRITICISED_REPLIES[kind])
    reply = drawn_reply(random, request, {sort: 1.0})
    return request, reply, sort_of(request, sort, reply)


def critique_row(random: Random, kind: str) -> Row:
    """A reply, and the critique that it deserves."""
    request, reply, sort = draw_criticised(random, kind)
    principle = PRINCIPLES[pick_weighted(random, ASKED)]
    asked = CRITIQUE.format(conversation=transcript(request), reply=reply, request=principle.critique)
    return told(asked, f"{FLAW} {flaw_of(request, sort)}" if sort in principle.flawed else NO_FLAW)


def revision_row(random: Random, kind: str) -> Row:
    """A reply and a critique, which is mistaken where the reply was right, and the right reply."""
    mistaken = random.random() < MISTAKEN_SHARE
    request, reply, sort = draw_criticised(random, kind)
    while (sort == "right") != mistaken:
        request, reply, sort = draw_criticised(random, kind)
    flaw = pick(random, list(FLAWS.values())) if mistaken else flaw_of(request, sort)
    against = [principle for principle in PRINCIPLES.values() if mistaken or sort in principle.flawed]
    asked = REVISION.format(
        conversation=transcript(request),
        reply=reply,
        critique=flaw if random.random() < 0.5 else f"{FLAW} {flaw}",
        request=pick(random, against).revision,
    )
    return told(asked, request.right_reply())


def comparison_row(random: Random, kind: str) -> Row:
    """The right reply and another one, in either order, and which is right."""
    request, reply, sort = draw_criticised(random, kind)
    while sort == "right":
        request, reply, sort = draw_criticised(random, kind)
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
    plain_row: 0.2,
    critique_row: 0.3,
    revision_row: 0.2,
    comparison_row: 0.3,
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
