"""Rows to train on that are also in what a model is judged by: held-out rows and evaluation sets.

Two rules, both on words without case and punctuation: the same prompt, and 13 words in a row in any turn. Source of the
13: Brown et al. 2020, arXiv:2005.14165, appendix C. System turns are left out: thousands of rows share one.
"""

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from align.data.findings import LISTED_ROWS, Finding, split_answers
from align.data.records import Message, Origin, Record, TextDocument

GRAM_WORDS = 13
WORD = re.compile(r"\w+")
MULTIPLIERS = np.random.default_rng(0).integers(0, 2**63, GRAM_WORDS, np.uint64) | np.uint64(1)
BETWEEN_TURNS = 0
"""Stands for the border of a turn among the hashes of words; no run of words goes across it."""


@dataclass
class _Keys:
    """The 64-bit keys of a reference's rows, and which of them were met: 21 bytes each."""

    keys: array = field(default_factory=lambda: array("Q"))
    rows: array = field(default_factory=lambda: array("I"))
    distinct: np.ndarray | None = None
    met: np.ndarray | None = None

    def add(self, keys: np.ndarray, rows: np.ndarray) -> None:
        assert self.distinct is None, "references come before the rows that are compared with them"
        self.keys.frombytes(keys.astype(np.uint64).tobytes())
        self.rows.frombytes(rows.astype(np.uint32).tobytes())

    def meet(self, keys: np.ndarray) -> np.ndarray:
        """(keys,) bool: which of these the reference has."""
        if self.distinct is None:
            self.distinct = np.unique(np.frombuffer(self.keys, np.uint64) if self.keys else np.empty(0, np.uint64))
            self.met = np.zeros(len(self.distinct), bool)
        if not len(self.distinct):
            return np.zeros(len(keys), bool)
        place = np.minimum(np.searchsorted(self.distinct, keys), len(self.distinct) - 1)
        known = self.distinct[place] == keys
        self.met[place[known]] = True
        return known

    def rows_met(self) -> int:
        """Rows of the reference that have a key that was met."""
        if self.distinct is None or not len(self.distinct):
            return 0
        place = np.searchsorted(self.distinct, np.frombuffer(self.keys, np.uint64))
        return len(np.unique(np.frombuffer(self.rows, np.uint32)[self.met[place]]))


@dataclass
class _Reference:
    """One set that must not be trained on, and the training rows found in it."""

    size: int = 0
    prompts: _Keys = field(default_factory=_Keys)
    grams: _Keys = field(default_factory=_Keys)
    found: dict[str, int] = field(default_factory=lambda: {"prompts": 0, "grams": 0})
    rows: dict[str, list[str]] = field(default_factory=lambda: {"prompts": [], "grams": []})

    def note(self, kind: str, origins: Sequence[Origin], indices: np.ndarray) -> None:
        self.found[kind] += len(indices)
        room = LISTED_ROWS - len(self.rows[kind])
        self.rows[kind] += [str(origins[index]) for index in indices[:room].tolist()]


class Overlap:
    """First the references, row by row; then the rows to train on; then the findings, two for each reference."""

    def __init__(self, names: Sequence[str]) -> None:
        self._references = {name: _Reference() for name in names}
        self._scanned = 0

    def add_reference(self, name: str, records: Sequence[Record]) -> None:
        """Rows of a reference: their prompts, and their answers where they have them."""
        reference = self._references[name]
        prompts, has_prompt = prompt_keys(records)
        numbers = reference.size + np.arange(len(records))
        reference.prompts.add(prompts[has_prompt], numbers[has_prompt])
        grams, row = gram_keys(records)
        reference.grams.add(grams, reference.size + row)
        reference.size += len(records)

    def scan(self, origins: Sequence[Origin], records: Sequence[Record]) -> None:
        """Compare rows to train on with every reference."""
        prompts, has_prompt = prompt_keys(records)
        grams, row = gram_keys(records)
        self._scanned += len(records)
        for reference in self._references.values():
            reference.note("prompts", origins, np.flatnonzero(reference.prompts.meet(prompts) & has_prompt))
            reference.note("grams", origins, np.unique(row[reference.grams.meet(grams)]))

    def results(self) -> list[Finding]:
        """For each reference the rows with one of its prompts, and those that share 13 words in a row with it."""
        return [finding for name in self._references for finding in self._of(name)]

    def _of(self, name: str) -> tuple[Finding, Finding]:
        reference = self._references[name]
        return (
            self._finding(name, "prompts", f"have a prompt of {name}", reference.prompts),
            self._finding(name, "grams", f"share {GRAM_WORDS} words in a row with {name}", reference.grams),
        )

    def _finding(self, name: str, kind: str, what: str, keys: _Keys) -> Finding:
        reference = self._references[name]
        count, met = reference.found[kind], keys.rows_met()
        text = (
            f"{count:,} of {self._scanned:,} rows to train on {what} "
            f"({met:,} of its {reference.size:,}, {met / max(reference.size, 1):.1%})"
        )
        level = "warn" if count else "info"
        return Finding(f"overlap_{kind}/{name}", count, self._scanned, reference.rows[kind], level, text)


def words_of(text: str) -> list[str]:
    """Words without case and punctuation."""
    return WORD.findall(text.casefold())


def prompt_keys(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """(records,) uint64: equal for prompts of the same words; and (records,) bool: whether there are any."""
    prompts = [" ".join(words_of("\n".join(_contents(_prompt(record))))) for record in records]
    # Python's hash differs from process to process, and these keys never leave one.
    keys = np.array([hash(prompt) for prompt in prompts], np.int64).view(np.uint64)
    return keys, np.array([bool(prompt) for prompt in prompts], bool)


def gram_keys(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Every run of 13 words inside a turn: (runs,) uint64 hashes, and (runs,) the index of the record."""
    hashes: list[int] = []
    ends = []
    for record in records:
        for text in _turns(record):
            hashes.extend(map(hash, words_of(text)))
            hashes.append(BETWEEN_TURNS)
        ends.append(len(hashes))
    words = np.array(hashes, np.int64).view(np.uint64)
    runs = max(len(words) - GRAM_WORDS + 1, 0)
    keys = np.zeros(runs, np.uint64)
    whole = np.ones(runs, bool)
    for offset, multiplier in enumerate(MULTIPLIERS):
        part = words[offset : offset + runs]
        keys += part * multiplier
        whole &= part != BETWEEN_TURNS
    row = np.searchsorted(np.array(ends, np.int64), np.arange(runs), side="right")
    return keys[whole], row[whole]


def _prompt(record: Record) -> Sequence[Message]:
    return split_answers(record)[0]


def _turns(record: Record) -> list[str]:
    if isinstance(record, TextDocument):
        return [record.text]
    prompt, answers = split_answers(record)
    return _contents((*prompt, *answers))


def _contents(messages: Sequence[Message]) -> list[str]:
    return [message.content for message in messages if message.role != "system"]
