"""A speaker in this process, computed by vLLM on this rank's GPU.

What many questions begin with is read once, by vLLM's cache of prefixes. Sums in another batch differ in their last
digits, so an answer may differ too where other questions were under way beside it; each has its own seed all the same.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from align.config.errors import UserError
from align.data.template import Template
from align.distributed.runtime import free_memory
from align.generation.answer_logps import Tree
from align.generation.chats import Chats
from align.generation.speakers import Ask, Choose, Chosen, Failed, Messages, Said, cut_at_stop
from align.generation.vllm_engine import Setting, drawn_by, shut_down

FULL_BATCHES = 8
"""Batches that are asked for in one call: more keep the GPU busier, fewer lose less when the process is killed."""
CHOICES_TOGETHER = 64
"""Questions of `choose` in one call, always."""


class VllmSpeaker:
    """A model and its template, in an engine that this process keeps until it is closed."""

    def __init__(
        self,
        model_path: str,
        template: Template,
        setting: Setting,
        *,
        name: str,
        dtype: torch.dtype,
        seed: int,
        batch_size: int,
        memory_share: float,
        max_tokens: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        pickled_weights: bool = False,
    ):
        """model_path: a folder or hub id. batch_size: answers under way at a time. memory_share: of the GPU's memory.

        max_tokens: longest question with its answer; None: what the model allows. Raises: UserError as `Setting.start`.
        """
        assert batch_size > 0
        self.name, self.weighed_together = name, CHOICES_TOGETHER
        self._vllm, self._setting, self._batch_size = setting.vllm(), setting, batch_size
        self._llm = setting.start(
            model_path,
            max_tokens=max_tokens,
            dtype=dtype,
            seed=seed,
            batch_size=batch_size,
            memory_share=memory_share,
            revision=revision,
            trust_remote_code=trust_remote_code,
            pickled_weights=pickled_weights,
        )
        self._chats = Chats(template, self._llm.llm_engine.model_config.max_model_len)

    def say(self, asks: Sequence[Ask], done: Callable[[int, Said | Failed], None]) -> None:
        """See `Speaker`. Raises: UserError for an answer that vLLM broke off."""
        asked: list[tuple[int, list[int]]] = []
        for place, ask in enumerate(asks):
            encoded = self._chats.question(ask)
            if isinstance(encoded, Failed):
                done(place, encoded)
            else:
                asked.append((place, encoded))
        size = FULL_BATCHES * self._batch_size
        for start in range(0, len(asked), size):
            part = asked[start : start + size]
            outputs = self._generate([ids for _, ids in part], [self._drawn_by(asks[place]) for place, _ in part])
            for (place, ids), output in zip(part, outputs, strict=True):
                done(place, self._said(asks[place], len(ids), output.outputs[0]))

    def choose(self, chooses: Sequence[Choose], done: Callable[[int, Chosen | Failed], None]) -> None:
        """See `Speaker`: a request for each candidate, read as a prompt. Raises: UserError as `say`."""
        trees: list[tuple[int, Tree]] = []
        # vLLM answers with a token at least, and wants room for it.
        for place, encoded in enumerate(self._chats.trees(chooses, beyond=1)):
            if isinstance(encoded, Failed):
                done(place, encoded)
            else:
                trees.append((place, encoded))
        # prompt_logprobs=0: no more than that of the token which is there.
        weighed = drawn_by(self._vllm, 0, [], 1, 0.0, prompt_logprobs=0, detokenize=False)
        for start in range(0, len(trees), CHOICES_TOGETHER):
            part = trees[start : start + CHOICES_TOGETHER]
            texts = [[*prompt, *answer] for _, (prompt, answers) in part for answer in answers]
            outputs = iter(self._generate(texts, [weighed] * len(texts)))
            for place, (prompt, answers) in part:
                logps = tuple(_logp(next(outputs).prompt_logprobs[len(prompt) :], answer) for answer in answers)
                done(place, Chosen(logps, len(prompt)))

    def prompt_text(self, messages: Messages) -> str:
        """What the model is given. Raises: RowRefused if the template does not take these messages."""
        return self._chats.prompt_text(messages)

    def prompt_tokens(self, messages: Messages) -> int:
        """Tokens of `prompt_text`. Raises: as it does."""
        return self._chats.prompt_tokens(messages)

    def close(self) -> None:
        """Stop the engine and free its memory. See `Speaker`."""
        shut_down(self._llm)
        del self._llm
        free_memory()

    def _drawn_by(self, ask: Ask) -> Any:
        # vLLM looks for stop texts in what it decodes as it goes.
        options = {"stop": list(ask.stop), "detokenize": True} if ask.stop else {"detokenize": False}
        stops = sorted(self._chats.template.stop_token_ids)
        return drawn_by(self._vllm, ask.seed, stops, ask.max_new_tokens, ask.temperature, **options)

    def _generate(self, prompts: list[list[int]], drawn: list[Any]) -> list[Any]:
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], drawn, use_tqdm=False)
        assert [list(output.prompt_token_ids) for output in outputs] == prompts
        return outputs

    def _said(self, ask: Ask, prompt_tokens: int, answer: Any) -> Said:
        finished = self._setting.checked(answer).finish_reason == "stop"
        text = cut_at_stop(self._chats.text(list(answer.token_ids)), ask.stop)[0].strip()
        return Said(text, finished, prompt_tokens, len(answer.token_ids))


def _logp(listed: Sequence[Any], answer: Sequence[int]) -> float:
    """Of a whole answer. Raises: UserError if it is no number."""
    logp = float(sum(step[token].logprob for step, token in zip(listed, answer, strict=True)))
    if not math.isfinite(logp):
        raise UserError("the model's logits are no numbers, so nothing can be judged; use weights that are sound")
    return logp
