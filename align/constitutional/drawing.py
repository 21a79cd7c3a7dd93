"""Chance, by the row: what is drawn for a prompt depends on the run's seed and the prompt, not on its neighbours."""

import hashlib
from collections.abc import Sequence
from random import Random

from align.config.constitution import Principle
from align.config.schema import Draw


def seed_of(*parts: object) -> int:
    """A seed from 0 up to 2**63 for what the parts name."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def draw_principles(principles: Sequence[Principle], count: int, draw: Draw, seed: int) -> list[Principle]:
    """Principles for `count` rounds, likelier by weight; `in_order` takes them as they are written, round and round.

    Without replacement all come once before any comes again.
    """
    if draw is Draw.in_order:
        return [principles[n % len(principles)] for n in range(count)]
    random, left, found = Random(seed), list(principles), []
    for _ in range(count):
        taken = _weighted(random, left)
        found.append(taken)
        if draw is Draw.without_replacement:
            left = [one for one in left if one is not taken] or list(principles)
    return found


def _weighted(random: Random, principles: Sequence[Principle]) -> Principle:
    point = random.random() * sum(one.weight for one in principles)
    for one in principles:
        point -= one.weight
        if point < 0:
            return one
    return principles[-1]
