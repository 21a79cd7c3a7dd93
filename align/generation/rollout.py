"""Rollouts: completions sampled for training, each token with the log-probability it was sampled at.

Hugging Face `generate` runs the model, a chunk of steps at a time; the tokens are drawn here, from numbers of each
completion's own, so that what is sampled depends on the prompt and the seed and not on the batch. A prompt is read once
however many completions it gets, and finished completions leave the batch between chunks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from align.config.errors import UserError
from align.generation.batching import Batching, Rules, generate, left_padded, prove_batching, with_tokens
from align.generation.roomy_cache import move_rows
from align.generation.seeds import row_uniforms
from align.models.layout import plain_model, speaking_model
from align.tracking.progress import Progress

CHUNK_STEPS = 16


@dataclass(frozen=True)
class Completion:
    """What was sampled for a prompt."""

    ids: list[int]
    """Sampled tokens, the stop token included if it came."""
    logps: list[float]
    """Log-probability of each (nats) under softmax(logits / temperature) of the sampler, in fp32."""
    finished: bool
    """Whether a stop token ended it, and not the limit."""


@dataclass
class Row:
    """A completion in the making."""

    prompt: tuple[int, ...]
    seed: int
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finished: bool = False


@torch.no_grad()
def sample(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    per_prompt: int,
    seeds: Sequence[int],
    stop_token_ids: Sequence[int],
    pad_token_id: int,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    progress: Progress | None,
) -> list[Completion]:
    """`per_prompt` completions of each prompt (token ids), prompt-major, one for each of the seeds.

    The same prompt and seed give the same tokens, up to rounding, whatever the batch, the order and the other prompts.
    The model's own generation config (top_k, repetition penalty, stop tokens ...) has no say. batch_size: completions
    in a batch. The model may be wrapped by PEFT; it comes back in the mode, training or not, that it was in.
    Raises: UserError if the model's logits are no numbers.
    """
    assert len(seeds) == len(prompts) * per_prompt and all(prompts) and max_new_tokens > 0 and batch_size > 0
    rules = Rules(frozenset(stop_token_ids), pad_token_id, max_new_tokens, temperature)
    rows = [Row(tuple(prompts[index // per_prompt]), seed) for index, seed in enumerate(seeds)]
    if not rows:
        return []
    plain = speaking_model(model)
    with as_sampler(plain):
        batching = prove_batching(plain, max((row.prompt for row in rows), key=len), pad_token_id)
        done = 0
        for batch in batches_of(rows, batch_size, batching):
            steps = _decode(plain, batch, rules) if batching is Batching.moving else decode_at_once(plain, batch, rules)
            for finished in steps:
                if progress:
                    progress.show(done + finished)
            done += len(batch)
    return [Completion(row.ids, row.logps, row.finished) for row in rows]


@contextmanager
def as_sampler(model: PreTrainedModel) -> Iterator[None]:
    """The model in eval mode, with a generation config that says nothing; as it was, afterwards."""
    training = [module for module in model.modules() if module.training]
    # `generate` fills what a config of ours leaves open from the model's; PEFT's wrapping has one of its own.
    configs = {one: one.generation_config for one in (model, plain_model(model))}
    model.eval()
    for one in configs:
        one.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for one, config in configs.items():
            one.generation_config = config
        for module in training:
            module.training = True


def batches_of(rows: list[Row], batch_size: int, batching: Batching) -> Iterator[list[Row]]:
    """Prompts of like length together, completions of one prompt beside each other."""
    ordered = sorted(rows, key=lambda row: (len(row.prompt), row.prompt))
    alike = [ordered]
    if batching is Batching.equal_lengths:
        alike = [list(group) for _, group in groupby(ordered, key=lambda row: len(row.prompt))]
    size = 1 if batching is Batching.single else batch_size
    for group in alike:
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _decode(model: PreTrainedModel, batch: list[Row], rules: Rules) -> Iterator[int]:
    """Complete the rows of a batch, yielding how many are done; a row that is done is computed no further."""
    prompts = list(dict.fromkeys(row.prompt for row in batch))
    place = {prompt: index for index, prompt in enumerate(prompts)}
    ids, mask = left_padded(prompts, rules.pad_token_id, model.device)
    read = generate(model, ids, mask, 1, rules, output_logits=True)
    cache, rows = read.past_key_values, batch
    uniforms = uniforms_of(rows, rules, model.device)
    keep = torch.tensor([place[row.prompt] for row in rows], device=model.device)
    tokens, logps = draw(read.logits[0][keep], uniforms[:, 0], rules.temperature)
    record(rows, tokens[:, None], logps[:, None], rules)
    ids, mask = with_tokens(ids[keep], mask[keep], tokens[:, None])
    for step in range(1, rules.max_new_tokens, CHUNK_STEPS):
        alive = torch.tensor([i for i, row in enumerate(rows) if not row.finished], dtype=torch.long)
        yield len(batch) - len(alive)
        if not len(alive):
            return
        alive = alive.to(model.device)
        move_rows(cache, keep[alive], CHUNK_STEPS)
        rows = [row for row in rows if not row.finished]
        ids, mask, uniforms = ids[alive], mask[alive], uniforms[alive]
        draws = Draws(uniforms[:, step : step + CHUNK_STEPS], rules.temperature)
        steps = min(CHUNK_STEPS, rules.max_new_tokens - step)
        width = ids.shape[1]
        ids = generate(model, ids, mask, steps, rules, draws, past_key_values=cache).sequences
        new = ids[:, width:]
        record(rows, new, torch.stack(draws.logps, 1), rules)
        mask = torch.cat([mask, torch.ones_like(new)], 1)
        keep = torch.arange(len(rows), device=model.device)
    yield len(batch)


def decode_at_once(model: PreTrainedModel, batch: list[Row], rules: Rules) -> Iterator[int]:
    """As `_decode`, by one call of generate in which every row is computed until the last is done."""
    ids, mask = left_padded([row.prompt for row in batch], rules.pad_token_id, model.device)
    draws = Draws(uniforms_of(batch, rules, model.device), rules.temperature)
    output = generate(model, ids, mask, rules.max_new_tokens, rules, draws)
    record(batch, output.sequences[:, ids.shape[1] :], torch.stack(draws.logps, 1), rules)
    yield len(batch)


class Draws(LogitsProcessor):
    """Draws the next token of each row by the row's own uniform number, and keeps its log-probability.

    uniforms: (rows, steps) float64. generate is greedy and takes the token because no other score is finite.
    """

    def __init__(self, uniforms: Tensor, temperature: float) -> None:
        self.uniforms, self.temperature = uniforms, temperature
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.temperature:
            self.logps.append(_greatest_logps(scores))
            return scores  # generate takes the likeliest by itself
        tokens, logps = draw(scores, self.uniforms[:, len(self.logps)], self.temperature)
        self.logps.append(logps)
        # A copy that generate made of the logits, and reads no more.
        return scores.fill_(-torch.inf).scatter_(1, tokens[:, None], 0.0)


def draw(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens (rows,) by inverse CDF of softmax(logits / temperature), and their log-probabilities (rows,) fp32.

    logits: (rows, vocabulary); uniforms: (rows,) float64 in [0, 1). temperature 0: the likeliest token,
    softmax(logits).
    """
    if not temperature:
        return logits.argmax(-1), _greatest_logps(logits)
    token_logps = torch.log_softmax(logits.float() / temperature, -1)
    # fp32 sums over a large vocabulary lose what a rare token is worth.
    cdf = token_logps.exp().cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True)
    tokens = tokens.clamp_(max=logits.shape[-1] - 1)
    return tokens[:, 0], token_logps.gather(1, tokens)[:, 0]


def _greatest_logps(logits: Tensor) -> Tensor:
    """Log-probability of each row's likeliest token; NaN in a row is NaN here."""
    logits = logits.float()
    return logits.amax(-1) - logits.logsumexp(-1)


def record(rows: list[Row], tokens: Tensor, logps: Tensor, rules: Rules) -> None:
    """Add sampled tokens (rows, steps) to their rows, up to the first stop token."""
    if not logps.isfinite().all():
        raise UserError("the model's logits are no numbers, so nothing can be sampled; go back to a checkpoint before")
    for row, new, new_logps in zip(rows, tokens.tolist(), logps.tolist(), strict=True):
        for token, logp in zip(new, new_logps, strict=True):
            row.ids.append(token)
            row.logps.append(logp)
            if token in rules.stop_token_ids:
                row.finished = True
                break


def uniforms_of(rows: list[Row], rules: Rules, device: torch.device) -> Tensor:
    """Numbers of [0, 1) by which the tokens of each row are drawn, of its seed alone: (rows, max_new_tokens)."""
    return torch.from_numpy(row_uniforms([row.seed for row in rows], rules.max_new_tokens)).to(device)
