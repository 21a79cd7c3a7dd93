"""The formats that rows come in: a table, each with what it looks like and how it is read; docs/data.md shows rows.

Demonstrations
text                   text (a document)
alpaca                 instruction, [input], [system], [history], output
sharegpt               conversations [{from, value}], [system]
messages               messages [{role, content}]
prompt_completion      prompt, completion (text or messages)
question_answer        question, answer
labelled               text, label (a word or a number)
self_instruct          instruction, instances [{input, output}]

Preferences, in pairs
preference             prompt, chosen, rejected (text or messages)
preference_alpaca      instruction, [input], [system], [history], chosen, rejected
preference_sharegpt    conversations, chosen, rejected (one message each)
preference_implicit    chosen, rejected: whole conversations as messages
hh_rlhf                chosen, rejected: whole transcripts, `\\n\\nHuman: ... \\n\\nAssistant: ...`
judge_prompts          chosen_instruction, rejected_instruction: prompts for a judge, with ### markers
comparison_label       a prompt, two answers (output_1 output_2, response_0 response_1, answer_a answer_b), a label
comparison_scores      a prompt, two answers and their scores (score_1 score_2, score_a score_b)
votes                  a prompt, two answers, annotator1 annotator2 ..., or votes
pairwise_labels        question, [passages], `prediction 1` `prediction 2` ..., preference: a label for each two

Preferences, in rankings, or of one answer alone
ranking                a prompt, completions (or responses, answers): a list, with ranks or scores
oasst_tree             text, role, rank, replies: a tree of turns, or a prompt that is one
unpaired               prompt and completion, or messages, and label: true or false

Prompts
prompts                prompt (text or messages)
turns                  turns: the questions of a judge; the first is used
goal                   goal, or Goal
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from align.config.errors import UserError
from align.config.schema import Ties
from align.data import reading, reading_ranked, reading_trees
from align.data.converting import READ_AS, as_wanted
from align.data.fields import Row
from align.data.records import (
    Demonstration,
    PreferencePair,
    PromptRow,
    Ranking,
    Rated,
    Record,
    RowRefused,
    TextDocument,
    Unpaired,
)

Read = Record | list[Record | RowRefused]


@dataclass(frozen=True)
class Format:
    """One way to write rows. `matches` looks at field names and outer types; `read` refuses what is wrong inside."""

    name: str
    record: type
    matches: Callable[[Row], bool]
    read: Callable[[Row], Read]
    read_demonstration: Callable[[Row], Read] | None = None
    """Where a row as a demonstration is not the best answer of each record that `read` makes."""
    read_prompt: Callable[[Row], Read] | None = None
    """Where a row's prompt is not that of each record."""
    doubt: Callable[[Sequence[Row]], str | None] = lambda rows: None
    """What the first rows leave open, so that the format is only taken by name."""


def _has(row: Row, *names: str, without: tuple[str, ...] = ()) -> bool:
    return all(name in row for name in names) and not any(name in row for name in without)


def _has_any(row: Row, *names: str) -> bool:
    return any(name in row for name in names)


def _is_list(row: Row, name: str) -> bool:
    return isinstance(row.get(name), list)


ANSWERS = ("completion", "chosen", "rejected", "label")


def _two_conversations(row: Row) -> bool:
    """A list of more than one message is a conversation; beside a prompt, a list of one is an answer."""
    sides = [row["chosen"], row["rejected"]]
    return all(isinstance(side, list) for side in sides) and ("prompt" not in row or any(len(s) > 1 for s in sides))


def _implicit(row: Row) -> bool:
    if _has(row, "chosen_messages", "rejected_messages"):
        return True
    return _has(row, "chosen", "rejected", without=("conversations",)) and _two_conversations(row)


def _transcripts(row: Row) -> bool:
    sides = [row.get("chosen"), row.get("rejected")]
    starts = all(isinstance(side, str) and side.lstrip().startswith("Human:") for side in sides)
    return starts and "prompt" not in row


def _compared(row: Row) -> bool:
    return bool(reading_ranked.two_answers(row))


def _scored(row: Row) -> bool:
    """Two answers with scores of their own; `scores` in a list belong to a ranking."""
    found = reading_ranked.two_answers(row)
    return any(all(f"score_{suffix}" in row for suffix in two.suffixes) for two in found)


def _ranked(row: Row) -> bool:
    if not any(_is_list(row, name) for name in reading_ranked.LISTS):
        return False
    return _has(row, "ranks") or _has(row, "scores") or reading_ranked.ranks_inside(row)


def _several_answers(row: Row) -> bool:
    return _has(row, "chosen", "rejected") or _compared(row) or _ranked(row)


def _conversation(row: Row, name: str) -> bool:
    """A list of messages that are all there is to learn."""
    return _is_list(row, name) and not _has_any(row, *ANSWERS) and not _several_answers(row)


def _unpaired(row: Row) -> bool:
    talk = _is_list(row, "messages") or _is_list(row, "conversations")
    return "label" in row and (talk or _has(row, "prompt", "completion")) and not _several_answers(row)


def _labelled(row: Row) -> bool:
    word = row.get("label")
    named = isinstance(word, str | int) and not isinstance(word, bool)
    others = ("messages", "conversations", "replies", "prompt", "completion", "instruction", "question")
    return named and isinstance(row.get("text"), str) and not _has_any(row, *others)


def _prompts(row: Row) -> bool:
    answered = _has_any(row, "completion", "chosen", "rejected") or _several_answers(row)
    return isinstance(row.get("prompt"), str | list) and not answered


TABLE = (
    Format(
        "text",
        TextDocument,
        lambda row: _has(row, "text", without=("messages", "conversations", "replies")),
        reading.read_text,
    ),
    Format("alpaca", Demonstration, lambda row: _has(row, "instruction", "output"), reading.read_alpaca),
    Format(
        "sharegpt",
        Demonstration,
        lambda row: _conversation(row, "conversations"),
        reading.read_sharegpt,
    ),
    Format(
        "messages",
        Demonstration,
        lambda row: _conversation(row, "messages"),
        reading.read_messages,
    ),
    Format(
        "prompt_completion",
        Demonstration,
        lambda row: _has(row, "prompt", "completion", without=("label",)),
        reading.read_prompt_completion,
    ),
    Format("question_answer", Demonstration, lambda row: _has(row, "question", "answer"), reading.read_question_answer),
    Format("labelled", Demonstration, _labelled, reading.read_labelled),
    Format(
        "self_instruct",
        Demonstration,
        lambda row: _has(row, "instruction") and _is_list(row, "instances"),
        reading.read_self_instruct,
    ),
    Format(
        "preference",
        PreferencePair,
        lambda row: _has(row, "prompt", "chosen", "rejected") and not _two_conversations(row),
        reading.read_preference,
    ),
    Format(
        "preference_alpaca",
        PreferencePair,
        lambda row: _has(row, "instruction", "chosen", "rejected"),
        reading.read_preference_alpaca,
    ),
    Format(
        "preference_sharegpt",
        PreferencePair,
        lambda row: _has(row, "conversations", "chosen", "rejected"),
        reading.read_preference_sharegpt,
    ),
    Format("preference_implicit", PreferencePair, _implicit, reading.read_preference_implicit),
    Format("hh_rlhf", PreferencePair, _transcripts, reading.read_hh_rlhf),
    Format(
        "judge_prompts",
        PreferencePair,
        lambda row: _has(row, "chosen_instruction", "rejected_instruction"),
        reading.read_judge_prompts,
    ),
    Format(
        "comparison_label",
        PreferencePair,
        lambda row: _compared(row) and bool(reading_ranked.label_fields(row)),
        reading_ranked.read_comparison_label,
        doubt=reading_ranked.doubtful_labels,
    ),
    Format("comparison_scores", PreferencePair, _scored, reading_ranked.read_comparison_scores),
    Format(
        "votes",
        PreferencePair,
        lambda row: _compared(row) and bool(reading_ranked.vote_fields(row)),
        reading_ranked.read_votes,
    ),
    Format(
        "pairwise_labels",
        PreferencePair,
        lambda row: len(reading_ranked.prediction_fields(row)) > 1 and _is_list(row, "preference"),
        reading_ranked.read_pairwise_labels,
        read_demonstration=reading_ranked.best_prediction,
        read_prompt=reading_ranked.prediction_prompt,
    ),
    Format("ranking", Ranking, _ranked, reading_ranked.read_ranking),
    Format(
        "oasst_tree",
        Ranking,
        reading_trees.is_tree,
        reading_trees.read_tree,
        read_demonstration=reading_trees.best_conversation,
        read_prompt=reading_trees.root_prompt,
    ),
    Format("unpaired", Unpaired, _unpaired, reading.read_unpaired),
    Format("prompts", PromptRow, _prompts, reading.read_prompts),
    Format("turns", PromptRow, lambda row: _is_list(row, "turns"), reading.read_turns),
    Format("goal", PromptRow, lambda row: _has_any(row, "goal", "Goal") and "prompt" not in row, reading.read_goal),
)
FORMATS = {entry.name: entry for entry in TABLE}


def find_format(rows: Sequence[Row], wanted: type | None, where: str) -> Format:
    """The one format that most of the first rows match, among those that can become the `wanted` record.

    Raises: UserError naming the candidates if there are two, or the fields found if there is none.
    """
    found = [entry for entry in TABLE if 2 * sum(map(entry.matches, rows)) > len(rows)]
    able = [entry for entry in found if entry.record in READ_AS[wanted]]
    if wanted is not TextDocument and FORMATS["labelled"] in able:
        # What a label says of a text would be lost in a document.
        able = [entry for entry in able if entry.record is not TextDocument]
    if len(able) > 1:
        names = " or ".join(entry.name for entry in able)
        raise UserError(f"{where}: the rows can be read as {names}; say which with format={able[0].name}")
    if len(able) == 1:
        doubt = able[0].doubt(rows)
        if doubt:
            raise UserError(f"{where}: {doubt}")
        return able[0]
    if found:
        raise UserError(f"{where}: {_cannot(found[0], wanted)}")
    fields = ", ".join(map(str, rows[0])) or "no fields"
    raise UserError(
        f"{where}: no format fits rows with the fields {fields}; known here: {_names_of_able(wanted)}; "
        "rename the fields, or name the format with format="
    )


def named_format(name: str, wanted: type | None, where: str) -> Format:
    """The format that the user named.

    Raises: UserError if there is none of this name, or its rows cannot become the `wanted` record.
    """
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{where}: there is no format {name} (auto, {', '.join(FORMATS)}){hint}")
    if FORMATS[name].record not in READ_AS[wanted]:
        raise UserError(f"{where}: {_cannot(FORMATS[name], wanted)}")
    return FORMATS[name]


def _cannot(entry: Format, wanted: type | None) -> str:
    if entry.record is Unpaired and wanted is PreferencePair:
        return (
            "the rows are unpaired: one answer with a verdict, and no other answer to compare it with. They teach KTO, "
            "not pairs; rows with chosen and rejected do"
        )
    return f"rows in format {entry.name} cannot be used here; formats that can: {_names_of_able(wanted)}"


def _names_of_able(wanted: type | None) -> str:
    return ", ".join(entry.name for entry in TABLE if entry.record in READ_AS[wanted])


def as_records(row_format: Format, wanted: type | None, row: Row, *, ties: Ties) -> list[Record | RowRefused]:
    """The row as records of the `wanted` type; None leaves them as the format makes them.

    An element that is a RowRefused is one record of the row that is left out, such as one branch of a tree.
    Raises: RowRefused if the whole row cannot be used.
    """
    read = {Demonstration: row_format.read_demonstration, PromptRow: row_format.read_prompt}.get(wanted)
    made = (read or row_format.read)(row)
    if wanted in (None, Rated) and isinstance(made, Demonstration):
        made = reading.with_score(made, row)
    return as_wanted(made if isinstance(made, list) else [made], wanted, row, ties)
