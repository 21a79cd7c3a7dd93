"""Fields of a row, type-checked: what is missing or of a wrong type refuses the row by name."""

from collections.abc import Mapping, Sequence
from typing import Any

from align.data.records import Message, RowRefused

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
}


def text_field(row: Mapping[str, Any], name: str, *, default: str | None = None) -> str:
    """A field that must be text; `default` stands for a missing or null one, if given."""
    value = row.get(name)
    if value is None:
        if default is not None:
            return default
        raise RowRefused("missing_field", f"{name!r} is missing" if name not in row else f"{name!r} is null")
    if not isinstance(value, str):
        raise RowRefused("wrong_type", f"{name!r} is {type(value).__name__}, text was expected")
    return value


def message_field(row: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    """A field that must be a list of messages."""
    if row.get(name) is None:
        raise RowRefused("missing_field", f"{name!r} is missing" if name not in row else f"{name!r} is null")
    return messages_of(row[name], name)


def messages_of(value: Any, name: str) -> tuple[Message, ...]:
    """Messages from `[{role, content}]` or ShareGPT's `[{from, value}]`."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RowRefused("wrong_type", f"{name!r} is {type(value).__name__}, a list of messages was expected")
    return tuple(message_of(item, f"{name}[{index}]") for index, item in enumerate(value))


def message_of(item: Any, name: str) -> Message:
    """One message; its role words are unified, its content must be text or a list of text parts."""
    if not isinstance(item, Mapping):
        raise RowRefused("wrong_type", f"{name} is {type(item).__name__}, a message was expected")
    role_key, content_key = ("from", "value") if "from" in item else ("role", "content")
    role = text_field(item, role_key)
    if item.get("tool_calls"):
        raise RowRefused("tools_not_supported", f"{name} calls tools")
    if role.lower() not in ROLES:
        raise RowRefused("unknown_role", f"{name} has the role {role!r}")
    unified = ROLES[role.lower()]
    weight = item.get("loss_weight", item.get("weight"))
    if weight not in (None, 1 if unified == "assistant" else 0):
        raise RowRefused("weight_not_supported", f"{name} has a loss weight of {weight}")
    return Message(unified, _content(item, content_key, name))


def _content(item: Mapping[str, Any], key: str, name: str) -> str:
    value = item.get(key)
    if not isinstance(value, list):
        return text_field(item, key)
    parts = []
    for part in value:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise RowRefused("wrong_type", f"{name} has a content part that is not text")
        parts.append(text_field(part, "text" if "text" in part else "value"))
    return "".join(parts)


def refuse_tools(row: Mapping[str, Any]) -> None:
    """Refuse a row that declares tools: leaving them out would change what is learnt."""
    if row.get("tools") not in (None, "", "[]", []):
        raise RowRefused("tools_not_supported", "the row declares tools")
