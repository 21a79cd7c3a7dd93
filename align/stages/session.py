"""What comes before a trainer: ZeRO choice, tokenizer, rows, and the checkpoint to go on from."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import TaskType
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from align import artifacts
from align.artifacts import Manifest
from align.config.adapters import refuse_sharding
from align.config.best import FIGURES, asked_for, key_of
from align.config.errors import UserError
from align.config.schema import AdapterStart, PeftMethod, PPOStage, StageConfig
from align.data.encoded import largest_token
from align.data.prepare import Prepared
from align.data.template import Template
from align.distributed import elastic, runtime, zero
from align.distributed.peak import Peak
from align.models import load
from align.models.adapters.quantised import compute_exactly, quantisation
from align.models.peft import add_adapter
from align.models.reward import load_reward_model
from align.models.trained import trained_model
from align.stages.adapters import keep_start, trained_words
from align.stages.context import RunContext, plain
from align.stages.rows import load_template, prepare_rows, report_rows
from align.stages.sharding import planned_bytes, session_choice
from align.tracking.local import MetricsLog
from align.tracking.progress import say
from align.tracking.wandb_run import WandbRun
from align.trainers import checkpoints
from align.trainers.adapters import AdapterCallbacks
from align.trainers.arguments import Machine, trainer_arguments
from align.trainers.best import Best, HeldOutGuard
from align.trainers.callbacks import Report, StopAtNaN
from align.trainers.pruning import Pruning
from align.trainers.quiet import quiet_libraries
from align.trainers.stopping import StopTogether


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
    stop: StopTogether
    callbacks: list[Any] = field(default_factory=list)
    adapter: AdapterCallbacks | None = None
    elastic: bool = False
    """The checkpoint to go on from is a ZeRO checkpoint of another number of ranks."""
    best: Best | None = None
    """With keep_best or stop_after."""
    peak: Peak | None = None
    """Counts what memory the stage takes."""
    planned_bytes: float = 0.0
    """What it was expected to take of a device; 0: that could not be counted."""
    parameters: dict[str, int] = field(default_factory=dict)
    """`trained` and `total`, once the trainer has run."""
    kept_step: int | None = None
    """With keep_best: the step whose weights are the policy."""

    @property
    def checkpoint_dir(self) -> Path:
        return self.context.stage_dir / "checkpoints"

    def argument_values(self) -> dict[str, Any]:
        """Keyword arguments for TrainingArguments."""
        peft = self.context.config.peft
        return trainer_arguments(
            self.stage,
            self.machine,
            self.checkpoint_dir,
            log_every=self.context.config.log.every,
            evaluate=len(self.prepared.held_out) > 0,
            paged=peft.method is PeftMethod.qlora and peft.paged_optimizer,
            judge_first=checkpoints.owes_evaluation(self.resume_from, self.stage.eval_every),
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
        rounded = quantisation(config.peft, bf16=self.machine.bf16)
        model = load_any(name, config.model, dtype, seed=self.stage.seed, quantisation=rounded)
        compute_exactly(model)
        _refuse_unknown_tokens(self, name, model.config.get_text_config().vocab_size)
        model.config.use_cache = False
        return model

    def load_for_proof(self, name: str, *, scores: bool = False) -> PreTrainedModel:
        """A model that a trainer is given to read with adapters off: transformers takes none of 4 bits without one."""
        model, peft = self.load_plain(name, scores=scores), self.context.config.peft
        if peft.method is not PeftMethod.qlora:
            return model
        task = TaskType.SEQ_CLS if scores else TaskType.CAUSAL_LM
        return add_adapter(model, peft, seed=self.stage.seed, zero3=False, task=task)

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
        return self._adapted(self.load_plain(self.stage.policy), TaskType.CAUSAL_LM)

    def load_scorer(self) -> PreTrainedModel:
        """The policy with a score head, with its adapter if any. Call after TrainingArguments were made (ZeRO-3)."""
        return self._adapted(self.load_plain(self.stage.policy, scores=True), TaskType.SEQ_CLS)

    def _adapted(self, model: PreTrainedModel, task: TaskType) -> PreTrainedModel:
        """The model with the run's adapter, of which it is said how much is trained."""
        peft, zero3 = self.context.config.peft, self.zero_stage == 3
        adapted = add_adapter(model, peft, seed=self.stage.seed, zero3=zero3, task=task)
        if peft.method is not PeftMethod.none:
            say(f"{self.context.stage_name}: {trained_words(self, adapted)}", active=self.context.runtime.is_main)
            if peft.init is AdapterStart.pissa and self.context.runtime.is_main:
                keep_start(adapted, self.context.stage_dir)
        return adapted


def open_session(stage: StageConfig, context: RunContext) -> Session:
    """Everything that comes before the trainer: ZeRO choice, tokenizer, template, rows, checkpoint to go on from."""
    config, run = context.config, context.runtime
    bf16 = load.use_bf16(config.precision, run.device)
    template = load_template(config, stage.policy)
    prepared = prepare_rows(config, context.stage_name, template, context.stage_dir)
    if run.is_main:
        report_rows(context.stage_name, prepared, context.stage_dir)
    zero_stage = _zero_stage(context, prepared)
    zero_dict = None if zero_stage is None else zero.zero_dict(zero_stage, config.deepspeed.offload, bf16=bf16)
    machine = Machine(run.world_size, run.device.startswith("cuda"), bf16, zero_dict)
    wandb_run = WandbRun(
        config.log, config.name, active=run.is_main, stage=context.stage_name, stage_dir=context.stage_dir
    )
    inputs = input_digests(stage.policy, "policy") + prepared.inputs
    wandb_run.describe(plain(config), inputs)
    session = Session(
        context, stage, template.tokenizer, template, prepared, machine, zero_stage, None,
        MetricsLog(context.stage_dir / "metrics.jsonl"), wandb_run, inputs, StopTogether(context.stage_name),
    )  # fmt: skip
    session.peak, session.planned_bytes = Peak.begin(run.device), planned_bytes(context, prepared, zero_stage)
    session.resume_from = _checkpoint_to_resume(session)
    session.adapter = AdapterCallbacks(config.peft, deepspeed=zero_stage is not None, main=run.is_main)
    session.adapter.resume_from = session.resume_from
    seal = checkpoints.SealCheckpoint(run.is_main, _identity(session))
    session.callbacks = [session.stop, *session.adapter.callbacks, seal]
    if asked_for(stage):
        session.best = Best(
            context.stage_name, stage, active=run.is_main, alert=wandb_run.alert, pruning=_pruning(context, stage)
        )
        if not len(prepared.held_out) and not isinstance(stage, PPOStage):
            key = f"stages.{context.stage_name}.{'keep_best=true' if stage.keep_best else 'stop_after'}"
            raise UserError(f"{key}: no row is held out to judge by; raise data.held_out_fraction")
        session.callbacks.append(session.best)
    if run.is_main:
        session.callbacks.append(Report(context.stage_name, session.log, wandb_run, session.best))
        session.callbacks.append(HeldOutGuard(context.stage_name, wandb_run.alert))
    session.callbacks.append(StopAtNaN(context.stage_name, wandb_run.alert))
    return session


def _pruning(context: RunContext, stage: StageConfig) -> Pruning | None:
    if not stage.prune:
        return None
    name = context.stage_name
    return Pruning(context.config.sweep, context.run_dir, name, FIGURES[stage.best_by], key_of(name, stage))


def _zero_stage(context: RunContext, prepared: Prepared) -> int | None:
    """Raises: UserError with overrides that would fit, if `auto` finds nothing that does."""
    run, name = context.runtime, context.stage_name
    choice = session_choice(context, prepared)
    chosen = choice.sharding.stage
    refuse_sharding(context.config.peft, chosen)
    if run.world_size > 1:
        words = "no DeepSpeed" if chosen is None else f"ZeRO-{chosen}"
        say(f"{name}: {run.world_size} ranks, {words} ({choice.reason})", active=run.is_main)
    return chosen


def input_digests(model: str, name: str) -> list[dict[str, str]]:
    """A model as a manifest's inputs: digest of a folder, the bare id of a hub model; after an adapter its base.

    Raises: UserError for an adapter whose base is not said, or has changed since the adapter was trained.
    """
    path = Path(load.resolve_model(model))
    digest = artifacts.digest_model(path) if path.is_dir() else f"hub:{model}"
    base = input_digests(str(trained_model(model).base), f"{name}.base") if load.is_adapter(path) else []
    return [{"name": name, "path": model, "digest": digest}, *base]


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
    """The newest checkpoint that stands, the same on every rank, made fit for as many as there are; newer debris is
    removed.

    Raises: UserError if it was written under another ZeRO stage or from other rows.
    """
    context = session.context
    found, identity, passed_over = checkpoints.newest_good(session.checkpoint_dir)
    for line in passed_over:
        say(f"{context.stage_name}: {line}", active=context.runtime.is_main)
    if found is not None:
        _refuse_foreign(session, found, identity)
    if context.runtime.is_main:
        checkpoints.remove_newer(session.checkpoint_dir, found)
    runtime.barrier()
    if found is not None:
        step, ranks = checkpoints.checkpoint_step(found), identity["world_size"]
        other = f", written by {ranks} rank{'s' * (ranks > 1)}" if ranks != session.machine.world_size else ""
        say(f"{context.stage_name}: going on from step {step}{other}", active=context.runtime.is_main)
        if other and session.zero_stage:
            _make_universal(session, found)
    return found


def _refuse_foreign(session: Session, found: Path, identity: dict[str, Any]) -> None:
    """Raises: UserError if a run cannot go on from a checkpoint of this identity."""
    mine, stage_dir = _identity(session), session.context.stage_dir
    changed = [key for key in mine if identity.get(key) != mine[key]]
    # These have not been shown to come out the same on other ranks.
    adapter = session.zero_stage is not None and session.context.config.peft.method is not PeftMethod.none
    if isinstance(session.stage, PPOStage) or session.zero_stage == 0 or adapter or "zero_stage" in changed:
        fixed = changed
    else:
        fixed = [key for key in changed if key != "world_size"]
    if not fixed:
        return
    words = ", ".join(f"{key} {identity.get(key)} -> {mine[key]}" for key in fixed)
    way = "go back to what it was"
    if "zero_stage" in fixed:
        then = identity.get("zero_stage")
        way = f"add deepspeed={'none' if then is None else f'zero{then}'}"
    raise UserError(f"{found}: cannot go on from it, changed: {words}; {way}, or delete {stage_dir}")


def _make_universal(session: Session, found: Path) -> None:
    """Turn a ZeRO checkpoint of other ranks into one that these can load, and have DeepSpeed load that."""
    refusal = None
    if session.context.runtime.is_main:
        try:
            elastic.make_universal(found)
        except UserError as error:
            refusal = str(error)
    if (refusal := runtime.from_main(refusal)) is not None:
        raise UserError(refusal)
    session.machine = replace(session.machine, zero=session.machine.zero | elastic.LOAD)
    session.elastic = True


def close_session(session: Session) -> None:
    """Free the model and forget ZeRO."""
    forget_zero()
    runtime.free_memory()


def forget_zero() -> None:
    """Of a stage that is over, however it ended: its flags would shard the next one's loading, and put DeepSpeed under
    a trainer that is to run without it."""
    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def log_manifest(manifest: Manifest, context: RunContext) -> None:
    """Send a stage that trains nothing to wandb: its config, inputs and figures."""
    run = WandbRun(
        context.config.log,
        context.config.name,
        active=context.runtime.is_main,
        stage=context.stage_name,
        stage_dir=context.stage_dir,
    )
    run.describe(plain(context.config), manifest.inputs)
    run.leave(manifest)
    run.finish(manifest.metrics)
