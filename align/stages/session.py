"""What comes before a trainer: ZeRO choice, tokenizer, rows, and the checkpoint to go on from."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import TaskType
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from align import artifacts
from align.artifacts import Manifest
from align.config.errors import UserError
from align.config.schema import PeftMethod, StageConfig
from align.data.encoded import largest_token
from align.data.prepare import Prepared
from align.data.template import Template
from align.distributed import runtime, zero
from align.models import load
from align.models.peft import add_adapter
from align.models.reward import load_reward_model
from align.stages.context import RunContext, plain
from align.stages.rows import load_template, prepare_rows, report_rows
from align.tracking.local import MetricsLog
from align.tracking.progress import say
from align.tracking.wandb_run import WandbRun
from align.trainers import checkpoints
from align.trainers.arguments import Machine, trainer_arguments
from align.trainers.callbacks import Report, StopAtNaN
from align.trainers.quiet import quiet_libraries


@dataclass
class Session:
    """One trained stage in progress: made by `open_session`, used by the stage, closed by `close_session`."""

    context: RunContext
    stage: StageConfig
    tokenizer: PreTrainedTokenizerBase
    template: Template
    prepared: Prepared
    machine: Machine
    zero_stage: int | None
    resume_from: Path | None
    log: MetricsLog
    wandb_run: WandbRun
    inputs: list[dict[str, str]]
    callbacks: list[Any] = field(default_factory=list)

    @property
    def checkpoint_dir(self) -> Path:
        return self.context.stage_dir / "checkpoints"

    def argument_values(self) -> dict[str, Any]:
        """Keyword arguments for TrainingArguments."""
        return trainer_arguments(
            self.stage,
            self.machine,
            self.checkpoint_dir,
            log_every=self.context.config.log.every,
            evaluate=len(self.prepared.held_out) > 0,
            fresh=self.resume_from is None,
        )

    def load_plain(self, name: str, *, scores: bool = False) -> PreTrainedModel:
        """A model as this run computes with it, without adapter; with a score head if `scores`.

        Call after TrainingArguments were made (ZeRO-3).
        """
        config = self.context.config
        # With DeepSpeed or an adapter the fp32 masters live elsewhere; else autocast needs fp32 weights.
        half = self.machine.bf16 and (self.machine.zero is not None or config.peft.method is not PeftMethod.none)
        dtype = torch.bfloat16 if half else torch.float32
        quiet_libraries()  # a Trainer sets the level of transformers' talk anew, and a new score head is no news
        load_any = load_reward_model if scores else load.load_model
        model = load_any(name, config.model, dtype, seed=self.stage.seed)
        _refuse_unknown_tokens(self, name, model.config.get_text_config().vocab_size)
        model.config.use_cache = False
        return model

    def load_frozen(self, name: str, *, scores: bool = False) -> PreTrainedModel:
        """A model that is only read, in the precision of the run. Call after TrainingArguments were made (ZeRO-3)."""
        dtype = torch.bfloat16 if self.machine.bf16 else torch.float32
        quiet_libraries()
        load_any = load_reward_model if scores else load.load_model
        model = load_any(name, self.context.config.model, dtype, seed=self.stage.seed)
        model.config.use_cache = False
        return model.eval().requires_grad_(False)

    def load_policy(self) -> PreTrainedModel:
        """The policy, with its adapter if any. Call after TrainingArguments were made (ZeRO-3)."""
        model = self.load_plain(self.stage.policy)
        return add_adapter(model, self.context.config.peft, seed=self.stage.seed, zero3=self.zero_stage == 3)

    def load_scorer(self) -> PreTrainedModel:
        """The policy with a score head, with its adapter if any. Call after TrainingArguments were made (ZeRO-3)."""
        model = self.load_plain(self.stage.policy, scores=True)
        peft, zero3 = self.context.config.peft, self.zero_stage == 3
        return add_adapter(model, peft, seed=self.stage.seed, zero3=zero3, task=TaskType.SEQ_CLS)


def open_session(stage: StageConfig, context: RunContext) -> Session:
    """Everything that comes before the trainer: ZeRO choice, tokenizer, template, rows, checkpoint to go on from."""
    config, run = context.config, context.runtime
    zero_stage = _zero_stage(stage, context)
    bf16 = load.use_bf16(config.precision, run.device)
    zero_dict = None if zero_stage is None else zero.zero_dict(zero_stage, config.deepspeed.offload, bf16=bf16)
    template = load_template(config, stage.policy)
    prepared = prepare_rows(config, context.stage_name, template, context.stage_dir)
    if run.is_main:
        report_rows(context.stage_name, prepared, context.stage_dir)
    machine = Machine(run.world_size, run.device.startswith("cuda"), bf16, zero_dict)
    wandb_run = WandbRun(
        config.log, active=run.is_main, group=config.name, stage=context.stage_name, stage_dir=context.stage_dir
    )
    inputs = input_digests(stage.policy, "policy") + prepared.inputs
    wandb_run.describe(plain(config), inputs)
    session = Session(
        context, stage, template.tokenizer, template, prepared, machine, zero_stage, None,
        MetricsLog(context.stage_dir / "metrics.jsonl"), wandb_run, inputs,
    )  # fmt: skip
    session.resume_from = _checkpoint_to_resume(session)
    session.callbacks = [checkpoints.SealCheckpoint(run.is_main, _identity(session))]
    if run.is_main:
        session.callbacks.append(Report(context.stage_name, session.log, wandb_run))
    session.callbacks.append(StopAtNaN(context.stage_name))
    return session


def _zero_stage(stage: StageConfig, context: RunContext) -> int | None:
    run = context.runtime
    config = context.config.deepspeed
    parameters, memory = 0, float("inf")
    if run.world_size > 1 and config.mode.value == "auto":
        parameters = load.count_parameters(stage.policy, context.config.model)
        if run.device.startswith("cuda"):
            memory = torch.cuda.get_device_properties(run.device).total_memory
    chosen, reason = zero.choose(config, parameters=parameters, world_size=run.world_size, memory_bytes=memory)
    if run.world_size > 1:
        name = "no DeepSpeed" if chosen is None else f"ZeRO-{chosen}"
        say(f"{context.stage_name}: {run.world_size} ranks, {name} ({reason})", active=run.is_main)
    return chosen


def input_digests(model: str, name: str) -> list[dict[str, str]]:
    """A model as a manifest's input: digest of a folder, the bare id of a hub model."""
    path = Path(load.resolve_model(model))
    digest = artifacts.digest_model(path) if path.is_dir() else f"hub:{model}"
    return [{"name": name, "path": model, "digest": digest}]


def _refuse_unknown_tokens(session: Session, name: str, vocabulary: int) -> None:
    """Refuse a tokenizer that writes tokens for which the model has no embedding."""
    tokenizer, prepared = session.tokenizer, session.prepared
    largest = max(largest_token(prepared.train), largest_token(prepared.held_out), tokenizer.pad_token_id or 0)
    if largest >= vocabulary:
        raise UserError(
            f"{name}: the tokenizer writes token {largest} ({tokenizer.convert_ids_to_tokens(largest)}), but the model "
            f"has {vocabulary} embeddings; use the model's own tokenizer, or save it after resize_token_embeddings"
        )


def _identity(session: Session) -> dict[str, Any]:
    """What a checkpoint shares with a run that may go on from it, beyond the stage's config."""
    return {
        "world_size": session.machine.world_size,
        "zero_stage": session.zero_stage,
        "rows": session.prepared.report.digest,
        "template": session.template.digest,
        "policy": session.inputs[0]["digest"],
    }


def _checkpoint_to_resume(session: Session) -> Path | None:
    """The newest checkpoint that stands, the same on every rank; newer debris is removed.

    Raises: UserError if it was written by other ranks, another ZeRO stage or from other rows.
    """
    context = session.context
    found, identity, passed_over = runtime.from_main(checkpoints.newest_sealed(session.checkpoint_dir))
    for line in passed_over:
        say(f"{context.stage_name}: {line}", active=context.runtime.is_main)
    if found is not None and identity != _identity(session):
        mine = _identity(session)
        changed = ", ".join(f"{k} {identity.get(k)} -> {mine[k]}" for k in mine if identity.get(k) != mine[k])
        raise UserError(
            f"{found}: cannot go on from it, changed: {changed}; go back to what it was, or delete {context.stage_dir}"
        )
    if context.runtime.is_main:
        checkpoints.remove_newer(session.checkpoint_dir, found)
    runtime.barrier()
    if found is not None:
        step = checkpoints.checkpoint_step(found)
        say(f"{context.stage_name}: going on from step {step}", active=context.runtime.is_main)
    return found


def close_session(session: Session) -> None:
    """Free the model and forget ZeRO: its flag outlives a stage and would shard the next one's loading."""
    unset_hf_deepspeed_config()
    runtime.free_memory()


def log_manifest(manifest: Manifest, context: RunContext) -> None:
    """Send a stage that trains nothing to wandb: its config, inputs and figures."""
    run = WandbRun(
        context.config.log,
        active=context.runtime.is_main,
        group=context.config.name,
        stage=context.stage_name,
        stage_dir=context.stage_dir,
    )
    run.describe(plain(context.config), manifest.inputs)
    run.finish(manifest.metrics)
