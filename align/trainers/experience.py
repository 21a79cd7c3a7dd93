"""What an update learns from: sampled completions with all that was read of them, on every rank the whole of it."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from align.config.errors import UserError
from align.config.schema import Layout, PPOStage
from align.data.forest import Tree, lay_out
from align.data.prompt_rows import read_record
from align.data.template import Template
from align.distributed import runtime
from align.generation.rollout import Completion
from align.tracking.progress import Progress
from align.trainers.reward_sources import Answered

FORWARD = 4
"""Reading keeps no gradients, so it takes this many micro-batches at once."""

DISAGREEMENT_NATS = 0.5
"""Mean difference a token between the sampler's log-probabilities and the trainer's that no rounding explains: in half
precision they differ by hundredths of it, and with weights that are not the policy's by several nats."""

Batch = dict[str, Tensor]


class RewardSource(Protocol):
    """What scores completions; see `align.trainers.reward_sources`."""

    setting: Any

    def scores(self, answered: Sequence[Answered]) -> np.ndarray: ...


class Sampler(Protocol):
    """Completions of the policy as it is, prompt-major, one a seed: see `align.generation.rollout.sample`.

    It is called on every rank, with as many prompts as the rank has, if any.
    """

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        per_prompt: int,
        seeds: Sequence[int],
        temperature: float,
        progress: Progress | None,
    ) -> list[Completion]: ...


@dataclass
class Experience:
    """Completions in prompt order, (B,) or padded to (B, T) with zeros behind the last token; tensors on the CPU.

    Of one rank, or joined of all.
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    """Sampled tokens, the stop token included where it came."""
    group: Tensor
    """(B,) which prompt of the run a completion answers; equal for those that share a prompt."""
    finished: Tensor
    """(B,) bool: ended by a stop token."""
    empty: Tensor
    """(B,) bool: no text but white space."""
    scores: dict[str, np.ndarray]
    """Source -> (B,) in float64, NaN where it gives none."""
    mask: Tensor
    """(B, T) bool: a sampled token."""
    sampler_logps: Tensor
    logps: Tensor
    """(B, T) of the policy, by the trainer."""
    reference_logps: Tensor
    """(B, T); those of the policy where there is no reference."""
    entropies: Tensor
    values: Tensor
    """(B, T); zeros without a value model."""

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def lengths(self) -> Tensor:
        """(B,) sampled tokens."""
        return self.mask.sum(1)


def joined(parts: Sequence[Experience]) -> Experience:
    """The completions of every part, parts in order."""
    longest = max(part.mask.shape[1] for part in parts)
    values: dict[str, Any] = {}
    for field in fields(Experience):
        of_parts = [getattr(part, field.name) for part in parts]
        if isinstance(of_parts[0], list):
            values[field.name] = [one for part in of_parts for one in part]
        elif isinstance(of_parts[0], dict):
            values[field.name] = {key: np.concatenate([part[key] for part in of_parts]) for key in of_parts[0]}
        elif of_parts[0].dim() == 2:
            wide = [torch.nn.functional.pad(part, (0, longest - part.shape[1])) for part in of_parts]
            values[field.name] = torch.cat(wide)
        else:
            values[field.name] = torch.cat(of_parts)
    return Experience(**values)


def trees_of(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], group: Sequence[int]
) -> list[Tree]:
    """One tree a run of equal groups: completions of a prompt that follow each other share its computation."""
    trees = []
    for _, places in groupby(range(len(group)), key=lambda place: group[place]):
        members = list(places)
        trees.append(Tree(prompts[members[0]], [completions[place] for place in members]))
    return trees


def padded(flat: Tensor, lengths: Sequence[int]) -> Tensor:
    """Numbers of tokens (S,), completions in order, as (B, T) with zeros behind; on the CPU."""
    rows = flat.cpu().split(list(lengths))
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def prompt_of(position: int, rows: int, seed: int) -> int:
    """Which row is drawn at a position of the run: each once an epoch, in an order of the epoch's own."""
    epoch, place = divmod(position, rows)
    return int(_order(rows, seed, epoch)[place])


_orders: dict[tuple[int, int, int], np.ndarray] = {}


def _order(rows: int, seed: int, epoch: int) -> np.ndarray:
    key = (rows, seed, epoch)
    if key not in _orders:
        _orders.clear()
        _orders[key] = np.random.default_rng([seed, epoch]).permutation(rows)
    return _orders[key]


def completion_seed(seed: int, position: int, number: int) -> int:
    """The seed of one completion: the same whatever the ranks, the batch and what was sampled before."""
    return int.from_bytes(hashlib.sha256(f"{seed} {position} {number}".encode()).digest()[:8], "little") >> 1


@dataclass
class Readers:
    """What reads completions, as the trainer has it wrapped."""

    tokens: Callable[[Batch], tuple[Tensor, Tensor | None, Tensor]]
    """Batch of `lay_out` -> log-probabilities, values or None, entropies, each (S,)."""
    reference: Callable[[Batch], Tensor] | None
    """Batch of `lay_out` -> log-probabilities (S,); None without a reference."""
    sample: Sampler
    on_device: Callable[[], AbstractContextManager[None]]
    """Inside: the frozen models are where they compute."""


class ExperienceMaker:
    """Samples, reads and scores the completions of an update: each rank its share, every rank gets all of them."""

    def __init__(
        self,
        settings: PPOStage,
        *,
        prompts: Dataset,
        template: Template,
        sources: Sequence[RewardSource],
        readers: Readers,
        layout: Layout,
        accelerator: Accelerator,
        watch: Callable[[str], AbstractContextManager[Progress]],
    ):
        """watch: takes the time of `rollout` and of `scoring`, and gives a live line."""
        self.settings, self.prompts, self.template, self.sources = settings, prompts, template, sources
        self.readers, self.layout, self.accelerator = readers, layout, accelerator
        self.watch = watch

    def make(self, update: int) -> Experience:
        """The experience of update `update` (counted from 0), the same on every rank."""
        settings, ranks, rank = self.settings, self.accelerator.num_processes, self.accelerator.process_index
        count = settings.completions_per_update // settings.completions_per_prompt
        share = count // ranks
        positions = [update * count + rank * share + i for i in range(share)]
        rows = [self.prompts[prompt_of(position, len(self.prompts), settings.seed)] for position in positions]
        with self.watch("rollout") as progress:
            sampled = self._sample(rows, positions, progress)
        with self.watch("scoring"):
            part = self._read(rows, positions, sampled)
        whole = joined(runtime.gather(part))
        refuse_disagreement(whole)
        return whole

    def _sample(
        self, rows: Sequence[Mapping[str, Any]], positions: Sequence[int], progress: Progress
    ) -> list[Completion]:
        settings = self.settings
        each = range(settings.completions_per_prompt)
        return self.readers.sample(
            [row["prompt_ids"] for row in rows],
            per_prompt=settings.completions_per_prompt,
            seeds=[completion_seed(settings.seed, position, k) for position in positions for k in each],
            temperature=settings.temperature,
            progress=progress,
        )

    def _read(
        self, rows: Sequence[Mapping[str, Any]], positions: Sequence[int], sampled: Sequence[Completion]
    ) -> Experience:
        each = self.settings.completions_per_prompt
        prompts = [row["prompt_ids"] for row in rows for _ in range(each)]
        group = [position for position in positions for _ in range(each)]
        completions = [one.ids for one in sampled]
        answered = answers(self.template, [row for row in rows for _ in range(each)], sampled)
        with self.readers.on_device():
            scores = {source.setting.name: source.scores(answered) for source in self.sources}
            read = self._read_tokens(prompts, completions, group)
        lengths = [len(ids) for ids in completions]
        return Experience(
            prompts=prompts,
            completions=completions,
            group=torch.tensor(group),
            finished=torch.tensor([one.finished for one in sampled]),
            empty=torch.tensor([not one.text.strip() for one in answered]),
            scores=scores,
            mask=padded(torch.ones(sum(lengths), dtype=torch.bool), lengths),
            sampler_logps=padded(torch.tensor([logp for one in sampled for logp in one.logps]), lengths),
            **{name: padded(torch.cat(parts), lengths) for name, parts in read.items()},
        )

    def _read_tokens(self, prompts: list, completions: list, group: list) -> dict[str, list[Tensor]]:
        """name -> (tokens of a completion,) for each; as many forwards on every rank, for ZeRO-3 gathers in each."""
        order = sorted(range(len(group)), key=lambda i: (-len(prompts[i]), group[i]))
        size = FORWARD * self.settings.micro_batch_size
        found: dict[str, list] = {"logps": [], "values": [], "entropies": [], "reference_logps": []}
        for start in range(0, len(order), size):
            places = order[start : start + size]
            taken = ([column[i] for i in places] for column in (prompts, completions, group))
            batch = self._on_device(lay_out(trees_of(*taken), self.layout, self.template.tokenizer.pad_token_id))
            with torch.no_grad():
                logps, values, entropies = self.readers.tokens(batch)
                reference = self.readers.reference(batch) if self.readers.reference else logps
            values = torch.zeros_like(logps) if values is None else values
            lengths = [len(completions[i]) for i in places]
            for name, flat in zip(found, (logps, values, entropies, reference), strict=True):
                found[name] += zip(places, flat.float().cpu().split(lengths), strict=True)
        return {name: [flat for _, flat in sorted(parts, key=lambda part: part[0])] for name, parts in found.items()}

    def _on_device(self, batch: Batch) -> Batch:
        return {key: value.to(self.accelerator.device) for key, value in batch.items()}


def refuse_disagreement(seen: Experience) -> None:
    """Refuse completions that were sampled from another distribution than the policy's, as the trainer reads it.

    Small differences are corrected, by weights; those of a sampler that holds other weights cannot be.
    Raises: UserError above DISAGREEMENT_NATS.
    """
    difference = (seen.sampler_logps - seen.logps)[seen.mask].abs().mean().item()
    if difference > DISAGREEMENT_NATS:
        raise UserError(
            f"stages.ppo.rollout: log-probabilities of sampled tokens differ by {difference:.2f} nats a token from the "
            "trainer's, so what samples is not the policy; set stages.ppo.rollout=hf"
        )


def answers(template: Template, rows: Sequence[Mapping[str, Any]], sampled: Sequence[Completion]) -> list[Answered]:
    """Completions as rewards see them. rows: one a completion, of `align.data.prompt_rows.PROMPTS`."""
    found = []
    for row, one in zip(rows, sampled, strict=True):
        record = read_record(row)
        text = template.tokenizer.decode(one.ids, skip_special_tokens=True)
        found.append(
            Answered(record.messages, record.tools, row["prompt_ids"], one.ids, text, one.finished, record.row)
        )
    return found
