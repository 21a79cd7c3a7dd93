"""Trains policy and value model under DDP and ZeRO, each rank a process; leaves what is saved of each as tensors.

Call: deepspeed --num_gpus 2 --no_local_rank ranks.py FOLDER WAY...   with WAY = separate-ddp, shared-zero3, ...
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from align.config.schema import Layout, ModelConfig, Offload, PeftConfig, PeftMethod
from align.data.forest import Tree, lay_out
from align.distributed import runtime, zero
from align.models.actor_critic import ActorCritic, Read
from align.models.load import load_model
from align.models.reward import load_reward_model
from align.models.shared_base import SharedBase
from align.trainers.quiet import quiet_libraries

STEPS, RANKS = 2, 2
NAME = "tiny-sft"


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 64, (length,), generator=generator).tolist()

    return [{"tree": Tree(ids(3 + i), [ids(4), ids(2 + i % 3)])} for i in range(STEPS * RANKS)]


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return lay_out([row["tree"] for row in rows], Layout.forest, 0)


def build(kind: str, *, zero3: bool) -> ActorCritic:
    policy = load_model(NAME, ModelConfig(), torch.float32, seed=0)
    if kind == "shared":
        peft = PeftConfig(method=PeftMethod.lora, r=4)
        model: ActorCritic = SharedBase.from_base(policy, peft, temperature=0.7, seed=0, zero3=zero3)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # where B is 0, A has no gradient
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    else:
        critic = load_reward_model(NAME, ModelConfig(), torch.float32, seed=0)
        model = ActorCritic(policy, critic, temperature=0.7)
    model.initialise_value(scale=1 / 3, centre=0.1)
    model.attach(Layout.forest)
    return model


class TwoForwards(Trainer):
    """Both models are read twice a step, and the reference between, where it is in there."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        first = model(inputs, entropies=True)
        loss = first.logps.mean() + (first.values**2).mean()
        if self.accelerator.unwrap_model(model).has_own_reference:
            loss = loss * (1 + 0.01 * model(inputs, read=Read.reference).mean().tanh())
        second = model(inputs)
        return loss + 0.1 * (second.logps**2).mean() + 0.1 * second.values.mean() - 0.01 * first.entropies.mean()

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, None if state_dict is None else self.model.kept(state_dict))


def train(folder: Path, way: str, *, resume_from: Path | None = None, accumulation: int = 1) -> TwoForwards:
    kind, _, engine = way.partition("-")
    stage = int(engine[-1]) if engine.startswith("zero") else None
    unset_hf_deepspeed_config()
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=1, learning_rate=1e-3, save_steps=1,
        remove_unused_columns=False, report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        gradient_accumulation_steps=accumulation, ddp_find_unused_parameters=False, logging_strategy="no",
        optim="sgd", max_grad_norm=0.0,
        deepspeed=None if stage is None else zero.zero_dict(stage, Offload.none, bf16=False),
    )  # fmt: skip
    trainer = TwoForwards(build(kind, zero3=stage == 3), arguments, data_collator=collate, train_dataset=rows())
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    return trainer


def main(folder: Path, ways: list[str]) -> None:
    quiet_libraries()
    this = runtime.start(deepspeed=True, timeout_seconds=120)
    for way in ways:
        trainer = train(folder / way, way)
        runtime.barrier()
        resumed = train(folder / f"{way}-resumed", way, resume_from=folder / way / "checkpoint-1")
        for name, done in ((way, trainer), (f"{way}-resumed", resumed)):
            state = done.accelerator.get_state_dict(done.model_wrapped)
            if this.is_main:
                save_file(done.model.kept(state), folder / f"{name}.safetensors")
        runtime.barrier()
    runtime.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
