"""A trained model on disk: complete or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from align.config.adapters import NOT_MERGED, VIRTUAL_TOKENS
from align.config.schema import AdapterStart, PeftMethod
from align.distributed import runtime
from align.models import load
from align.models.peft import merged_model, quiet_peft
from align.models.trained import ADAPTER, POLICY
from align.stages.adapters import START, write_adapter, write_with_base
from align.stages.context import RunContext
from align.stages.session import Session

__all__ = ["ADAPTER", "POLICY", "REWARD_MODEL", "finish_folders", "make_readable", "partial_folder", "save_model"]

REWARD_MODEL = "reward_model"

Finish = Callable[[PreTrainedConfig], None]
"""Puts what was found out after training into a model's config, before it is written."""


def save_model(session: Session, trainer: Trainer, name: str, finish: Finish = lambda config: None) -> None:
    """Write `<name>/` (and `adapter/`), complete or not at all: written beside, checked, then renamed."""
    context = session.context
    partial, adapter = (partial_folder(context, folder) for folder in (name, ADAPTER))
    if context.runtime.is_main:
        for unfinished in (partial, adapter):
            shutil.rmtree(unfinished, ignore_errors=True)
    runtime.barrier()
    trainer.model.config.use_cache = True
    if context.config.peft.method is PeftMethod.none:
        finish(trainer.model.config)
        _save_weights(session, trainer, partial)
    else:
        _save_adapter(session, trainer, adapter, partial, finish)
    unset_hf_deepspeed_config()  # else ZeRO-3 would shard whatever is loaded next
    if context.runtime.is_main:
        finish_folders(session, [ADAPTER, name])
    runtime.barrier()


def finish_folders(session: Session, names: list[str]) -> None:
    """Each `<name>.partial/` that was written becomes `<name>/`: a model whole and with its tokenizer. For rank 0."""
    for name in names:
        partial = partial_folder(session.context, name)
        if partial.exists():
            if name != ADAPTER:
                load.save_tokenizer(session.tokenizer, partial)
            if not load.is_adapter(partial):
                load.check_saved_model(partial, session.context.config.model)
            make_readable(partial)
            _rename_whole(partial)


def partial_folder(context: RunContext, name: str) -> Path:
    """Where `<name>/` is written until it is complete."""
    return context.stage_dir / f"{name}.partial"


def make_readable(folder: Path) -> None:
    """safetensors writes files that only their owner can read; let them be as readable as any other file."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*") if folder.exists() else ():
        path.chmod(0o666 & ~mask)


def _rename_whole(partial: Path) -> None:
    """`policy.partial/`, where it was written, becomes `policy/`."""
    if partial.exists():
        whole = partial.with_suffix("")
        shutil.rmtree(whole, ignore_errors=True)
        partial.rename(whole)


def _save_weights(session: Session, trainer: Trainer, folder: Path) -> None:
    if session.machine.zero is not None:
        trainer.save_model(str(folder))
        (folder / "training_args.bin").unlink(missing_ok=True)
    elif session.context.runtime.is_main:
        save_in_precision(session, trainer.accelerator.unwrap_model(trainer.model), folder)


def save_in_precision(session: Session, model: PreTrainedModel, folder: Path) -> None:
    """Weights are stored in the training precision: bf16 runs need no fp32 copies."""
    model = model.to(torch.bfloat16 if session.machine.bf16 else torch.float32)
    model.save_pretrained(folder)


def _save_adapter(session: Session, trainer: Trainer, adapter: Path, folder: Path, finish: Finish) -> None:
    context, config = session.context, session.context.config
    model = trainer.accelerator.unwrap_model(trainer.model)
    if session.adapter.ranks is not None:
        session.adapter.ranks.settle(model)
    whole_alone = config.peft.method in VIRTUAL_TOKENS or config.peft.init is AdapterStart.pissa
    if whole_alone:
        write_adapter(model, adapter, context.stage_dir / START, main=context.runtime.is_main)
    else:
        with quiet_peft():
            trainer.save_model(str(adapter))
    if not context.runtime.is_main:
        return
    for extra in adapter.iterdir():
        if not extra.name.startswith("adapter_"):
            extra.unlink()
    if config.peft.keep_adapter or config.peft.method in NOT_MERGED:
        write_with_base(model, adapter, folder, finish)
    else:
        unset_hf_deepspeed_config()  # else ZeRO-3 would shard the base
        merged = folded_in(session, adapter)
        finish(merged.config)
        save_in_precision(session, merged, folder)


def folded_in(session: Session, adapter: Path) -> PreTrainedModel:
    """What the stage started from, with the adapter that it trained folded in, in fp32."""
    config = session.context.config
    return merged_model(
        session.stage.policy,
        adapter,
        config.model,
        seed=session.stage.seed,
        peft=config.peft,
        bf16=session.machine.bf16,
    )
