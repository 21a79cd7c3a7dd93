"""Train, judge before and after, save, sign."""

from collections.abc import Mapping

from transformers import Trainer

from align import artifacts
from align.artifacts import Manifest
from align.config.schema import PeftMethod
from align.distributed import runtime
from align.stages.context import stage_record
from align.stages.saving import ADAPTER, POLICY, save_model
from align.stages.session import Session
from align.tracking.local import MetricsLog, read_metrics
from align.trainers.quiet import quiet_trainer


def train_and_sign(session: Session, trainer: Trainer) -> Manifest:
    """Run the trainer to its end, judge it once more, save the policy, and return the manifest to be written."""
    train(session, trainer)
    save_model(session, trainer, POLICY)
    return sign(session, trainer, [POLICY])


def train(session: Session, trainer: Trainer) -> None:
    """Run the trainer to its end, from a checkpoint if there is one, and judge it once more on the held-out rows."""
    assert not session.zero_stage or trainer.is_deepspeed_enabled, "ZeRO was asked for, but the trainer runs without it"
    quiet_trainer(trainer)
    trainer.train(resume_from_checkpoint=str(session.resume_from) if session.resume_from else None)
    if len(session.prepared.held_out) and not _judged_at_end(session, trainer):
        trainer.evaluate()


def sign(
    session: Session, trainer: Trainer, outputs: list[str], figures: Mapping[str, float] | None = None
) -> Manifest:
    """The manifest to be written, once `outputs` are there; `figures` join those of the first and last evaluation."""
    manifest = _manifest(session, trainer.state.global_step, outputs, figures or {})
    session.wandb_run.finish(manifest.metrics)
    return manifest


def _judged_at_end(session: Session, trainer: Trainer) -> bool:
    last = trainer.state.log_history[-3:]
    judged = any("eval_loss" in line and line["step"] == trainer.state.global_step for line in last)
    return runtime.from_main(judged)


def _manifest(session: Session, steps: int, outputs: list[str], figures: Mapping[str, float]) -> Manifest:
    context, report = session.context, session.prepared.report
    names = outputs if context.config.peft.method is PeftMethod.none else [*outputs, ADAPTER]
    record = stage_record(context.config, context.stage_name, context.run_dir)
    written = artifacts.list_outputs(context.stage_dir, names) if context.runtime.is_main else []
    return Manifest(
        stage=context.stage_name,
        config=record,
        config_digest=artifacts.digest_value(record),
        inputs=session.inputs,
        outputs=written,
        rows=report.counts(),
        steps=steps,
        metrics=before_and_after(session.log) | dict(figures),
        seed=session.stage.seed,
        world_size=session.machine.world_size,
        zero_stage=session.zero_stage,
        template_digest=session.template.digest,
    )


def before_and_after(log: MetricsLog) -> dict[str, float]:
    """The first and the last evaluation of a stage, as `before/<metric>` and `after/<metric>`."""
    judged = [line for line in read_metrics(log.path) if "eval_loss" in line]
    metrics: dict[str, float] = {}
    for prefix, line in (("before", judged[:1]), ("after", judged[-1:])):
        for name, value in line[0].items() if line else ():
            if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second")):
                metrics[f"{prefix}/{name.removeprefix('eval_')}"] = value
    return metrics
