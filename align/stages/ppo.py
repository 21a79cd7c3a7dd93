"""PPO: a policy is trained on what it samples for `data.prompts`, as rewards judge it."""

from typing import Any

import torch
from datasets import Dataset
from transformers import TrainingArguments

from align import artifacts
from align.artifacts import Manifest
from align.config.errors import UserError
from align.config.rewards import RewardSetting, parse_rewards
from align.config.schema import PPOStage, RolloutEngine
from align.data.prepare import prepare_text
from align.generation.vllm_rollout import ROLLOUT, VllmSampler
from align.models.load import resolve_model
from align.stages.context import RunContext
from align.stages.ppo_models import Models
from align.stages.saving_actor import save_actor
from align.stages.session import Session, close_session, input_digests, open_session
from align.stages.training import run_trainer, sign
from align.tracking.local import read_metrics
from align.tracking.ppo_page import ppo_page
from align.tracking.progress import say
from align.trainers.arguments import accumulation_steps
from align.trainers.callbacks import StopAtNaN
from align.trainers.checkpoints import SealCheckpoint, checkpoint_step
from align.trainers.ppo import ADAM_EPSILON, PPOTrainer
from align.trainers.ppo_callbacks import KeepState, UpdateEnd, UpdateReport
from align.trainers.reward_sources import FUNCTION_FAILED, FunctionFailed, function_digest
from align.trainers.samples import HeldOutSamples, read_samples
from align.trainers.stopping import STOP

SAMPLES, REPORT = "samples.jsonl", "ppo_report.html"


def run(stage: PPOStage, context: RunContext) -> Manifest:
    """Train on `data.prompts`; leaves `policy/`, `value/` (with a value model), `samples.jsonl` and a page."""
    if stage.rollout is RolloutEngine.vllm:
        ROLLOUT.check(device=context.runtime.device, temperatures={"stages.ppo.temperature": stage.temperature})
    session = open_session(stage, context)
    _check_ranks(session, stage)
    models = Models(session, stage, parse_rewards(stage.rewards))
    models.check_rewards()
    engine = _engine(session, stage)
    session.inputs += [digest for one in models.rewards for digest in _reward_digests(one)]
    texts = _texts(session, stage)
    layout = models.prove_layout()
    # Made anew after the proof's own: DeepSpeed's state belongs to the arguments made last.
    arguments = TrainingArguments(**_argument_values(session, stage))
    trainer = PPOTrainer(
        models.actor(),
        arguments,
        stage,
        updates=_updates(session, stage),
        prompts=session.prepared.train,
        template=session.template,
        texts=texts,
    )
    sources, reference = models.sources(trainer, layout), models.reference(trainer, layout)
    trainer.begin(layout, sources, reference, stage.offload_frozen, engine)
    trainer.restore(session.resume_from)
    end = _add_callbacks(session, trainer)
    _say_sizes(session, stage, trainer)
    try:
        _train(session, trainer, end)
    except FunctionFailed:
        (context.stage_dir / FUNCTION_FAILED).touch()
        raise
    manifest = _finish(session, trainer, end)
    if engine is not None:
        engine.close()
    close_session(session)
    return manifest


def _reward_digests(setting: RewardSetting) -> list[dict[str, str]]:
    return input_digests(setting.model, setting.name) if setting.model else [function_digest(setting)]


def _check_ranks(session: Session, stage: PPOStage) -> None:
    """Raises: UserError if ranks cannot share prompts and minibatches evenly."""
    ranks = session.machine.world_size
    accumulation_steps(stage, ranks)
    prompts = stage.completions_per_update // stage.completions_per_prompt
    if prompts % ranks:
        raise UserError(
            f"stages.ppo.completions_per_update={stage.completions_per_update}: {prompts} prompts an update do not "
            f"divide among {ranks} ranks; use a multiple of {stage.completions_per_prompt * ranks}"
        )


def _engine(session: Session, stage: PPOStage) -> VllmSampler | None:
    """What samples, where it is not the model that is trained. Call it on every rank.

    It comes before all TrainingArguments, after which ZeRO-3 shards every model that transformers makes.
    """
    if stage.rollout is RolloutEngine.hf:
        return None
    model = session.context.config.model
    return VllmSampler(
        resolve_model(stage.policy),
        max_tokens=stage.max_tokens,
        dtype=torch.bfloat16 if session.machine.bf16 else torch.float32,
        seed=stage.seed,
        batch_size=stage.rollout_batch_size,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        pickled_weights=model.pickled_weights,
    )


def _argument_values(session: Session, stage: PPOStage) -> dict[str, Any]:
    """The arguments of every stage, in updates where they count steps, and without the Trainer's own logging."""
    steps = stage.update_epochs * (stage.completions_per_update // stage.batch_size)
    return session.argument_values() | {
        "max_steps": 1,  # the trainer counts its own
        "save_steps": max(stage.save_every, 1) * steps,
        # The best one, which a guard goes back to, is kept beside the newest ones.
        "save_total_limit": stage.keep_checkpoints + 1,
        "adam_epsilon": ADAM_EPSILON,
        "logging_strategy": "no",
        "eval_strategy": "no",
        "eval_on_start": False,
        # The trainer itself knows which prompts come next.
        "ignore_data_skip": True,
    }


def _updates(session: Session, stage: PPOStage) -> int:
    if stage.max_steps is not None:
        return stage.max_steps
    prompts = stage.completions_per_update // stage.completions_per_prompt
    return max(1, int(stage.epochs * len(session.prepared.train) / prompts))


def _texts(session: Session, stage: PPOStage) -> Dataset | None:
    """Rows of `data.text` for the mix, cut into pieces of max_tokens as in pretraining."""
    if not stage.pretraining_weight:
        return None
    context = session.context
    prepared = prepare_text(context.config.data, session.template, stage.max_tokens, context.cache_dir)
    session.inputs += prepared.inputs
    return prepared.train


def _add_callbacks(session: Session, trainer: PPOTrainer) -> UpdateEnd:
    """In the order in which they have to be called: figures first, the seal after all else is written."""
    context = session.context
    held_out = session.prepared.held_out
    rows = held_out if len(held_out) else session.prepared.train
    if not len(held_out):
        say("ppo: no prompt is held out, so samples are of prompts that are trained on", active=context.runtime.is_main)
    samples = HeldOutSamples(trainer, rows, context.stage_dir / SAMPLES)
    end = UpdateEnd(trainer, samples, session.wandb_run, session.resume_from, session.best)
    trainer.stop = session.stop
    session.stop.every = trainer.steps_per_update
    trainer.add_callback(session.stop)
    trainer.add_callback(end)
    trainer.add_callback(KeepState(trainer))
    trainer.add_callback(next(one for one in session.callbacks if isinstance(one, SealCheckpoint)))
    if context.runtime.is_main:
        first = trainer.first_update
        trainer.add_callback(UpdateReport(context.stage_name, trainer.updates, first, session.log, session.wandb_run))
    trainer.add_callback(StopAtNaN(context.stage_name, session.wandb_run.alert))
    return end


def _say_sizes(session: Session, stage: PPOStage, trainer: PPOTrainer) -> None:
    groups = trainer.inner.parameter_groups()
    counts = ", ".join(f"{name} {sum(map(_size, group)):,}" for name, group in groups.items() if group)
    say(
        f"ppo: {trainer.updates} updates of {stage.completions_per_update} completions, "
        f"{trainer.steps_per_update} optimizer steps each; trained parameters: {counts}",
        active=session.context.runtime.is_main,
    )


def _size(parameter: Any) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _train(session: Session, trainer: PPOTrainer, end: UpdateEnd) -> None:
    """Run to the end, or until a guard stops it: then the weights are those of the best checkpoint."""
    if end.stopped_by is not None:
        _train_no_further(trainer)
    with STOP.held():
        run_trainer(session, trainer)
    if end.stopped_by is None and not trainer.settings.keep_best:
        return
    active, best = session.context.runtime.is_main, trainer.best_checkpoint
    if best is None:
        say("ppo: no checkpoint is the best so far; the policy is kept as it is", active=active)
        return
    if checkpoint_step(best) != trainer.state.global_step:
        trainer.load_weights(best)
        trainer.start_average(best)
    update = checkpoint_step(best) // trainer.steps_per_update
    end.keep(update)
    how = f"the policy is that of {best.name}, the best before"
    if session.best is not None and trainer.settings.keep_best:
        session.kept_step = update
        how = f"the policy is that of update {update}, where {session.best.where()}: {trainer.state.best_metric:.4f}"
    say(f"ppo: {how if end.stopped_by is None else f'stopped by a guard; {how}'}", active=active)


def _train_no_further(trainer: PPOTrainer) -> None:
    """A run that was interrupted after a guard had stopped it has nothing left to train."""
    trainer.updates = trainer.first_update
    trainer.args.max_steps = trainer.updates * trainer.steps_per_update


def _finish(session: Session, trainer: PPOTrainer, end: UpdateEnd) -> Manifest:
    """Save the models and the page, and sign for them."""
    names = save_actor(session, trainer)
    context = session.context
    lines, samples = read_metrics(session.log.path), read_samples(context.stage_dir / SAMPLES)
    if context.runtime.is_main:
        title = f"PPO: {context.stage_dir / 'policy'}"
        page = ppo_page(lines, samples, title, trainer.guards.raised)
        artifacts.write_text(context.stage_dir / REPORT, page)
    figures = end.summary() | {"updates": float(trainer.update), "stopped_by_guard": float(end.stopped_by is not None)}
    return sign(session, trainer, [*names, SAMPLES, REPORT], figures)
