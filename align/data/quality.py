"""Which rows may be learnt from: every check has a name, and nothing is repaired."""

from collections.abc import Callable, Sequence
from typing import Any

from align.data.records import (
    Demonstration,
    Message,
    PreferencePair,
    PromptRow,
    Ranking,
    Rated,
    Record,
    RowRefused,
    TextDocument,
    Unpaired,
)


def check_record(record: Record) -> None:
    """The check of this record's type. Raises RowRefused."""
    CHECKS[type(record)](record)


def check_text(document: TextDocument) -> None:
    """Raises RowRefused for a document without text."""
    if not document.text.strip():
        raise RowRefused("empty_text", "'text' is empty")


def check_demonstration(demonstration: Demonstration) -> None:
    """Raises RowRefused unless sound turns lead to a last assistant turn that says something or calls a tool."""
    messages = demonstration.messages
    if not messages or messages[-1].role != "assistant":
        raise RowRefused("roles_do_not_alternate", "the last turn is not the assistant's")
    _check_turns(messages[:-1])
    _check_completion("the answer", messages[-1])


def check_pair(pair: PreferencePair) -> None:
    """Raises RowRefused unless both answers say something, differ, and belong to a sound prompt."""
    _check_completion("'chosen'", pair.chosen)
    _check_completion("'rejected'", pair.rejected)
    _check_turns(pair.prompt)
    if _same(pair.chosen, pair.rejected):
        raise RowRefused("chosen_equals_rejected", "'chosen' and 'rejected' are the same text")


def check_ranking(ranking: Ranking) -> None:
    """Raises RowRefused unless two or more answers, all different, belong to a sound prompt."""
    assert len(ranking.completions) == len(ranking.ranks)
    if len(ranking.completions) < 2:
        raise RowRefused("too_few_answers", "a ranking needs two answers or more")
    _check_answers(ranking)


def check_rated(rated: Rated) -> None:
    """Raises RowRefused unless all answers say something, differ, and belong to a sound prompt."""
    assert len(rated.completions) == len(rated.scores)
    _check_answers(rated)


def _check_answers(listed: Ranking | Rated) -> None:
    if not listed.completions:
        raise RowRefused("empty_completion", "there is no answer")
    for number, completion in enumerate(listed.completions, start=1):
        _check_completion(f"answer {number}", completion)
    _check_turns(listed.prompt)
    seen: dict[Any, int] = {}
    for number, completion in enumerate(listed.completions, start=1):
        first = seen.setdefault(_said(completion), number)
        if first != number:
            raise RowRefused("answers_equal", f"answers {first} and {number} are the same text")


def check_unpaired(unpaired: Unpaired) -> None:
    """Raises RowRefused unless the answer says something and belongs to a sound prompt."""
    _check_completion("'completion'", unpaired.completion)
    _check_turns(unpaired.prompt)


def check_prompt(prompt: PromptRow) -> None:
    """Raises RowRefused unless the turns are in order and the last is the user's, or a tool's."""
    _check_turns(prompt.messages)


CHECKS: dict[type, Callable[[Any], None]] = {
    TextDocument: check_text,
    Demonstration: check_demonstration,
    PreferencePair: check_pair,
    Ranking: check_ranking,
    Rated: check_rated,
    Unpaired: check_unpaired,
    PromptRow: check_prompt,
}

FOLLOWS = {
    "start": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("tool", "assistant"),
}
"""What was before (`call`: an assistant turn that calls tools) -> the roles that may follow."""


def _check_turns(prompt: Sequence[Message]) -> None:
    """Raises RowRefused unless the turns before an answer are in order, none is empty, and an answer may follow.

    After an optional system turn, user and assistant alternate; between an assistant's call and its next turn come
    one or more turns of tools.
    """
    messages = prompt[1:] if prompt and prompt[0].role == "system" else prompt
    if not messages:
        raise RowRefused("empty_prompt", "there is no turn to answer")
    before = "start"
    for turn, message in enumerate(messages, start=1):
        role = message.role
        if role not in FOLLOWS[before]:
            raise RowRefused("roles_do_not_alternate", _out_of_order(turn, role, before))
        # What a tool answers may be empty, and so may the text beside a call.
        if role != "tool" and not message.tool_calls and (not message.content or message.content.isspace()):
            raise RowRefused("empty_prompt", f"turn {turn} is empty")
        before = "call" if message.tool_calls else role
    if before == "call":
        raise RowRefused("roles_do_not_alternate", "the call of a tool before the answer is not answered")
    if before == "assistant":
        raise RowRefused("roles_do_not_alternate", "the last turn before the answer is not the user's")


def _out_of_order(turn: int, role: str, before: str) -> str:
    expected = " or ".join(f"the {allowed}'s" for allowed in FOLLOWS[before])
    after = ", after a call of a tool" if before == "call" else ""
    return f"turn {turn} is the {role}'s, not {expected}{after}"


def _check_completion(name: str, message: Message) -> None:
    if message.role != "assistant":
        raise RowRefused("roles_do_not_alternate", f"{name} is the {message.role}'s turn, not the assistant's")
    if not message.tool_calls and (not message.content or message.content.isspace()):
        raise RowRefused("empty_completion", f"{name} is empty")


def _same(first: Message, second: Message) -> bool:
    return _said(first) == _said(second)


def _said(message: Message) -> tuple[Any, ...]:
    """All that an answer consists of; blanks around a text do not make another answer."""
    return message.content.strip(), message.tool_calls, message.reasoning.strip()
