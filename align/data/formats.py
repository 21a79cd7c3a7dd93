"""The formats that rows come in: a table, each with what it looks like and how it is read.

text                   text
alpaca                 instruction, [input], [system], [history], output
sharegpt               conversations [{from, value}]
messages               messages [{role, content}]
prompt_completion      prompt, completion (text or messages)
question_answer        question, answer
preference             prompt, chosen, rejected (text or messages)
preference_alpaca      instruction, [input], [system], [history], chosen, rejected
preference_sharegpt    conversations, chosen, rejected (one message each)
preference_implicit    chosen, rejected: whole conversations as messages
hh_rlhf                chosen, rejected: whole transcripts, `\\n\\nHuman: ... \\n\\nAssistant: ...`
prompts                prompt (text or messages)
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from align.config.errors import UserError
from align.data.reading import (
    Row,
    read_alpaca,
    read_hh_rlhf,
    read_messages,
    read_preference,
    read_preference_alpaca,
    read_preference_implicit,
    read_preference_sharegpt,
    read_prompt_completion,
    read_prompts,
    read_question_answer,
    read_sharegpt,
    read_text,
)
from align.data.records import Demonstration, PreferencePair, PromptRow, TextDocument

Record = TextDocument | Demonstration | PreferencePair | PromptRow


@dataclass(frozen=True)
class Format:
    """One way to write rows. `matches` looks at field names and outer types; `read` refuses what is wrong inside."""

    name: str
    record: type
    matches: Callable[[Row], bool]
    read: Callable[[Row], Record]


def _has(row: Row, *names: str, without: tuple[str, ...] = ()) -> bool:
    return all(name in row for name in names) and not any(name in row for name in without)


def _is_list(row: Row, name: str) -> bool:
    return isinstance(row.get(name), list)


ANSWERS = ("completion", "chosen", "rejected", "label")

FORMATS = {
    entry.name: entry
    for entry in (
        Format("text", TextDocument, lambda row: _has(row, "text", without=("messages", "conversations")), read_text),
        Format("alpaca", Demonstration, lambda row: _has(row, "instruction", "output"), read_alpaca),
        Format(
            "sharegpt",
            Demonstration,
            lambda row: _has(row, "conversations", without=ANSWERS) and _is_list(row, "conversations"),
            read_sharegpt,
        ),
        Format(
            "messages",
            Demonstration,
            lambda row: _has(row, "messages", without=ANSWERS) and _is_list(row, "messages"),
            read_messages,
        ),
        Format(
            "prompt_completion",
            Demonstration,
            lambda row: _has(row, "prompt", "completion", without=("label",)),
            read_prompt_completion,
        ),
        Format("question_answer", Demonstration, lambda row: _has(row, "question", "answer"), read_question_answer),
        Format(
            "preference",
            PreferencePair,
            lambda row: _has(row, "prompt", "chosen", "rejected") and not _two_conversations(row),
            read_preference,
        ),
        Format(
            "preference_alpaca",
            PreferencePair,
            lambda row: _has(row, "instruction", "chosen", "rejected"),
            read_preference_alpaca,
        ),
        Format(
            "preference_sharegpt",
            PreferencePair,
            lambda row: _has(row, "conversations", "chosen", "rejected"),
            read_preference_sharegpt,
        ),
        Format(
            "preference_implicit",
            PreferencePair,
            lambda row: (
                _has(row, "chosen_messages", "rejected_messages")
                or (_has(row, "chosen", "rejected", without=("conversations",)) and _two_conversations(row))
            ),
            read_preference_implicit,
        ),
        Format(
            "hh_rlhf",
            PreferencePair,
            lambda row: _has(row, "chosen", "rejected", without=("prompt",)) and _transcripts(row),
            read_hh_rlhf,
        ),
        Format(
            "prompts",
            PromptRow,
            lambda row: _has(row, "prompt", without=("completion", "chosen", "rejected")),
            read_prompts,
        ),
    )
}


def _two_conversations(row: Row) -> bool:
    """A list of more than one message is a conversation; beside a prompt, a list of one is an answer."""
    sides = [row["chosen"], row["rejected"]]
    return all(isinstance(side, list) for side in sides) and ("prompt" not in row or any(len(s) > 1 for s in sides))


def _transcripts(row: Row) -> bool:
    sides = (row["chosen"], row["rejected"])
    return all(isinstance(side, str) and side.lstrip().startswith("Human:") for side in sides)


READ_AS = {
    TextDocument: (TextDocument,),
    Demonstration: (Demonstration, PreferencePair),
    PreferencePair: (PreferencePair,),
    PromptRow: (PromptRow, Demonstration, PreferencePair),
}
"""Record that a slot needs -> records it can be made from."""


def find_format(rows: Sequence[Row], wanted: type, where: str) -> Format:
    """The one format that most of the first rows match, among those that can become the `wanted` record.

    Raises: UserError naming the candidates if there are two, or the fields found if there is none.
    """
    able = [entry for entry in FORMATS.values() if entry.record in READ_AS[wanted]]
    found = [entry for entry in able if 2 * sum(map(entry.matches, rows)) > len(rows)]
    if len(found) == 1:
        return found[0]
    if found:
        names = " or ".join(entry.name for entry in found)
        raise UserError(f"{where}: the rows can be read as {names}; say which with format={found[0].name}")
    fields = ", ".join(map(str, rows[0])) or "no fields"
    raise UserError(
        f"{where}: no format fits rows with the fields {fields}; known here: "
        f"{', '.join(entry.name for entry in able)}; rename the fields, or name the format with format="
    )


def named_format(name: str, wanted: type, where: str) -> Format:
    """The format that the user named.

    Raises: UserError if there is none of this name, or its rows cannot become the `wanted` record.
    """
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{where}: there is no format {name} (auto, {', '.join(FORMATS)}){hint}")
    if FORMATS[name].record not in READ_AS[wanted]:
        able = ", ".join(entry.name for entry in FORMATS.values() if entry.record in READ_AS[wanted])
        raise UserError(f"{where}: rows in format {name} cannot be used here; formats that can: {able}")
    return FORMATS[name]


def to_demonstration(record: Record) -> Demonstration:
    """A conversation to be learnt: a pair's prompt with its chosen answer."""
    if isinstance(record, PreferencePair):
        return Demonstration((*record.prompt, record.chosen))
    assert isinstance(record, Demonstration)
    return record


def to_prompt(record: Record, row: Row) -> PromptRow:
    """The conversation up to the turn to be answered; a demonstration's last assistant turn is left out."""
    if isinstance(record, PromptRow):
        return record
    if isinstance(record, PreferencePair):
        return PromptRow(record.prompt, row)
    assert isinstance(record, Demonstration)
    messages = record.messages
    return PromptRow(messages[:-1] if messages and messages[-1].role == "assistant" else messages, row)
