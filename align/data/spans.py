"""Where the trained text of a rendered conversation lies, in characters: each assistant turn up to its stop token."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from align.data.fit import NOT_TRAINED
from align.data.records import Message, RowRefused

MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]


class Renderer:
    """A tokenizer's chat template as text, with the spans of assistant turns."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.template = tokenizer.get_chat_template()
        self.has_markers = MARKERS.search(self.template) is not None

    def text(self, messages: Sequence[Message], *, to_answer: bool = False) -> str:
        """The conversation as text; `to_answer` adds what comes before the assistant's next words.

        Raises: RowRefused with the template's own words if it does not take this conversation.
        """
        return self._render(messages, to_answer, with_spans=False)[0]

    def marked(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The conversation as text, and the spans inside the template's `{% generation %}` markers."""
        return self._render(messages, False, with_spans=True)

    def _render(self, messages: Sequence[Message], to_answer: bool, with_spans: bool) -> tuple[str, list[Span]]:
        values: dict[str, Any] = dict(self.tokenizer.special_tokens_map)
        try:
            texts, spans = render_jinja_template(
                conversations=[[message.as_dict() for message in messages]],
                chat_template=self.template,
                return_assistant_tokens_mask=with_spans,
                add_generation_prompt=to_answer,
                **values,
            )
        except (TemplateError, TypeError) as error:
            raise RowRefused("template_refused", f"the chat template refuses it: {error}") from error
        return texts[0], [(start, end) for start, end in spans[0]] if with_spans else []

    def trained_spans(self, messages: Sequence[Message], stop: str) -> tuple[str, list[Span]]:
        """The conversation as text, and for each assistant turn the span from its first character through `stop`.

        Raises: RowRefused if a turn or its stop token cannot be found where the template must have written it.
        """
        if self.has_markers:
            text, marked = self.marked(messages)
            limits = [start for start, _ in marked[1:]] + [len(text)]
            found = [(start, limit) for (start, _), limit in zip(marked, limits, strict=True)]
        else:
            text = self.text(messages)
            found = self._spans_by_prefix(messages, text)
        turns = [message for message in messages if message.role == "assistant"]
        if len(found) != len(turns):
            raise RowRefused("mask_not_found", f"the template marks {len(found)} of {len(turns)} assistant turns")
        return text, [_through_stop(text, *span, turn, stop) for span, turn in zip(found, turns, strict=True)]

    def _spans_by_prefix(self, messages: Sequence[Message], text: str) -> list[Span]:
        """From where generation would start to the next turn's start, found by rendering what comes before."""
        starts = []
        for index, message in enumerate(messages):
            if message.role == "assistant":
                before = self.text(messages[:index], to_answer=True)
                if not text.startswith(before):
                    raise RowRefused("template_rewrites", f"the template rewrites what precedes turn {index + 1}")
                starts.append(len(before))
        return list(zip(starts, [*starts[1:], len(text)], strict=True))


def _through_stop(text: str, start: int, limit: int, turn: Message, stop: str) -> Span:
    """The span from `start` through the first stop token, which must come after the turn's whole content.

    Markers that leave the stop token out are widened by it; a line break after it is never trained.
    """
    at = text.find(stop, start, limit)
    if at < 0:
        raise RowRefused("stop_not_found", f"no {stop!r} follows an assistant turn")
    if turn.content.strip() not in text[start:at]:
        raise RowRefused("template_rewrites", "the template changes the text of an assistant turn")
    return start, at + len(stop)


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
