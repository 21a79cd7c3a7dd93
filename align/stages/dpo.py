"""Direct preference optimisation: reference log-probabilities first, as data; then the pair trainer."""

import gc
from typing import Any

from datasets import Dataset
from transformers import TrainingArguments

from align import artifacts
from align.artifacts import Manifest
from align.config.schema import DPOStage, Layout
from align.data.forest import PairCollator, Tree
from align.losses.pairwise import PairObjective
from align.models.layout import prove_layout
from align.stages.adapters import padded_for_adapter, rounding_key
from align.stages.context import RunContext
from align.stages.session import Session, close_session, input_digests, open_session
from align.stages.training import train_and_sign
from align.tracking.progress import say
from align.trainers.pairs import PairTrainer
from align.trainers.reference import longest_first, reference_engine, with_reference_logps

REFERENCE_FORWARD = 4
"""Reference forwards keep no gradients, so they take this many micro-batches at once."""


def run(stage: DPOStage, context: RunContext) -> Manifest:
    """Train on `data.preferences`; leaves `policy/`."""
    session = open_session(stage, context)
    layout, rows = reference_pass(session, stage)
    arguments = TrainingArguments(**session.argument_values())
    trainer = _pair_trainer(session, stage, arguments, session.load_policy(), layout, rows)
    manifest = train_and_sign(session, trainer)
    close_session(session)
    return manifest


def objective(stage: DPOStage) -> PairObjective:
    """The loss that the stage asks for."""
    return PairObjective(
        loss=stage.loss.value,
        beta=stage.beta,
        label_smoothing=stage.label_smoothing,
        nll_weight=stage.nll_weight,
    )


def reference_pass(session: Session, stage: DPOStage) -> tuple[Layout, dict[str, Dataset]]:
    """Prove the batch layout and add the reference's log-probabilities to the rows, before any policy is loaded.

    The reference is a model of its own for as long as this takes: ZeRO-3 parameters cannot serve two engines, and a
    resumed policy is no reference. Returns the layout and the parts `train` and `held_out`.
    """
    arguments = TrainingArguments(**session.argument_values())
    reference = stage.reference or stage.policy
    model = session.load_for_proof(reference)
    parts = {"train": session.prepared.train, "held_out": session.prepared.held_out}
    trainer = _pair_trainer(session, stage, arguments, model, Layout.padded, parts)
    engine = reference_engine(model, trainer.accelerator)
    layout = _proven_layout(session, stage, engine, trainer)
    collator = PairCollator(layout, session.tokenizer.pad_token_id)
    digest = input_digests(reference, "reference")[0]
    if stage.reference:
        session.inputs.append(digest)
    rows = {
        name: with_reference_logps(
            engine,
            part,
            collator=collator,
            accelerator=trainer.accelerator,
            micro_batch_size=REFERENCE_FORWARD * stage.micro_batch_size,
            cache_dir=session.context.cache_dir / "reference",
            key=_cache_key(session, digest["digest"], name),
        )
        for name, part in parts.items()
        if len(part)
    }
    del trainer, engine, model
    gc.collect()
    return layout, rows


def _proven_layout(session: Session, stage: DPOStage, engine: Any, trainer: PairTrainer) -> Layout:
    if (padded := padded_for_adapter(session)) is not None:
        return padded
    rows = session.prepared.train
    proven = prove_layout(
        engine,
        [_tree(rows[i]) for i in longest_first(rows)[:2]],
        stage.layout,
        pad_token_id=session.tokenizer.pad_token_id,
        device=trainer.accelerator.device,
    )
    say(
        f"{session.context.stage_name}: layout {proven.layout.value} ({proven.reason})",
        active=session.context.runtime.is_main,
    )
    return proven.layout


def _tree(row: dict[str, Any]) -> Tree:
    return Tree(tuple(row["prompt_ids"]), (tuple(row["chosen_ids"]), tuple(row["rejected_ids"])))


def _cache_key(session: Session, reference: str, part: str) -> str:
    """Whatever decides the numbers: the reference's weights, the rows, the template, the precision."""
    return artifacts.digest_value(
        {
            "reference": reference,
            "rows": session.prepared.report.digest,
            "part": part,
            "template": session.template.digest,
            "bf16": session.machine.bf16,
            # A base in 4 bits is another reference; other methods leave the base as it is.
            **rounding_key(session),
        }
    )


def _pair_trainer(
    session: Session,
    stage: DPOStage,
    arguments: TrainingArguments,
    model: Any,
    layout: Layout,
    rows: dict[str, Dataset],
) -> PairTrainer:
    held_out = rows.get("held_out")
    return PairTrainer(
        model,
        arguments,
        objective(stage),
        layout=layout,
        order=stage.order,
        pad_token_id=session.tokenizer.pad_token_id,
        train_dataset=rows["train"],
        eval_dataset=held_out if held_out else None,
        processing_class=session.tokenizer,
        callbacks=session.callbacks,
    )
