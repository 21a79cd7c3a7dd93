"""What stands out in the records of a slot: copies, conflicts, length bias, refusals, left-over markup.

Fast enough to run before every training (some 8 microseconds a row of 1 KB), and of a record it keeps a few numbers:
32 bytes, never its text.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from align.data.leftovers import holds_markup, holds_placeholder, opens_like_refusal
from align.data.records import (
    Demonstration,
    Message,
    Origin,
    PreferencePair,
    PromptRow,
    Ranking,
    Rated,
    Record,
    TextDocument,
    Unpaired,
)

LISTED_ROWS = 20
"""Rows that a finding names; the first ones."""
FEWEST_PAIRS = 100
"""With fewer pairs than this, the share of longer chosen answers says little and is no warning."""
BALANCED = (0.35, 0.65)
"""Share of pairs whose chosen answer is longer, within which there is no warning."""
MANY_COPIES = 0.01
"""Share of rows that are copies of others from which it is a warning."""

ONE_WORD = 60
"""An answer longer than this many characters is not looked at as one word."""

NAMES = {"chosen": "the chosen answers", "rejected": "the rejected answers", "answer": "the answers"}

ALL_BITS = 0xFFFF_FFFF_FFFF_FFFF
KEY_BITS = 0xFFFF_FFFF_FFFF_FFFE
"""A key without its lowest bit, which holds the label."""


@dataclass
class Finding:
    """One thing that was looked for. count 0: it was looked for and not found."""

    name: str
    count: int
    of: int
    """Records looked at; for a share of answers, answers."""
    rows: list[str]
    """Where the first of them were found."""
    level: str
    """info | warn"""
    text: str
    """One sentence for people, with the numbers."""


@dataclass
class Tally:
    """How often something was met, and where first."""

    count: int = 0
    rows: list[str] = field(default_factory=list)

    def add(self, origin: Origin) -> None:
        self.count += 1
        if len(self.rows) < LISTED_ROWS:
            self.rows.append(str(origin))


class Places:
    """The origins of many records in 8 bytes each."""

    def __init__(self) -> None:
        self._files: dict[tuple[str, bool], int] = {}
        self._file, self._number = array("I"), array("I")

    def __len__(self) -> int:
        return len(self._file)

    def add(self, origin: Origin) -> None:
        self._file.append(self._files.setdefault((origin.path, origin.has_lines), len(self._files)))
        self._number.append(origin.number)

    def __getitem__(self, index: int) -> Origin:
        path, has_lines = list(self._files)[self._file[index]]
        return Origin(path, self._number[index], has_lines)

    def listed(self, indices: np.ndarray) -> list[str]:
        """The first of these records' origins, in the order in which they were read, each once."""
        return list(dict.fromkeys(str(self[index]) for index in np.sort(indices)[:LISTED_ROWS].tolist()))

    def as_numbers(self) -> np.ndarray:
        """(records,) uint64: equal where the row is the same."""
        file, number = np.array(self._file, np.uint64), np.array(self._number, np.uint64)
        return (file << np.uint64(32)) | number


@dataclass
class Lengths:
    """Characters of chosen and rejected answers, summed."""

    pairs: int = 0
    longer: int = 0
    equal: int = 0
    chosen: int = 0
    rejected: int = 0

    def add(self, chosen: int, rejected: int) -> None:
        self.pairs += 1
        self.longer += chosen > rejected
        self.equal += chosen == rejected
        self.chosen += chosen
        self.rejected += rejected


class Findings:
    """Looks at records batch after batch; `results` says what was found in all of them."""

    def __init__(self) -> None:
        self.places = Places()
        self.records, self.prompts, self.labelled = array("Q"), array("Q"), array("Q")
        """64-bit hashes: of the record, of its prompt, and of what its label is about, with the label as lowest bit."""
        self.has_prompts = self.has_labels = False
        self.answers = dict.fromkeys(NAMES, 0)
        self.refusals = {side: Tally() for side in self.answers}
        self.one_word, self.markup, self.placeholders = Tally(), Tally(), Tally()
        self.ties, self.soft_labels, self.lengths = Tally(), Tally(), Lengths()

    def add(self, origins: Sequence[Origin], records: Sequence[Record]) -> None:
        """Look at sound records of one slot and where each was found."""
        for origin, record in zip(origins, records, strict=True):
            self.places.add(origin)
            if type(record) is PreferencePair:
                self._add_pair(origin, record)
            elif type(record) is TextDocument:
                self._add(origin, record, (), (), record.text)
            else:
                self._add(origin, record, *split_answers(record))

    def _add_pair(self, origin: Origin, pair: PreferencePair) -> None:
        chosen, rejected = pair.chosen, pair.rejected
        self.lengths.add(len(chosen.content), len(rejected.content))
        if pair.tie:
            self.ties.add(origin)
        if pair.p != 1.0 and pair.p != 0.5:
            self.soft_labels.add(origin)
        texts = _text_of(pair.prompt), _text_of((chosen,)), _text_of((rejected,))
        prompt, first, second = map(_hash, texts)
        self.records.append(hash((prompt, first, second, pair.p, pair.margin, pair.tools)) & ALL_BITS)
        self.prompts.append(prompt)
        # A tie prefers neither side, so it contradicts nothing: 0 stands for no label.
        sides = (first, second) if first < second else (second, first)
        self.labelled.append(0 if pair.p == 0.5 else hash((prompt, *sides)) & KEY_BITS | (first < second))
        self.has_prompts = self.has_labels = True
        self._look_at(origin, "".join(texts))
        self._look_at_answers(origin, (("chosen", chosen.content), ("rejected", rejected.content)))

    def _add(
        self, origin: Origin, record: Record, prompt: Sequence[Message], answers: Sequence[Message], text: str = ""
    ) -> None:
        key, whole = _hash(_text_of(prompt)), _text_of((*prompt, *answers)) + text
        self.records.append(_hash(whole + _rest_of(record)))
        self.prompts.append(key)
        label = record.desirable if isinstance(record, Unpaired) else None
        self.labelled.append(0 if label is None else _hash(whole) & KEY_BITS | label)
        self.has_prompts |= bool(prompt)
        self.has_labels |= label is not None
        self._look_at(origin, whole)
        self._look_at_answers(origin, [("answer", message.content) for message in answers])

    def _look_at(self, origin: Origin, text: str) -> None:
        """The whole of a record, every turn from the start of a line."""
        if holds_markup(text):
            self.markup.add(origin)
        if holds_placeholder(text):
            self.placeholders.add(origin)

    def _look_at_answers(self, origin: Origin, answers: Sequence[tuple[str, str]]) -> None:
        one_word = False
        for side, text in answers:
            self.answers[side] += 1
            if opens_like_refusal(text):
                self.refusals[side].add(origin)
            if len(text) <= ONE_WORD:
                one_word |= len(text.split()) <= 1
        if one_word:
            self.one_word.add(origin)

    def results(self) -> list[Finding]:
        """What was found, in a fixed order; also what was looked for and not found."""
        found = [self._copies()]
        if self.has_prompts:
            found.append(self._repeated_prompts())
        if self.has_labels:
            found.append(self._opposite_labels())
        if self.lengths.pairs:
            found += [self._chosen_longer(), self._tallied("ties", self.ties, "rows are ties")]
            found.append(self._tallied("soft_labels", self.soft_labels, "rows have a label between certain and tied"))
        if any(self.answers.values()):
            found += [self._one_word_answers(), self._refused()]
        found.append(self._tallied("template_markup", self.markup, "rows hold left-over template markup", warn=True))
        found.append(self._tallied("placeholders", self.placeholders, "rows hold an unfilled placeholder", warn=True))
        return found

    def _copies(self) -> Finding:
        keys = np.frombuffer(self.records, np.uint64) if self.records else np.empty(0, np.uint64)
        first = np.unique(keys, return_index=True)[1]
        copies = np.setdiff1d(np.arange(len(keys)), first, assume_unique=True)
        level = "warn" if len(copies) > MANY_COPIES * len(keys) else "info"
        text = f"{_share(len(copies), len(keys))} rows are exact copies of an earlier row"
        return Finding("exact_duplicates", len(copies), len(keys), self.places.listed(copies), level, text)

    def _repeated_prompts(self) -> Finding:
        # The records of one row share a prompt by nature, so each prompt of a row stands once.
        keys, rows = np.frombuffer(self.prompts, np.uint64), self.places.as_numbers()
        order = np.lexsort((rows, keys))
        again = (np.diff(keys[order]) == 0) & (np.diff(rows[order]) == 0)
        first = order[np.concatenate([[True], ~again])]
        _, inverse, counts = np.unique(keys[first], return_inverse=True, return_counts=True)
        repeated = first[counts[inverse] > 1]
        text = f"{_share(len(repeated), len(first))} rows have a prompt that another row has too"
        return Finding("repeated_prompts", len(repeated), len(first), self.places.listed(repeated), "info", text)

    def _opposite_labels(self) -> Finding:
        labelled = np.frombuffer(self.labelled, np.uint64)
        about = labelled & np.uint64(KEY_BITS)
        both = np.intersect1d(about[labelled == about], about[labelled != about])
        rows = np.flatnonzero(np.isin(about, both[both != 0]))
        text = f"{_share(len(rows), len(about))} rows are contradicted by another row: same texts, opposite label"
        level = "warn" if len(rows) else "info"
        return Finding("opposite_labels", len(rows), len(about), self.places.listed(rows), level, text)

    def _chosen_longer(self) -> Finding:
        sums = self.lengths
        share = sums.longer / sums.pairs
        biased = sums.pairs >= FEWEST_PAIRS and not BALANCED[0] <= share <= BALANCED[1]
        text = (
            f"chosen is longer in {share:.0%} of the pairs and as long in {sums.equal / sums.pairs:.0%}; on average "
            f"{sums.chosen / sums.pairs:,.0f} characters against {sums.rejected / sums.pairs:,.0f}"
        )
        return Finding("chosen_longer", sums.longer, sums.pairs, [], "warn" if biased else "info", text)

    def _one_word_answers(self) -> Finding:
        return self._tallied("one_word_answers", self.one_word, "rows have an answer of one word")

    def _refused(self) -> Finding:
        sides = {side: count for side, count in self.answers.items() if count}
        shares = [f"{self.refusals[side].count / count:.0%} of {NAMES[side]}" for side, count in sides.items()]
        text = f"{' and '.join(shares)} open like a refusal"
        rows = list(dict.fromkeys(row for side in sides for row in self.refusals[side].rows))[:LISTED_ROWS]
        count = sum(self.refusals[side].count for side in sides)
        return Finding("refusals", count, sum(sides.values()), rows, "info", text)

    def _tallied(self, name: str, tally: Tally, what: str, *, warn: bool = False) -> Finding:
        level = "warn" if warn and tally.count else "info"
        text = f"{_share(tally.count, len(self.places))} {what}"
        return Finding(name, tally.count, len(self.places), list(dict.fromkeys(tally.rows)), level, text)


def split_answers(record: Record) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """The prompt of a record and its answers; a document has neither."""
    if isinstance(record, PreferencePair):
        return record.prompt, (record.chosen, record.rejected)
    if isinstance(record, Demonstration):
        return record.messages[:-1], record.messages[-1:]
    if isinstance(record, PromptRow):
        return record.messages, ()
    if isinstance(record, Ranking | Rated):
        return record.prompt, record.completions
    if isinstance(record, Unpaired):
        return record.prompt, (record.completion,)
    return (), ()


def _rest_of(record: Record) -> str:
    """What makes two records differ beside their turns."""
    if isinstance(record, Ranking):
        return f"{record.ranks}{record.tools}"
    if isinstance(record, Rated):
        return f"{record.scores}{record.tools}"
    if isinstance(record, Unpaired):
        return f"{record.desirable}{record.tools}"
    return "" if isinstance(record, TextDocument) else str(record.tools)


def _text_of(messages: Sequence[Message]) -> str:
    """Turns as one text, each from the start of a line; unequal turns give unequal texts."""
    return "".join([f"{m.role}\x1f\n{m.content}{_extra(m)}\x1e" for m in messages])


def _extra(message: Message) -> str:
    if message.tool_calls or message.reasoning:
        return f"\x1f{message.reasoning}\x1f{message.tool_calls}"
    return ""


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


def _share(count: int, of: int) -> str:
    return f"{count:,} of {of:,}"
