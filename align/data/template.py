"""Conversations to token ids, with proof of what is trained: assistant tokens and their stop token, nothing else."""

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from transformers import PreTrainedTokenizerBase

from align.config.errors import UserError
from align.data.fit import NOT_TRAINED
from align.data.plain import PLAIN, chat_template_text
from align.data.records import Demonstration, Message, PreferencePair, RowRefused
from align.data.spans import Piece, Renderer, Span, all_text, follows, labelled, parsed_tools, trained_tokens

PROBE = (
    Message("user", "What is the colour of the sky?"),
    Message("assistant", "It is blue today."),
    Message("user", "And at night?"),
    Message("assistant", "Black, with stars."),
)

Ids = list[int]
Answers = tuple[Sequence[Message], Sequence[Message], Sequence[str]]
"""A prompt, several answers to it, and the tools that they may call."""


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
        """Rows (or pieces of them) whose tokens would have merged across the border of prompt and completion."""

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
        trained = ""
        for encoded in self._encode_pieces(renderer.pieces(PROBE, (), stop), chat):
            if isinstance(encoded, RowRefused):
                raise encoded
            ids, labels = encoded
            bos = self.tokenizer.bos_token_id
            if bos is not None and ids[:2] == [bos, bos]:
                raise ValueError("it starts with two BOS tokens")
            learnt = [label for label in labels if label != NOT_TRAINED]
            trained += self.tokenizer.decode(learnt, clean_up_tokenization_spaces=False)
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

    def encode_demonstrations(self, rows: Sequence[Demonstration]) -> list[list[tuple[Ids, Ids]] | RowRefused]:
        """(input_ids, labels) of each piece of each conversation, or why it cannot be used.

        Labels are -100 where not trained. A conversation is one piece, unless the template renders a turn otherwise
        once the conversation has gone on; see `Renderer.pieces`.
        """
        chat = self.chat
        marked = [_or_refused(self._pieces, row) for row in rows]
        sound = [piece for row in marked if not isinstance(row, RowRefused) for piece in row]
        encoded = iter(self._encode_pieces(sound, chat))
        return [row if isinstance(row, RowRefused) else _all_or_refused([next(encoded) for _ in row]) for row in marked]

    def encode_trees(self, rows: Sequence[Answers]) -> list[tuple[Ids, list[Ids]] | RowRefused]:
        """(prompt_ids, ids of each answer) of prompts with several answers, or why a row cannot be used.

        prompt_ids are what generation would be given; an answer ends with its stop token.
        """
        rendered = [_or_refused(self._tree_texts, row) for row in rows]
        texts = [text for row in rendered if not isinstance(row, RowRefused) for text in row]
        ids = iter(self._tokenized(texts))
        return [
            row if isinstance(row, RowRefused) else self._tree_ids(row, [next(ids) for _ in row]) for row in rendered
        ]

    def encode_pairs(self, pairs: Sequence[PreferencePair]) -> list[tuple[Ids, Ids, Ids] | RowRefused]:
        """(prompt_ids, chosen_ids, rejected_ids) of each pair, or why it cannot be used; see `encode_trees`."""
        trees = self.encode_trees([(pair.prompt, (pair.chosen, pair.rejected), pair.tools) for pair in pairs])
        return [tree if isinstance(tree, RowRefused) else _distinct(tree) for tree in trees]

    def encode_prompt(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> Ids:
        """The ids that generation is given. Raises: RowRefused if the template does not take the conversation."""
        self._refuse_special_tokens(messages, tools)
        return self._tokenized([self.chat.renderer.prompt(messages, parsed_tools(tools))])[0]

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

    def _refuse_special_tokens(self, messages: Sequence[Message], tools: Sequence[str]) -> None:
        """A special token spelt out in a turn or a tool would end or forge turns."""
        for message in messages:
            if found := self._special_text.search(all_text(message)):
                raise RowRefused("special_token_in_text", f"a {message.role} turn contains {found.group()!r}")
        if found := self._special_text.search(json.dumps(parsed_tools(tools), ensure_ascii=False)):
            raise RowRefused("special_token_in_text", f"a tool contains {found.group()!r}")

    def _pieces(self, row: Demonstration) -> list[Piece]:
        self._refuse_special_tokens(row.messages, row.tools)
        return self.chat.renderer.pieces(row.messages, parsed_tools(row.tools), self.chat.stop)

    def _tree_texts(self, row: Answers) -> list[str]:
        """The prompt as generation would see it, then the conversation with each answer through its stop token."""
        prompt, answers, tools = row
        self._refuse_special_tokens([*prompt, *answers], tools)
        chat, known = self.chat, parsed_tools(tools)
        before = chat.renderer.prompt(prompt, known)
        whole = (chat.renderer.answered(before, [*prompt, answer], known, chat.stop)[0] for answer in answers)
        return [before, *whole]

    def _tree_ids(self, texts: Sequence[str], ids: Sequence[Ids]) -> tuple[Ids, list[Ids]] | RowRefused:
        """Answers as what follows the prompt's own tokens; tokenised apart where a token would cross the border."""
        prompt, *whole = ids
        answers = [one[len(prompt) :] for one in whole]
        if any(one[: len(prompt)] != prompt for one in whole):
            self.borders_cut += 1
            try:
                answers = [self._following(prompt, text[len(texts[0]) :], self.chat) for text in texts[1:]]
            except RowRefused as refused:
                return refused
        if any(one[-1:] != [self.chat.stop_id] for one in answers):
            return RowRefused("stop_not_trained", "the last token of an answer is not the stop token")
        return prompt, answers

    def _encode_pieces(self, pieces: Sequence[Piece], chat: Chat) -> list[tuple[Ids, Ids] | RowRefused]:
        if not pieces:
            return []
        tokens = self.tokenizer(
            [piece.text for piece in pieces],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        heads = [self._heads(piece) for piece in pieces]
        distinct = sorted({head for piece in heads for head in piece})
        met = dict(zip(distinct, self._tokenized(distinct), strict=True))
        return [
            self._masked(piece, ids, offsets, [met[head] for head in piece_heads], chat)
            for piece, ids, offsets, piece_heads in zip(
                pieces, tokens["input_ids"], tokens["offset_mapping"], heads, strict=True
            )
        ]

    def _masked(
        self, piece: Piece, ids: Ids, offsets: Sequence[Span], heads: Sequence[Ids], chat: Chat
    ) -> tuple[Ids, Ids] | RowRefused:
        """(input_ids, labels) of a piece; tokenised apart at the borders that its tokens would cross."""
        trained = trained_tokens(ids, offsets, piece.spans, chat.stop_id)
        if trained is None or not follows(ids, trained, heads):
            self.borders_cut += 1
            try:
                ids, trained = self._cut_at_borders(piece, chat)
            except RowRefused as refused:
                return refused
        return labelled(ids, trained, chat.stop_id)

    def _heads(self, piece: Piece) -> list[str]:
        """The text before each span, back to the last special token: no token merges across one."""
        specials = [match.start() for match in self._special_text.finditer(piece.text)]
        heads = []
        for start, _ in piece.spans:
            before = bisect_left(specials, start)
            heads.append(piece.text[specials[before - 1] if before else 0 : start])
        return heads

    def _cut_at_borders(self, piece: Piece, chat: Chat) -> tuple[Ids, list[bool]]:
        """The text tokenised apart where each answer starts: what generation meets. Raises: RowRefused."""
        starts = [start for start, _ in piece.spans]
        [ids] = self._tokenized([piece.text[: starts[0]]])
        trained = [False] * len(ids)
        for start, limit in zip(starts, [*starts[1:], len(piece.text)], strict=True):
            following = self._following(ids, piece.text[start:limit], chat)
            answer = following.index(chat.stop_id) + 1
            ids += following
            trained += [True] * answer + [False] * (len(following) - answer)
        return ids, trained

    def _following(self, before: Ids, text: str, chat: Chat) -> Ids:
        """The tokens of `text`, which starts with an answer, on its own; the answer must read the same after `before`.

        Some tokenizers put a blank before the first word of any text, so a second try starts it with a special token.
        Raises: RowRefused if that does not help either.
        """
        answer = text[: text.index(chat.stop) + len(chat.stop)]
        decode = partial(self.tokenizer.decode, clean_up_tokenization_spaces=False)
        for opening in ("", chat.stop):
            ids = self._tokenized([opening + text])[0][1 if opening else 0 :]
            through_stop = ids[: ids.index(chat.stop_id) + 1] if chat.stop_id in ids else []
            if decode(before + through_stop)[len(decode(before)) :] == answer:
                return ids
        raise RowRefused("border_changes_text", "an answer that is tokenised apart from its prompt reads otherwise")

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


def _or_refused(render, row):
    try:
        return render(row)
    except RowRefused as refused:
        return refused


def _distinct(tree: tuple[Ids, list[Ids]]) -> tuple[Ids, Ids, Ids] | RowRefused:
    prompt, (chosen, rejected) = tree
    if chosen == rejected:
        return RowRefused("chosen_equals_rejected", "'chosen' and 'rejected' have the same tokens")
    return prompt, chosen, rejected


def _all_or_refused(pieces: list[tuple[Ids, Ids] | RowRefused]) -> list[tuple[Ids, Ids]] | RowRefused:
    return next((piece for piece in pieces if isinstance(piece, RowRefused)), pieces)


__all__ = ["Template", "chat_template_text"]
