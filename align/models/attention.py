"""Attention over a forest: each token sees its own prompt and its own completion, nothing else of the row.

A model is switched to an attention function of ours (transformers' AttentionInterface). What it gets in place of a mask
is the forest's table of lengths, a 4-D integer tensor, which every model hands to its layers as it is. One masked
attention a tree then costs the sum of squared tree lengths instead of the square of the row.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FOREST_ATTENTION = "align_forest"


def tree_mask(lengths: list[int], window: int, device: torch.device) -> Tensor:
    """Which earlier tokens of its tree a token sees, (n, n) bool, True = seen.

    lengths: input tokens of the prompt and of each completion. window: a token sees this many positions, itself
    included, measured along its own prompt + completion; 0 = all.
    """
    prompt = lengths[0]
    position = torch.cat([torch.arange(prompt), *(torch.arange(prompt, prompt + n) for n in lengths[1:])]).to(device)
    branch = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(device)
    seen = (branch == branch[:, None]) | (branch == 0)
    seen = seen.tril_()
    if window:
        seen &= position[:, None] - position < window
    return seen


def forest_table(lengths: Tensor, window: int) -> Tensor:
    """The lengths (1, 1, trees, 1 + K) with the window in front of each tree: what a layer gets as its mask."""
    return F.pad(lengths, (1, 0), value=window)


def forest_masks(config: PreTrainedConfig, lengths: Tensor) -> Tensor | dict[str, Tensor]:
    """What to pass as attention_mask: one table, or one for each type of layer where the config mixes types."""
    settings = config.get_text_config().to_dict()
    window, types = settings.get("sliding_window") or 0, settings.get("layer_types")
    if types and "sliding_attention" in types:
        return {"full_attention": forest_table(lengths, 0), "sliding_attention": forest_table(lengths, window)}
    return forest_table(lengths, 0 if types else window)


def forest_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention inside each tree of a row; with any other mask, what SDPA (or a soft-capped softmax) would do.

    Shapes: query (1, heads, N, D), key and value (1, key heads, N, D); returns (1, N, heads, D).
    """
    if attention_mask is None or attention_mask.dtype != torch.long:
        if softcap is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        return _dense_softcapped(query, key, value, attention_mask, scaling, softcap), None
    assert dropout == 0.0, "pairs are trained without dropout"
    key, value = _repeat_key_heads(query, key, value)
    trees = attention_mask[0, 0].tolist()
    sizes = [sum(tree[1:]) for tree in trees]
    outputs = []
    for (window, *lengths), q, k, v in zip(
        trees, query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True
    ):
        mask = tree_mask(lengths, window, query.device)
        if softcap is None:
            output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        else:
            output = _softcapped(q, k, v, mask, scaling, softcap)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, 1), None


def _repeat_key_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)


def _softcapped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, cap: float) -> Tensor:
    """Attention with scores squeezed into (-cap, cap) (Gemma 2, arXiv:2408.00118, section 2)."""
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (torch.tanh(scores / cap) * cap).masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def _dense_softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, cap: float
) -> Tensor:
    key, value = _repeat_key_heads(query, key, value)
    if mask is None:
        queries, keys = query.shape[2], key.shape[2]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    return _softcapped(query, key, value, mask, scaling, cap).transpose(1, 2)


AttentionInterface.register(FOREST_ATTENTION, forest_attention)
AttentionMaskInterface.register(FOREST_ATTENTION, sdpa_mask)
