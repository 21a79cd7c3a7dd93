"""One reader a format: a row's fields to a record. What is missing or of a wrong type refuses the row."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from align.data.fields import message_field, message_of, messages_of, refuse_tools, text_field
from align.data.records import Demonstration, Message, PreferencePair, PromptRow, RowRefused, TextDocument

Row = Mapping[str, Any]

TURN = re.compile(r"\n\n(Human|Assistant):")
TURN_ROLES = {"Human": "user", "Assistant": "assistant"}


def read_text(row: Row) -> TextDocument:
    return TextDocument(text_field(row, "text"))


def read_alpaca(row: Row) -> Demonstration:
    return Demonstration((*_alpaca_prompt(row), Message("assistant", text_field(row, "output"))))


def read_sharegpt(row: Row) -> Demonstration:
    refuse_tools(row)
    system = text_field(row, "system", default="")
    return Demonstration((*_system(system), *message_field(row, "conversations")))


def read_messages(row: Row) -> Demonstration:
    refuse_tools(row)
    return Demonstration(message_field(row, "messages"))


def read_prompt_completion(row: Row) -> Demonstration:
    refuse_tools(row)
    return Demonstration((*_prompt(row, "prompt"), _answer(row, "completion")))


def read_question_answer(row: Row) -> Demonstration:
    question, answer = text_field(row, "question"), text_field(row, "answer")
    return Demonstration((Message("user", question), Message("assistant", answer)))


def read_preference(row: Row) -> PreferencePair:
    refuse_tools(row)
    return PreferencePair(_prompt(row, "prompt"), _answer(row, "chosen"), _answer(row, "rejected"))


def read_preference_alpaca(row: Row) -> PreferencePair:
    return PreferencePair(_alpaca_prompt(row), _answer(row, "chosen"), _answer(row, "rejected"))


def read_preference_sharegpt(row: Row) -> PreferencePair:
    refuse_tools(row)
    prompt = (*_system(text_field(row, "system", default="")), *message_field(row, "conversations"))
    return PreferencePair(prompt, _answer(row, "chosen"), _answer(row, "rejected"))


def read_preference_implicit(row: Row) -> PreferencePair:
    refuse_tools(row)
    suffix = "_messages" if "chosen_messages" in row else ""
    return _pair_of(message_field(row, f"chosen{suffix}"), message_field(row, f"rejected{suffix}"))


def read_hh_rlhf(row: Row) -> PreferencePair:
    return _pair_of(split_transcript(text_field(row, "chosen")), split_transcript(text_field(row, "rejected")))


def read_prompts(row: Row) -> PromptRow:
    return PromptRow(_prompt(row, "prompt"), row)


def split_transcript(text: str) -> tuple[Message, ...]:
    """The turns of an hh-rlhf transcript; the blanks around a turn belong to the markers.

    A role word inside a line or after a single line break is text.
    """
    pieces = TURN.split("\n\n" + text.lstrip())
    if pieces[0].strip():
        raise RowRefused("not_a_transcript", "the text does not start with a turn, such as '\\n\\nHuman:'")
    turns = zip(pieces[1::2], pieces[2::2], strict=True)
    return tuple(Message(TURN_ROLES[role], content.strip()) for role, content in turns)


def _pair_of(chosen: Sequence[Message], rejected: Sequence[Message]) -> PreferencePair:
    """Two whole conversations as a pair: all turns but the last must agree."""
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not side:
            raise RowRefused("empty_completion", f"{name!r} has no turns")
    if tuple(chosen[:-1]) != tuple(rejected[:-1]):
        raise RowRefused("prompts_differ", _difference(chosen[:-1], rejected[:-1]))
    return PreferencePair(tuple(chosen[:-1]), chosen[-1], rejected[-1])


def _difference(chosen: Sequence[Message], rejected: Sequence[Message]) -> str:
    if len(chosen) != len(rejected):
        return f"before the answer, chosen has {len(chosen)} turns and rejected has {len(rejected)}"
    turn = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=True)) if a != b)
    return f"chosen and rejected differ in turn {turn + 1}, before the answer"


def _prompt(row: Row, name: str) -> tuple[Message, ...]:
    if isinstance(row.get(name), list):
        return message_field(row, name)
    return (*_system(text_field(row, "system", default="")), Message("user", text_field(row, name)))


def _answer(row: Row, name: str) -> Message:
    """The one assistant message that a field holds: as text, as a message, or as a list of one message."""
    value = row.get(name)
    if isinstance(value, Mapping):
        return message_of(value, name)
    if not isinstance(value, list):
        return Message("assistant", text_field(row, name))
    messages = messages_of(value, name)
    if len(messages) != 1:
        raise RowRefused("wrong_type", f"{name!r} has {len(messages)} messages, one answer was expected")
    return messages[0]


def _alpaca_prompt(row: Row) -> tuple[Message, ...]:
    messages = _system(text_field(row, "system", default=""))
    for turn in row.get("history") or ():
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise RowRefused("wrong_type", "'history' is not a list of [question, answer] texts")
        messages = (*messages, Message("user", turn[0]), Message("assistant", turn[1]))
    instruction, extra = text_field(row, "instruction"), text_field(row, "input", default="")
    return (*messages, Message("user", f"{instruction}\n{extra}" if extra.strip() else instruction))


def _system(text: str) -> tuple[Message, ...]:
    return (Message("system", text),) if text.strip() else ()
