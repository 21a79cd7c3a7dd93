"""From the typed config to the config of PEFT that an adapter method is made of."""

from collections.abc import Callable
from typing import Any

from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
)
from peft import PeftConfig as AdapterConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as IA3_INPUTS
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from align.config.errors import UserError
from align.config.schema import AdapterStart, PeftConfig, PeftMethod
from align.models.adapters.bottleneck import BottleneckConfig, places
from align.models.cut_points import SCORE_HEAD

ALL_LINEAR = "all-linear"
PISSA = "pissa_niter_16"
"""By a fast SVD: seconds where a full one takes hours (arXiv:2404.02948, section 5.5)."""


def adapter_config(model: PreTrainedModel, peft: PeftConfig, task: TaskType) -> AdapterConfig:
    """What PEFT is asked for. Raises: UserError if target_modules or rank_pattern name a layer that is not there."""
    return MAKERS[peft.method](model, peft, {"task_type": task})


def low_rank(model: PreTrainedModel, peft: PeftConfig, options: dict[str, Any]) -> LoraConfig:
    """LoRA; of qlora the base is another, of dora the scale. loftq comes later: it needs the weights of the base."""
    ranks = dict(peft.rank_pattern or {})
    _refuse_unknown_ranks(model, ranks)
    return LoraConfig(
        r=peft.r,
        lora_alpha=peft.alpha,
        lora_dropout=peft.dropout,
        target_modules=target_modules(model, peft.target_modules),
        use_rslora=peft.rank_stabilised,
        use_dora=peft.method is PeftMethod.dora,
        init_lora_weights=PISSA if peft.init is AdapterStart.pissa else True,
        rank_pattern=ranks,
        **options,
    )


def _adalora(model: PreTrainedModel, peft: PeftConfig, options: dict[str, Any]) -> AdaLoraConfig:
    """The steps are not known yet: `align.trainers.ranks` sets the schedule when training begins.

    PEFT adds the penalty on directions that are not orthogonal to a loss that the model itself returns, so only in SFT,
    and on held-out rows too; here it is switched off, and `align.trainers.ranks` adds its gradient in every stage.
    """
    return AdaLoraConfig(
        init_r=peft.r,
        target_r=peft.final_r,
        lora_alpha=peft.alpha,
        lora_dropout=peft.dropout,
        target_modules=target_modules(model, peft.target_modules),
        total_step=1,
        orth_reg_weight=0.0,
        **options,
    )


def _ia3(model: PreTrainedModel, peft: PeftConfig, options: dict[str, Any]) -> IA3Config:
    """Scales on what layers give out; on the MLP's way down, as its authors have it, on what it takes in."""
    wanted = target_modules(model, peft.target_modules)
    if wanted is None:
        return IA3Config(**options)
    if wanted == ALL_LINEAR:
        wanted = sorted({name.rsplit(".", 1)[-1] for name in _linear_layers(model)})
    inputs = IA3_INPUTS.get(model.config.get_text_config().model_type, [])
    return IA3Config(target_modules=wanted, feedforward_modules=[name for name in wanted if name in inputs], **options)


def _prefix(model: PreTrainedModel, peft: PeftConfig, options: dict[str, Any]) -> PrefixTuningConfig:
    return PrefixTuningConfig(num_virtual_tokens=peft.virtual_tokens, **options)


def _prompt(model: PreTrainedModel, peft: PeftConfig, options: dict[str, Any]) -> PromptTuningConfig:
    """From embeddings of real tokens: random ones are far from all that the model knows (arXiv:2104.08691, 3.2)."""
    return PromptTuningConfig(
        num_virtual_tokens=peft.virtual_tokens, prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB, **options
    )


def _ptuning(model: PreTrainedModel, peft: PeftConfig, options: dict[str, Any]) -> PromptEncoderConfig:
    width = model.config.get_text_config().hidden_size
    return PromptEncoderConfig(num_virtual_tokens=peft.virtual_tokens, encoder_hidden_size=width, **options)


def _bottleneck(model: PreTrainedModel, peft: PeftConfig, options: dict[str, Any]) -> BottleneckConfig:
    if peft.target_modules == ALL_LINEAR:
        raise UserError(
            "peft.target_modules=all-linear: bottleneck layers sit where peft.placement says; use null, or names of "
            "modules to sit behind"
        )
    wanted = places(model, peft.placement) if peft.target_modules is None else _names(peft.target_modules)
    return BottleneckConfig(
        r=peft.r, dropout=peft.dropout, placement=peft.placement.value, target_modules=wanted, **options
    )


MAKERS: dict[PeftMethod, Callable[[PreTrainedModel, PeftConfig, dict[str, Any]], AdapterConfig]] = {
    PeftMethod.lora: low_rank,
    PeftMethod.qlora: low_rank,
    PeftMethod.dora: low_rank,
    PeftMethod.adalora: _adalora,
    PeftMethod.ia3: _ia3,
    PeftMethod.prefix: _prefix,
    PeftMethod.prompt: _prompt,
    PeftMethod.ptuning: _ptuning,
    PeftMethod.bottleneck: _bottleneck,
}


def target_modules(model: PreTrainedModel, wanted: Any) -> str | list[str] | None:
    """`all-linear` (every linear layer but the output layer), None (PEFT's choice for models of this type), or names of
    linear layers that are all there.

    The output layer is refused: SFT computes log-probabilities past an adapter on it, and merging into weights that it
    shares with the embeddings would change those too. A score head is trained whole.
    Raises: UserError naming what the model has.
    """
    if wanted in (ALL_LINEAR, None):
        return wanted
    layers = _linear_layers(model)
    known = ", ".join(sorted({layer.rsplit(".", 1)[-1] for layer in layers}))
    names = _names(wanted)
    if not names:
        raise UserError(f"peft.target_modules={wanted}: must be {ALL_LINEAR} or a list of {known}")
    for name in names:
        if not any(_is_called(layer, name) for layer in layers):
            raise UserError(f"peft.target_modules: no layer for an adapter is called {name}; this model has {known}")
    return names


def _names(wanted: Any) -> list[str]:
    """One name or a list of names, as a list; empty for anything else."""
    names = [wanted] if isinstance(wanted, str) else wanted
    return list(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """Paths of the linear layers, without the output layer and the score head."""
    outputs = (model.get_output_embeddings(), getattr(model, SCORE_HEAD, None))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module not in outputs
    ]


def _is_called(layer: str, name: str) -> bool:
    return layer == name or layer.endswith(f".{name}")


def _refuse_unknown_ranks(model: PreTrainedModel, pattern: dict[str, int]) -> None:
    """Raises: UserError for a rank of a layer that is not there; PEFT would leave it out without a word."""
    layers = _linear_layers(model) if pattern else []
    for name in pattern:
        if not any(_is_called(layer, name) for layer in layers):
            known = ", ".join(sorted({layer.rsplit(".", 1)[-1] for layer in layers}))
            raise UserError(f"peft.rank_pattern: no layer is called {name}; this model has {known}")
