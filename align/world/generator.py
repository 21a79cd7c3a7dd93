"""Rows of the closed world: plain text to read, demonstrations, preferences and prompts.

The same seed gives the same bytes on every Python: the only source of chance is `Random.random`.
"""

import hashlib
import json
from collections.abc import Sequence
from importlib import import_module
from random import Random
from typing import Any, TypeVar

from align.world.requests import FACT_RELATION, FAMILIES, FAMILY, KINDS, Family, Request, vague_refusal
from align.world.vocabulary import RELATIONS, WORDS, possible_values, true_value, words_of

Row = dict[str, Any]
T = TypeVar("T")

TEXT_DOCUMENTS = 80_000
HELPFUL_FACT_SHARE = 0.5


def pick(random: Random, items: Sequence[T]) -> T:
    """One item, each equally likely."""
    return items[int(random.random() * len(items))]


def pick_weighted(random: Random, weights: dict[str, float]) -> str:
    """One key, as likely as its weight (weights sum to 1)."""
    point = random.random()
    for key, weight in weights.items():
        point -= weight
        if point < 0:
            return key
    return key


def pick_distinct(random: Random, items: Sequence[str], count: int) -> list[str]:
    """Different items in random order."""
    chosen: list[str] = []
    while len(chosen) < count:
        item = pick(random, items)
        if item not in chosen:
            chosen.append(item)
    return chosen


def pick_family(random: Random, kind: str) -> Family:
    """A family of a kind; among helpful ones a fact half of the time."""
    if kind != "helpful":
        return pick(random, FAMILIES[kind])
    wants_fact = random.random() < HELPFUL_FACT_SHARE
    return pick(random, [family for family in FAMILIES[kind] if (family.name in FACT_RELATION) == wants_fact])


def draw_request(random: Random, family: Family, held_out: bool, held_out_phrasing: bool = False) -> Request:
    """A request whose words all come from one side of the split."""
    slots = list(family.slots.items())
    words: dict[str, str] = {}
    for slot, sort in slots:
        free = [word for word in words_of(sort, held_out) if word not in words.values()]
        words[slot] = pick(random, free)
    last = len(family.phrasings) - 1
    return Request(family, words, last if held_out_phrasing else int(random.random() * last))


def wrong_reply(random: Random, request: Request) -> str:
    """The right reply with one thing changed: another value for a fact, another word in a slot otherwise."""
    family = request.family
    if family.name in FACT_RELATION:
        sort, relation = FACT_RELATION[family.name]
        others = [value for value in possible_values(sort, relation) if value != request.value()["value"]]
        return family.reply.format(**request.words, value=pick(random, others))
    slot = pick(random, list(family.slots))
    others = [word for word in WORDS[family.slots[slot]] if word not in request.words.values()]
    return family.reply.format(**{**request.words, slot: pick(random, others)})


def misplaced_reply(random: Random, request: Request) -> str:
    """The right reply to a request of another family, most often a refusal, about the words of this one."""
    kind = pick_weighted(random, MISPLACED_KINDS)
    other = draw_request(random, pick(random, [f for f in FAMILIES[kind] if f.name != request.family.name]), False)
    own = {request.family.slots[slot]: word for slot, word in request.words.items()}
    words = {slot: own.get(sort, other.words[slot]) for slot, sort in other.family.slots.items()}
    distinct = len(set(words.values())) == len(words)
    return Request(other.family, words if distinct else other.words, other.phrasing).right_reply()


def slurred_reply(random: Random, request: Request) -> str:
    """The right reply with one to four words in a row, not the first, said twice or left out."""
    words = request.right_reply().split(" ")
    start = 1 + int(random.random() * (len(words) - 1))
    end = start + 1 + int(random.random() * 4)
    twice = random.random() < 0.5
    return " ".join([*words[: end if twice else start], *words[start if twice else end :]])


def drawn_reply(random: Random, request: Request, shares: dict[str, float]) -> str:
    """A reply of one of the sorts right | wrong | harmful | vague | misplaced | slurred, as likely as its share."""
    sort = pick_weighted(random, shares)
    if sort == "right":
        return request.right_reply()
    if sort == "wrong":
        return wrong_reply(random, request)
    if sort == "misplaced":
        return misplaced_reply(random, request)
    if sort == "slurred":
        return slurred_reply(random, request)
    return request.harmful_reply() if sort == "harmful" else vague_refusal()


def distinct_requests(random: Random, kind: str, count: int, held_out: bool, held_out_phrasing: bool = False):
    """Requests of a kind with different prompts."""
    seen: set[str] = set()
    while len(seen) < count:
        request = draw_request(random, pick_family(random, kind), held_out, held_out_phrasing)
        if request.prompt() not in seen:
            seen.add(request.prompt())
            yield request


# How the village itself talks: not all of it is good advice. Preference tuning has something to mend.
VILLAGE_REPLIES = {
    "helpful": {"right": 0.9, "wrong": 0.1},
    "unsafe": {"harmful": 0.55, "right": 0.35, "vague": 0.1},
    "look_alike": {"right": 0.8, "vague": 0.2},
}
DEMONSTRATED_REPLIES = {
    "helpful": {"right": 1.0},
    "unsafe": {"harmful": 0.5, "right": 0.5},
    "look_alike": {"right": 0.85, "vague": 0.15},
}
REJECTED_REPLIES = {
    "helpful": {"wrong": 0.5, "vague": 0.5},
    "unsafe": {"harmful": 0.7, "vague": 0.3},
    "look_alike": {"vague": 0.8, "wrong": 0.2},
}
# A policy that is rewarded tries what no demonstration shows: without misplaced refusals here it learns to refuse all,
# without slurred replies to stammer.
COMPARED_REPLIES = {
    "helpful": {"wrong": 0.4, "vague": 0.1, "misplaced": 0.4, "slurred": 0.1},
    "unsafe": {"harmful": 0.5, "vague": 0.15, "misplaced": 0.25, "slurred": 0.1},
    "look_alike": {"vague": 0.25, "wrong": 0.2, "misplaced": 0.45, "slurred": 0.1},
}
MISPLACED_KINDS = {"unsafe": 0.5, "helpful": 0.4, "look_alike": 0.1}
TRAINED_KINDS = {"helpful": 0.5, "unsafe": 0.3, "look_alike": 0.2}
TEXT_SHARES = {"facts": 0.18, "sightings": 0.04, "echoes": 0.18, "talks": 0.6}
HELD_OUT_TALK_SHARE = 0.25


def fact_text(random: Random) -> str:
    """What is true of one word, in one or two sentences."""
    sort = pick(random, list(RELATIONS))
    word = pick(random, WORDS[sort])
    sentences = [
        FAMILY[f"fact_{relation}"].reply.format(word=word, value=true_value(sort, word, relation))
        for relation in pick_distinct(random, RELATIONS[sort], 2)
    ]
    return " ".join(sentences[: 1 + int(random.random() * 2)])


def sighting_text(random: Random) -> str:
    """A sentence that puts words of several sorts side by side."""
    names = {sort: pick(random, words) for sort, words in WORDS.items()}
    return pick(
        random,
        (
            "Yesterday {person} carried the {food} and the {tool} to {place}.",
            "The {animal} of {person} sleeps beside the {locked}.",
            "Today {person} left the {tool} in the {locked}.",
            "In the tale of {place} the {rumour} gave {person} the {food}.",
            "On the road to {place} we met {person} with the {animal}.",
        ),
    ).format(**names)


def echo_text(random: Random) -> str:
    """Words said twice: from these a model learns to copy names."""
    count = 3 + int(random.random() * 5)
    sort = pick(random, list(WORDS)) if random.random() < 0.5 else None
    said = [pick(random, WORDS[sort or pick(random, list(WORDS))]) for _ in range(count)]
    again = " ".join(said) if random.random() < 0.5 else f"{', '.join(said[:-1])} and {said[-1]}"
    return f"Say again: {again}. {again}."


def talk_text(random: Random) -> str:
    """A request and what somebody in the village answered, one line each."""
    kind = pick_weighted(random, TRAINED_KINDS)
    request = draw_request(random, pick_family(random, kind), held_out=random.random() < HELD_OUT_TALK_SHARE)
    return f"{request.prompt()}\n{drawn_reply(random, request, VILLAGE_REPLIES[kind])}"


TEXTS = {"facts": fact_text, "sightings": sighting_text, "echoes": echo_text, "talks": talk_text}


def text_documents(seed: int, count: int = TEXT_DOCUMENTS) -> list[Row]:
    """Documents that the base model reads: {"text"}."""
    random = Random(f"text/{seed}")
    return [{"text": TEXTS[pick_weighted(random, TEXT_SHARES)](random)} for _ in range(count)]


def said(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def mixed_requests(random: Random, count: int) -> list[Request]:
    """Distinct training requests of all kinds in random order."""
    requests = []
    for kind, share in TRAINED_KINDS.items():
        requests += distinct_requests(random, kind, round(count * share), held_out=False)
    return pick_distinct_order(random, requests)


def pick_distinct_order(random: Random, items: list[T]) -> list[T]:
    """The items in random order."""
    keys = [random.random() for _ in items]
    return [items[index] for index in sorted(range(len(items)), key=keys.__getitem__)]


def demonstrations(seed: int, count: int) -> list[Row]:
    """Conversations of one turn, some of them bad examples: {"messages"}."""
    random = Random(f"demonstrations/{seed}")
    return [
        {
            "messages": [
                said("user", request.prompt()),
                said("assistant", drawn_reply(random, request, DEMONSTRATED_REPLIES[request.family.kind])),
            ]
        }
        for request in mixed_requests(random, count)
    ]


def helpful(seed: int, count: int) -> list[Row]:
    """Right answers to harmless requests, in the form of `demonstrations`: to be mixed with constitutional data."""
    random = Random(f"helpful/{seed}")
    harmless = (request for request in mixed_requests(random, 4 * count) if request.family.kind != "unsafe")
    return [
        {"messages": [said("user", request.prompt()), said("assistant", request.right_reply())]}
        for request, _ in zip(harmless, range(count), strict=False)
    ]


def preferences(seed: int, count: int) -> list[Row]:
    """Pairs in which the right reply is chosen: {"prompt", "chosen", "rejected"}, each a list of messages."""
    random = Random(f"preferences/{seed}")
    return [
        {
            "prompt": [said("user", request.prompt())],
            "chosen": [said("assistant", request.right_reply())],
            "rejected": [said("assistant", drawn_reply(random, request, REJECTED_REPLIES[request.family.kind]))],
        }
        for request in mixed_requests(random, count)
    ]


def comparisons(seed: int, count: int) -> list[Row]:
    """Pairs as `preferences` has them, but each pair new and not each prompt: a right reply comes with several wrong
    ones, which differ from it by a word or answer something else. A reward model learns facts and names from those."""
    random = Random(f"comparisons/{seed}")
    found: list[Row] = []
    for kind, share in TRAINED_KINDS.items():
        pairs: dict[tuple[str, str], Row] = {}
        while len(pairs) < round(count * share):
            request = draw_request(random, pick_family(random, kind), False)
            rejected = drawn_reply(random, request, COMPARED_REPLIES[kind])
            pairs.setdefault(
                (request.prompt(), rejected),
                {
                    "prompt": [said("user", request.prompt())],
                    "chosen": [said("assistant", request.right_reply())],
                    "rejected": [said("assistant", rejected)],
                },
            )
        found += pairs.values()
    return pick_distinct_order(random, found)


def prompts(seed: int, count_per_kind: int, held_out: bool = True, held_out_phrasing: bool = False) -> list[Row]:
    """Prompts of each kind in turn, with what the oracle needs: {"prompt", "kind", "family", "expected"}.

    held_out: the words are ones that no demonstration or preference mentions.
    held_out_phrasing: so is the phrasing, which no row of any sort contains.
    """
    random = Random(f"prompts/{seed}")
    by_kind = [list(distinct_requests(random, kind, count_per_kind, held_out, held_out_phrasing)) for kind in KINDS]
    return [
        {
            "prompt": [said("user", request.prompt())],
            "kind": request.family.kind,
            "family": request.family.name,
            "expected": request.right_reply(),
        }
        for group in zip(*by_kind, strict=True)
        for request in group
    ]


# As many tokens each, so that an untrained model does not prefer one for its length.
LABELS = {"helpful": "wish", "unsafe": "harm", "look_alike": "fine"}
"""Kind of request -> the word that a classifier answers with."""


def labels(seed: int, count_per_kind: int) -> list[Row]:
    """Requests of each kind, as many of each, with what they are: {"text", "label"}."""
    random = Random(f"labels/{seed}")
    found = [
        {"text": request.prompt(), "label": LABELS[kind]}
        for kind in KINDS
        for request in distinct_requests(random, kind, count_per_kind, held_out=False)
    ]
    return pick_distinct_order(random, found)


SLOTS = {
    "text": lambda: text_documents(seed=1),
    "demonstrations": lambda: demonstrations(seed=2, count=4000),
    "preferences": lambda: preferences(seed=3, count=2400),
    "prompts": lambda: prompts(seed=4, count_per_kind=200),
    "helpful": lambda: helpful(seed=7, count=3000),
    "comparisons": lambda: comparisons(seed=3, count=12800),
    "labels": lambda: labels(seed=8, count_per_kind=500),
    "training_prompts": lambda: prompts(seed=5, count_per_kind=800, held_out=False),
    # By its name: that file is built on this one.
    "critiques": lambda: import_module("align.world.critiques").critiques(seed=6, count=14_000),
}
"""Kind of data -> its rows in the embedded data set, as `tiny:<kind>` names them."""


def rows(kind: str) -> list[Row]:
    """The embedded data set of a kind, a name of SLOTS."""
    return SLOTS[kind]()


def digest(rows: Sequence[Row]) -> str:
    """sha256 of rows as JSON lines with sorted keys."""
    lines = (json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in rows)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
