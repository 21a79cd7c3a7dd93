"""One tiny random model of each family, with windows (4 positions) far smaller than the trees that test them."""

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 64
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_NEOX = {key: value for key, value in _SHAPE.items() if key != "num_key_value_heads"}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}

# name -> (class prefix, settings)
FOREST = {
    "llama": ("Llama", _SHAPE),
    "llama_tied": ("Llama", {**_SHAPE, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", _SHAPE),
    "qwen2_windows": ("Qwen2", {**_SHAPE, **_SLIDING, "use_sliding_window": True}),
    "qwen3": ("Qwen3", {**_SHAPE, "head_dim": 8}),
    "mistral": ("Mistral", {**_SHAPE, "sliding_window": None}),
    "mistral_window": ("Mistral", {**_SHAPE, "sliding_window": 4}),
    "phi3": ("Phi3", _SHAPE),
    "phi3_window": ("Phi3", {**_SHAPE, "sliding_window": 4}),
    "gpt2": ("GPT2", _GPT2),
    "gpt_neox": ("GPTNeoX", _NEOX),
    "olmo2": ("Olmo2", _SHAPE),
    "granite": ("Granite", {**_SHAPE, "logits_scaling": 4.0, "attention_multiplier": 0.3}),
    "qwen2_moe": ("Qwen2Moe", {**_SHAPE, **_EXPERTS, "shared_expert_intermediate_size": 16}),
    "mixtral": ("Mixtral", {**_SHAPE, "num_local_experts": 4}),
    "mixtral_window": ("Mixtral", {**_SHAPE, "num_local_experts": 4, "sliding_window": 4}),
    "gemma2": ("Gemma2", {**_SHAPE, **_SLIDING, "head_dim": 8, "attn_logit_softcapping": 1.0}),
    "gemma3": ("Gemma3", {**_SHAPE, **_SLIDING, "head_dim": 8}),
}
NO_FOREST = {"mamba": ("Mamba", _MAMBA)}


def tiny(name: str) -> PreTrainedModel:
    """The model `name` in eval mode, with weights large enough for what a token sees to matter."""
    prefix, settings = {**FOREST, **NO_FOREST}[name]
    config_class = "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**settings), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5.0)
    return model.eval()
