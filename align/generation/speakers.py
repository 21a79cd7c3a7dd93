"""What answers and what judges: the questions, the answers, and the interface that every backend has."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

PASSING_REASONS = frozenset({"timeout", "unreachable", "rate_limited", "server_error", "malformed"})
"""Reasons of a `Failed` that lie in a server's hour and not in the question: asked again later, it may be answered."""

Messages = Sequence[Mapping[str, Any]]
"""Turns of a chat, as `align.data.records.Message.as_dict` writes them; servers read `role` and `content` alone."""


@dataclass(frozen=True)
class Ask:
    """A chat that is to be answered. The answer depends on its own fields alone, whatever is asked beside it."""

    key: str
    """The caller's name for it."""
    messages: tuple[dict[str, Any], ...]
    seed: int
    """From 0 up to 2**128."""
    temperature: float
    """0 takes the likeliest token each time."""
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    """Texts that end the answer, beside the model's own stop tokens; neither they nor what follows is part of it."""
    tools: tuple[str, ...] = ()
    """JSON of each tool that may be called. Models in this process only."""


@dataclass(frozen=True)
class Said:
    """An answer."""

    text: str
    """Without special tokens, stop texts, and blanks around it."""
    finished: bool
    """Whether it ended by itself, and not by the limit."""
    prompt_tokens: int
    new_tokens: int
    """Sampled tokens, a stop token included."""


@dataclass(frozen=True)
class Choose:
    """A chat, and whole answers to it whose probabilities are wanted.

    Raises: ValueError unless there are two answers or more, none empty and none the beginning of another: without the
    stop token the beginning could never be the less likely one.
    """

    key: str
    messages: tuple[dict[str, str], ...]
    candidates: tuple[str, ...]
    seed: int
    """Of votes, where there are no log-probabilities."""

    def __post_init__(self) -> None:
        texts = [text.strip() for text in self.candidates]
        if len(texts) < 2 or not all(texts):
            raise ValueError(f"{self.candidates}: two candidates or more are needed, none of them empty")
        if any(a.startswith(b) for i, a in enumerate(texts) for j, b in enumerate(texts) if i != j):
            raise ValueError(f"{self.candidates}: no candidate may be the beginning of another")


@dataclass(frozen=True)
class Chosen:
    """Log-probabilities (nats) of the candidates, in their order.

    Each is that of the whole candidate as the beginning of the assistant's answer: the stop token after it is not
    counted. A model that would go on to explain its choice has made it all the same, and servers give no
    log-probability of stopping.
    """

    logps: tuple[float, ...]
    prompt_tokens: int
    votes: int = 0
    """0: log-probabilities of the model. Else logps are logs of shares of so many sampled answers; one that was never
    given counts as half a vote."""


@dataclass(frozen=True)
class Failed:
    """Why there is no answer."""

    reason: str
    """A countable name, such as `too_long`; those of PASSING_REASONS are worth another try."""
    detail: str
    """One sentence about this case, without secrets."""


class Speaker(Protocol):
    """A model that answers chats and weighs candidate answers, wherever it runs."""

    name: str
    weighed_together: int | None
    """Questions of `choose` that have to be asked together to give the same digits again; None: each stands alone."""

    def say(self, asks: Sequence[Ask], done: Callable[[int, Said | Failed], None]) -> None:
        """Answer each. `done` is called once for each place in `asks`, when its answer is known, in any order."""

    def choose(self, chooses: Sequence[Choose], done: Callable[[int, Chosen | Failed], None]) -> None:
        """Weigh the candidates of each. `done` as in `say`."""

    def prompt_text(self, messages: Messages) -> str:
        """What the model is given, for the trace. Raises: UserError if it does not take these messages."""

    def prompt_tokens(self, messages: Messages) -> int:
        """Tokens of what the model is given, or an estimate of them. Raises: as `prompt_text`."""

    def close(self) -> None:
        """Give the memory of the model back: it answers no more, but still tells what it is given."""


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of the stop texts in it, and whether there is one."""
    places = [place for place in map(text.find, filter(None, stop)) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)


def messages_text(messages: Messages) -> str:
    """The messages as JSON, for speakers that do not see what a template makes of them."""
    return json.dumps([dict(message) for message in messages], ensure_ascii=False)
