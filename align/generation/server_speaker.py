"""A speaker behind an OpenAI-compatible server: `transformers serve`, vLLM, llama.cpp, a provider.

The server decides what a seed means: the same question may be answered otherwise when it is asked again.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from threading import Lock
from typing import Any, TypeVar

from align.generation.chat_server import ChatServer, Malformed
from align.generation.server_choices import first_token_logps, log_shares, vote_of
from align.generation.speakers import Ask, Choose, Chosen, Failed, Messages, Said, cut_at_stop, messages_text

Q = TypeVar("Q")
A = TypeVar("A")
TOP_LOGPROBS = 20
"""The most that the interface allows."""
BYTES_A_TOKEN, TOKENS_A_TURN = 4, 4
"""The estimate of tokens where no tokenizer counts them: about right for English."""
NO_LOG_PROBS = Failed("no_log_probs", "the server gives no log-probabilities that show each candidate")


class ServerSpeaker:
    """Questions are asked `concurrency` at a time; each ends in an answer or in a `Failed`."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_env: str | None = None,
        concurrency: int = 16,
        timeout_seconds: float = 120.0,
        retries: int = 6,
        backoff_seconds: float = 0.5,
        votes: int = 8,
        top_logprobs: int = TOP_LOGPROBS,
        limit_field: str = "max_tokens",
        prompt_price: float | None = None,
        completion_price: float | None = None,
        count_tokens: Callable[[str], int] | None = None,
    ):
        """url, key_env, timeout_seconds, retries, backoff_seconds: see `ChatServer`.

        votes: sampled answers for a choice that log-probabilities do not show; 0: such a choice fails. limit_field:
        what the server calls the limit of new tokens (some want `max_completion_tokens`). Prices: of a million tokens.
        count_tokens: tokens of a text, for `prompt_tokens`. Raises: UserError as `ChatServer` does.
        """
        assert concurrency > 0 and votes >= 0 and retries >= 0 and timeout_seconds > 0
        self.name, self.weighed_together = model, None
        self._server = ChatServer(
            url, key_env=key_env, timeout_seconds=timeout_seconds, retries=retries, backoff_seconds=backoff_seconds
        )
        self._concurrency, self._votes, self._top_logprobs = concurrency, votes, top_logprobs
        self._limit_field, self._prices, self._count = limit_field, (prompt_price, completion_price), count_tokens
        self._log_probs_offered = True
        self._lock = Lock()
        self.spent_prompt_tokens = 0
        """Tokens that the server says it read, of all answered requests."""
        self.spent_new_tokens = 0

    def say(self, asks: Sequence[Ask], done: Callable[[int, Said | Failed], None]) -> None:
        """See `Speaker`; `done` is called in this thread. Raises: UserError as `ChatServer.post` does."""
        self._each(asks, self._said, done)

    def choose(self, chooses: Sequence[Choose], done: Callable[[int, Chosen | Failed], None]) -> None:
        """See `Speaker`, `first_token_logps` and `log_shares`. Raises: UserError as `ChatServer.post` does."""
        self._each(chooses, self._chosen, done)

    def prompt_text(self, messages: Messages) -> str:
        """The messages as JSON: what the server's template makes of them is not seen here."""
        return messages_text(messages)

    def prompt_tokens(self, messages: Messages) -> int:
        """An estimate: tokens of the texts by `count_tokens`, or by their bytes, and a few for each turn."""
        return sum(self._tokens(message["content"]) + TOKENS_A_TURN for message in messages)

    def close(self) -> None:
        """Nothing is held here between questions."""

    def price(self, prompt_tokens: int, new_tokens: int) -> float | None:
        """Of so many tokens, in the currency of the prices; None if one of them is not known."""
        prompt_price, completion_price = self._prices
        if prompt_price is None or completion_price is None:
            return None
        return (prompt_tokens * prompt_price + new_tokens * completion_price) / 1e6

    def _each(self, questions: Sequence[Q], answer: Callable[[Q], A], done: Callable[[int, A], None]) -> None:
        self._server.stopped.clear()
        pool = ThreadPoolExecutor(self._concurrency, thread_name_prefix="server-speaker")
        try:
            places = {pool.submit(answer, question): place for place, question in enumerate(questions)}
            for future in as_completed(places):
                done(places.pop(future), future.result())
        except BaseException:
            self._server.stopped.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _said(self, ask: Ask) -> Said | Failed:
        body = self._body(ask.messages, ask.seed, ask.temperature, ask.max_new_tokens)
        if ask.stop:
            body["stop"] = list(ask.stop)
        return self._server.post(body, partial(self._read_said, ask), seed=ask.seed)

    def _read_said(self, ask: Ask, answer: dict[str, Any]) -> Said | Failed:
        choice = answer["choices"][0]
        text, reason = _text_of(choice), choice.get("finish_reason")
        prompt_tokens, new_tokens = self._usage(answer, ask.messages, text)
        if reason == "content_filter":
            return Failed("filtered_by_server", "the server's content filter took the answer away")
        # Some servers leave the stop text in.
        text, stopped = cut_at_stop(text, ask.stop)
        finished = stopped or reason not in ("length", "max_tokens", None)
        return Said(text.strip(), finished, prompt_tokens, new_tokens)

    def _chosen(self, choose: Choose) -> Chosen | Failed:
        result: Chosen | Failed = NO_LOG_PROBS
        if self._log_probs_offered:
            result = self._by_log_probs(choose)
            if isinstance(result, Chosen) or result.reason not in (NO_LOG_PROBS.reason, "refused_by_server"):
                return result
        return self._by_votes(choose) if self._votes else result

    def _by_log_probs(self, choose: Choose) -> Chosen | Failed:
        # As many tokens as the candidates' common beginning can have, and the one after it.
        body = self._body(choose.messages, choose.seed, 0.0, _common_letters(choose.candidates) + 1)
        body |= {"logprobs": True, "top_logprobs": self._top_logprobs}
        result = self._server.post(body, partial(self._read_log_probs, choose), seed=choose.seed)
        if isinstance(result, Failed) and result.reason == "refused_by_server" and "logprobs" in result.detail:
            self._log_probs_offered = False
        return result

    def _read_log_probs(self, choose: Choose, answer: dict[str, Any]) -> Chosen | Failed:
        choice = answer["choices"][0]
        prompt_tokens, _ = self._usage(answer, choose.messages, "")
        logprobs = choice.get("logprobs")
        if not logprobs or not logprobs.get("content"):
            self._log_probs_offered = False
            return NO_LOG_PROBS
        logps = first_token_logps(logprobs, choose.candidates)
        return NO_LOG_PROBS if logps is None else Chosen(logps, prompt_tokens)

    def _by_votes(self, choose: Choose) -> Chosen | Failed:
        limit, votes, prompt_tokens = max(len(text.encode()) for text in choose.candidates), [], 0
        for vote in range(self._votes):
            seed = _seed_of_vote(choose.seed, vote)
            body = self._body(choose.messages, seed, 1.0, limit)
            answer = self._server.post(body, partial(self._read_vote, choose), seed=seed)
            if isinstance(answer, Failed):
                return answer
            prompt_tokens = answer[1]
            votes.append(answer[0])
        shares = log_shares(votes, len(choose.candidates))
        if isinstance(shares, Failed):
            return shares
        return Chosen(shares, prompt_tokens, votes=sum(vote is not None for vote in votes))

    def _read_vote(self, choose: Choose, answer: dict[str, Any]) -> tuple[int | None, int]:
        text = _text_of(answer["choices"][0])
        prompt_tokens, _ = self._usage(answer, choose.messages, text)
        return vote_of(text, choose.candidates), prompt_tokens

    def _body(self, messages: Messages, seed: int, temperature: float, limit: int) -> dict[str, Any]:
        return {
            "model": self.name,
            "messages": [dict(message) for message in messages],
            "temperature": temperature,
            self._limit_field: limit,
            "seed": seed % 2**31,  # larger ones are refused here and there
        }

    def _usage(self, answer: Mapping[str, Any], messages: Messages, text: str) -> tuple[int, int]:
        """Tokens of the prompt and of the answer, as the server counts them, or estimated; added to what is spent."""
        usage = answer.get("usage") or {}
        prompt, new = usage.get("prompt_tokens"), usage.get("completion_tokens")
        prompt = self.prompt_tokens(messages) if prompt is None else int(prompt)
        new = self._tokens(text) if new is None else int(new)
        with self._lock:
            self.spent_prompt_tokens += prompt
            self.spent_new_tokens += new
        return prompt, new

    def _tokens(self, text: str) -> int:
        return self._count(text) if self._count else math.ceil(len(text.encode()) / BYTES_A_TOKEN)


def _text_of(choice: Mapping[str, Any]) -> str:
    """What the assistant said. Raises: Malformed if it said nothing that is text."""
    message = choice["message"]
    text = message.get("content")
    if text is None:
        text = message.get("refusal")  # a refusal is a reply like any other
    if text is None and choice.get("finish_reason") == "content_filter":
        return ""
    if not isinstance(text, str):
        raise Malformed("no text in choices[0].message.content")
    return text


def _common_letters(candidates: Sequence[str]) -> int:
    """Bytes that the candidates start with alike, a blank before them included."""
    first, last = min(candidates), max(candidates)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    return len(first[:same].encode()) + 1


def _seed_of_vote(seed: int, vote: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {vote}".encode()).digest()[:4], "big") % 2**31
