"""A speaker without a model, for tests: it answers what it is told to, and counts what it is asked."""

import random
from collections.abc import Callable, Sequence

from align.generation.speakers import Ask, Choose, Chosen, Failed, Messages, Said, cut_at_stop, messages_text


class FakeSpeaker:
    """Answers and log-probabilities come from two functions of the question; a token is a word."""

    def __init__(
        self,
        answers: Callable[[Ask], str | Failed],
        logps: Callable[[Choose], Sequence[float] | Failed],
        *,
        name: str = "fake",
    ):
        self.name, self.weighed_together = name, None
        self._answers, self._logps = answers, logps
        self.asked: list[Ask] = []
        """All that it was asked to say, in the order in which it answered."""
        self.weighed: list[Choose] = []
        """All that it was asked to choose from, in the order in which it answered."""

    def say(self, asks: Sequence[Ask], done: Callable[[int, Said | Failed], None]) -> None:
        """See `Speaker`. Answers of more than `max_new_tokens` words are cut, and not finished."""
        for place in _some_order(len(asks)):
            self.asked.append(asks[place])
            answer = self._answers(asks[place])
            done(place, answer if isinstance(answer, Failed) else self._said(asks[place], answer))

    def choose(self, chooses: Sequence[Choose], done: Callable[[int, Chosen | Failed], None]) -> None:
        """See `Speaker`."""
        for place in _some_order(len(chooses)):
            choose = chooses[place]
            self.weighed.append(choose)
            logps = self._logps(choose)
            if isinstance(logps, Failed):
                done(place, logps)
                continue
            assert len(logps) == len(choose.candidates), f"{len(logps)} log-probabilities: {choose.candidates}"
            done(place, Chosen(tuple(map(float, logps)), self.prompt_tokens(choose.messages)))

    def prompt_text(self, messages: Messages) -> str:
        """The messages as JSON."""
        return messages_text(messages)

    def prompt_tokens(self, messages: Messages) -> int:
        """Words of the messages."""
        return sum(len(message["content"].split()) for message in messages)

    def close(self) -> None:
        """Nothing is held."""

    def _said(self, ask: Ask, answer: str) -> Said:
        text, _ = cut_at_stop(answer, ask.stop)
        words = text.split()
        finished = len(words) <= ask.max_new_tokens
        text = text.strip() if finished else " ".join(words[: ask.max_new_tokens])
        return Said(text, finished, self.prompt_tokens(ask.messages), min(len(words), ask.max_new_tokens))


def _some_order(places: int) -> list[int]:
    """The same each time, and not that of the questions: nobody may rely on it."""
    return random.Random(places).sample(range(places), places)
