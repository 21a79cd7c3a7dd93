"""Train, judge before and after, save, sign."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Trainer

from align import artifacts
from align.artifacts import Manifest
from align.config.schema import PeftMethod
from align.distributed import runtime
from align.stages.adapters import parameter_counts
from align.stages.best import SAMPLES, Measures, measures
from align.stages.context import stage_record
from align.stages.saving import ADAPTER, POLICY, save_model
from align.stages.session import Session
from align.tracking.local import MetricsLog, read_metrics
from align.tracking.model_card import write_model_cards
from align.tracking.progress import say
from align.trainers.checkpoints import MendElastic, checkpoint_step, newest_sealed
from align.trainers.nonfinite import FILE, SkippedSteps
from align.trainers.quiet import quiet_trainer
from align.trainers.stopping import STOP
from align.trainers.surviving import SurvivingTrainer

SHOWN_TOKENS = 64
"""Of a row of a step that was not finite."""


def train_and_sign(session: Session, trainer: SurvivingTrainer) -> Manifest:
    """Run the trainer to its end, judge it once more, save the policy, and return the manifest to be written."""
    train(session, trainer)
    save_model(session, trainer, POLICY)
    return sign(session, trainer, [POLICY])


def train(session: Session, trainer: SurvivingTrainer) -> None:
    """Run the trainer to its end, from a checkpoint if there is one, and judge it once more on the held-out rows.

    Raises: Stopped, with a checkpoint of the last step, if any rank was told to stop.
    """
    with STOP.held():
        run_trainer(session, trainer)
        if len(session.prepared.held_out) and not _judged_at_end(session, trainer):
            trainer.evaluate()
        if session.stage.keep_best:
            _take_best(session, trainer)


def run_trainer(session: Session, trainer: SurvivingTrainer) -> None:
    """Run the trainer to its end, from a checkpoint if there is one. Call it where signals are held.

    Raises: Stopped, with a checkpoint of the last step, if any rank was told to stop; UserError if too many steps were
    not finite.
    """
    assert (session.zero_stage is not None) == trainer.is_deepspeed_enabled, "DeepSpeed under the wrong trainer"
    quiet_trainer(trainer)
    context = session.context
    trainer.skipped = SkippedSteps(
        context.stage_name,
        context.stage_dir / FILE,
        limit=session.stage.max_nonfinite_steps,
        resumed_at=checkpoint_step(session.resume_from),
        main=context.runtime.is_main,
        describe=lambda row: _text(session, trainer.train_rows[row]),
        last_good=lambda: newest_sealed(session.checkpoint_dir)[0],
        alert=session.wandb_run.alert,
    )
    if (asked := measures(session)) is not None:
        trainer.measure = _measure(session, trainer, asked)
    if session.elastic:
        trainer.add_callback(MendElastic(trainer, session.resume_from))
    session.parameters = dict(zip(("trained", "total"), parameter_counts(trainer.model), strict=True))
    trainer.train(resume_from_checkpoint=str(session.resume_from) if session.resume_from else None)
    session.stop.end(trainer.state.global_step)


def _measure(session: Session, trainer: SurvivingTrainer, asked: Measures) -> Callable[[], dict[str, float]]:
    """What the trainer asks at each evaluation. A signal that comes meanwhile breaks it off."""

    def pause() -> None:
        session.stop.on_prediction_step(trainer.args, trainer.state, trainer.control)

    return asked.of(trainer, lambda: trainer.state.global_step, pause)


def _take_best(session: Session, trainer: SurvivingTrainer) -> None:
    """Put the weights of the best evaluation in place of the last ones, if they are others."""
    state, active, name = trainer.state, session.context.runtime.is_main, session.context.stage_name
    assert session.best is not None
    if state.best_model_checkpoint is None:
        say(
            f"{name}: {session.best.figure.words} never was a number; the policy is that of the last step",
            active=active,
        )
        return
    session.kept_step = state.best_global_step
    if session.kept_step != state.global_step:
        trainer._load_best_model()
        session.adapter.take_up(trainer.model, Path(state.best_model_checkpoint))
    say(
        f"{name}: the policy is that of step {session.kept_step}, where {session.best.where()}: "
        f"{state.best_metric:.4f}",
        active=active,
    )


def _text(session: Session, row: Mapping[str, Any]) -> str:
    """How a row of tokens begins, as text; of a packed row every sequence in it."""
    ids = row.get("input_ids", row.get("prompt_ids"))
    starts = np.cumsum([0, *row.get("seq_lengths", [len(ids)])])
    parts = [ids[start : min(start + SHOWN_TOKENS, end)] for start, end in pairwise(starts)]
    return " | ".join(session.tokenizer.decode(part) for part in parts)


def sign(
    session: Session, trainer: Trainer, outputs: list[str], figures: Mapping[str, float] | None = None
) -> Manifest:
    """The manifest to be written, once `outputs` are there; `figures` join those of the first and last evaluation."""
    manifest = _manifest(session, trainer.state.global_step, outputs, figures or {})
    session.wandb_run.leave(manifest)
    session.wandb_run.finish(manifest.metrics)
    return manifest


def _judged_at_end(session: Session, trainer: Trainer) -> bool:
    last = trainer.state.log_history[-3:]
    judged = any("eval_loss" in line and line["step"] == trainer.state.global_step for line in last)
    return runtime.from_main(judged)


def _manifest(session: Session, steps: int, outputs: list[str], figures: Mapping[str, float]) -> Manifest:
    context, report = session.context, session.prepared.report
    names = outputs if context.config.peft.method is PeftMethod.none else [*outputs, ADAPTER]
    if SAMPLES not in names and (context.stage_dir / SAMPLES).is_file():
        names = [*names, SAMPLES]
    record = stage_record(context.config, context.stage_name, context.run_dir)
    kept = {} if session.kept_step is None else {"kept_step": float(session.kept_step)}
    if session.best is not None and session.best.stopped:
        kept["stopped_early"] = 1.0
    if session.adapter is not None and session.adapter.ranks is not None:
        kept |= session.adapter.ranks.figures()
    manifest = Manifest(
        stage=context.stage_name,
        config=record,
        config_digest=artifacts.digest_value(record),
        inputs=session.inputs,
        rows=report.counts(),
        steps=steps,
        metrics=before_and_after(session.log, session.kept_step) | kept | dict(figures),
        seed=session.stage.seed,
        world_size=session.machine.world_size,
        zero_stage=session.zero_stage,
        memory=_memory(session),
        parameters=session.parameters,
        template_digest=session.template.digest,
    )
    if context.runtime.is_main:
        write_model_cards(context.stage_dir, manifest, context.run_dir)
        manifest.outputs = artifacts.list_outputs(context.stage_dir, names)
    return manifest


def _memory(session: Session) -> dict[str, float]:
    """Planned and taken, of the rank that took most. On every rank."""
    assert session.peak is not None
    of_ranks = runtime.gather(session.peak.taken())
    most = {name: max(taken[name] for taken in of_ranks) for name in of_ranks[0]}
    return most | ({"planned_bytes": session.planned_bytes} if session.planned_bytes else {})


def before_and_after(log: MetricsLog, kept_step: int | None = None) -> dict[str, float]:
    """The first and the last evaluation of a stage, as `before/<metric>` and `after/<metric>`; of the step whose
    weights are kept, if it is not the last one."""
    judged = [line for line in read_metrics(log.path) if "eval_loss" in line]
    after = judged if kept_step is None else [line for line in judged if line["step"] == kept_step]
    metrics: dict[str, float] = {}
    for prefix, line in (("before", judged[:1]), ("after", after[-1:])):
        for name, value in line[0].items() if line else ():
            if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second")):
                metrics[f"{prefix}/{name.removeprefix('eval_')}"] = value
    return metrics
