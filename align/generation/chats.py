"""Questions as the tokens of a model in this process, for the speakers that compute it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from align.data.records import Message, RowRefused
from align.data.template import Template
from align.generation.answer_logps import Tree
from align.generation.speakers import Ask, Choose, Failed, Messages


@dataclass(frozen=True)
class Chats:
    """A template, and how many tokens its model takes."""

    template: Template
    longest: int | None
    """A question with its answer; None: any number."""

    def prompt_text(self, messages: Messages) -> str:
        """What the model is given. Raises: RowRefused if the template does not take these messages."""
        return self.template.chat.renderer.prompt(_turns(messages))

    def prompt_tokens(self, messages: Messages) -> int:
        """Tokens of `prompt_text`. Raises: as it does."""
        return len(self.template.encode_prompt(_turns(messages)))

    def question(self, ask: Ask) -> list[int] | Failed:
        """Token ids of a chat that is to be answered."""
        try:
            ids = self.template.encode_prompt(_turns(ask.messages), ask.tools)
        except RowRefused as refused:
            return Failed(refused.reason, refused.detail)
        return self._too_long(len(ids), ask.max_new_tokens) or list(ids)

    def trees(self, chooses: Sequence[Choose], beyond: int = 0) -> Iterator[Tree | Failed]:
        """Token ids of each prompt and its candidates, these without their stop token (see `Chosen`).

        beyond: tokens that the model has to have room for after a candidate.
        """
        rows = [(_turns(one.messages), [Message("assistant", text) for text in one.candidates], ()) for one in chooses]
        for encoded in self.template.encode_trees(rows):
            if isinstance(encoded, RowRefused):
                yield Failed(encoded.reason, encoded.detail)
                continue
            prompt, answers = encoded
            answers = [answer[:-1] for answer in answers]
            yield self._too_long(len(prompt), max(map(len, answers)) + beyond) or (tuple(prompt), answers)

    def text(self, ids: Sequence[int]) -> str:
        """Of sampled tokens, without special ones."""
        return self.template.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _too_long(self, prompt_tokens: int, new_tokens: int) -> Failed | None:
        if self.longest is None or prompt_tokens + new_tokens <= self.longest:
            return None
        return Failed("too_long", f"{prompt_tokens} tokens and {new_tokens} to come exceed the model's {self.longest}")


def _turns(messages: Messages) -> list[Message]:
    return [Message.from_dict(message) for message in messages]
