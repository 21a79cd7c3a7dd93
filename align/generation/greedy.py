"""Greedy replies one at a time, and what a model makes of given ones: as plain as it can be, to compare models by."""

from collections.abc import Sequence

import torch

from align.generation.answer_logps import token_logps_alone
from align.generation.batching import Rules, generate, left_padded
from align.generation.rollout import as_sampler
from align.losses.parity import Read
from align.models.layout import speaking_model

Ids = list[int]


@torch.no_grad()
def greedy_read(
    model: torch.nn.Module,
    prompts: Sequence[Ids],
    given: Sequence[Ids] | None,
    *,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
    max_new_tokens: int,
) -> Read:
    """A model's greedy replies to prompts (token ids), and its log-probabilities of the replies that are given.

    given: None takes its own. The model may be wrapped by PEFT; its own generation config has no say.
    Raises: UserError if the model's logits are no numbers.
    """
    speaking = speaking_model(model)
    rules = Rules(frozenset(stop_token_ids), pad_token_id, max_new_tokens, 0.0)
    replies = []
    with as_sampler(speaking):
        for prompt in prompts:
            ids, mask = left_padded([prompt], pad_token_id, speaking.device)
            answer = generate(speaking, ids, mask, max_new_tokens, rules).sequences[0, len(prompt) :]
            replies.append(answer.tolist())
        own, other = (
            list(
                token_logps_alone(
                    speaking, list(zip(prompts, of, strict=True)), pad_token_id=pad_token_id, batch_size=1
                )
            )
            for of in (replies, replies if given is None else given)
        )
    return Read(replies, own, other)
