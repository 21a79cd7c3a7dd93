"""Reading prompts that start alike: what they share is read once, and its cache repeated for each.

    [shared prefix][padding][rest of the prompt]

Positions follow the mask, so padding in the middle counts for nothing, as long as a model takes no distances from
places in the row, which is proven by trial. A window is such a distance: rows longer than the shortest are read whole.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from align.generation.batching import Rules, _logits_alone, _same, generate, left_padded, with_tokens
from align.generation.roomy_cache import RoomyLayer, move_rows

SHORTEST_PREFIX = 16
"""Tokens; reading fewer by themselves costs about what it saves (benchmarks/speakers.py)."""


class Read(NamedTuple):
    """Prompts that a model has read; n rows of W tokens."""

    ids: Tensor
    """(n, W) long, padded."""
    mask: Tensor
    """(n, W), 1 = a token of the prompt."""
    cache: Cache
    logits: Tensor
    """(n, vocabulary) of the next token."""


def common_prefix(prompts: Sequence[Sequence[int]], new_tokens: int, longest_shared: float) -> int:
    """Tokens that different prompts start with and that are worth reading once; 0: none.

    The last token of each prompt stays apart: it is read for what follows it. `longest_shared` (of `prove_sharing`)
    bounds the tokens of a row with those that are to be added.
    """
    first, last = min(prompts), max(prompts)
    if first == last or max(map(len, prompts)) + new_tokens > longest_shared:
        return 0
    limit = min(map(len, prompts)) - 1
    # All that lies between two texts in the order of a dictionary starts as they do.
    share = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), limit)
    share = min(share, limit)
    return share if share >= SHORTEST_PREFIX else 0


def read_prompts(model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], rules: Rules, share: int) -> Read:
    """Read the prompts, the first `share` tokens (the same in all of them) once. 0: each by itself, padded."""
    ids, mask = left_padded([prompt[share:] for prompt in prompts], rules.pad_token_id, model.device)
    if not share:
        read = generate(model, ids, mask, 1, rules, output_logits=True)
        return Read(ids, mask, read.past_key_values, read.logits[0])
    head = torch.tensor([prompts[0][:share]], device=model.device)
    cache = generate(model, head, torch.ones_like(head), 1, rules).past_key_values
    move_rows(cache, torch.zeros(len(prompts), dtype=torch.long, device=model.device), ids.shape[1])
    head = head.expand(len(prompts), -1)
    ids, mask = torch.cat([head, ids], 1), torch.cat([torch.ones_like(head), mask], 1)
    read = generate(model, ids, mask, 1, rules, output_logits=True, past_key_values=cache)
    return Read(ids, mask, read.past_key_values, read.logits[0])


def prove_sharing(model: PreTrainedModel, prompt: tuple[int, ...], pad_token_id: int) -> float:
    """How long rows (tokens) of this model may grow that share a prefix: 0 not at all, math.inf without limit.

    The trial: two prompts that share the first half of this one, and differ in length, must be continued with the
    logits that each is given alone, also after their rows are swapped. The model's states must be able to move
    (`Batching.moving`).
    """
    rules = Rules(frozenset(), pad_token_id, 2, 0.0)
    long = prompt * math.ceil(4 / len(prompt))
    share = len(long) // 2
    pair = [long, long[: share + 1]]
    kind = generate(model, *left_padded([long[:1]], pad_token_id, model.device), 1, rules).past_key_values
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, RoomyLayer) for layer in kind.layers):
        return 0
    windows = [layer.sliding_window for layer in kind.layers if type(layer) is DynamicSlidingWindowLayer]
    longest = min(windows, default=math.inf)
    # A window that the trial outgrows says nothing about rows that stay within it.
    while len(pair[0]) + 2 > longest and share > 1:
        share //= 2
        pair = [long[: 2 * share + 1], long[: share + 1]]
    if len(pair[0]) + 2 > longest:
        return 0
    return longest if _goes_on_shared(model, pair, rules, share) else 0


def _goes_on_shared(model: PreTrainedModel, pair: list[tuple[int, ...]], rules: Rules, share: int) -> bool:
    following, after = _logits_alone(model, pair, rules)
    read = read_prompts(model, pair, rules, share)
    if not _same(read.logits, following):
        return False
    swap = torch.tensor([1, 0], device=model.device)
    ids, mask = with_tokens(read.ids, read.mask, following.argmax(-1, keepdim=True))
    move_rows(read.cache, swap, 1)
    moved = generate(model, ids[swap], mask[swap], 1, rules, past_key_values=read.cache, output_logits=True)
    return _same(moved.logits[0], after[swap])
