"""What an adapter method can do, and which settings it does not go with: refused before anything is loaded.

Each refusal here stands for something that libraries let pass: docs/adapters.md has the table, made by trying.
"""

from align.config.best import measured
from align.config.errors import UserError
from align.config.schema import (
    AdapterStart,
    DPOStage,
    Layout,
    PeftConfig,
    PeftMethod,
    PPOStage,
    PretrainStage,
    RewardStage,
    RolloutEngine,
    RunConfig,
    SFTStage,
    StageConfig,
    ZeroChoice,
)

LOW_RANK = (PeftMethod.lora, PeftMethod.qlora, PeftMethod.dora)
"""LoRA, and what is LoRA but for its base or its scale."""
VIRTUAL_TOKENS = (PeftMethod.prefix, PeftMethod.prompt, PeftMethod.ptuning)
"""Methods that put trained positions in front of a row."""
NOT_MERGED = (*VIRTUAL_TOKENS, PeftMethod.bottleneck)
"""Methods that no weight of the base can take up."""
READ_BY: dict[str, tuple[PeftMethod, ...]] = {
    "r": (*LOW_RANK, PeftMethod.adalora, PeftMethod.bottleneck),
    "alpha": (*LOW_RANK, PeftMethod.adalora),
    "dropout": (*LOW_RANK, PeftMethod.adalora, PeftMethod.bottleneck),
    "target_modules": (*LOW_RANK, PeftMethod.adalora, PeftMethod.ia3, PeftMethod.bottleneck),
    "rank_stabilised": LOW_RANK,
    "init": LOW_RANK,
    "rank_pattern": LOW_RANK,
    "final_r": (PeftMethod.adalora,),
    "rank_warmup_fraction": (PeftMethod.adalora,),
    "rank_settled_fraction": (PeftMethod.adalora,),
    "virtual_tokens": VIRTUAL_TOKENS,
    "placement": (PeftMethod.bottleneck,),
    "double_quantisation": (PeftMethod.qlora,),
    "compute_precision": (PeftMethod.qlora,),
    "paged_optimizer": (PeftMethod.qlora,),
}
"""Key of `peft` -> the methods that read it."""


def refuse_adapter(config: RunConfig) -> None:
    """Check that the adapter method goes with every trained stage of the run.

    Raises: UserError for the first that it does not go with.
    """
    peft = config.peft
    if peft.method is PeftMethod.none:
        return
    _refuse_settings(peft)
    for name in config.run:
        stage = getattr(config.stages, name, None)
        if isinstance(stage, StageConfig):
            settings = config.deepspeed
            refuse_sharding(peft, settings.stage if settings.mode is ZeroChoice.zero else None)
            _refuse_stage(peft, name, stage)


def _refuse_settings(peft: PeftConfig) -> None:
    if peft.method is PeftMethod.adalora:
        if peft.final_r >= peft.r:
            raise UserError(
                f"peft.final_r={peft.final_r}: adalora starts with peft.r={peft.r}, and takes ranks; set a smaller one"
            )
        if peft.rank_warmup_fraction + peft.rank_settled_fraction >= 1:
            raise UserError(
                f"peft.rank_warmup_fraction={peft.rank_warmup_fraction} and "
                f"peft.rank_settled_fraction={peft.rank_settled_fraction} leave no step to take ranks in; lower one"
            )
    if peft.method is PeftMethod.qlora and peft.keep_adapter:
        raise UserError(
            "peft.keep_adapter=true: the adapter of qlora fits a base in 4 bits, which nobody would find beside it; "
            "leave keep_adapter out: adapter/ is kept beside the merged model anyway"
        )
    if not isinstance(peft.rank_pattern or {}, dict):
        raise UserError(f"peft.rank_pattern={peft.rank_pattern}: ranks by module were expected, such as {{q_proj: 32}}")
    for module, rank in (peft.rank_pattern or {}).items():
        if type(rank) is not int or rank < 1:
            raise UserError(f"peft.rank_pattern: {module}: {rank}: a rank is a whole number of 1 or more")
    if peft.init is AdapterStart.loftq and peft.method is not PeftMethod.qlora:
        raise UserError("peft.init=loftq makes up for what 4 bits lose, and this base keeps its bits; use peft=qlora")
    if peft.init is AdapterStart.pissa and peft.method is not PeftMethod.lora:
        raise UserError(
            f"peft.init=pissa takes its start out of the base's weights, which peft={peft.method.value} "
            f"{'keeps in 4 bits' if peft.method is PeftMethod.qlora else 'reads'}; use peft=lora, or another init"
        )


def refuse_sharding(peft: PeftConfig, stage: int | None) -> None:
    """Raises: UserError if a method does not go with a ZeRO stage (None: plain PyTorch), asked for or chosen."""
    if peft.method is PeftMethod.adalora and stage is not None:
        raise UserError(
            "peft=adalora takes ranks by the gradients of a step, which DeepSpeed has freed by then; add deepspeed=none"
        )
    if stage != 3:
        return
    if peft.method is PeftMethod.qlora:
        raise UserError("peft=qlora: ZeRO-3 cannot share out weights of 4 bits; use deepspeed=zero2 or none")
    if peft.init is AdapterStart.pissa:
        raise UserError("peft.init=pissa reads whole weights, and ZeRO-3 shares them out; use deepspeed=zero2 or none")


def _refuse_stage(peft: PeftConfig, name: str, stage: StageConfig) -> None:
    method = f"peft={peft.method.value}"
    if isinstance(stage, PPOStage):
        _refuse_ppo(peft, stage)
    if peft.method not in VIRTUAL_TOKENS:
        return
    if measured(name, stage) is not None:
        raise UserError(
            f"stages.{name}.best_by={stage.best_by.value}: a policy with the virtual tokens of {method} is asked only "
            "when it is complete; use best_by=loss"
        )
    if isinstance(stage, SFTStage | PretrainStage) and stage.packing:
        raise UserError(
            f"{method} puts its virtual tokens in front of a row, not of each sequence packed into it; "
            f"add stages.{name}.packing=false"
        )
    if isinstance(stage, DPOStage | RewardStage) and stage.layout in (Layout.forest, Layout.sequences):
        raise UserError(
            f"stages.{name}.layout={stage.layout.value}: {method} puts its virtual tokens in front of a row, not of "
            f"each sequence in it; use stages.{name}.layout=padded or auto"
        )
    if peft.method is PeftMethod.prefix and stage.activation_checkpointing:
        raise UserError(
            f"stages.{name}.activation_checkpointing=true: peft=prefix is a cache of keys and values, which "
            "checkpointing drops; turn it off, or use peft=prompt"
        )


def _refuse_ppo(peft: PeftConfig, stage: PPOStage) -> None:
    """PPO keeps the adapters of policy and value model on one base, and reads the reference with both off."""
    if peft.method in VIRTUAL_TOKENS or peft.method is PeftMethod.adalora:
        reason = "a model learns one set of ranks" if peft.method is PeftMethod.adalora else "they sit before every row"
        raise UserError(
            f"peft={peft.method.value}: PPO trains two adapters on one base, and this method allows one ({reason}); "
            "use lora, dora, qlora, ia3 or bottleneck"
        )
    if peft.init is not AdapterStart.default:
        raise UserError(
            f"peft.init={peft.init.value}: PPO's reference is the base with adapters off, so they have to start from "
            "nothing; leave init out"
        )
    if stage.activation_checkpointing:
        raise UserError(
            f"stages.ppo.activation_checkpointing=true: with peft={peft.method.value} two adapters share a base, and a "
            "layer would be computed again under the wrong one; turn it off, or set peft=none"
        )
    if stage.rollout is RolloutEngine.vllm and peft.method is not PeftMethod.lora:
        raise UserError("stages.ppo.rollout=vllm folds only LoRA into its weights; use peft=lora, or rollout=hf")
