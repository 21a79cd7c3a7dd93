"""How completions may share a batch: what the states of a model allow, found by trial where it cannot be known."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from align.generation.roomy_cache import move_rows
from align.models.layout import prompt_learning

ROUNDING_SHARE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""What rounding may change log-probabilities by, as a share of their spread; in half precision 0.05."""


@dataclass(frozen=True)
class Rules:
    """What a completion is drawn by."""

    stop_token_ids: frozenset[int]
    pad_token_id: int
    max_new_tokens: int
    temperature: float
    """0 takes the likeliest token; its log-probability is then that of softmax(logits)."""


class Batching(Enum):
    """What the states of a model allow, best first."""

    moving = "rows of the cache can be repeated and dropped"
    padded = "one call of generate for a batch"
    equal_lengths = "one call of generate for a batch of equally long prompts: what is padded would be read as text"
    single = "one call of generate for a completion"


def prove_batching(model: PreTrainedModel, prompt: tuple[int, ...], pad_token_id: int) -> Batching:
    """How completions may share a batch: by the kind of cache if it holds keys and values alone, else by trial.

    The trial reads a prompt beside another, then beside its own first half, then swaps those two and goes on: each must
    be given the logits that it is given alone. A model may keep states outside its cache, read padding as text, or mix
    the rows of a batch up (transformers' RWKV, 5.23).
    """
    rules = Rules(frozenset(), pad_token_id, 2, 0.0)
    long = prompt if len(prompt) > 1 else prompt * 2
    short = long[: len(long) // 2]
    kind = generate(model, *left_padded([long[:1]], pad_token_id, model.device), 1, rules).past_key_values
    moves = not prompt_learning(model)  # else the cache holds positions that no token stands for
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    if moves and type(kind) is DynamicCache and all(type(layer) in known for layer in kind.layers):
        return Batching.moving
    if not _reads_together(model, [long, (pad_token_id,) * len(long)], rules):
        return Batching.single
    if not _reads_together(model, [long, short], rules):
        return Batching.equal_lengths
    return Batching.moving if moves and _goes_on_swapped(model, [long, short], rules) else Batching.padded


def _reads_together(model: PreTrainedModel, pair: list[tuple[int, ...]], rules: Rules) -> bool:
    ids, mask = left_padded(pair, rules.pad_token_id, model.device)
    together = generate(model, ids, mask, 2, rules, output_logits=True).logits
    return all(map(_same, together, _logits_alone(model, pair, rules)))


def _goes_on_swapped(model: PreTrainedModel, pair: list[tuple[int, ...]], rules: Rules) -> bool:
    ids, mask = left_padded(pair, rules.pad_token_id, model.device)
    read = generate(model, ids, mask, 1, rules)
    cache, swap = read.past_key_values, torch.tensor([1, 0], device=model.device)
    try:
        if not isinstance(cache, Cache) or cache.get_seq_length() != ids.shape[1]:
            return False
    except ValueError:  # no layer counts tokens, so generate cannot tell where the cache ends
        return False
    move_rows(cache, swap, 1)
    ids, mask = with_tokens(ids, mask, read.sequences[:, -1:])
    moved = generate(model, ids[swap], mask[swap], 1, rules, past_key_values=cache, output_logits=True)
    return _same(moved.logits[0], _logits_alone(model, pair, rules)[1][swap])


def _logits_alone(model: PreTrainedModel, pair: list[tuple[int, ...]], rules: Rules) -> list[Tensor]:
    """Of the next token and of the one after, each (2, vocabulary)."""
    inputs = [left_padded([prompt], rules.pad_token_id, model.device) for prompt in pair]
    alone = [generate(model, *row, 2, rules, output_logits=True).logits for row in inputs]
    return [torch.cat(rows) for rows in zip(*alone, strict=True)]


def _same(logits: Tensor, expected: Tensor) -> bool:
    difference = (logits.log_softmax(-1) - expected.log_softmax(-1)).abs().mean()
    return bool(difference <= ROUNDING_SHARE.get(logits.dtype, 0.05) * expected.std())


def generate(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    new_tokens: int,
    rules: Rules,
    draws: LogitsProcessor | None = None,
    **more: Any,
) -> GenerateDecoderOnlyOutput:
    """generate, greedy but for `draws`, until the stop tokens or `new_tokens`; with a cache, on from where it ends."""
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=sorted(rules.stop_token_ids) or None,
        pad_token_id=rules.pad_token_id,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=more.pop("output_logits", False),
    )
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=config,
        logits_processor=LogitsProcessorList([draws] if draws else []),
        # Under ZeRO-3 generate would wait for the other ranks each step, and they take other numbers of steps.
        synced_gpus=False,
        **more,
    )


def left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask


def with_tokens(ids: Tensor, mask: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([ids, tokens], 1), torch.cat([mask, torch.ones_like(tokens)], 1)
