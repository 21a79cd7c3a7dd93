"""Where the trained text of a rendered conversation lies, in characters: each assistant turn up to its stop token."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from align.data.fit import NOT_TRAINED
from align.data.records import Message, RowRefused

MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]
Tools = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Piece:
    """Text that ends in an assistant turn's stop token, and the spans of it that are trained, in order."""

    text: str
    spans: list[Span]


class Renderer:
    """A tokenizer's chat template as text, with the spans of assistant turns.

    Spans come from rendering what generation would be given, and what follows it once the turn is answered. Where the
    template has `{% generation %}` markers of its own, what they leave out at the start of a turn is not trained.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.has_markers = MARKERS.search(tokenizer.get_chat_template()) is not None

    def text(self, messages: Sequence[Message], tools: Tools = (), *, to_answer: bool = False) -> str:
        """The conversation as text; `to_answer` adds what comes before the assistant's next words.

        Raises: RowRefused with the template's own words if it does not take this conversation.
        """
        return self._render(messages, tools, to_answer=to_answer)[0]

    def _render(
        self, messages: Sequence[Message], tools: Tools, *, to_answer: bool = False, with_markers: bool = False
    ) -> tuple[str, list[Span]]:
        """The conversation as text, and what the template's markers mark in it."""
        values: dict[str, Any] = dict(self.tokenizer.special_tokens_map)
        try:
            texts, marked = render_jinja_template(
                conversations=[[message.as_dict() for message in messages]],
                tools=list(tools) or None,
                chat_template=self.tokenizer.get_chat_template(tools=list(tools) or None),
                return_assistant_tokens_mask=with_markers,
                add_generation_prompt=to_answer,
                **values,
            )
        except (TemplateError, TypeError) as error:
            raise RowRefused("template_refused", f"the chat template refuses it: {error}") from error
        return texts[0], [(start, end) for start, end in marked[0]] if with_markers else []

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        """What generation is given to answer the last turn.

        Raises: RowRefused if the template does not take the conversation, or leaves out a turn, a call or a tool.
        """
        text = self.text(messages, tools, to_answer=True)
        for turn, message in enumerate(messages, start=1):
            if message.role != "assistant" and not _written(message.content, text):
                raise RowRefused("template_rewrites", f"the template leaves out or changes turn {turn}, {message.role}")
        self._refuse_lost_tools(messages, tools, text)
        return text

    def _refuse_lost_tools(self, messages: Sequence[Message], tools: Tools, text: str) -> None:
        """Raises RowRefused if a declared tool or an earlier call is not in the prompt's `text`."""
        calls = Counter(call.name for message in messages for call in message.tool_calls)
        if lost := [name for name, count in calls.items() if text.count(name) < count]:
            raise RowRefused("template_rewrites", f"the template leaves out the call of {lost[0]!r}")
        if not tools:
            return
        without = self.text(messages, to_answer=True)
        for name in map(_tool_name, tools):
            if text.count(name) <= without.count(name):
                raise RowRefused("template_rewrites", f"the template takes no tools: {name!r} is not in its text")

    def answered(self, before: str, messages: Sequence[Message], tools: Tools, stop: str) -> tuple[str, int]:
        """The conversation through the stop token of its last turn, the assistant's, and where its training starts.

        `before` is what the turn answers.
        Raises: RowRefused if the text does not start with `before`, or the turn is changed or does not stop.
        """
        text, marked = self._render(messages, tools, with_markers=self.has_markers)
        if not text.startswith(before):
            raise RowRefused("template_rewrites", f"the template rewrites what precedes turn {len(messages)}")
        at = text.find(stop, len(before))
        if at < 0:
            raise RowRefused("stop_not_found", f"no {stop!r} follows an assistant turn")
        _refuse_changed_answer(messages[-1], text[len(before) : at])
        start = len(before)
        if self.has_markers:
            inside = [(max(start, first), last) for first, last in marked if last > start and first < at]
            if not inside or messages[-1].content.strip() not in text[inside[0][0] : inside[-1][1]]:
                raise RowRefused("mask_not_found", "the template's markers leave out words of an assistant turn")
            start = inside[0][0]
        return text[: at + len(stop)], start

    def pieces(self, messages: Sequence[Message], tools: Tools, stop: str) -> list[Piece]:
        """The conversation as pieces that together train each assistant turn once, as generation meets it.

        One piece, unless the template renders a turn otherwise once the conversation has gone on (such as one that
        drops the reasoning of earlier turns): then that turn ends a piece of its own. A template that writes an empty
        thought before an answer without reasoning has it trained as part of the answer, since nothing in the prompt
        of generation says it. Text after the last answer teaches nothing and is left out.
        Raises: RowRefused if a turn cannot be found where the template must have written it.
        """
        waiting: list[tuple[int, str]] = []
        for turn, message in enumerate(messages):
            if message.role == "assistant":
                before = self.prompt(messages[:turn], tools)
                text, start = self.answered(before, messages[: turn + 1], tools, stop)
                waiting.append((start, text))
        pieces: list[Piece] = []
        while waiting:
            whole = waiting[-1][1]
            pieces.append(Piece(whole, [(start, len(text)) for start, text in waiting if whole.startswith(text)]))
            waiting = [(start, text) for start, text in waiting if not whole.startswith(text)]
        return pieces[::-1]


def parsed_tools(tools: Sequence[str]) -> list[dict[str, Any]]:
    """The tools of a row as chat templates read them."""
    return [json.loads(tool) for tool in tools]


def all_text(message: Message) -> str:
    """What a template may write of a turn; calls as JSON, with every character as itself."""
    plain = ("role", "content", "reasoning_content")
    rest = {key: value for key, value in message.as_dict().items() if key not in plain}
    return "\n".join([message.content, message.reasoning, json.dumps(rest, ensure_ascii=False) if rest else ""])


def _written(content: str, text: str) -> bool:
    """Whether `content` stands in the text, as it is or as JSON; blanks around it are the template's business."""
    content = content.strip()
    return content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text


def _tool_name(tool: dict[str, Any]) -> str:
    return str(tool.get("function", tool).get("name", ""))


def _refuse_changed_answer(turn: Message, span: str) -> None:
    """Raises RowRefused unless the words, the reasoning and the calls of an assistant turn are all in its span."""
    if turn.content.strip() not in span:
        raise RowRefused("template_rewrites", "the template changes the text of an assistant turn")
    if turn.reasoning.strip() not in span:
        raise RowRefused("template_rewrites", "the template leaves out or changes the reasoning of an assistant turn")
    around = span.replace(turn.content.strip(), "", 1)
    for name, count in Counter(call.name for call in turn.tool_calls).items():
        if around.count(name) < count:
            raise RowRefused("template_rewrites", f"the template leaves out the call of {name!r}")


def trained_tokens(
    ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span], stop_id: int
) -> list[bool] | None:
    """Which tokens lie in a span; None if one crosses a border.

    Blanks that a tokenizer leaves out of its offsets count to the token after them. A stop token may run past the
    end of its span: some swallow the blanks that follow.
    """
    place = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    ends = np.maximum.accumulate(place[:, 1])
    starts = np.minimum(place[:, 0], np.concatenate([[0], ends[:-1]]))
    is_stop = np.asarray(ids) == stop_id
    trained = np.zeros(len(ids), dtype=bool)
    for start, end in spans:
        inside = (starts >= start) & (starts < end) & ((ends <= end) | is_stop)
        if np.any((starts < end) & (ends > start) & ~inside):
            return None
        trained |= inside
    return trained.tolist()


def follows(ids: list[int], trained: list[bool], heads: Sequence[list[int]]) -> bool:
    """Whether each run of trained tokens comes after the very tokens that generation would be given there."""
    starts = [t for t in range(len(ids)) if trained[t] and not (t and trained[t - 1])]
    if len(starts) != len(heads):
        return False
    return all(ids[max(0, start - len(head)) : start] == head for start, head in zip(starts, heads, strict=True))


def labelled(ids: list[int], trained: list[bool], stop_id: int) -> tuple[list[int], list[int]] | RowRefused:
    """(input_ids, labels), refused unless every run of trained tokens ends in the stop token."""
    ends = [t for t in range(len(ids)) if trained[t] and (t + 1 == len(ids) or not trained[t + 1])]
    if not ends or any(ids[end] != stop_id for end in ends):
        return RowRefused("stop_not_trained", "an assistant turn's last trained token is not the stop token")
    return ids, [token if learnt else NOT_TRAINED for token, learnt in zip(ids, trained, strict=True)]
