"""Parameters of adapters, counted on one layer of each kind: as many as PEFT puts on all of them."""

import pytest
import torch
import transformers
from peft import TaskType
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig

from align.config.schema import ModelConfig, PeftConfig, PeftMethod, Placement
from align.models.peft import add_adapter
from align.models.shape import keep_one_of_each_kind, shape_of

_SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MAMBA_HEADS = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 4}
MODELS = {
    "llama": ("Llama", _SHAPE),
    "gpt2": ("GPT2", {"vocab_size": 64, "n_embd": 32, "n_layer": 6, "n_head": 4}),
    "gemma3": ("Gemma3Text", {**_SHAPE, "head_dim": 8, "sliding_window_pattern": 3}),
    # Layers of several kinds: experts but for two layers; attention in one layer of three, else a state-space model.
    "qwen2_moe": ("Qwen2Moe", {**_SHAPE, **_EXPERTS, "mlp_only_layers": [1, 4], "shared_expert_intermediate_size": 16}),
    "bamba": ("Bamba", {**_SHAPE, **_MAMBA_HEADS, "attn_layer_indices": [2, 5]}),
}
KINDS = {"llama": [6], "gpt2": [6], "gemma3": [6], "qwen2_moe": [4, 2], "bamba": [4, 2]}
"""How many layers of each kind these have, in the order of their first."""


def config_of(name: str) -> PreTrainedConfig:
    prefix, settings = MODELS[name]
    return getattr(transformers, f"{prefix}Config")(**settings)


def counted_whole(config: PreTrainedConfig, peft: PeftConfig, *, scores: bool = False) -> int:
    """What PEFT trains of the whole model, layer by layer."""
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    config.num_labels = 1
    task = TaskType.SEQ_CLS if scores else TaskType.CAUSAL_LM
    with torch.device("meta"):
        adapted = add_adapter(auto.from_config(config), peft, seed=0, zero3=True, task=task)
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("name", MODELS)
def test_one_layer_of_each_kind_is_kept(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name))
    assert [count for _, count in keep_one_of_each_kind(model)] == KINDS[name]


# GPT-2 calls the ways out of attention and of the MLP by one name, which bottleneck layers do not take.
METHODS = [
    (name, method)
    for name in MODELS
    for method in PeftMethod
    if method is not PeftMethod.none and (name, method) != ("gpt2", PeftMethod.bottleneck)
]


@pytest.mark.parametrize(("name", "method"), METHODS)
def test_adapters_of_every_method_are_counted_as_on_all_layers(name, method, tmp_path):
    peft = PeftConfig(method=method, r=12, target_modules=None if method is PeftMethod.bottleneck else "all-linear")
    config_of(name).save_pretrained(tmp_path)
    assert shape_of(str(tmp_path), ModelConfig(), peft).adapter == counted_whole(config_of(name), peft)


SETTINGS = {
    "names": PeftConfig(method=PeftMethod.lora, target_modules=["q_proj", "down_proj"]),
    "one layer": PeftConfig(method=PeftMethod.lora, target_modules=["layers.4.self_attn.q_proj", "up_proj"]),
    "ranks": PeftConfig(method=PeftMethod.lora, rank_pattern={"q_proj": 3, "down_proj": 5}),
    "rank of one layer": PeftConfig(method=PeftMethod.lora, rank_pattern={"layers.2.mlp.up_proj": 2, "q_proj": 5}),
    "authors' choice": PeftConfig(method=PeftMethod.dora, target_modules=None),
    "behind the MLP": PeftConfig(method=PeftMethod.bottleneck, target_modules=None, placement=Placement.pfeiffer),
    "behind one layer": PeftConfig(method=PeftMethod.bottleneck, target_modules=["layers.3.mlp", "self_attn"]),
}


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_names_of_modules_are_counted_as_on_all_layers(name, scores, tmp_path):
    config_of("llama").save_pretrained(tmp_path)
    found = shape_of(str(tmp_path), ModelConfig(), SETTINGS[name], scores=scores).adapter
    assert found == counted_whole(config_of("llama"), SETTINGS[name], scores=scores)


def test_layers_that_share_a_module_are_all_kept():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of("llama"))
    model.model.layers[3].mlp.up_proj = model.model.layers[1].mlp.up_proj
    assert keep_one_of_each_kind(model) == [] and len(model.model.layers) == 6
