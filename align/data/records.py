"""What a row becomes: small types that every format is read into."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from align.config.errors import UserError


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; role is `system`, `user` or `assistant`."""

    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        """The shape that chat templates read."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Origin:
    """Where a row was found: `file:812` for formats with lines, `file row 812` for the others. Counted from 1."""

    path: str
    number: int
    has_lines: bool = True

    def __str__(self) -> str:
        return f"{self.path}:{self.number}" if self.has_lines else f"{self.path} row {self.number}"


@dataclass(frozen=True)
class TextDocument:
    """A plain document for continued pretraining."""

    text: str


@dataclass(frozen=True)
class Demonstration:
    """A conversation whose assistant turns are to be learnt."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt; p is the probability that chosen is the better one."""

    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    p: float = 1.0
    margin: float = 0.0


@dataclass(frozen=True)
class PromptRow:
    """A conversation that ends in the turn to be answered; `row` is what it came from, for a judge."""

    messages: tuple[Message, ...]
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BadRow:
    """A row that was left out, and why."""

    origin: Origin
    reason: str
    detail: str
    row: Any


class RowRefused(UserError):
    """One row cannot be used: `reason` is a countable name, `detail` one sentence about this row."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
