"""PPO trainers on the tiny models of `families`, with tokens for words and rewards that are plain functions."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from align.config.rewards import RewardSetting
from align.config.schema import Advantage, Layout, PPOStage
from align.models.actor_critic import ActorCritic
from align.trainers.ppo import ADAM_EPSILON, PPOTrainer
from align.trainers.ppo_callbacks import KeepState, UpdateEnd
from align.trainers.reward_sources import Answered
from align.trainers.samples import HeldOutSamples
from tests.models.families import VOCABULARY, tiny
from tests.models.scorers import tiny_scorer

PAD, STOPS = 0, (2, 7, 11, 13)


class Words:
    """A tokenizer whose words are the numbers of their tokens; pad and stop tokens are special."""

    def __init__(self, pad_token_id: int, stops: Sequence[int]):
        self.pad_token_id, self.special = pad_token_id, {pad_token_id, *stops}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(str(token) for token in ids if token not in self.special)


def words_template(pad_token_id: int = PAD, stops: Sequence[int] = STOPS) -> Any:
    return SimpleNamespace(tokenizer=Words(pad_token_id, stops), stop_token_ids=set(stops), digest="words")


class Scored:
    """A reward source: `score(answered)` of each completion."""

    def __init__(self, score: Callable[[Answered], float], name: str = "mine", weight: float = 1.0):
        self.setting, self.score = RewardSetting(name, None, "some:function", weight), score
        self.seen: list[Answered] = []

    def scores(self, answered: Sequence[Answered]) -> np.ndarray:
        self.seen += answered
        return np.array([self.score(one) for one in answered], dtype=np.float64)


def even(answered: Answered) -> float:
    """The share of even tokens: different for most completions."""
    return float(np.mean([token % 2 == 0 for token in answered.completion_ids])) + 0.01 * answered.completion_ids[0]


def prompt_rows(count: int, seed: int = 0, *, ending: Sequence[int] = ()) -> Dataset:
    """Rows of `align.data.prompt_rows.PROMPTS`; every prompt ends in `ending`."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        ids = generator.integers(14, VOCABULARY, generator.integers(2, 9)).tolist()
        message = {"role": "user", "content": f"Question {number}?", "tool_calls": []}
        record = {"messages": [message], "tools": [], "row": {"number": number}}
        rows.append({"prompt_ids": [*ids, *ending], "record": json.dumps(record)})
    return Dataset.from_list(rows)


def stage(**changed: Any) -> PPOStage:
    """Small settings: 8 completions an update, 2 minibatches, 2 passes."""
    small = {
        "completions_per_update": 8, "completions_per_prompt": 1, "batch_size": 4, "micro_batch_size": 4,
        "update_epochs": 2, "max_new_tokens": 6, "temperature": 1.0, "learning_rate": 1e-3, "value_weight": 0.1,
        "rewards": {"mine": {"function": "some:function"}}, "rollout_batch_size": 8, "advantage": Advantage.gae,
        "sample_every": 0, "sample_prompts": 3,
    }  # fmt: skip
    return PPOStage(policy="memory", **(small | changed))


def actor(settings: PPOStage, name: str = "llama") -> ActorCritic:
    critic = tiny_scorer(name, seed=3) if settings.advantage is Advantage.gae else None
    return ActorCritic(tiny(name), critic, temperature=settings.temperature)


def build(
    folder: Path,
    settings: PPOStage,
    *,
    updates: int = 1,
    layout: Layout = Layout.padded,
    model: ActorCritic | None = None,
    sources: Sequence[Any] | None = None,
    prompts: Dataset | None = None,
    template: Any = None,
    texts: Dataset | None = None,
    reference: nn.Module | None = None,
    schedule: str = "constant",
    save_every: int = 0,
    samples: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    **arguments: Any,
) -> PPOTrainer:
    """A trainer that is begun, with a copy of the policy as its reference."""
    steps = settings.update_epochs * (settings.completions_per_update // settings.batch_size)
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        max_steps=1,
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.batch_size // settings.micro_batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=schedule,
        adam_epsilon=ADAM_EPSILON,
        logging_strategy="no",
        save_strategy="steps" if save_every else "no",
        save_steps=max(save_every, 1) * steps,
        ignore_data_skip=True,
        **arguments,
    )
    model = actor(settings) if model is None else model
    trainer = PPOTrainer(
        model, args, settings, updates=updates, prompts=prompt_rows(12) if prompts is None else prompts,
        template=template or words_template(), texts=texts,
    )  # fmt: skip
    if reference is None and settings.kl_coefficient:
        reference = ActorCritic(tiny("llama"), None, temperature=settings.temperature).requires_grad_(False).eval()
        reference.attach(layout)
    trainer.begin(layout, [Scored(even)] if sources is None else sources, reference, offload=False)
    held_out = HeldOutSamples(trainer, prompt_rows(5, seed=9), folder / "samples.jsonl") if samples else None
    trainer.alerts = []
    tracker = SimpleNamespace(table=lambda *_: None, alert=lambda *words: trainer.alerts.append(words))
    trainer.end = UpdateEnd(trainer, held_out, tracker, None)
    for callback in (trainer.end, KeepState(trainer), *callbacks):
        trainer.add_callback(callback)
    return trainer


def trained(folder: Path, settings: PPOStage, **options: Any) -> PPOTrainer:
    """As `build`, run to its end."""
    trainer = build(folder, settings, **options)
    trainer.train()
    return trainer


def lines(trainer: PPOTrainer) -> list[dict[str, float]]:
    """The figures of each update."""
    return trainer.state.log_history


def steps_of(trainer: PPOTrainer, update: int = 0) -> list[list[dict[str, torch.Tensor]]]:
    """The micro-batches of each optimizer step of an update, without any step being made."""
    if trainer.optimizer is None:
        trainer.create_optimizer_and_scheduler(10)
    batches = list(trainer.update_batches(update))
    size = trainer.args.gradient_accumulation_steps
    return [batches[start : start + size] for start in range(0, len(batches), size)]


def loss_of(trainer: PPOTrainer, step: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The loss of an optimizer step; leaves its gradient."""
    trainer.model.zero_grad()
    total = torch.zeros(())
    for batch in step:
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        total += loss.detach()
    return total


def gradients(model: nn.Module) -> torch.Tensor:
    found = [
        (torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters() if p.requires_grad
    ]
    return torch.cat(found)


def weights(parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]
