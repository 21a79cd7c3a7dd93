"""Messages of a row: OpenAI's and ShareGPT's, typed parts, calls of tools and their answers, to one Message each."""

from collections.abc import Mapping
from typing import Any

from align.data.fields import Row, field, text_field, wrong_type
from align.data.reading_tools import tool_calls_of
from align.data.records import Message, RowRefused, ToolCall

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
REASONING_PARTS = ("reasoning", "thinking")


def message_field(row: Row, name: str) -> tuple[Message, ...]:
    """A field that must be a list of messages."""
    return messages_of(field(row, name), name)


def messages_of(value: Any, name: str) -> tuple[Message, ...]:
    """Messages from `[{role, content}]` or ShareGPT's `[{from, value}]`."""
    if not isinstance(value, list | tuple):
        raise wrong_type(repr(name), value, "a list of messages")
    return tuple(message_of(item, f"{name}[{index}]") for index, item in enumerate(value))


def message_of(item: Any, name: str) -> Message:
    """One message; its role words are unified, its content must be text or typed parts of text."""
    if not isinstance(item, Mapping):
        raise wrong_type(name, item, "a message")
    role_key, content_key = ("from", "value") if "from" in item else ("role", "content")
    word = text_field(item, role_key).lower()
    if word not in ROLES:
        raise RowRefused("unknown_role", f"{name} has the role {word!r}")
    role = ROLES[word]
    _refuse_weight(item, role, name)
    if word == "function_call":
        return Message(role, "", tool_calls_of(field(item, content_key), name))
    if role == "assistant":
        return _assistant(item, content_key, name)
    if item.get("tool_calls"):
        raise RowRefused("bad_tool_call", f"{name} calls tools, but is the {role}'s turn")
    content, calls, reasoning = _parts(item, content_key, name)
    if calls or reasoning:
        raise RowRefused("wrong_type", f"{name} is the {role}'s turn, but holds calls or reasoning")
    if role != "tool":
        return Message(role, content)
    return Message(
        role,
        content,
        name=text_field(item, "name", default=""),
        tool_call_id=text_field(item, "tool_call_id", default=""),
    )


def _assistant(item: Row, content_key: str, name: str) -> Message:
    listed = item.get("tool_calls")
    calls = tool_calls_of(listed, name) if listed else ()
    if calls and item.get(content_key) is None:
        content, in_parts, reasoning = "", (), ""
    else:
        content, in_parts, reasoning = _parts(item, content_key, name)
    return Message("assistant", content, (*calls, *in_parts), reasoning or _reasoning(item))


def _reasoning(item: Row) -> str:
    return text_field(item, "reasoning_content", default="")


def _parts(item: Row, key: str, name: str) -> tuple[str, tuple[ToolCall, ...], str]:
    """Text, calls and reasoning of a content that is text or a list of typed parts; parts of one kind are joined."""
    parts = item.get(key)
    if not isinstance(parts, list):
        return text_field(item, key), (), ""
    texts, calls, reasoning = [], [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            texts.append(_part_text(part, kind))
        elif kind in REASONING_PARTS:
            reasoning.append(_part_text(part, kind))
        elif kind == "tool_call":
            calls.extend(tool_calls_of(field(part, "value"), name))
        else:
            raise RowRefused("wrong_type", f"{name} has a content part that is not text")
    return "".join(texts), tuple(calls), "".join(reasoning)


def _part_text(part: Row, kind: str) -> str:
    return text_field(part, next((key for key in (kind, "text") if key in part), "value"))


def _refuse_weight(item: Row, role: str, name: str) -> None:
    """A weight other than the usual one (answers 1, all else 0) would be lost without a word."""
    weight = item.get("loss_weight", item.get("weight"))
    if weight not in (None, 1 if role == "assistant" else 0):
        raise RowRefused("weight_not_supported", f"{name} has a loss weight of {str(weight)[:20]}")
