"""The questions that a constitution asks, as chats, and what their answers say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from align.config.constitution import Constitution, Principle

Chat = tuple[dict[str, str], ...]
Turns = Sequence[Mapping[str, str]]
"""`role` and `content`, the earliest first."""


def chat(*pairs: tuple[str, str]) -> Chat:
    """(role, content) pairs as messages."""
    return tuple({"role": role, "content": content} for role, content in pairs)


@dataclass(frozen=True)
class Critique:
    """What was said of a reply."""

    text: str
    """Without the words that mark a flaw."""
    flaw: bool
    marked: bool
    """Whether it began with one of the two marks. One without counts as a flaw, and is counted."""


class Questions:
    """Fills in the wording of a constitution. A conversation is told as a transcript inside one user message.

    So turns of several speakers stay whole, and a model is asked about a reply as if another had given it.
    The worked examples come before every question of their kind, so that a batch of questions has one beginning.
    """

    def __init__(self, constitution: Constitution):
        self.constitution, self.scaffold = constitution, constitution.scaffold
        self._critiques = self._critique_examples()
        self._revisions = self._revision_examples()
        self._comparisons = self._comparison_examples()

    def critique(self, conversation: Turns, reply: str, principle: Principle) -> Chat:
        """Asks what is wrong with a reply."""
        return self._critiques + self._user(
            self.scaffold.critique, conversation, reply=reply, request=principle.critique
        )

    def read_critique(self, text: str) -> Critique:
        """What an answer to `critique` says."""
        text = text.strip()
        for mark, flaw in ((self.scaffold.no_flaw, False), (self.scaffold.flaw, True)):
            if text.casefold().startswith(mark.casefold()):
                return Critique(text[len(mark) :].strip(), flaw, True)
        return Critique(text, True, False)

    def revision(self, conversation: Turns, reply: str, critique: str, principle: Principle) -> Chat:
        """Asks for a better reply; the answer is that reply."""
        return self._revisions + self._user(
            self.scaffold.revision, conversation, reply=reply, critique=critique, request=principle.revision
        )

    def comparison(self, conversation: Turns, first: str, second: str, principle: Principle) -> Chat:
        """Asks which of two replies is better; whole answers are `scaffold.candidates`."""
        return self._comparisons + self._user(
            self.scaffold.comparison, conversation, first=first, second=second, request=principle.comparison
        )

    def thought(self, conversation: Turns, first: str, second: str, principle: Principle) -> Chat:
        """Asks to think about two replies first. Without the examples, whose answers have no thoughts."""
        return self._user(self.scaffold.thought, conversation, first=first, second=second, request=principle.comparison)

    def verdict(self, thought: Chat, said: str) -> Chat:
        """Asks for the choice after a thought; whole answers are `scaffold.candidates`."""
        return thought + chat(("assistant", said), ("user", self.scaffold.verdict))

    def _user(self, form: str, conversation: Turns, **texts: str) -> Chat:
        return chat(("user", form.format(conversation=self.transcript(conversation), **texts)))

    def transcript(self, conversation: Turns) -> str:
        """A conversation as text, a label before each turn; what a system message says has no label."""
        labels = {"user": self.scaffold.user, "assistant": self.scaffold.assistant}
        return "\n\n".join(f"{labels.get(turn['role'], '')} {turn['content']}".strip() for turn in conversation)

    def _critique_examples(self) -> Chat:
        found: Chat = ()
        for example in self.constitution.critique_examples:
            principle = self.constitution.principle(example.principle)
            turns = [vars(turn) for turn in example.conversation]
            found += self._user(self.scaffold.critique, turns, reply=example.reply, request=principle.critique)
            flawed = f"{self.scaffold.flaw} {example.critique}"
            found += chat(("assistant", flawed if example.critique else self.scaffold.no_flaw))
        return found

    def _revision_examples(self) -> Chat:
        found: Chat = ()
        for example in self.constitution.critique_examples:
            if not example.critique:
                continue
            principle = self.constitution.principle(example.principle)
            turns = [vars(turn) for turn in example.conversation]
            found += self._user(
                self.scaffold.revision, turns, reply=example.reply, critique=example.critique,
                request=principle.revision,
            )  # fmt: skip
            found += chat(("assistant", example.revision))
        return found

    def _comparison_examples(self) -> Chat:
        found: Chat = ()
        for example in self.constitution.judge_examples:
            principle = self.constitution.principle(example.principle)
            turns = [vars(turn) for turn in example.conversation]
            found += self._user(
                self.scaffold.comparison, turns, first=example.first, second=example.second,
                request=principle.comparison,
            )  # fmt: skip
            found += chat(("assistant", self.scaffold.candidates[0 if example.better == "first" else 1]))
        return found
