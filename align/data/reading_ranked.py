"""Readers of compared answers: labels, scores, ranks and votes, to pairs and rankings with their ties kept."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations, count, takewhile
from typing import Any, NamedTuple

from align.data.fields import Row, field, list_field, number_field, number_of, text_field, text_of, wrong_type
from align.data.reading import alpaca_prompt, answer_from, answer_of, prompt_of, system_of
from align.data.reading_messages import message_field
from align.data.reading_tools import tools_field
from align.data.records import Demonstration, Message, PreferencePair, PromptRow, Ranking, RowRefused

STEMS = ("output", "response", "answer", "completion")
SUFFIXES = ("12", "01", "ab", "AB")
LABELS = ("label", "winner", "preferred", "choice", "preference")
LISTS = ("completions", "responses", "answers")
PROMPTS = ("messages", "conversations", "prompt", "question", "instruction")
TIE_WORDS = {"tie", "both", "draw", "equal", "same", "neither", "tiebothbad", "bothbad", "bothgood"}
SIGNS = re.compile(r"[\s_()\[\]]")
ANSWER_WORDS = ("", "model", "assistant", *STEMS)
SCORES_INSIDE = ("score", "fine-grained_score")
"""Fields of a listed answer; the second is UltraFeedback's mean of its aspects."""


class Two(NamedTuple):
    """The fields of two answers, and those that a third one would be in."""

    first: str
    second: str
    suffixes: str
    thirds: tuple[str, str]


def _two(stem: str, suffixes: str) -> Two:
    before, after = chr(ord(suffixes[0]) - 1), chr(ord(suffixes[1]) + 1)
    return Two(stem + suffixes[0], stem + suffixes[1], suffixes, (stem + before, stem + after))


TWO = [_two(stem + gap, suffixes) for stem in STEMS for gap in ("_", "", " ") for suffixes in SUFFIXES]
PREDICTIONS = _two("prediction ", "12")


def two_answers(row: Row) -> list[Two]:
    """All pairs of fields that hold two answers, `output_1 output_2`; where there is a third, it is none."""
    found = [two for two in TWO if two.first in row and two.second in row]
    return [two for two in found if not any(third in row for third in two.thirds)]


def _the_two(row: Row) -> Two:
    found = two_answers(row)
    if len(found) != 1:
        raise RowRefused(
            "ambiguous_answers", "the row must have two answers, such as 'output_1' and 'output_2', no more"
        )
    return found[0]


def label_fields(row: Row) -> list[str]:
    """The fields that may say which of two answers is better."""
    return [name for name in LABELS if name in row]


def vote_fields(row: Row) -> list[str]:
    """`annotator1`, `annotator2` and so on, as many as follow each other; or `votes`."""
    names = takewhile(row.__contains__, (f"annotator{number}" for number in count(1)))
    return list(names) or [name for name in ("votes",) if name in row]


def read_comparison_label(row: Row) -> PreferencePair:
    """Two answers and a label that names the better one, or a tie."""
    two, labels = _the_two(row), label_fields(row)
    if len(labels) != 1:
        raise RowRefused("ambiguous_label", f"one of the fields {', '.join(LABELS)} must say which answer is better")
    verdict = verdict_of(two, field(row, labels[0]), repr(labels[0]))
    return _judged(row, two, verdict, verdict == 0, 1.0 if verdict else 0.5)


def read_comparison_scores(row: Row) -> PreferencePair:
    """Two answers, each with a score: the higher is better, equal is a tie."""
    two = _the_two(row)
    first, second = (number_field(row, f"score_{suffix}") for suffix in two.suffixes)
    verdict = 0 if first == second else 1 if first > second else 2
    pair = _judged(row, two, verdict, verdict == 0, 1.0 if verdict else 0.5)
    return replace(pair, scores=(max(first, second), min(first, second)))


def read_votes(row: Row) -> PreferencePair:
    """Two answers and the verdicts of several annotators: p is the share of votes, half of each tie's, for chosen."""
    two, names = _the_two(row), vote_fields(row)
    votes = _votes(row, names)
    counts = Counter(verdict_of(two, vote, name) for name, vote in votes if vote is not None)
    total = sum(counts.values())
    if not total:
        raise RowRefused("missing_field", "the row has no votes")
    better = 2 if counts[2] > counts[1] else 1
    tie = counts[1] == counts[2] or counts[0] > max(counts[1], counts[2])
    return _judged(row, two, better, tie, (counts[better] + counts[0] / 2) / total)


def _votes(row: Row, names: Sequence[str]) -> list[tuple[str, Any]]:
    if names != ["votes"]:
        return [(repr(name), row[name]) for name in names]
    votes = field(row, "votes")
    if isinstance(votes, Mapping):
        return [("a vote", vote) for vote in votes.values()]
    return [("a vote", vote) for vote in list_field(row, "votes")]


def verdict_of(two: Two, label: Any, name: str) -> int:
    """1 or 2: the first or the second answer is better; 0: a tie.

    Numbers: answers that end in 1 and 2 have labels 1, 2, and 0 for a tie; answers that end in 0 and 1 have 0 and 1.
    Texts: the answer's suffix or field, `model_a`, `first`; `tie`, `both`, `draw` and the like.
    """
    word = _word(label, name)
    first, second = two.suffixes.lower()
    if word in TIE_WORDS or (word == "0" and first == "1"):
        return 0
    for verdict, suffix, ordinal in ((1, first, "first"), (2, second, "second")):
        if word == ordinal or any(word == answer + suffix for answer in ANSWER_WORDS):
            return verdict
    raise RowRefused("unknown_label", f"{name} is {word[:40]!r}; write {first}, {second}, or tie")


def _word(label: Any, name: str) -> str:
    """A label as a plain word: `Output (a)` is `outputa`, 1.0 is `1`."""
    if isinstance(label, str):
        return SIGNS.sub("", label.lower())
    if isinstance(label, bool) or not isinstance(label, int | float):
        raise wrong_type(name, label, "a label")
    if label not in (0, 1, 2):
        raise RowRefused("unknown_label", f"{name} is a number other than 0, 1, 2")
    return str(int(label))


def doubtful_labels(rows: Sequence[Row]) -> str | None:
    """Why labels cannot be told from these rows: 0 and 1, never 2, where the answers are numbered 1 and 2."""
    words = {_first_label(row) for row in rows}
    if not {"0", "1"} <= words or "2" in words:
        return None
    return (
        "the answers are numbered 1 and 2, but the labels are 0 and 1: if 0 is a tie, say format=comparison_label; "
        "if 0 is the first answer, rename the fields (columns) to response_0 and response_1"
    )


def _first_label(row: Row) -> str | None:
    found, labels = two_answers(row), label_fields(row)
    if len(found) != 1 or len(labels) != 1 or found[0].suffixes != "12":
        return None
    try:
        return _word(row[labels[0]], "")
    except RowRefused:
        return None


def _judged(row: Row, two: Two, verdict: int, tie: bool, p: float) -> PreferencePair:
    """A pair from two answers in the row's order; of a tie, the first is called chosen."""
    first, second = (answer_of(row, name) for name in two[:2])
    chosen, rejected = (second, first) if verdict == 2 else (first, second)
    margin = 0.0 if row.get("margin") is None else number_field(row, "margin")
    return PreferencePair(any_prompt(row), chosen, rejected, p, margin, tie, tools_field(row))


def any_prompt(row: Row) -> tuple[Message, ...]:
    """The prompt of a row, whatever its field is called.

    Raises: RowRefused for a row without one, or with two.
    """
    names = [name for name in PROMPTS if row.get(name) is not None]
    extra = text_field(row, "input", default="") if "instruction" not in names else ""
    if extra.strip():
        names.append("input")
    if len(names) > 1:
        raise RowRefused("ambiguous_prompt", f"{' and '.join(names)} may both be the prompt; rename or drop one")
    if not names:
        raise RowRefused("missing_field", f"there is no prompt: none of {', '.join(PROMPTS)}, input")
    if names[0] == "instruction":
        return alpaca_prompt(row)
    if names[0] in ("messages", "conversations"):
        return (*system_of(row), *message_field(row, names[0]))
    return prompt_of(row, names[0])


def read_ranking(row: Row) -> Ranking:
    """Two or more answers in a list, with `ranks` (smaller is better) or `scores` (larger is better)."""
    names = [name for name in LISTS if isinstance(row.get(name), list)]
    if len(names) != 1:
        raise RowRefused("ambiguous_answers", f"one of the fields {', '.join(LISTS)} must be a list of answers")
    answers = row[names[0]]
    if len(answers) < 2:
        raise RowRefused("too_few_answers", f"{names[0]!r} must hold two answers or more")
    completions = tuple(_listed_answer(answer, f"{names[0]}[{index}]") for index, answer in enumerate(answers))
    ranks, scores = _ranks(row, answers)
    return Ranking(any_prompt(row), completions, ranks, tools_field(row), scores)


def _listed_answer(answer: Any, name: str) -> Message:
    """An answer as text, as a message (or a list of one), or as an object with `text`, `response` or `content`."""
    if isinstance(answer, list) or (isinstance(answer, Mapping) and ("role" in answer or "from" in answer)):
        return answer_from(answer, name)
    if isinstance(answer, Mapping):
        name = next((name for name in ("text", "response") if name in answer), "content")
        return Message("assistant", text_field(answer, name))
    return Message("assistant", text_of(answer, name))


def ranks_inside(row: Row) -> bool:
    """True if the listed answers are objects that hold their own rank or score."""
    answers = next((row[name] for name in LISTS if isinstance(row.get(name), list)), [])
    known = ("rank", *SCORES_INSIDE)
    return bool(answers) and all(isinstance(a, Mapping) and any(name in a for name in known) for a in answers)


def _ranks(row: Row, answers: Sequence[Any]) -> tuple[tuple[float, ...], tuple[float, ...] | None]:
    """(ranks, scores or None) of the answers, from the row or from the answers; ranks of scores are their negatives."""
    found = {key: list_field(row, key + "s") for key in ("rank", "score") if row.get(key + "s") is not None}
    for key in ("rank", "score"):
        if key not in found and (inside := _inside(answers, SCORES_INSIDE if key == "score" else ("rank",))):
            found[key] = inside
    if len(found) != 1:
        raise RowRefused("ambiguous_ranks", "the answers need ranks or scores, and not both")
    ((key, values),) = found.items()
    if len(values) != len(answers):
        raise RowRefused("wrong_type", f"there are {len(values)} {key}s for {len(answers)} answers")
    numbers = tuple(number_of(value, f"a {key}") for value in values)
    return (numbers, None) if key == "rank" else (tuple(-number for number in numbers), numbers)


def _inside(answers: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """The values of the first of these fields that every answer has; none if there is no such field."""
    for name in names:
        if all(isinstance(answer, Mapping) and answer.get(name) is not None for answer in answers):
            return [answer[name] for answer in answers]
    return []


def prediction_fields(row: Row) -> list[str]:
    """`prediction 1`, `prediction 2` and so on, as many as follow each other."""
    return list(takewhile(row.__contains__, (f"prediction {number}" for number in count(1))))


def read_pairwise_labels(row: Row) -> list[PreferencePair | RowRefused]:
    """`preference` has a label for each two of the predictions, in the order 1v2 1v3 ... 2v3; 0 is a tie."""
    prompt, answers, labels = _predictions(row)
    return [_labelled(prompt, a, b, label) for (a, b), label in zip(combinations(answers, 2), labels, strict=True)]


def _labelled(prompt: tuple[Message, ...], first: Message, second: Message, label: Any) -> PreferencePair | RowRefused:
    try:
        verdict = verdict_of(PREDICTIONS, label, "a label of 'preference'")
    except RowRefused as error:
        return error
    chosen, rejected = (second, first) if verdict == 2 else (first, second)
    return PreferencePair(prompt, chosen, rejected, p=1.0 if verdict else 0.5, tie=verdict == 0)


def best_prediction(row: Row) -> Demonstration:
    """The prediction that wins most comparisons, a tie counting half.

    Raises: RowRefused("tie") if several do.
    """
    prompt, answers, labels = _predictions(row)
    points = [0.0] * len(answers)
    for (first, second), label in zip(combinations(range(len(answers)), 2), labels, strict=True):
        verdict = verdict_of(PREDICTIONS, label, "a label of 'preference'")
        points[first] += (0.5, 1.0, 0.0)[verdict]
        points[second] += (0.5, 0.0, 1.0)[verdict]
    best = [answer for answer, won in zip(answers, points, strict=True) if won == max(points)]
    if len(best) != 1:
        raise RowRefused("tie", f"{len(best)} answers are equally good")
    return Demonstration((*prompt, best[0]))


def prediction_prompt(row: Row) -> PromptRow:
    return PromptRow(_question_with_passages(row), row)


def _predictions(row: Row) -> tuple[tuple[Message, ...], list[Message], list[Any]]:
    answers = [Message("assistant", text_field(row, name)) for name in prediction_fields(row)]
    labels, expected = list_field(row, "preference"), len(answers) * (len(answers) - 1) // 2
    if len(answers) < 2:
        raise RowRefused("too_few_answers", "'prediction 1' and 'prediction 2' are needed")
    if len(labels) != expected:
        raise RowRefused("wrong_type", f"'preference' has {len(labels)} labels, {len(answers)} answers need {expected}")
    return _question_with_passages(row), answers, labels


def _question_with_passages(row: Row) -> tuple[Message, ...]:
    """The passages that the answers were written from, a block each (title, then sentences), and the question."""
    question = text_field(row, "question")
    passages = list_field(row, "passages") if row.get("passages") is not None else []
    blocks = [_passage(passage, f"passages[{index}]") for index, passage in enumerate(passages)]
    return (Message("user", "\n\n".join([*blocks, question])),)


def _passage(passage: Any, name: str) -> str:
    if not isinstance(passage, list):
        return text_of(passage, name)
    title, *sentences = [text_of(text, name) for text in passage] or [""]
    return f"{title}\n{' '.join(sentences)}" if sentences else title
