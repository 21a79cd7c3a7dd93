"""Rollouts by vLLM itself: what it samples from loaded weights is what the model that is trained samples."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from align.config.schema import PeftConfig, PeftMethod
from align.generation.checkpoint_weights import checkpoint_weights
from align.generation.rollout import sample
from align.models.shared_base import SharedBase

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (extra `vllm`)"),
]
VOCABULARY, TEMPERATURE = 512, 0.7
PROMPTS = [[token, token + 1, token + 2] for token in range(20, 52)]
ENDS = list(range(3, 20))
"""Enough of the vocabulary that some completions end by themselves."""


def policy(seed: int):
    """Shapes that every attention kernel takes; weights large enough that tokens differ in probability."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0)
    return model.eval().cuda()


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """One for all tests, of other weights than any of them loads: a process holds only one that sleeps."""
    from align.generation.vllm_rollout import VllmSampler

    folder = tmp_path_factory.mktemp("policy")
    first = policy(seed=99)
    first.generation_config.update(do_sample=True, top_k=2, eos_token_id=[2, *range(300, 400)])
    first.save_pretrained(folder)
    sampler = VllmSampler(str(folder), max_tokens=64, dtype=torch.bfloat16, seed=0, batch_size=64, memory_share=0.2)
    yield sampler
    sampler.close()


def completions(engine, weights, **changes):
    engine.load(weights)
    options = {
        "per_prompt": 1, "seeds": list(range(len(PROMPTS))), "stop_token_ids": ENDS, "max_new_tokens": 24,
        "temperature": TEMPERATURE, "progress": None,
    }  # fmt: skip
    return engine.sample(PROMPTS, **(options | changes))


def mismatch(model, sampled, each: int = 1, temperature: float = TEMPERATURE) -> float:
    """Mean difference a token, in nats, to a plain forward of each prompt with its own completion."""
    differences = []
    for place, one in enumerate(sampled):
        prompt = PROMPTS[place // each]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *one.ids]], device="cuda")).logits[0, len(prompt) - 1 : -1].float()
        expected = (logits / (temperature or 1.0)).log_softmax(-1).cpu()
        differences.append(expected.gather(1, torch.tensor(one.ids)[:, None])[:, 0] - torch.tensor(one.logps))
    return torch.cat(differences).abs().mean().item()


def test_log_probabilities_are_the_policys_after_every_load(engine):
    for seed in (1, 2):
        model = policy(seed)
        sampled = completions(engine, checkpoint_weights(model), per_prompt=4, seeds=list(range(4 * len(PROMPTS))))
        assert mismatch(model, sampled, each=4) < 0.05
        assert mismatch(policy(seed + 1), sampled, each=4) > 0.5
        assert {one.finished for one in sampled} == {True, False}
        assert all(one.finished == (one.ids[-1] in ENDS) for one in sampled)


def test_greedy_tokens_are_those_of_generate(engine):
    model = policy(seed=3)
    ours = completions(engine, checkpoint_weights(model), temperature=0.0)
    expected = sample(
        model, PROMPTS, per_prompt=1, seeds=[0] * len(PROMPTS), stop_token_ids=ENDS, pad_token_id=0,
        max_new_tokens=24, temperature=0.0, batch_size=64, progress=None,
    )  # fmt: skip
    assert mismatch(model, ours, temperature=0.0) < 0.05
    same = sum(one.ids[:4] == other.ids[:4] for one, other in zip(ours, expected, strict=True))
    assert same >= 0.8 * len(PROMPTS), "in half precision near ties are decided either way, but few of them"


def test_the_same_seeds_sample_the_same_and_others_do_not(engine):
    model = policy(seed=4)
    first, again, other = (
        completions(engine, checkpoint_weights(model), seeds=[start + i for i in range(len(PROMPTS))])
        for start in (0, 0, 1000)
    )
    same = sum(one.ids == two.ids for one, two in zip(first, again, strict=True))
    assert same >= 0.8 * len(PROMPTS)
    assert sum(one.ids == two.ids for one, two in zip(first, other, strict=True)) < 0.2 * len(PROMPTS)


def test_the_adapter_of_a_shared_base_is_folded_in(engine):
    peft = PeftConfig(method=PeftMethod.lora, r=8, alpha=16)
    shared = SharedBase.from_base(policy(seed=5), peft, temperature=TEMPERATURE, seed=0, zero3=False).cuda()
    with torch.no_grad():
        for name, parameter in shared.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    with shared.generating() as model:
        sampled = completions(engine, checkpoint_weights(model))
        assert mismatch(model, sampled) < 0.05
    assert mismatch(policy(seed=5), sampled) > 0.3


def test_memory_is_given_back_between_rollouts(engine):
    completions(engine, checkpoint_weights(policy(seed=6)))
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    assert free > total - 0.1 * total
