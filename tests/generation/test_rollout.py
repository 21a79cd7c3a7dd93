"""Rollouts: what is sampled, at which log-probability, whatever the batch."""

import random
from functools import wraps

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from align.config.errors import UserError
from align.config.schema import Layout
from align.generation import rollout
from align.generation.batching import Batching, prove_batching
from align.generation.rollout import draw, sample
from align.generation.seeds import row_uniforms
from align.models.layout import attach
from align.tracking.progress import Progress
from tests.models.families import FOREST, NO_FOREST, VOCABULARY, tiny

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
ODD = {
    # A convolution's states beside keys and values, which move with the rows.
    "Lfm2": (
        {**SMALL, "layer_types": ["conv", "full_attention"], "num_attention_heads": 4, "num_key_value_heads": 2},
        Batching.moving,
    ),
    # States inside the model, out of reach.
    "RecurrentGemma": (
        {**SMALL, "num_hidden_layers": 3, "num_attention_heads": 4, "lru_width": 32, "intermediate_size": 48},
        Batching.padded,
    ),
    "Mamba2": (SMALL | {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1}, Batching.padded),
    # Mixes the states of its rows up.
    "Rwkv": (SMALL | {"attention_hidden_size": 32}, Batching.single),
}
STOPS = [2, 7, 11, 19, 23, 31]
"""Enough of 64 tokens that completions end at all lengths."""


def odd(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**ODD[name][0])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5.0)
    return model


def some_prompts(n=6, seed=0):
    numbers = random.Random(seed)
    return [[numbers.randrange(3, VOCABULARY) for _ in range(numbers.choice((2, 3, 5, 9)))] for _ in range(n)]


def completions(model, prompts, **changes):
    settings = {
        "per_prompt": 1,
        "stop_token_ids": STOPS,
        "pad_token_id": 0,
        "max_new_tokens": 24,
        "temperature": 0.7,
        "batch_size": 100,
        "progress": None,
    } | changes
    settings.setdefault("seeds", list(range(100, 100 + len(prompts) * settings["per_prompt"])))
    return sample(model, prompts, **settings)


def same(ours, others):
    assert [(c.ids, c.finished) for c in ours] == [(c.ids, c.finished) for c in others]
    for one, other in zip(ours, others, strict=True):
        assert one.logps == pytest.approx(other.logps, abs=1e-4)


def check_logps(model, prompts, sampled, temperature):
    for prompt, completion in zip(prompts, sampled, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logps), expected, rtol=0, atol=1e-4)


def test_the_same_seed_samples_the_same_in_any_batch_and_order(monkeypatch):
    monkeypatch.setattr(rollout, "CHUNK_STEPS", 4)
    model, prompts = tiny("llama"), some_prompts(9)
    together = completions(model, prompts)
    lengths = {len(c.ids) for c in together}
    assert len(lengths) > 4 and max(lengths) > 8, "the prompts and seeds of this test are to end at many lengths"
    for batch_size in (1, 3):
        same(completions(model, prompts, batch_size=batch_size), together)
    order = random.Random(1).sample(range(9), 9)
    shuffled = completions(model, [prompts[i] for i in order], seeds=[100 + i for i in order], batch_size=4)
    same(shuffled, [together[i] for i in order])


def test_several_completions_of_a_prompt_equal_the_prompt_listed_several_times():
    model, prompts, seeds = tiny("llama"), some_prompts(3), list(range(9))
    listed = [prompt for prompt in prompts for _ in range(3)]
    expected = [completions(model, [p], seeds=[seed])[0] for p, seed in zip(listed, seeds, strict=True)]
    assert len({tuple(c.ids) for c in expected}) == 9
    for batch_size in (100, 4):
        same(completions(model, prompts, per_prompt=3, seeds=seeds, batch_size=batch_size), expected)
        same(completions(model, listed, seeds=seeds, batch_size=batch_size), expected)


def test_a_prompt_is_read_once_and_done_rows_are_dropped(monkeypatch):
    monkeypatch.setattr(rollout, "CHUNK_STEPS", 4)
    model, prompts, shapes = tiny("llama"), some_prompts(4), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    sampled = completions(model, prompts, per_prompt=5)
    reads = [shape for shape in shapes if shape[1] > 1]
    assert reads == [(4, max(map(len, prompts)))]
    computed, lengths = sum(rows for rows, width in shapes if width == 1), [len(c.ids) for c in sampled]
    assert computed <= sum(lengths) + 4 * len(lengths) < len(lengths) * max(lengths)


@pytest.mark.parametrize("name", [*FOREST, *NO_FOREST, *ODD])
def test_every_family_samples_in_a_batch_what_it_samples_alone(name, monkeypatch):
    monkeypatch.setattr(rollout, "CHUNK_STEPS", 3)
    model = odd(name) if name in ODD else tiny(name)
    prompts = some_prompts(4, seed=3)
    expected = [completions(model, [p], seeds=[s], max_new_tokens=10)[0] for s, p in enumerate(prompts * 2)]
    same(completions(model, prompts * 2, seeds=list(range(8)), max_new_tokens=10), expected)
    assert len({len(c.ids) for c in expected}) > 1
    if name != "gemma2":  # its SDPA leaves out the soft cap that its eager attention has
        check_logps(model, prompts * 2, expected, 0.7)


@pytest.mark.parametrize("name", ODD)
def test_how_odd_caches_are_batched_is_found_by_trial(name):
    assert prove_batching(odd(name), (5, 9, 33, 8, 21), 0) is ODD[name][1]
    levels = list(Batching)
    assert levels.index(prove_batching(odd(name), (5,), 0)) >= levels.index(ODD[name][1])


def test_a_model_that_reads_padding_as_text_gets_equal_lengths_together(monkeypatch):
    model, prompts = odd("Mamba2"), some_prompts(5)
    forward = model.forward
    monkeypatch.setattr(model, "forward", wraps(forward)(lambda *a, **k: forward(*a, **k | {"attention_mask": None})))
    assert prove_batching(model, (5, 9, 33, 8, 21), 0) is Batching.equal_lengths
    expected = [completions(model, [p], seeds=[s])[0] for s, p in enumerate(prompts)]
    same(completions(model, prompts, seeds=list(range(5))), expected)
    check_logps(model, prompts, expected, 0.7)


@pytest.mark.parametrize("name", ["llama", "mistral_window", "gemma2", "gpt2"])
def test_a_model_attached_to_the_forest_samples_the_same(name):
    model, prompts = tiny(name), some_prompts(5)
    if name == "gemma2":
        model.set_attn_implementation("eager")
    expected = completions(model, prompts)
    attach(model, Layout.forest)
    same(completions(model, prompts), expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_log_probabilities_are_those_of_a_plain_forward(temperature):
    model, prompts = tiny("llama"), some_prompts(6)
    sampled = completions(model, prompts, temperature=temperature)
    check_logps(model, prompts, sampled, temperature)


def test_frequencies_are_those_of_the_softmax():
    model, prompt, n, temperature = tiny("llama"), [5, 9, 12], 4000, 2.0
    sampled = completions(
        model, [prompt], per_prompt=n, max_new_tokens=2, temperature=temperature, batch_size=n, stop_token_ids=[]
    )
    with torch.no_grad():
        first = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
        followed = torch.tensor([prompt + [token] for token in range(VOCABULARY)])
        second = first @ (model(followed).logits[:, -1] / temperature).softmax(-1)
    for step, probabilities in enumerate((first, second)):
        counts = torch.bincount(torch.tensor([c.ids[step] for c in sampled]), minlength=VOCABULARY).double()
        expected = n * probabilities.double()
        often = expected >= 5
        chi = ((counts - expected)[often] ** 2 / expected[often]).sum().item()
        degrees = int(often.sum()) - 1
        assert degrees > 5
        # Mean and spread of chi-square; the seeds are fixed, so this is no chance event.
        assert abs(chi - degrees) < 3.5 * (2 * degrees) ** 0.5


def test_a_token_is_drawn_where_the_cumulative_probabilities_pass_the_uniform_number():
    logits = torch.tensor([[0.0, -torch.inf, 1.0, 2.0, -torch.inf]])
    p = (logits / 0.5).softmax(-1).double()[0]
    edges = p.cumsum(0)
    for u, token in [(0.0, 0), (edges[0] - 1e-6, 0), (edges[0] + 1e-6, 2), (edges[2] + 1e-6, 3), (1 - 2**-53, 3)]:
        tokens, logps = draw(logits, torch.tensor([float(u)], dtype=torch.float64), 0.5)
        assert tokens.tolist() == [token]
        assert logps.tolist() == pytest.approx([p[token].log().item()], abs=1e-6)
    impossible_first = torch.tensor([[-torch.inf, 0.0, 1.0]])
    assert draw(impossible_first, torch.zeros(1, dtype=torch.float64), 1.0)[0].tolist() == [1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral_window", "mamba"])
def test_greedy_is_that_of_generate(name):
    model, prompts = tiny(name), some_prompts(5)
    model.generation_config = GenerationConfig()
    sampled = completions(model, prompts, temperature=0.0)
    for prompt, completion in zip(prompts, sampled, strict=True):
        ids = torch.tensor([prompt])
        settings = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": STOPS, "pad_token_id": 0}
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()
        assert completion.ids == expected
    check_logps(model, prompts, sampled, 1.0)


def test_a_completion_ends_with_its_first_stop_token_or_at_the_limit():
    model, prompts = tiny("llama"), some_prompts(8)
    sampled = completions(model, prompts, max_new_tokens=12)
    assert {c.finished for c in sampled} == {True, False}
    for completion in sampled:
        assert not set(completion.ids[:-1]) & set(STOPS)
        assert completion.finished == (completion.ids[-1] in STOPS)
        assert completion.finished or len(completion.ids) == 12
        assert len(completion.logps) == len(completion.ids)


@pytest.mark.parametrize("limit", [1, 2, 16, 17, 18])
def test_without_stop_tokens_every_completion_is_as_long_as_the_limit(limit):
    sampled = completions(tiny("llama"), some_prompts(3), stop_token_ids=[], max_new_tokens=limit)
    assert [(len(c.ids), c.finished) for c in sampled] == [(limit, False)] * 3


def test_a_pad_token_that_stops_ends_completions_all_the_same():
    model, prompts = tiny("llama"), some_prompts(8)
    expected = completions(model, prompts, pad_token_id=1)
    assert any(c.ids[-1] == STOPS[1] for c in expected)
    same(completions(model, prompts, pad_token_id=STOPS[1]), expected)


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_the_generation_config_of_the_model_has_no_say(name):
    model, prompts = tiny(name), some_prompts(5)
    expected = completions(model, prompts, stop_token_ids=[2])
    own = GenerationConfig(
        do_sample=True,
        top_k=2,
        top_p=0.3,
        temperature=0.1,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        min_new_tokens=20,
        suppress_tokens=[5, 6, 7],
        eos_token_id=list(range(30)),
        max_length=4,
        num_beams=1,
    )
    model.generation_config = own
    same(completions(model, prompts, stop_token_ids=[2]), expected)
    assert model.generation_config is own and own.top_k == 2
    assert all(len(c.ids) == 24 for c in completions(model, prompts, stop_token_ids=[]))


@pytest.mark.parametrize("training", [True, False])
def test_every_module_comes_back_in_its_own_mode_and_can_be_trained(training):
    model, prompts = tiny("llama"), some_prompts(2)
    model.config.use_cache = False
    model.train(training)
    model.lm_head.train(not training)
    modes = [module.training for module in model.modules()]
    completions(model, prompts)
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is False
    model(torch.tensor([prompts[0]])).logits.sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0
    assert not any(t.is_inference() for t in [*model.parameters(), *model.buffers()])


def test_dropout_does_not_sample():
    model, prompts = tiny("gpt2"), some_prompts(4)
    expected = completions(model.eval(), prompts)
    same(completions(model.train(), prompts), expected)


def test_the_mode_comes_back_after_an_error():
    model = tiny("llama").train()
    own = model.generation_config
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="no numbers"):
        completions(model, some_prompts(2))
    assert model.training and model.generation_config is own


def test_an_adapter_samples_as_the_model_it_is_folded_into():
    torch.manual_seed(0)
    base = tiny("llama")
    plain = completions(base, some_prompts(4))
    adapted = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    ).train()
    sampled = completions(adapted, some_prompts(4))
    assert adapted.training and adapted.base_model.model.training
    assert [c.ids for c in sampled] != [c.ids for c in plain]
    same(sampled, completions(adapted.merge_and_unload(), some_prompts(4)))


def test_progress_counts_completions_up_to_all(monkeypatch):
    shown = []
    progress = Progress("sampling", 12)
    monkeypatch.setattr(progress, "show", lambda done, note="": shown.append(done))
    completions(tiny("llama"), some_prompts(6), per_prompt=2, batch_size=5, progress=progress)
    assert shown == sorted(shown) and shown[-1] == 12 and len(shown) >= 3


def test_no_prompts_give_no_completions():
    assert completions(tiny("llama"), []) == []


def test_draws_of_a_seed_are_its_own_and_like_no_other_seed():
    uniforms = row_uniforms([3, 4, 3, 2**100], 1000)
    assert (uniforms[0] == uniforms[2]).all() and (uniforms[0] == row_uniforms([3], 1000)[0]).all()
    assert (row_uniforms([4], 10)[0] == uniforms[1, :10]).all()
    for one, other in ((0, 1), (0, 3), (1, 3)):
        assert abs(((uniforms[one] - 0.5) * (uniforms[other] - 0.5)).mean() * 12) < 0.1
    many = row_uniforms(range(5000), 1)[:, 0]
    assert abs(many.mean() - 0.5) < 0.015 and 0 <= many.min() and many.max() < 1
    with pytest.raises(ValueError):
        row_uniforms([-1], 2)
