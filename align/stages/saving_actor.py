"""What PPO leaves: the policy as a plain model, and the value model, each complete or not at all."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from align.config.adapters import NOT_MERGED
from align.distributed import runtime
from align.models.actor_critic import ActorCritic
from align.models.reward import set_statistics
from align.models.shared_base import POLICY as POLICY_ADAPTER
from align.models.shared_base import VALUE as VALUE_ADAPTER
from align.models.shared_base import SharedBase
from align.stages.adapters import write_with_base
from align.stages.saving import ADAPTER, POLICY, finish_folders, folded_in, partial_folder, save_in_precision
from align.stages.session import Session
from align.trainers.ppo import PPOTrainer

VALUE, AVERAGE = "value", "policy_ema"


def save_actor(session: Session, trainer: PPOTrainer) -> list[str]:
    """Write policy/, value/ and policy_ema/, as far as the run has them; returns their names. Call it on every rank."""
    written = [POLICY, *([VALUE] if trainer.inner.has_value else [])]
    folders = [*written, *([ADAPTER] if isinstance(trainer.inner, SharedBase) else [])]
    _save(session, trainer, folders, lambda state: _write_all(session, trainer.inner, state, POLICY, ADAPTER))
    if trainer.average is not None:
        trainer.average.swap()
        _save(session, trainer, [AVERAGE], lambda state: _write_average(session, trainer.inner, state))
        trainer.average.swap()
        written.append(AVERAGE)
    return written


def _save(
    session: Session, trainer: PPOTrainer, folders: list[str], write: Callable[[Mapping[str, Tensor]], None]
) -> None:
    context = session.context
    if context.runtime.is_main:
        for folder in folders:
            shutil.rmtree(partial_folder(context, folder), ignore_errors=True)
    runtime.barrier()
    state = trainer.whole_state()
    unset_hf_deepspeed_config()  # else ZeRO-3 would shard the models that are made to write and to check
    if context.runtime.is_main:
        write(state)
        finish_folders(session, folders)
    runtime.barrier()


def _write_all(session: Session, actor: ActorCritic, state: Mapping[str, Tensor], policy: str, adapter: str) -> None:
    if isinstance(actor, SharedBase):
        _write_adapted(session, actor, state, policy, adapter)
        if actor.has_value:
            folder = partial_folder(session.context, VALUE)
            actor.save_adapter(VALUE_ADAPTER, folder, state)
        return
    _write_model(session, actor.policy, state, "policy.", partial_folder(session.context, policy))
    if actor.critic is not None:
        scale, centre = actor.value_affine
        set_statistics(actor.critic.config, centre, 1.0)
        # A value is scale * (score - centre); the score head keeps its own scale.
        actor.critic.config.value_scale = scale
        _write_model(session, actor.critic, state, "critic.", partial_folder(session.context, VALUE))


def _write_average(session: Session, actor: ActorCritic, state: Mapping[str, Tensor]) -> None:
    if isinstance(actor, SharedBase):
        scratch = f"{AVERAGE}_adapter"
        _write_adapted(session, actor, state, AVERAGE, scratch)
        shutil.rmtree(partial_folder(session.context, scratch))
    else:
        _write_model(session, actor.policy, state, "policy.", partial_folder(session.context, AVERAGE))


def _write_model(
    session: Session, model: PreTrainedModel, state: Mapping[str, Tensor], prefix: str, folder: Path
) -> None:
    """The tensors under `prefix`, in the precision of the run, with the model's config."""
    dtype = torch.bfloat16 if session.machine.bf16 else torch.float32
    own = {name.removeprefix(prefix): value.to(dtype) for name, value in state.items() if name.startswith(prefix)}
    model.config.use_cache, model.config.dtype = True, dtype
    model.save_pretrained(folder, state_dict=own)


def _write_adapted(session: Session, actor: SharedBase, state: Mapping[str, Tensor], policy: str, adapter: str) -> None:
    """The policy's adapter, and the base with it folded in, or with peft.keep_adapter the adapter alone."""
    config = session.context.config
    folder, whole = partial_folder(session.context, adapter), partial_folder(session.context, policy)
    actor.save_adapter(POLICY_ADAPTER, folder, state)
    if config.peft.keep_adapter or config.peft.method in NOT_MERGED:
        write_with_base(actor.policy, folder, whole, lambda config: None)
        return
    model = folded_in(session, folder)
    model.config.use_cache = True
    save_in_precision(session, model, whole)
