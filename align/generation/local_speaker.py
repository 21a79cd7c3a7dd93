"""A speaker in this process: a Hugging Face model that answers and weighs, in batches.

Tokens are drawn as `align.generation.rollout` draws them, from numbers of each question's own, so that an answer does
not depend on its batch, up to rounding: in fp32 that changes a token about once in a million, in bf16 more often. The
same questions in the same order and batch size give the same bytes. Log-probabilities of `choose` differ from batch to
batch in their last digits.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from align.data.template import Template
from align.distributed.runtime import free_memory
from align.generation.answer_logps import Tree, answer_logps, answer_logps_alone
from align.generation.batching import Batching, Rules, generate, left_padded, prove_batching, with_tokens
from align.generation.chats import Chats
from align.generation.rollout import (
    CHUNK_STEPS,
    Draws,
    Row,
    as_sampler,
    batches_of,
    decode_at_once,
    draw,
    record,
    uniforms_of,
)
from align.generation.roomy_cache import move_rows
from align.generation.shared_prefix import common_prefix, prove_sharing, read_prompts
from align.generation.speakers import Ask, Choose, Chosen, Failed, Messages, Said, cut_at_stop
from align.models.layout import prompt_learning, speaking_model

LONGEST_CHUNK_STEPS = 4 * CHUNK_STEPS
SHORT_PROMPT = 64
"""Tokens; up to here a prompt is read again for each candidate, in one forward: that costs less than a second one."""


@dataclass
class Saying(Row):
    """An answer in the making."""

    place: int = -1
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class States:
    """What the states of the model allow."""

    batching: Batching
    longest_shared: float
    """See `prove_sharing`."""


class Begun(NamedTuple):
    """A batch of n rows whose first k tokens are sampled."""

    ids: Tensor
    """(n, W) long: the prompts, padded."""
    mask: Tensor
    """(n, W), 1 = a token of the prompt."""
    cache: Cache
    """Of the prompts and all tokens but the last, a row for each different prompt."""
    keep: Tensor
    """(n,) the row of the cache that is a row's own."""
    new: Tensor
    """(n, k) long."""
    logps: Tensor
    """(n, k)."""


CANDIDATES_TOGETHER = 16
"""Candidates in a forward, always: sums in a batch of another size differ in their last digits, and so would p."""
CHOICES_TOGETHER = 32
"""Questions whose batches are made together: who wants the same bits again asks all of them again."""


class LocalSpeaker:
    """A model and its template. What the questions of a batch start with (system prompt, examples) is read once."""

    def __init__(
        self,
        model: torch.nn.Module,
        template: Template,
        *,
        name: str,
        batch_size: int,
        device: torch.device | str | None = None,
    ):
        """batch_size: answers that are sampled together. device: None leaves the model
        where it is. The model may be wrapped by PEFT; it comes back from each call in the mode that it was in.
        """
        assert batch_size > 0
        self.name = name
        self._plain: PreTrainedModel = speaking_model(model.to(device) if device is not None else model)
        longest = getattr(self._plain.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and prompt_learning(self._plain):
            longest -= self._plain.active_peft_config.num_virtual_tokens
        self._chats, self._batch_size = Chats(template, longest), batch_size
        pad = template.tokenizer.pad_token_id
        self._pad = template.chat.stop_id if pad is None else pad
        self._states: States | None = None
        self.weighed_together = CHOICES_TOGETHER

    def say(self, asks: Sequence[Ask], done: Callable[[int, Said | Failed], None]) -> None:
        """See `Speaker`. An answer is known when it ends, be the others of its batch as long as they are.

        Raises: UserError if the model's logits are no numbers.
        """
        rows: dict[tuple[float, int], list[Row]] = {}
        for place, ask in enumerate(asks):
            encoded = self._chats.question(ask)
            if isinstance(encoded, Failed):
                done(place, encoded)
            else:
                row = Saying(tuple(encoded), ask.seed, place=place, stop=ask.stop)
                rows.setdefault((ask.temperature, ask.max_new_tokens), []).append(row)
        with torch.no_grad(), as_sampler(self._plain):
            for (temperature, limit), alike in rows.items():
                rules = Rules(frozenset(self._chats.template.stop_token_ids), self._pad, limit, temperature)
                for row in self._complete(alike, rules):
                    done(row.place, self._said(row))

    def choose(self, chooses: Sequence[Choose], done: Callable[[int, Chosen | Failed], None]) -> None:
        """See `Speaker`; the same questions in one call give the same bits, whatever the batch size.

        Raises: UserError if the model's logits are no numbers.
        """
        trees: list[tuple[int, Tree]] = []
        for place, encoded in enumerate(self._chats.trees(chooses)):
            if isinstance(encoded, Failed):
                done(place, encoded)
            else:
                trees.append((place, encoded))
        # Questions with as many candidates, of like length, together.
        trees.sort(key=lambda entry: (len(entry[1][1]), len(entry[1][0]), entry[1][0]))
        with torch.no_grad(), as_sampler(self._plain):
            for candidates, group in groupby(trees, key=lambda entry: len(entry[1][1])):
                alike, size = list(group), max(1, CANDIDATES_TOGETHER // candidates)
                for start in range(0, len(alike), size):
                    batch = alike[start : start + size]
                    for (place, tree), logps in zip(batch, self._weigh([t for _, t in batch]), strict=True):
                        done(place, Chosen(tuple(logps), len(tree[0])))

    def prompt_text(self, messages: Messages) -> str:
        """What the model is given. Raises: RowRefused if the template does not take these messages."""
        return self._chats.prompt_text(messages)

    def prompt_tokens(self, messages: Messages) -> int:
        """Tokens of `prompt_text`. Raises: as it does."""
        return self._chats.prompt_tokens(messages)

    @property
    def model(self) -> PreTrainedModel:
        """What answers: without PEFT's wrapping, unless that puts virtual tokens in front."""
        return self._plain

    def close(self) -> None:
        """See `Speaker`; memory is free once the caller has dropped the model too."""
        del self._plain
        free_memory()

    def _complete(self, rows: list[Row], rules: Rules) -> Iterator[Saying]:
        states = self._found(max((row.prompt for row in rows), key=len))
        for batch in batches_of(rows, self._batch_size, states.batching):
            if states.batching is Batching.moving:
                yield from self._decode(batch, rules, states)
                continue
            for _ in decode_at_once(self._plain, batch, rules):
                pass
            for row in batch:
                self._end_at_stop(row)
            yield from batch

    def _found(self, prompt: tuple[int, ...]) -> States:
        if self._states is None:
            batching = prove_batching(self._plain, prompt, self._pad)
            moving = batching is Batching.moving
            self._states = States(batching, prove_sharing(self._plain, prompt, self._pad) if moving else 0)
        return self._states

    def _decode(self, batch: list[Saying], rules: Rules, states: States) -> Iterator[Saying]:
        """Complete the rows of a batch, and yield each when it ends; it is computed no further then."""
        model, rows = self._plain, batch
        uniforms = uniforms_of(rows, rules, model.device)
        ids, mask, cache, keep, new, new_logps = self._begin(batch, rules, states, uniforms)
        step = steps = new.shape[1]
        while True:
            record(rows, new, new_logps, rules)
            ended = [self._end_at_stop(row) or step >= rules.max_new_tokens for row in rows]
            yield from (row for row, over in zip(rows, ended, strict=True) if over)
            rows = [row for row, over in zip(rows, ended, strict=True) if not over]
            if not rows:
                return
            alive = torch.tensor([i for i, over in enumerate(ended) if not over], device=model.device)
            ids, mask = with_tokens(ids[alive], mask[alive], new[alive])
            # Each chunk copies the cache and sets generate up; where nothing ends there is no use in short ones.
            steps = CHUNK_STEPS if any(ended) or step == 1 else min(2 * steps, LONGEST_CHUNK_STEPS)
            steps, width = min(steps, rules.max_new_tokens - step), ids.shape[1]
            move_rows(cache, keep[alive], steps)
            uniforms = uniforms[alive]
            draws = Draws(uniforms[:, step : step + steps], rules.temperature)
            new = generate(model, ids, mask, steps, rules, draws, past_key_values=cache).sequences[:, width:]
            new_logps, step = torch.stack(draws.logps, 1), step + steps
            keep = torch.arange(len(rows), device=model.device)

    def _begin(self, batch: list[Saying], rules: Rules, states: States, uniforms: Tensor) -> Begun:
        model, prompts = self._plain, list(dict.fromkeys(row.prompt for row in batch))
        place = {prompt: index for index, prompt in enumerate(prompts)}
        keep = torch.tensor([place[row.prompt] for row in batch], device=model.device)
        share = common_prefix(prompts, rules.max_new_tokens, states.longest_shared)
        if share or len(prompts) < len(batch):
            read = read_prompts(model, prompts, rules, share)
            tokens, logps = draw(read.logits[keep], uniforms[:, 0], rules.temperature)
            return Begun(read.ids[keep], read.mask[keep], read.cache, keep, tokens[:, None], logps[:, None])
        # Nothing is read twice here, so the first tokens come from the same call of generate.
        ids, mask = left_padded(prompts, rules.pad_token_id, model.device)
        steps = min(CHUNK_STEPS, rules.max_new_tokens)
        draws = Draws(uniforms[:, :steps], rules.temperature)
        output = generate(model, ids, mask, steps, rules, draws)
        new = output.sequences[:, ids.shape[1] :]
        return Begun(ids, mask, output.past_key_values, keep, new, torch.stack(draws.logps, 1))

    def _weigh(self, trees: list[Tree]) -> list[list[float]]:
        states = self._found(max((prompt for prompt, _ in trees), key=len))
        if states.batching is Batching.moving and max(len(prompt) for prompt, _ in trees) > SHORT_PROMPT:
            return answer_logps(self._plain, trees, pad_token_id=self._pad, longest_shared=states.longest_shared)
        size = 1 if states.batching is Batching.single else CANDIDATES_TOGETHER
        return answer_logps_alone(self._plain, trees, pad_token_id=self._pad, batch_size=size)

    def _end_at_stop(self, row: Saying) -> bool:
        """Whether the row has ended, by a token or by a stop text; tokens after a stop text are dropped."""
        if row.stop and cut_at_stop(self._chats.text(row.ids), row.stop)[1]:
            # Fewer tokens that still hold it, so that where a chunk ended does not matter.
            while cut_at_stop(self._chats.text(row.ids[:-1]), row.stop)[1]:
                row.ids.pop()
                row.logps.pop()
            row.finished = True
        return row.finished

    def _said(self, row: Saying) -> Said:
        text = cut_at_stop(self._chats.text(row.ids), row.stop)[0].strip()
        return Said(text, row.finished, len(row.prompt), len(row.ids))
