"""What does not fit: conversations and pairs are left out and counted, never cut; text becomes pieces, nothing lost."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from align.data.records import RowRefused

TOO_LONG = "too_long"
NOT_TRAINED = -100

Columns = dict[str, list[int]]


def demonstration_tokens(row: Mapping[str, list[int]]) -> int:
    """Tokens of a conversation."""
    return len(row["input_ids"])


def pair_tokens(row: Mapping[str, list[int]]) -> int:
    """Tokens of a pair's longer side: the prompt with the longer completion."""
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def tree_tokens(row: Mapping[str, list[int]]) -> int:
    """Tokens of the longest of a tree's sides: the prompt with its longest completion."""
    return len(row["prompt_ids"]) + max(map(len, row["completion_ids"]))


def trained_tokens(row: Mapping[str, list[int]]) -> int:
    """Tokens that a row teaches: labels of a conversation, both completions of a pair, none of a prompt."""
    if "record" in row:
        return 0
    if "labels" in row:
        return sum(label != NOT_TRAINED for label in row["labels"])
    if "completion_ids" in row:
        return sum(map(len, row["completion_ids"]))
    return len(row["chosen_ids"]) + len(row["rejected_ids"])


def refuse_too_long(tokens: int, max_tokens: int) -> None:
    """Raises RowRefused for a row longer than max_tokens."""
    if tokens > max_tokens:
        raise RowRefused(TOO_LONG, f"{tokens} tokens, max_tokens={max_tokens}")


def text_pieces(input_ids: Sequence[int], max_tokens: int) -> list[Columns]:
    """A document as consecutive pieces of at most max_tokens (2 or more), every token trained; nothing is lost."""
    borders = [*range(0, len(input_ids), max_tokens), len(input_ids)]
    if len(borders) > 2 and borders[-1] - borders[-2] == 1:
        borders[-2] -= 1  # a piece of one token predicts nothing
    pieces = [list(input_ids[start:end]) for start, end in pairwise(borders)]
    return [{"input_ids": piece, "labels": list(piece)} for piece in pieces]
