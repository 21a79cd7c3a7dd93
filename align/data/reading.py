"""One reader a format of texts, conversations, pairs and prompts: a row's fields to a record.

What is missing or of a wrong type refuses the row.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from align.data.fields import Row, field, list_field, number_field, text_field, text_of, wrong_type
from align.data.reading_messages import message_field, message_of
from align.data.reading_tools import tools_field
from align.data.records import Demonstration, Message, PreferencePair, PromptRow, RowRefused, TextDocument, Unpaired

USER_TURN, ASSISTANT_TURN = "\n\nHuman:", "\n\nAssistant:"


def read_text(row: Row) -> TextDocument:
    return TextDocument(text_field(row, "text"))


def read_alpaca(row: Row) -> Demonstration:
    return Demonstration((*alpaca_prompt(row), Message("assistant", text_field(row, "output"))), tools_field(row))


def read_sharegpt(row: Row) -> Demonstration:
    return Demonstration((*system_of(row), *message_field(row, "conversations")), tools_field(row))


def read_messages(row: Row) -> Demonstration:
    return Demonstration(message_field(row, "messages"), tools_field(row))


def read_prompt_completion(row: Row) -> Demonstration:
    return Demonstration((*prompt_of(row, "prompt"), answer_of(row, "completion")), tools_field(row))


def read_question_answer(row: Row) -> Demonstration:
    return Demonstration((*prompt_of(row, "question"), Message("assistant", text_field(row, "answer"))))


def read_labelled(row: Row) -> Demonstration:
    """The text is asked, the label word is the answer."""
    word = row["label"] if "label" in row else None
    if isinstance(word, int) and not isinstance(word, bool):
        word = str(word)
    return Demonstration(
        (Message("user", text_field(row, "text")), Message("assistant", text_field({"label": word}, "label")))
    )


def read_self_instruct(row: Row) -> list[Demonstration]:
    """One demonstration an instance of the task."""
    instruction, found = text_field(row, "instruction"), []
    for instance in list_field(row, "instances"):
        if not isinstance(instance, dict):
            raise wrong_type("an item of 'instances'", instance, "{input, output}")
        ask = Message("user", with_input(instruction, text_field(instance, "input", default="")))
        found.append(Demonstration((ask, Message("assistant", text_field(instance, "output")))))
    if not found:
        raise RowRefused("missing_field", "'instances' is empty")
    return found


def read_preference(row: Row) -> PreferencePair:
    return _pair(row, prompt_of(row, "prompt"), answer_of(row, "chosen"), answer_of(row, "rejected"))


def read_preference_alpaca(row: Row) -> PreferencePair:
    return _pair(row, alpaca_prompt(row), answer_of(row, "chosen"), answer_of(row, "rejected"))


def read_preference_sharegpt(row: Row) -> PreferencePair:
    prompt = (*system_of(row), *message_field(row, "conversations"))
    return _pair(row, prompt, answer_of(row, "chosen"), answer_of(row, "rejected"))


def read_preference_implicit(row: Row) -> PreferencePair:
    suffix = "_messages" if "chosen_messages" in row else ""
    return _pair_of_two(row, message_field(row, f"chosen{suffix}"), message_field(row, f"rejected{suffix}"))


def read_hh_rlhf(row: Row) -> PreferencePair:
    """Two transcripts. Where the openings are one text, it is split into turns once."""
    chosen, rejected = text_field(row, "chosen"), text_field(row, "rejected")
    opening, marker, answer = chosen.rpartition(ASSISTANT_TURN)
    other = rejected[len(opening) + len(marker) :]
    one_opening = marker and rejected.startswith(opening + marker)
    if not one_opening or USER_TURN in answer or USER_TURN in other or ASSISTANT_TURN in other:
        return _pair_of_two(row, split_transcript(chosen), split_transcript(rejected))
    answers = Message("assistant", answer.strip()), Message("assistant", other.strip())
    return _pair(row, split_transcript(opening), *answers)


def with_score(demonstration: Demonstration, row: Row) -> Demonstration:
    """The demonstration with the number in the row's `score`, if there is one: how good its last answer is."""
    try:
        return replace(demonstration, score=number_field(row, "score"))
    except RowRefused:
        return demonstration


def read_judge_prompts(row: Row) -> PreferencePair:
    """Two prompts for a judge that differ in the answer to be judged; turns inside the instruction are turns."""
    (ask, chosen), (other_ask, rejected) = (
        _cut_judge_prompt(text_field(row, name), name) for name in ("chosen_instruction", "rejected_instruction")
    )
    if ask != other_ask:
        raise RowRefused("prompts_differ", "the instructions to evaluate differ")
    prompt = split_transcript(f"{USER_TURN} {ask}")
    return _pair(row, prompt, Message("assistant", chosen), Message("assistant", rejected))


JUDGE_MARKERS = ("###The instruction to evaluate:", "###Response to evaluate:", "###Score Rubrics:")


def _cut_judge_prompt(text: str, name: str) -> tuple[str, str]:
    """The instruction and the answer between the three markers, each of which must be there once, in this order."""
    places = [text.find(marker) for marker in JUDGE_MARKERS]
    if any(text.count(marker) != 1 for marker in JUDGE_MARKERS) or places != sorted(places):
        raise RowRefused("not_a_judge_prompt", f"{name!r} must hold each of {', '.join(JUDGE_MARKERS)} once, in order")
    starts = [place + len(marker) for place, marker in zip(places, JUDGE_MARKERS, strict=True)]
    return text[starts[0] : places[1]].strip(), text[starts[1] : places[2]].strip()


def read_unpaired(row: Row) -> Unpaired:
    """One answer with a verdict: `prompt` and `completion`, or a conversation whose last turn is judged."""
    label = field(row, "label")
    if not isinstance(label, bool):
        raise wrong_type("'label'", label, "true or false")
    if "completion" in row:
        prompt, completion = prompt_of(row, "prompt"), answer_of(row, "completion")
        return Unpaired(prompt, completion, label, tools_field(row))
    name = "messages" if "messages" in row else "conversations"
    messages = (*system_of(row), *message_field(row, name))
    if not messages:
        raise RowRefused("empty_completion", f"{name!r} has no turns")
    return Unpaired(messages[:-1], messages[-1], label, tools_field(row))


def read_prompts(row: Row) -> PromptRow:
    return PromptRow(prompt_of(row, "prompt"), row, tools_field(row))


def read_turns(row: Row) -> PromptRow:
    """The first of the questions that a judge asks in turn."""
    turns = list_field(row, "turns")
    if not turns:
        raise RowRefused("empty_prompt", "'turns' is empty")
    return PromptRow((*system_of(row), Message("user", text_of(turns[0], "turns[0]"))), row)


def read_goal(row: Row) -> PromptRow:
    return PromptRow((Message("user", text_field(row, "Goal" if "Goal" in row else "goal")),), row)


def split_transcript(text: str) -> tuple[Message, ...]:
    """The turns of an hh-rlhf transcript; the blanks around a turn belong to the markers.

    A role word inside a line or after a single line break is text.
    """
    start, *asked = ("\n\n" + text.lstrip()).split(USER_TURN)
    start, *answered = start.split(ASSISTANT_TURN)
    if start.strip():
        raise RowRefused("not_a_transcript", "the text does not start with a turn, such as '\\n\\nHuman:'")
    turns = [Message("assistant", answer.strip()) for answer in answered]
    for piece in asked:
        ask, *answers = piece.split(ASSISTANT_TURN)
        turns.append(Message("user", ask.strip()))
        turns.extend([Message("assistant", answer.strip()) for answer in answers])
    return tuple(turns)


def prompt_of(row: Row, name: str) -> tuple[Message, ...]:
    """A prompt that is text, with the row's `system` before it, or a list of messages."""
    if isinstance(row.get(name), list):
        return message_field(row, name)
    return (*system_of(row), Message("user", text_field(row, name)))


def answer_of(row: Row, name: str) -> Message:
    """The one assistant message that a field holds."""
    value = row.get(name)
    return answer_from(value, name) if isinstance(value, dict | list) else Message("assistant", text_field(row, name))


def answer_from(value: Any, name: str) -> Message:
    """One message, or a list of one."""
    if not isinstance(value, list):
        return message_of(value, name)
    if len(value) != 1:
        raise RowRefused("wrong_type", f"{name!r} has {len(value)} messages, one answer was expected")
    return message_of(value[0], name)


def alpaca_prompt(row: Row) -> tuple[Message, ...]:
    """`instruction` with its `input` on a new line, after `system` and the [question, answer] texts of `history`."""
    messages = system_of(row)
    history = row.get("history")
    for turn in list_field(row, "history") if history is not None and history != "" else ():
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowRefused("wrong_type", "'history' is not a list of [question, answer] texts")
        ask, answer = (text_of(text, "a text of 'history'") for text in turn)
        messages = (*messages, Message("user", ask), Message("assistant", answer))
    ask = with_input(text_field(row, "instruction"), text_field(row, "input", default=""))
    return (*messages, Message("user", ask))


def with_input(instruction: str, text: str) -> str:
    """An instruction, and on a new line what it is about, if anything."""
    return f"{instruction}\n{text}" if text.strip() else instruction


def system_of(row: Row) -> tuple[Message, ...]:
    """The system turn that a row's `system` makes, if it has text."""
    text = text_field(row, "system", default="")
    return (Message("system", text),) if text.strip() else ()


def _pair_of_two(row: Row, chosen: Sequence[Message], rejected: Sequence[Message]) -> PreferencePair:
    """Two whole conversations as a pair: all turns but the last must agree."""
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not side:
            raise RowRefused("empty_completion", f"{name!r} has no turns")
    if tuple(chosen[:-1]) != tuple(rejected[:-1]):
        raise RowRefused("prompts_differ", _difference(chosen[:-1], rejected[:-1]))
    return _pair(row, tuple(chosen[:-1]), chosen[-1], rejected[-1])


def _difference(chosen: Sequence[Message], rejected: Sequence[Message]) -> str:
    if len(chosen) != len(rejected):
        return f"before the answer, chosen has {len(chosen)} turns and rejected has {len(rejected)}"
    turn = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=True)) if a != b)
    return f"chosen and rejected differ in turn {turn + 1}, before the answer"


def _pair(row: Row, prompt: tuple[Message, ...], chosen: Message, rejected: Message) -> PreferencePair:
    return PreferencePair(prompt, chosen, rejected, **pair_extras(row))


def pair_extras(row: Row) -> dict[str, Any]:
    """What a row with `chosen` and `rejected` may say besides: margin, p, tie, score_chosen and score_rejected, tools.

    Raises: RowRefused for scores that rate the rejected answer higher.
    """
    extras: dict[str, Any] = {}
    if row.get("tools") is not None:
        extras["tools"] = tools_field(row)
    if row.get("margin") is not None:
        extras["margin"] = number_field(row, "margin")
    if row.get("p") is not None:
        extras["p"] = _probability(row)
    if row.get("score_chosen") is not None and row.get("score_rejected") is not None:
        higher, lower = number_field(row, "score_chosen"), number_field(row, "score_rejected")
        if higher < lower:
            raise RowRefused("scores_contradict", f"'chosen' scores {higher:g}, less than 'rejected' with {lower:g}")
        if higher == lower:
            extras |= {"p": extras.get("p", 0.5), "tie": True}
        extras["scores"] = (higher, lower)
    if row.get("tie") is not None:
        if not isinstance(row["tie"], bool):
            raise wrong_type("'tie'", row["tie"], "true or false")
        if row["tie"]:
            extras |= {"p": extras.get("p", 0.5), "tie": True}
    return extras


def _probability(row: Row) -> float:
    p = number_field(row, "p")
    if not 0.5 <= p <= 1:
        raise RowRefused("bad_probability", f"'p' is {p:g}: chosen must be the better answer with 0.5 to 1")
    return p
