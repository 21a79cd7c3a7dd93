"""What a row becomes: small types that every format is read into."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from align.config.errors import UserError


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool by the assistant; `arguments` is the JSON text of an object."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; role is `system`, `user`, `assistant` or `tool` (what a tool answered)."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""
    """Assistant only: what was thought before the answer."""
    name: str = ""
    """Tool only: the tool that answered, where the row says."""
    tool_call_id: str = ""
    """Tool only: the call that is answered, where the row says."""

    def as_dict(self) -> dict[str, Any]:
        """The shape that chat templates read; a plain turn has `role` and `content` alone."""
        value: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning:
            value["reasoning_content"] = self.reasoning
        if self.tool_calls:
            value["tool_calls"] = [_call_as_dict(call) for call in self.tool_calls]
        extra = {"name": self.name, "tool_call_id": self.tool_call_id}
        return value | {key: text for key, text in extra.items() if text}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Message":
        """The turn whose `as_dict` this is."""
        return cls(
            value["role"], value["content"], tuple(_call_from_dict(call) for call in value.get("tool_calls", ())),
            value.get("reasoning_content", ""), value.get("name", ""), value.get("tool_call_id", ""),
        )  # fmt: skip


def _call_as_dict(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.loads(call.arguments)}
    return {"type": "function", "function": function} | ({"id": call.id} if call.id else {})


def _call_from_dict(call: Mapping[str, Any]) -> ToolCall:
    function = call["function"]
    return ToolCall(function["name"], json.dumps(function["arguments"], ensure_ascii=False), call.get("id", ""))


@dataclass(frozen=True)
class Origin:
    """Where a row was found: `file:812` for formats with lines, `file row 812` for the others. Counted from 1."""

    path: str
    number: int
    has_lines: bool = True

    def __str__(self) -> str:
        return f"{self.path}:{self.number}" if self.has_lines else f"{self.path} row {self.number}"

    @classmethod
    def parse(cls, text: str) -> "Origin":
        """The origin that `str` gave."""
        lines = re.fullmatch(r"(.*):(\d+)", text, re.DOTALL)
        path, number = lines.groups() if lines else text.rsplit(" row ", 1)
        return cls(path, int(number), has_lines=lines is not None)


@dataclass(frozen=True)
class TextDocument:
    """A plain document for continued pretraining."""

    text: str


@dataclass(frozen=True)
class Demonstration:
    """A conversation whose assistant turns are to be learnt."""

    messages: tuple[Message, ...]
    tools: tuple[str, ...] = ()
    """JSON text of each tool that the assistant may call, as chat templates read it."""
    score: float | None = None
    """Of the last answer, where the row rates it: larger is better."""


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt; p is the probability that chosen is the better one, at least 0.5."""

    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    p: float = 1.0
    margin: float = 0.0
    tie: bool = False
    """The verdict is a tie: of one judge, or of most annotators. `data.ties` says what becomes of it."""
    tools: tuple[str, ...] = ()
    scores: tuple[float, float] | None = None
    """Of chosen and of rejected, where the row rates both: larger is better."""


@dataclass(frozen=True)
class Ranking:
    """Several answers to one prompt with their ranks: smaller is better, equal is a tie."""

    prompt: tuple[Message, ...]
    completions: tuple[Message, ...]
    ranks: tuple[float, ...]
    tools: tuple[str, ...] = ()
    scores: tuple[float, ...] | None = None
    """Of each answer, where the row rates them; the ranks are then their negatives."""


@dataclass(frozen=True)
class Rated:
    """One answer or more to one prompt, each with a score that means the same in every row: larger is better."""

    prompt: tuple[Message, ...]
    completions: tuple[Message, ...]
    scores: tuple[float, ...]
    tools: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unpaired:
    """One answer to a prompt, with a verdict on it alone (KTO)."""

    prompt: tuple[Message, ...]
    completion: Message
    desirable: bool
    tools: tuple[str, ...] = ()


@dataclass(frozen=True)
class PromptRow:
    """A conversation that ends in the turn to be answered; `row` is what it came from, for a judge."""

    messages: tuple[Message, ...]
    row: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[str, ...] = ()


@dataclass(frozen=True)
class BadRow:
    """A row, or one of the records that it makes, that was left out, and why."""

    origin: Origin
    reason: str
    detail: str
    row: Any


Record = TextDocument | Demonstration | PreferencePair | Ranking | Rated | Unpaired | PromptRow


class RowRefused(UserError):
    """One row cannot be used: `reason` is a countable name, `detail` one sentence about this row."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
