"""Every family computes a forest exactly, or is found out and falls back."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from align.config.errors import UserError
from align.config.schema import Layout
from align.data.forest import Tree, lay_out
from align.losses.logprobs import token_logps
from align.models import attention
from align.models.layout import attach, detach, plain_model, prove_layout, scored_logits
from tests import oracles
from tests.models.families import FOREST, NO_FOREST, VOCABULARY, tiny

CPU = torch.device("cpu")


def random_trees(sizes: list[tuple[int, ...]], seed: int = 0) -> list[Tree]:
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()

    return [Tree(ids(prompt), tuple(ids(n) for n in completions)) for prompt, *completions in sizes]


TREES = random_trees([(11, 9, 7), (3, 1, 12), (1, 5, 2)])


def logps(model, trees, layout):
    batch = lay_out(trees, layout, 0)
    return token_logps(scored_logits(model, batch), batch["targets"])


def plain(model, trees):
    tokens = [oracles.token_logps(model, tree.prompt, c) for tree in trees for c in tree.completions]
    return torch.stack([logp for completion in tokens for logp in completion]).float()


@pytest.mark.parametrize("name", FOREST)
def test_forest_equals_each_sequence_alone(name):
    model = tiny(name)
    if name == "gemma2":
        model.set_attn_implementation("eager")
    expected = plain(model, TREES)
    assert prove_layout(model, TREES[:2], Layout.auto, pad_token_id=0, device=CPU).layout is Layout.forest
    torch.testing.assert_close(logps(model, TREES, Layout.forest), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", FOREST)
def test_forest_gradient_equals_that_of_the_padded_layout(name):
    model = tiny(name)
    if name == "gemma2":
        model.set_attn_implementation("eager")
    gradients = []
    for layout in (Layout.padded, Layout.forest):
        attach(model, layout)
        model.zero_grad()
        logps(model, TREES, layout).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    difference = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert difference < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "qwen2_windows", "mistral_window"])
def test_sequences_equal_each_sequence_alone(name):
    model = tiny(name)
    expected = plain(model, TREES)
    proven = prove_layout(model, TREES, Layout.sequences, pad_token_id=0, device=CPU)
    assert proven.layout is Layout.sequences
    torch.testing.assert_close(logps(model, TREES, Layout.sequences), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NO_FOREST)
def test_a_model_that_carries_state_along_the_row_falls_back_to_padding(name):
    model = tiny(name)
    expected = plain(model, TREES)
    proven = prove_layout(model, TREES[:2], Layout.auto, pad_token_id=0, device=CPU)
    assert proven.layout is Layout.padded
    assert "forest" in proven.reason and "sequences" in proven.reason
    torch.testing.assert_close(logps(model, TREES, Layout.padded), expected, rtol=0, atol=2e-5)


def test_a_leak_along_the_row_is_found_out_on_rows_that_all_have_one_length():
    trees = random_trees([(11, 9, 9), (11, 9, 9)])
    assert prove_layout(tiny("mamba"), trees, Layout.auto, pad_token_id=0, device=CPU).layout is Layout.padded


@pytest.mark.parametrize("name", ["qwen2_windows", "mistral_window", "phi3_window", "gemma3"])
def test_a_forgotten_window_is_found_out(name, monkeypatch):
    whole = attention.forest_table
    monkeypatch.setattr(attention, "forest_table", lambda lengths, window: whole(lengths, 0))
    proven = prove_layout(tiny(name), TREES[:2], Layout.auto, pad_token_id=0, device=CPU)
    assert proven.layout is Layout.sequences
    assert "differ by" in proven.reason


def test_a_leak_between_completions_is_found_out(monkeypatch):
    def leaking(lengths, window, device):
        n = sum(lengths)
        return torch.ones(n, n, dtype=torch.bool).tril()

    monkeypatch.setattr(attention, "tree_mask", leaking)
    proven = prove_layout(tiny("llama"), TREES[:2], Layout.auto, pad_token_id=0, device=CPU)
    assert proven.layout is Layout.sequences


def test_a_forced_layout_that_is_wrong_is_refused():
    with pytest.raises(UserError, match="layout=forest is not exact"):
        prove_layout(tiny("mamba"), TREES[:2], Layout.forest, pad_token_id=0, device=CPU)


def test_a_fallback_leaves_the_models_own_attention():
    model = tiny("llama")
    before = model.config._attn_implementation
    prove_layout(model, TREES[:2], Layout.sequences, pad_token_id=0, device=CPU)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "gemma2", "mistral_window"])
def test_an_attached_model_still_computes_and_generates_as_before(name):
    model = tiny(name)
    if name == "gemma2":
        model.set_attn_implementation("eager")
    ids = torch.tensor([[5, 9, 33, 8, 17, 40, 21, 4]])
    before = model(input_ids=ids).logits
    written = model.generate(ids, max_new_tokens=6, do_sample=False)
    implementation = attach(model, Layout.forest)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=2e-5)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), written)
    detach(model, implementation)
    assert model.config._attn_implementation == implementation


def test_log_probabilities_do_not_depend_on_neighbours():
    model = tiny("llama")
    attach(model, Layout.forest)
    alone = logps(model, TREES[:1], Layout.forest)
    for neighbours in (TREES[1:], random_trees([(30, 4, 4), (2, 20, 1)], seed=1)):
        together = logps(model, [*neighbours, TREES[0]], Layout.forest)[-len(alone) :]
        torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)


def test_a_ranking_of_many_completions_is_exact():
    model = tiny("mistral_window")
    trees = random_trees([(9, 8, 1, 6, 5), (4, 3, 7)])
    expected = plain(model, trees)
    attach(model, Layout.forest)
    torch.testing.assert_close(logps(model, trees, Layout.forest), expected, rtol=0, atol=2e-5)


def test_lora_takes_the_forest_and_prompt_tuning_does_not():
    lora = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert prove_layout(lora, TREES[:2], Layout.auto, pad_token_id=0, device=CPU).layout is Layout.forest
    prompt = get_peft_model(tiny("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert prove_layout(prompt, TREES[:2], Layout.auto, pad_token_id=0, device=CPU).layout is Layout.padded
    torch.testing.assert_close(logps(prompt, TREES, Layout.padded), _virtual(prompt), rtol=0, atol=2e-5)


def _virtual(model):
    """Token log-probabilities under virtual tokens: the last logits of each sequence are those of its real tokens."""
    result = []
    for tree in TREES:
        for completion in tree.completions:
            logits = model(input_ids=torch.tensor([[*tree.prompt, *completion]])).logits[0]
            before = logits[-len(completion) - 1 : -1].log_softmax(-1)
            result.append(before[range(len(completion)), list(completion)])
    return torch.cat(result).detach()


def test_plain_model_is_found_inside_its_wrappers():
    model = tiny("llama")
    assert plain_model(torch.nn.DataParallel(get_peft_model(model, LoraConfig(target_modules="all-linear")))) is model


def test_bf16_forest_is_accepted():
    model = tiny("llama").to(torch.bfloat16)
    assert prove_layout(model, TREES[:2], Layout.auto, pad_token_id=0, device=CPU).layout is Layout.forest
