"""The shape of a model, read off its config: built on the meta device, which has sizes and no numbers."""

import json
import warnings
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import torch
from peft import TaskType
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from align.config.adapters import READ_BY, VIRTUAL_TOKENS
from align.config.errors import UserError
from align.config.schema import AdapterStart, ModelConfig, PeftConfig, PeftMethod, Placement, Precision
from align.distributed.memory import Shape
from align.models.adapters.configs import ALL_LINEAR
from align.models.adapters.quantised import KEPT_WHOLE
from align.models.load import load_config
from align.models.peft import add_adapter

CHECKED = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "olmo2", "gemma3_text"})
"""Model types whose activations tests/distributed/test_memory.py holds against what autograd keeps."""


def shape_of(name: str, model: ModelConfig, peft: PeftConfig | None = None, *, scores: bool = False) -> Shape:
    """The shape of a causal model, with the adapters that `peft` asks for; with a score head if `scores`.

    Reads config.json and nothing else; takes well under a second for any size, unless adapters have to be counted layer
    by layer.
    Raises: UserError if the config cannot be read or the model cannot be built without numbers.
    """
    try:
        shape = _read(name, model.revision, model.trust_remote_code, scores)
        if peft is None or peft.method is PeftMethod.none:
            return shape
        adapter = _adapters_of(name, model, peft, scores)
        return replace(
            shape,
            adapter=adapter,
            inputs_kept=peft.method in READ_BY["alpha"],
            beside=_beside(shape, peft),
            # Each of its weights scales one number of a position.
            scaled=adapter // shape.layers if peft.method is PeftMethod.ia3 else 0,
            virtual=peft.virtual_tokens if peft.method in VIRTUAL_TOKENS else 0,
            prefix=peft.method is PeftMethod.prefix,
            quantised=_quantised(_on_meta(name, model.revision, model.trust_remote_code, scores), peft),
            double_quantisation=peft.double_quantisation,
        )
    # Code that comes with a model may need numbers to build it, or name its parts in its own way.
    except (AttributeError, KeyError, TypeError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{name}: its shape cannot be read ({type(error).__name__}: {error})") from error


def _shape(built: PreTrainedModel) -> Shape:
    config, layers = built.config.get_text_config().to_dict(), _layers(built)
    linear = {key: module for key, module in built.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    hidden = built.get_input_embeddings().weight.shape[1]
    heads = _number(config, "num_attention_heads", "n_head") or 1
    norms = [
        m.weight.numel() for key, m in layers[0].named_modules() if "Norm" in type(m).__name__ and m.weight is not None
    ]
    mlp = _mlp_width(config, hidden)
    wide = sum(_sizes(m)[1] for m in layers[0].modules() if isinstance(m, nn.Linear | Conv1D) and _widens(m, mlp))
    embedding = built.get_input_embeddings().weight.numel()
    return Shape(
        parameters=built.num_parameters(),
        linear=sum(module.weight.numel() for module in linear.values()),
        largest=max(embedding, *(sum(p.numel() for p in layer.parameters()) for layer in layers)),
        layers=len(layers),
        hidden=hidden,
        heads=heads,
        key_heads=_number(config, "num_key_value_heads") or heads,
        head_width=_number(config, "head_dim") or hidden // heads,
        mlp=mlp,
        vocabulary=built.get_input_embeddings().weight.shape[0],
        # Experts keep their weights outside linear layers; all that transformers has are gated.
        gated=wide >= 2 * mlp or not wide,
        norms=max(1, norms.count(hidden)),
        head_norms=any(numbers != hidden for numbers in norms),
        checked=config.get("model_type") in CHECKED,
    )


@cache
def _read(name: str, revision: str | None, trust_remote_code: bool, scores: bool) -> Shape:
    return _shape(_on_meta(name, revision, trust_remote_code, scores))


@cache
def _on_meta(name: str, revision: str | None, trust_remote_code: bool, scores: bool) -> PreTrainedModel:
    return _build(name, revision, trust_remote_code, scores)


def _build(name: str, revision: str | None, trust_remote_code: bool, scores: bool) -> PreTrainedModel:
    config = load_config(name, ModelConfig(revision=revision, trust_remote_code=trust_remote_code))
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    if scores:
        config.num_labels = 1
    try:
        with torch.device("meta"):
            return auto.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise UserError(f"{name}: {str(error).splitlines()[0]}") from error


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers: the longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UserError(f"{type(model).__name__}: no list of layers in it, so its memory cannot be planned")
    return max(lists, key=len)


def _number(config: dict[str, Any], *names: str) -> int:
    """The first of these keys that a config has; 0 if it has none."""
    return next((config[name] for name in names if isinstance(config.get(name), int)), 0)


def _mlp_width(config: dict[str, Any], hidden: int) -> int:
    """Width inside the MLP; with experts, the sum over those that a token passes."""
    dense = _number(config, "intermediate_size", "n_inner", "ffn_dim") or 4 * hidden
    chosen = _number(config, "num_experts_per_tok")
    if not chosen:
        return dense
    each = _number(config, "moe_intermediate_size") or dense
    return chosen * each + _number(config, "shared_expert_intermediate_size")


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer; Conv1D (GPT-2) keeps its weight the other way round."""
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def _widens(module: nn.Module, mlp: int) -> bool:
    """Whether a linear layer leads into the MLP: it gives its width, or twice that where gate and way up are one."""
    inputs, outputs = _sizes(module)
    return outputs in (mlp, 2 * mlp) and inputs < outputs


def _quantised(built: PreTrainedModel, peft: PeftConfig) -> int:
    """Numbers that qlora keeps in 4 bits: every linear layer's but those that read the hidden states out."""
    if peft.method is not PeftMethod.qlora:
        return 0
    layers = {key: module for key, module in built.named_modules() if isinstance(module, nn.Linear)}
    return sum(m.weight.numel() for key, m in layers.items() if key.rsplit(".", 1)[-1] not in KEPT_WHOLE)


def _beside(shape: Shape, peft: PeftConfig) -> int:
    """Numbers a position that the adapters of a layer keep: of low rank at each linear layer; of bottleneck layers what
    they take in, and both sides of what they bend it by."""
    if peft.method is PeftMethod.bottleneck:
        return (1 + (peft.placement is Placement.houlsby)) * (shape.hidden + 2 * peft.r)
    return peft.r * (7 if shape.gated else 6) if peft.method in READ_BY["alpha"] else 0


def _adapters_of(name: str, model: ModelConfig, peft: PeftConfig, scores: bool) -> int:
    # Where weights come from and how they are rounded changes no shape, and needs numbers to be done.
    shaped = replace(peft, init=AdapterStart.default)
    settings = json.dumps(asdict(shaped), default=lambda entry: entry.value)
    return _adapter_parameters(name, (model.revision, model.trust_remote_code), settings, scores)


@cache
def _adapter_parameters(name: str, model: tuple[str | None, bool], peft: str, scores: bool) -> int:
    """Numbers that are trained with adapters, the score head included: as PEFT puts them on a model without numbers."""
    values = json.loads(peft)
    kinds = {"method": PeftMethod, "init": AdapterStart, "placement": Placement, "compute_precision": Precision}
    settings = PeftConfig(**values | {key: kind(values[key]) for key, kind in kinds.items()})
    task = TaskType.SEQ_CLS if scores else TaskType.CAUSAL_LM
    built = _build(name, *model, scores)
    kept = [] if _may_single_out_a_layer(settings) else keep_one_of_each_kind(built)
    # It draws weights from a seed, of which nobody else is to notice.
    with torch.random.fork_rng(devices=[]), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = add_adapter(built, settings, seed=0, zero3=True, task=task)
    return _trained(adapted) + sum((count - 1) * _trained(layer) for layer, count in kept)


def _may_single_out_a_layer(peft: PeftConfig) -> bool:
    """Whether a name in the settings could be a path, which is in one layer only: `layers.3.self_attn.q_proj`."""
    modules = [] if peft.target_modules in (ALL_LINEAR, None) else peft.target_modules
    names = [*(modules if isinstance(modules, list) else [modules]), *(peft.rank_pattern or {})]
    return not all(isinstance(name, str) and name.isidentifier() for name in names)


def keep_one_of_each_kind(model: PreTrainedModel) -> list[tuple[nn.Module, int]]:
    """Drop the layers that are like an earlier one; returns those kept, each with how many there were of its kind.

    A plan that counts LoRA of 80 layers took 1.6 to 1.9 s behind its imports, 0.3 s with one of them (2026-11-22).
    Drops none where modules are shared: an adapter of one of these is in several layers and trained once.
    """
    if len(list(model.named_modules(remove_duplicate=False))) > len(list(model.modules())):
        return []
    layers = _layers(model)
    kinds: dict[Any, list[int]] = {}
    for index, layer in enumerate(layers):
        kinds.setdefault(_kind(layer), []).append(index)
    kept = [(layers[alike[0]], len(alike)) for alike in kinds.values()]
    for index in sorted((index for alike in kinds.values() for index in alike[1:]), reverse=True):
        del layers[index]
    return kept


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """What two layers have in common if adapters go on both alike: names, types and sizes of all their modules."""
    return tuple(
        (name, type(module), tuple(weight.shape for weight in module.parameters(recurse=False)))
        for name, module in layer.named_modules()
    )


def _trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
