"""What would be learnt from the rows of a slot: a few of them as text, cut where the role of the tokens changes.

Of prompts nothing is learnt: they are shown as what completions are sampled after.
"""

import json
import random
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from align.data.fit import NOT_TRAINED, TOO_LONG, demonstration_tokens, trained_tokens
from align.data.prepare import Prepared
from align.data.records import BadRow

CONTEXT, TRAINED, STOP = "context", "trained", "stop"
PROMPT, CHOSEN, REJECTED = "prompt", "chosen", "rejected"
LEARNT = (TRAINED, CHOSEN, REJECTED)
"""Roles of text that is learnt, its stop token apart."""

LEFT_OUT = "left_out"
PROMPT_SLOT = "prompts"
SHOWN_CHARACTERS = 2000
RANDOM_ROWS = 2


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of one role: context, trained, stop, prompt, chosen or rejected."""

    text: str
    role: str
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One row. `kind` is its slot, or `left_out` for a row that is shown as it was read."""

    label: str
    kind: str
    segments: list[Segment]
    tokens: dict[str, int] = field(default_factory=dict)
    """Tokens by column; for masked rows `all` and `trained`."""


def pick(
    prepared: Prepared, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Collection[int], *, seed: int = 0
) -> list[Sample]:
    """The first row, some at random, the longest, the shortest, and what did not fit; none of them twice.

    Of documents that were cut into pieces, one such piece; of other rows that were too long, one as it was read.
    """
    slot, rows = prepared.report.slot, prepared.train
    samples = [
        _sample(
            f"{' and '.join(labels)} (row {row + 1:,} of {len(rows):,})", slot, rows[row], tokenizer, stop_token_ids
        )
        for row, labels in _labelled_rows(prepared, stop_token_ids, seed).items()
    ]
    if bad := _first_too_long(prepared):
        samples.append(_left_out(bad))
    return samples


def _labelled_rows(prepared: Prepared, stop_token_ids: Collection[int], seed: int) -> dict[int, list[str]]:
    """Row -> why it is shown."""
    table = prepared.train.with_format("arrow")[:]
    count = len(table)
    if not count:
        return {}
    lengths = _lengths(table)
    chosen = [("first", 0)]
    chosen += [("random", row) for row in sorted(random.Random(seed).sample(range(count), min(RANDOM_ROWS, count)))]
    chosen += [("longest", int(lengths.argmax())), ("shortest", int(lengths.argmin()))]
    if prepared.report.slot == "text":
        chosen += [("cut", row) for row in _first_cut(table, lengths, prepared.report.max_tokens, stop_token_ids)]
    labels: dict[int, list[str]] = {}
    for label, row in chosen:
        if label != "random" or row not in labels:
            labels.setdefault(row, []).append(label)
    return labels


def _lengths(table: pa.Table) -> np.ndarray:
    """Tokens of each row, as max_tokens counts them."""
    if "completion_ids" in table.column_names:
        prompts = pc.list_value_length(table["prompt_ids"]).to_numpy()
        return prompts + [max(map(len, answers)) for answers in table["completion_ids"].to_pylist()]
    lengths = {
        name: pc.list_value_length(table[name]).to_numpy() for name in table.column_names if name.endswith("_ids")
    }
    if "input_ids" in lengths:
        return lengths["input_ids"]
    if "chosen_ids" not in lengths:
        return lengths["prompt_ids"]
    return lengths["prompt_ids"] + np.maximum(lengths["chosen_ids"], lengths["rejected_ids"])


def _first_cut(table: pa.Table, lengths: np.ndarray, max_tokens: int, ends: Collection[int]) -> list[int]:
    """The first piece after which its document goes on; a piece is cut at max_tokens, or one token before."""
    for row in np.flatnonzero(lengths >= max_tokens - 1).tolist():
        if table["input_ids"][row].as_py()[-1] not in ends:
            return [row]
    return []


def _first_too_long(prepared: Prepared) -> BadRow | None:
    if TOO_LONG not in prepared.report.dropped:
        return None
    return next((bad for bad in prepared.report.bad_rows if bad.reason == TOO_LONG), None)


def _left_out(bad: BadRow) -> Sample:
    text = json.dumps(bad.row, ensure_ascii=False, indent=2, default=str)
    if len(text) > SHOWN_CHARACTERS:
        text = f"{text[:SHOWN_CHARACTERS]}… and {len(text) - SHOWN_CHARACTERS:,} more characters"
    return Sample(f"left out as too long ({bad.origin}: {bad.detail})", LEFT_OUT, [Segment(text, CONTEXT)])


def _sample(
    label: str, slot: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, stop_token_ids: Collection[int]
) -> Sample:
    if "input_ids" in row:
        roles = [CONTEXT if token == NOT_TRAINED else TRAINED for token in row["labels"]]
        segments = _segments(tokenizer, row["input_ids"], _with_stops(row["input_ids"], roles, stop_token_ids))
        return Sample(label, slot, segments, {"all": demonstration_tokens(row), "trained": trained_tokens(row)})
    prompt, answers = row["prompt_ids"], _answers(row)
    segments = _segments(tokenizer, prompt, [PROMPT] * len(prompt))
    for role, ids in answers:
        roles = [PROMPT] * len(prompt) + [role] * len(ids)
        both = _segments(tokenizer, prompt + ids, _with_stops(prompt + ids, roles, stop_token_ids))
        segments += [segment for segment in both if segment.role != PROMPT]
    tokens = Counter({PROMPT: len(prompt)})
    for role, ids in answers:
        tokens[role] += len(ids)
    longest = {"longer side": len(prompt) + max(len(ids) for _, ids in answers)} if answers else {}
    return Sample(label, slot, segments, dict(tokens) | longest)


def _answers(row: dict[str, Any]) -> list[tuple[str, list[int]]]:
    """The answers of a pair, or of a ranking from the best to the worst; all but the best ones count as rejected.

    Prompts to sample after have none.
    """
    if "record" in row:
        return []
    if "completion_ids" not in row:
        return [(CHOSEN, row["chosen_ids"]), (REJECTED, row["rejected_ids"])]
    best = min(row["ranks"])
    ranked = sorted(zip(row["ranks"], row["completion_ids"], strict=True), key=lambda answer: answer[0])
    return [(CHOSEN if rank == best else REJECTED, ids) for rank, ids in ranked]


def _with_stops(ids: Sequence[int], roles: list[str], stop_token_ids: Collection[int]) -> list[str]:
    """The roles, with `stop` for a stop token that ends a learnt run."""
    following = [*roles[1:], ""]
    return [
        STOP if role in LEARNT and role != after and token in stop_token_ids else role
        for token, role, after in zip(ids, roles, following, strict=True)
    ]


def _segments(tokenizer: PreTrainedTokenizerBase, ids: list[int], roles: Sequence[str]) -> list[Segment]:
    """Runs of one role, special tokens visible; a run reads as it does after the ones before it."""
    segments, before, start = [], "", 0
    for role, run in groupby(roles):
        end = start + len(list(run))
        through = _decoded(tokenizer, ids[:end])
        # A run that starts inside a character changes the end of what precedes it.
        text = through[len(before) :] if through.startswith(before) else _decoded(tokenizer, ids[start:end])
        segments.append(Segment(text, role, tuple(ids[start:end])))
        before, start = through, end
    return segments


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def problems(sample: Sample, stop_token_ids: Collection[int], bos_token_id: int | None = None) -> list[str]:
    """What is wrong with a row, each as a sentence: nothing is trained, an answer does not stop, BOS comes twice.

    A piece of a document may end anywhere.
    """
    if sample.kind == LEFT_OUT:
        return []
    found = []
    if sample.kind != PROMPT_SLOT and not any(segment.role in LEARNT for segment in sample.segments):
        found.append("no token is trained")
    if sample.kind != "text":
        found += [
            f"{role} text ends in {text[-30:]!r}, not in a stop token"
            for role, text, last in _learnt_runs(sample.segments)
            if last not in stop_token_ids
        ]
    ids = [token for segment in sample.segments for token in segment.ids]
    if bos_token_id is not None and (bos_token_id, bos_token_id) in pairwise(ids):
        found.append("two BOS tokens follow each other")
    return found


def _learnt_runs(segments: Iterable[Segment]) -> Iterator[tuple[str, str, int]]:
    """(role, text, last token) of each learnt run, its stop token included."""
    for segment, after in pairwise([*segments, Segment("", CONTEXT)]):
        if segment.role in LEARNT:
            end = after if after.role == STOP else segment
            yield segment.role, segment.text + (after.text if end is after else ""), end.ids[-1]
