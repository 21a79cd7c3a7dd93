"""Log-probabilities of whole answers to prompts, each prompt read once for all of its answers."""

import inspect
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from align.config.errors import UserError
from align.generation.batching import Rules
from align.generation.roomy_cache import move_rows
from align.generation.shared_prefix import Read, common_prefix, read_prompts
from align.losses.logprobs import token_logps

NO_NUMBERS = "the model's logits are no numbers, so nothing can be judged; go back to a checkpoint before"
Tree = tuple[tuple[int, ...], list[list[int]]]
"""Token ids of a prompt, and of each answer to it."""


def answer_logps(
    model: PreTrainedModel, trees: Sequence[Tree], *, pad_token_id: int, longest_shared: float
) -> list[list[float]]:
    """Log-probability (nats, fp32) of each answer after its prompt: the sum over its tokens.

    Prompts are read once, what they all start with once for all (`longest_shared`: see `prove_sharing`). The states of
    the model must be able to move (`Batching.moving`). Raises: UserError if the model's logits are no numbers.
    """
    rules = Rules(frozenset(), pad_token_id, 1, 0.0)
    prompts = [prompt for prompt, _ in trees]
    answers = [answer for _, group in trees for answer in group]
    longest = max(map(len, answers))
    owner = torch.tensor([i for i, (_, group) in enumerate(trees) for _ in group], device=model.device)
    read = read_prompts(model, prompts, rules, common_prefix(prompts, longest, longest_shared))
    logits = read.logits[owner][:, None]
    if longest > 1:
        logits = torch.cat([logits, _logits_after(model, read, owner, answers, pad_token_id)], 1)
    return _by_tree(_sums(logits, answers), trees)


def answer_logps_alone(
    model: PreTrainedModel, trees: Sequence[Tree], *, pad_token_id: int, batch_size: int
) -> list[list[float]]:
    """As `answer_logps`, for models whose states cannot move: prompt and answer in one row, padded at its end.

    What comes later changes nothing in a causal model, so the padding needs no care. batch_size: rows in a forward.
    """
    rows = [(prompt, answer) for prompt, group in trees for answer in group]
    read = answer_logits(model, rows, pad_token_id=pad_token_id, batch_size=batch_size)
    sums = [_sums(logits[None], [answer])[0] for logits, (_, answer) in zip(read, rows, strict=True)]
    return _by_tree(sums, trees)


def token_logps_alone(
    model: PreTrainedModel, rows: Sequence[tuple[Sequence[int], list[int]]], *, pad_token_id: int, batch_size: int
) -> Iterator[list[float]]:
    """Log-probability (nats, fp32) of each token of each answer after its prompt, in the order of the rows.

    Raises: UserError if the model's logits are no numbers.
    """
    read = answer_logits(model, rows, pad_token_id=pad_token_id, batch_size=batch_size)
    for logits, (_, answer) in zip(read, rows, strict=True):
        logps = token_logps(logits, torch.tensor(answer, device=logits.device))
        if not logps.isfinite().all():
            raise UserError(NO_NUMBERS)
        yield logps.tolist()


def answer_logits(
    model: PreTrainedModel, rows: Sequence[tuple[Sequence[int], list[int]]], *, pad_token_id: int, batch_size: int
) -> Iterator[Tensor]:
    """Logits (tokens of the answer, vocabulary) from which each answer's tokens come; rows are padded at their end.

    Every answer has a token at least. batch_size: rows in a forward.
    """
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        ids, mask = _right_padded([[*prompt, *answer[:-1]] for prompt, answer in some], pad_token_id, model.device)
        kept = ids.shape[1] - min(len(prompt) for prompt, _ in some) + 1
        # Logits of whole prompts are the largest thing in memory where the vocabulary is large.
        keep = {"logits_to_keep": kept} if _takes(model, "logits_to_keep") else {}
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **keep).logits
        cut = ids.shape[1] - logits.shape[1]
        for row, (prompt, answer) in zip(logits, some, strict=True):
            first = len(prompt) - 1 - cut
            yield row[first : first + len(answer)]


def _logits_after(model: PreTrainedModel, read: Read, owner: Tensor, answers: Sequence[list[int]], pad: int) -> Tensor:
    """Logits (answers, longest - 1, vocabulary) of each answer's second token and those after it."""
    ids, mask = _right_padded([answer[:-1] for answer in answers], pad, model.device)
    move_rows(read.cache, owner, ids.shape[1])
    mask = torch.cat([read.mask[owner], mask], 1)
    places = {}
    if _takes(model, "position_ids"):
        places["position_ids"] = (mask.cumsum(-1) - 1)[:, -ids.shape[1] :]
    return model(input_ids=ids, attention_mask=mask, past_key_values=read.cache, use_cache=True, **places).logits


def _takes(model: PreTrainedModel, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


def _right_padded(rows: Sequence[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


def _sums(logits: Tensor, answers: Sequence[list[int]]) -> list[float]:
    """Log-probabilities of answers from the logits (answers, >= tokens, vocabulary) of each of their tokens."""
    width = max(map(len, answers))
    ids, mask = _right_padded(answers, 0, logits.device)
    logits = logits[:, :width].float()
    logps = logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)
    logps = torch.where(mask.bool(), logps, 0.0)
    if not logps.isfinite().all():
        raise UserError(NO_NUMBERS)
    return logps.sum(-1).tolist()


def _by_tree(values: Sequence[float], trees: Sequence[Tree]) -> list[list[float]]:
    rest = iter(values)
    return [[next(rest) for _ in group] for _, group in trees]
