"""Tools in a row: those that the assistant may call, and its calls, to JSON texts of one shape."""

import json
from collections.abc import Mapping
from typing import Any

from align.data.fields import Row, text_field, text_of
from align.data.records import RowRefused, ToolCall


def tools_field(row: Row, name: str = "tools") -> tuple[str, ...]:
    """The tools that a row declares, as a list or as the JSON text of one; null, `""` and `[]` are none.

    A bare `{name, description, parameters}` becomes `{"type": "function", "function": ...}`, as chat templates read it.
    """
    value = row.get(name)
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        value = _loads(value, "bad_tools", f"{name!r}")
    if not isinstance(value, list):
        raise RowRefused("bad_tools", f"{name!r} is {type(value).__name__}, a list of tools was expected")
    return tuple(_tool(item, f"{name}[{index}]") for index, item in enumerate(value))


def _tool(item: Any, name: str) -> str:
    if isinstance(item, str):
        item = _loads(item, "bad_tools", name)
    function = item.get("function", item) if isinstance(item, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowRefused("bad_tools", f"{name} is no tool with a name")
    return _dumps(item if "function" in item else {"type": "function", "function": item}, "bad_tools", name)


def tool_calls_of(value: Any, name: str) -> tuple[ToolCall, ...]:
    """Calls from one call or a list of them, or the JSON text of either."""
    if isinstance(value, str):
        value = _loads(value, "bad_tool_call", name)
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise RowRefused("bad_tool_call", f"{name} holds no call")
    return tuple(_tool_call(call, name) for call in calls)


def _tool_call(call: Any, name: str) -> ToolCall:
    """`{name, arguments}`, or OpenAI's `{id, type, function: {name, arguments}}`."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise RowRefused("bad_tool_call", f"{name} is no call of a tool: it has no name")
    return ToolCall(
        text_of(function["name"], name),
        _arguments(function.get("arguments"), name),
        text_field(call, "id", default=""),
    )


def _arguments(value: Any, name: str) -> str:
    """The JSON text of an object; a text that is one already stays as it is."""
    found = _loads(value, "bad_tool_call", name) if isinstance(value, str) else value
    if not isinstance(found, Mapping):
        raise RowRefused("bad_tool_call", f"{name} calls a tool with arguments that are no JSON object")
    return value if isinstance(value, str) else _dumps(value, "bad_tool_call", name)


def _loads(text: str, reason: str, name: str) -> Any:
    """JSON, strictly: NaN is none, and neither are halves of characters."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise RowRefused(reason, f"{name} is not sound JSON: {str(error)[:80]}") from error
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _dumps(value: Any, reason: str, name: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise RowRefused(reason, f"{name} cannot be written as JSON: {str(error)[:80]}") from error
    return text
