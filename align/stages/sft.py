"""Supervised fine-tuning and continued pretraining: the same loop on rows of another kind."""

from align.artifacts import Manifest
from align.config.schema import PretrainStage, SFTStage
from align.stages.context import RunContext
from align.stages.session import close_session, open_session
from align.stages.training import train_and_sign
from align.trainers.sft import build_sft_trainer, sft_arguments


def run(stage: SFTStage | PretrainStage, context: RunContext) -> Manifest:
    """Train on `data.demonstrations` (SFT) or `data.text` (pretrain); leaves `policy/`."""
    session = open_session(stage, context)
    arguments = sft_arguments(stage, session.argument_values())
    rows = session.prepared
    trainer = build_sft_trainer(
        session.load_policy(),
        arguments,
        rows.train,
        rows.held_out if len(rows.held_out) else None,
        session.tokenizer,
        session.callbacks,
        stage_name=context.stage_name,
    )
    manifest = train_and_sign(session, trainer)
    close_session(session)
    return manifest
