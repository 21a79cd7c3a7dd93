"""Conversations to token ids, with proof of what is trained: assistant tokens and their stop token, nothing else."""

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from align.config.errors import UserError
from align.data.fit import NOT_TRAINED
from align.data.plain import PLAIN, chat_template_text
from align.data.records import Message, RowRefused
from align.data.spans import Renderer, Span, follows, labelled, trained_tokens

PROBE = (
    Message("user", "What is the colour of the sky?"),
    Message("assistant", "It is blue today."),
    Message("user", "And at night?"),
    Message("assistant", "Black, with stars."),
)

Ids = list[int]


@dataclass(frozen=True)
class Chat:
    """What the probe conversation proved about a tokenizer's chat template."""

    renderer: Renderer
    stop: str
    stop_id: int


class Template:
    """A tokenizer and its chat template. The template is proven on a probe conversation before its first use.

    Plain text needs no chat template; anything with turns raises UserError without a sound one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if not tokenizer.is_fast:
            raise UserError(
                f"{tokenizer.name_or_path}: the tokenizer has no tokenizer.json, so tokens cannot be traced to text; "
                "convert it with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        self.tokenizer = tokenizer
        self.borders_cut = 0
        """Rows whose tokens would have merged across the border of prompt and completion."""

    @cached_property
    def digest(self) -> str:
        """sha256 of the tokenizer and its chat template: what decides the tokens of a row."""
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for changed_by_use in ("truncation", "padding"):
            backend.pop(changed_by_use, None)
        special = {key: str(value) for key, value in self.tokenizer.special_tokens_map.items() if key != "pad_token"}
        content = [backend, special, self.tokenizer.chat_template]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def chat(self) -> Chat:
        """The proven chat template.

        Raises: UserError if there is none, or if it fails on the probe conversation.
        """
        name = self.tokenizer.name_or_path or "the tokenizer"
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{name}: the tokenizer has no chat template; give one with model.chat_template=<file.jinja>, or use "
                f"model.chat_template={PLAIN} (roles as words, no new tokens)"
            )
        try:
            renderer = Renderer(self.tokenizer)
            return self._proven(renderer)
        except (RowRefused, ValueError) as error:
            detail = error.detail if isinstance(error, RowRefused) else error
            raise UserError(
                f"{name}: the chat template cannot be trained on: {detail}; give another with "
                f"model.chat_template=<file.jinja> or model.chat_template={PLAIN}"
            ) from error

    def _proven(self, renderer: Renderer) -> Chat:
        """Render and mask the probe, and check the mask token by token against what must be learnt."""
        stop_id = self._first_token_after_answer(renderer)
        stop = self.tokenizer.convert_ids_to_tokens(stop_id)
        chat = Chat(renderer, stop, stop_id)
        [encoded] = self._encode_marked([renderer.trained_spans(PROBE, stop)], chat)
        if isinstance(encoded, RowRefused):
            raise encoded
        ids, labels = encoded
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise ValueError("it starts with two BOS tokens")
        trained = self.tokenizer.decode(
            [label for label in labels if label != NOT_TRAINED], clean_up_tokenization_spaces=False
        )
        for message in PROBE:
            if (message.content in trained) != (message.role == "assistant"):
                raise ValueError(f"the {message.role}'s {message.content!r} is on the wrong side of the mask")
        self.borders_cut = 0  # the probe is no row
        return chat

    def _first_token_after_answer(self, renderer: Renderer) -> int:
        """The special token that the template writes after an answer: the one a model must learn to stop with."""
        text = renderer.text(PROBE)
        answer = PROBE[-1].content
        if answer not in text:
            raise ValueError("it leaves the last assistant turn out")
        tail = text[text.rindex(answer) + len(answer) :]
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        stops = [token for token in self._tokenized([tail])[0] if token in special]
        if not stops:
            raise ValueError(f"it writes no stop token after an assistant turn (only {tail!r})")
        return stops[0]

    @property
    def stop_token_ids(self) -> set[int]:
        """Tokens that end a generated turn: the template's own and the tokenizer's end of text."""
        eos = self.tokenizer.eos_token_id
        return {self.chat.stop_id} | ({eos} if eos is not None else set())

    def encode_demonstrations(self, conversations: Sequence[Sequence[Message]]) -> list[tuple[Ids, Ids] | RowRefused]:
        """(input_ids, labels) of each conversation, or why it cannot be used; labels are -100 where not trained."""
        chat = self.chat
        marked = [self._or_refused(self._spans, messages) for messages in conversations]
        sound = iter(self._encode_marked([row for row in marked if not isinstance(row, RowRefused)], chat))
        return [row if isinstance(row, RowRefused) else next(sound) for row in marked]

    def encode_demonstration(self, messages: Sequence[Message]) -> tuple[Ids, Ids]:
        """(input_ids, labels) of one conversation. Raises: RowRefused."""
        return _or_raise(self.encode_demonstrations([messages])[0])

    def encode_pairs(
        self, pairs: Sequence[tuple[Sequence[Message], Message, Message]]
    ) -> list[tuple[Ids, Ids, Ids] | RowRefused]:
        """(prompt_ids, chosen_ids, rejected_ids) of each (prompt, chosen, rejected), or why it cannot be used.

        prompt_ids are what generation would be given; a completion ends with its stop token.
        """
        rendered = [self._or_refused(self._pair_texts, *pair) for pair in pairs]
        texts = [text for row in rendered if not isinstance(row, RowRefused) for text in row]
        ids = iter(self._tokenized(texts))
        return [
            row if isinstance(row, RowRefused) else self._pair_ids(row, next(ids), next(ids), next(ids))
            for row in rendered
        ]

    def encode_pair(self, prompt: Sequence[Message], chosen: Message, rejected: Message) -> tuple[Ids, Ids, Ids]:
        """(prompt_ids, chosen_ids, rejected_ids) of one pair. Raises: RowRefused."""
        return _or_raise(self.encode_pairs([(prompt, chosen, rejected)])[0])

    def encode_prompt(self, messages: Sequence[Message]) -> Ids:
        """The ids that generation is given. Raises: RowRefused if the template does not take the conversation."""
        self._refuse_special_tokens(messages)
        return self._tokenized([self.chat.renderer.text(messages, to_answer=True)])[0]

    def encode_texts(self, texts: Sequence[str]) -> list[Ids]:
        """Documents with the end-of-text token after each, and BOS before it if the tokenizer uses one.

        Raises: UserError if the tokenizer has no end-of-text token.
        """
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise UserError(f"{self.tokenizer.name_or_path}: the tokenizer has no eos_token to end a document with")
        start = [self.tokenizer.bos_token_id] if self._uses_bos else []
        return [[*start, *ids, eos] for ids in self._tokenized(texts)]

    def encode_text(self, text: str) -> Ids:
        """One document; see `encode_texts`."""
        return self.encode_texts([text])[0]

    @cached_property
    def _uses_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]

    @cached_property
    def _special_text(self) -> re.Pattern[str]:
        tokens = {str(token) for token in self.tokenizer.all_special_tokens}
        tokens |= {entry.content for entry in self.tokenizer.added_tokens_decoder.values() if entry.special}
        return re.compile("|".join(map(re.escape, sorted(tokens - {""}))) or r"(?!)")

    def _refuse_special_tokens(self, messages: Sequence[Message]) -> None:
        """A special token spelt out in a turn would end or forge turns."""
        for message in messages:
            if found := self._special_text.search(message.content):
                raise RowRefused("special_token_in_text", f"a {message.role} turn contains {found.group()!r}")

    def _or_refused(self, render, *arguments):
        try:
            return render(*arguments)
        except RowRefused as refused:
            return refused

    def _spans(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        self._refuse_special_tokens(messages)
        return self.chat.renderer.trained_spans(messages, self.chat.stop)

    def _pair_texts(self, prompt: Sequence[Message], chosen: Message, rejected: Message) -> tuple[str, str, str]:
        """The prompt as generation would see it, and the conversation with each answer through its stop token."""
        self._refuse_special_tokens([*prompt, chosen, rejected])
        before = self.chat.renderer.text(prompt, to_answer=True)
        whole = []
        for answer in (chosen, rejected):
            text = self.chat.renderer.text([*prompt, answer])
            if not text.startswith(before):
                raise RowRefused("template_rewrites", "with an answer, the template renders the prompt differently")
            at = text.find(self.chat.stop, len(before))
            if at < 0 or answer.content.strip() not in text[len(before) : at]:
                raise RowRefused("template_rewrites", "the template changes the text of an answer")
            whole.append(text[: at + len(self.chat.stop)])
        return before, whole[0], whole[1]

    def _pair_ids(self, texts: tuple[str, str, str], prompt: Ids, *whole: Ids) -> tuple[Ids, Ids, Ids] | RowRefused:
        """Completions as what follows the prompt's own tokens; tokenised apart where a token would cross the border."""
        completions = [ids[len(prompt) :] for ids in whole]
        if any(ids[: len(prompt)] != prompt for ids in whole):
            self.borders_cut += 1
            completions = self._tokenized([text[len(texts[0]) :] for text in texts[1:]])
        if any(ids[-1:] != [self.chat.stop_id] for ids in completions):
            return RowRefused("stop_not_trained", "the last token of an answer is not the stop token")
        if completions[0] == completions[1]:
            return RowRefused("chosen_equals_rejected", "'chosen' and 'rejected' have the same tokens")
        return prompt, completions[0], completions[1]

    def _encode_marked(self, rows: Sequence[tuple[str, list[Span]]], chat: Chat) -> list[tuple[Ids, Ids] | RowRefused]:
        if not rows:
            return []
        tokens = self.tokenizer(
            [text for text, _ in rows],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        heads = [self._heads(text, spans) for text, spans in rows]
        distinct = sorted({head for row in heads for head in row})
        met = dict(zip(distinct, self._tokenized(distinct), strict=True))
        results = []
        for (text, spans), ids, offsets, row_heads in zip(
            rows, tokens["input_ids"], tokens["offset_mapping"], heads, strict=True
        ):
            trained = trained_tokens(ids, offsets, spans, chat.stop_id)
            if trained is None or not follows(ids, trained, [met[head] for head in row_heads]):
                self.borders_cut += 1
                ids, trained = self._cut_at_borders(text, spans)
            results.append(labelled(ids, trained, chat.stop_id))
        return results

    def _heads(self, text: str, spans: list[Span]) -> list[str]:
        """The text before each span, back to the last special token: no token merges across one."""
        specials = [match.start() for match in self._special_text.finditer(text)]
        heads = []
        for start, _ in spans:
            before = bisect_left(specials, start)
            heads.append(text[specials[before - 1] if before else 0 : start])
        return heads

    def _cut_at_borders(self, text: str, spans: list[Span]) -> tuple[Ids, list[bool]]:
        """The text tokenised piece by piece, so that no token crosses a border: what generation meets."""
        borders = [0, *(border for span in spans for border in span), len(text)]
        pieces = self._tokenized([text[start:end] for start, end in pairwise(borders)])
        trained = [bool(index % 2) for index, piece in enumerate(pieces) for _ in piece]
        return [token for piece in pieces for token in piece], trained

    def _tokenized(self, texts: Sequence[str]) -> list[Ids]:
        if not texts:
            return []
        return self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]


def _or_raise(result):
    if isinstance(result, RowRefused):
        raise result
    return result


__all__ = ["Template", "chat_template_text"]
