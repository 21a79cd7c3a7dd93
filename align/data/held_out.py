"""Which rows stay out of training: decided by a hash of the first turn, so that near copies stay together."""

import hashlib
from collections.abc import Sequence

from align.data.records import Message

TOO_FEW_ROWS = 20
SCALE = 2**64


def first_turn(messages: Sequence[Message]) -> str:
    """The first turn of a conversation that is not the system's."""
    return next((message.content for message in messages if message.role != "system"), "")


def position(first: str) -> float:
    """Where a first turn falls in [0, 1): the same on every run, in any order, whatever its case and blanks."""
    normal = " ".join(first.casefold().split())
    return int.from_bytes(hashlib.sha256(normal.encode("utf-8", "surrogatepass")).digest()[:8], "big") / SCALE


def held_out_rows(positions: Sequence[float], fraction: float) -> list[bool]:
    """True for every row kept out of training: those whose first turn falls below `fraction`.

    From 20 rows on, at least one first turn is kept out if any is asked for. Never all rows: then none is.
    """
    chosen = [place < fraction for place in positions]
    if fraction > 0 and not any(chosen) and len(positions) >= TOO_FEW_ROWS:
        lowest = min(positions)
        chosen = [place == lowest for place in positions]
    return chosen if not all(chosen) else [False] * len(positions)


def held_out_tails(pieces: Sequence[int], fraction: float) -> list[bool]:
    """For few documents, given as numbers of pieces: True for the last pieces of each that has 20 or more."""
    chosen = []
    for count in pieces:
        tail = round(fraction * count) if count >= TOO_FEW_ROWS else 0
        chosen += [False] * (count - tail) + [True] * tail
    return chosen
