"""Reward models: where they come from, where the score is read, and what travels with the weights."""

import copy
import json
import shutil

import pytest
import torch
from peft import TaskType
from transformers import AutoModelForSequenceClassification, FalconConfig, MambaConfig, PreTrainedModel

from align.config.errors import UserError
from align.config.schema import Layout, ModelConfig, PeftConfig, PeftMethod
from align.data.forest import lay_out_scores
from align.models.layout import prove_layout
from align.models.load import load_model, resolve_model
from align.models.peft import add_adapter, merged_model
from align.models.reward import (
    SCORES,
    as_scorer,
    centre_of,
    centred_scores,
    draw_head,
    has_score_head,
    load_reward_model,
    score_batch,
    set_statistics,
)
from tests.models.families import FOREST, VOCABULARY
from tests.models.scorers import tiny_scorer
from tests.models.test_layout import CPU, TREES, random_trees

# Granite has no sequence classification in transformers 5.23.
FAMILIES = [name for name in FOREST if name != "granite"]
LAYOUTS = [Layout.forest, Layout.sequences, Layout.padded]
LORA = PeftConfig(method=PeftMethod.lora, r=2, alpha=4)


def plain_scores(model: PreTrainedModel, trees) -> torch.Tensor:
    """What transformers' own forward says of each sequence alone; none of them ends in the pad token."""
    sequences = [[*tree.prompt, *completion] for tree in trees for completion in tree.completions]
    return torch.cat([model(input_ids=torch.tensor([ids])).logits[:, 0].detach() for ids in sequences])


def scores(model, trees, layout: Layout = Layout.padded) -> torch.Tensor:
    return score_batch(model, lay_out_scores(trees, layout, 0))


def loaded(name, seed: int = 0, dtype: torch.dtype = torch.float32, **settings) -> PreTrainedModel:
    return load_reward_model(str(name), ModelConfig(**settings), dtype, seed=seed).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_of_a_forest_equal_those_of_each_sequence_alone(name):
    model = tiny_scorer(name)
    if name == "gemma2":
        model.set_attn_implementation("eager")
    expected = plain_scores(model, TREES)
    assert expected.std() > 0.05
    proven = prove_layout(model, TREES[:2], Layout.auto, pad_token_id=0, device=CPU, reading=SCORES)
    assert proven.layout is Layout.forest, proven.reason
    for layout in LAYOUTS:
        torch.testing.assert_close(scores(model, TREES, layout), expected, rtol=0, atol=1e-5)


def strong(config) -> PreTrainedModel:
    """A scorer whose weights are large enough for what a token sees to matter."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5.0)
    draw_head(model, seed=0)
    return as_scorer(model).eval()


def test_a_family_that_takes_no_forest_falls_back_to_padding():
    settings = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = strong(FalconConfig(**settings, alibi=True, pad_token_id=0, num_labels=1))
    expected = plain_scores(model, TREES)
    proven = prove_layout(model, TREES[:2], Layout.auto, pad_token_id=0, device=CPU, reading=SCORES)
    assert proven.layout is Layout.padded
    assert "sequences: scores differ by" in proven.reason
    torch.testing.assert_close(scores(model, TREES), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_a_leak_is_found_out_however_large_the_head_is(scale, monkeypatch):
    def leaking(lengths, window, device):
        return torch.ones(sum(lengths), sum(lengths), dtype=torch.bool).tril()

    model = tiny_scorer("llama")
    with torch.no_grad():
        model.score.weight.mul_(scale)
    prove = {"requested": Layout.auto, "pad_token_id": 0, "device": CPU, "reading": SCORES}
    assert prove_layout(copy.deepcopy(model), TREES[:2], **prove).layout is Layout.forest
    monkeypatch.setattr("align.models.attention.tree_mask", leaking)
    assert prove_layout(model, TREES[:2], **prove).layout is Layout.sequences


def test_bf16_scores_are_fp32_numbers_and_the_forest_is_accepted():
    model = tiny_scorer("llama").to(torch.bfloat16)
    proven = prove_layout(model, TREES[:2], Layout.auto, pad_token_id=0, device=CPU, reading=SCORES)
    assert proven.layout is Layout.forest, proven.reason
    read = scores(model, TREES, Layout.forest)
    assert read.dtype == torch.float32
    assert not torch.equal(read, read.to(torch.bfloat16).float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert scores(tiny_scorer("llama"), TREES).dtype == torch.float32


def test_a_ranking_is_scored_as_its_completions_are_alone():
    trees = random_trees([(9, 8, 1, 6, 5), (4, 3, 7)])
    model = tiny_scorer("mistral_window")
    expected = plain_scores(model, trees)
    prove_layout(model, trees, Layout.forest, pad_token_id=0, device=CPU, reading=SCORES)
    torch.testing.assert_close(scores(model, trees, Layout.forest), expected, rtol=0, atol=1e-5)


def test_the_backbone_of_a_causal_model_is_kept_and_the_head_is_drawn_from_the_seed():
    causal, model = load_model("tiny-sft", ModelConfig(), torch.float32, seed=0), loaded("tiny-sft")
    ours, theirs = model.base_model.state_dict(), causal.base_model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(model.score.weight, loaded("tiny-sft").score.weight)
    assert not torch.equal(model.score.weight, loaded("tiny-sft", seed=1).score.weight)
    width = model.config.hidden_size
    assert model.score.weight.std().item() == pytest.approx((width + 1) ** -0.5, rel=0.25)
    half = loaded("tiny-sft", dtype=torch.bfloat16).score.weight
    assert torch.equal(half, model.score.weight.to(torch.bfloat16))


def test_an_untrained_embedded_model_becomes_a_scorer():
    assert torch.equal(loaded("tiny-untrained").score.weight, loaded("tiny-sft").score.weight)
    assert not torch.equal(loaded("tiny-untrained").base_model.norm.weight, loaded("tiny-sft").base_model.norm.weight)


def saved(model: PreTrainedModel, folder) -> PreTrainedModel:
    """`model` in a folder, with the tokenizer of the embedded models."""
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{resolve_model('tiny-sft')}/{file}", folder)
    return model


def test_a_reward_model_keeps_its_head_its_centre_and_any_tool_loads_it(tmp_path):
    model = loaded("tiny-sft", seed=3)
    assert not has_score_head(load_model("tiny-sft", ModelConfig(), torch.float32, seed=0).config)
    set_statistics(model.config, 1.5, torch.tensor(0.25))
    saved(model, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["architectures"][0].endswith("ForSequenceClassification")
    assert (values["reward_centre"], values["reward_std"]) == (1.5, 0.25)
    assert values["pad_token_id"] is not None
    again = loaded(tmp_path, seed=7)
    assert has_score_head(again.config)
    assert torch.equal(again.score.weight, model.score.weight)
    torch.testing.assert_close(scores(again, TREES), scores(model, TREES), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        centred_scores(again, lay_out_scores(TREES, Layout.padded, 0)) + 1.5, scores(model, TREES)
    )
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(plain_scores(plain, TREES), scores(model, TREES).detach(), rtol=0, atol=1e-5)


def test_without_statistics_the_centre_is_zero():
    assert centre_of(tiny_scorer("llama").config) == 0.0


def test_a_reward_model_without_its_head_is_refused(tmp_path):
    model = loaded("tiny-sft")
    weights = {key: value for key, value in model.state_dict().items() if key != "score.weight"}
    saved(model, tmp_path)
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(UserError, match=r"1 tensors do not fit.*score\.weight is missing"):
        loaded(tmp_path)


def test_a_missing_tensor_of_the_backbone_is_refused(tmp_path):
    causal = load_model("tiny-sft", ModelConfig(), torch.float32, seed=0)
    saved(causal, tmp_path)
    causal.save_pretrained(tmp_path, state_dict={k: v for k, v in causal.state_dict().items() if "norm" not in k})
    with pytest.raises(UserError, match=r"tensors do not fit.*norm.* is missing"):
        loaded(tmp_path)


def test_a_classifier_of_two_labels_is_refused(tmp_path):
    config = loaded("tiny-sft").config
    config.num_labels = 2
    saved(AutoModelForSequenceClassification.from_config(config), tmp_path)
    with pytest.raises(UserError, match=r"score\.weight is \(2, \d+\) in the file, \(1, "):
        loaded(tmp_path)


def test_a_model_type_without_sequence_classification_is_refused_in_one_line(tmp_path):
    MambaConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no sequence classification for model type mamba") as refusal:
        loaded(tmp_path)
    assert "\n" not in str(refusal.value)


def test_an_adapter_trains_the_head_and_merging_keeps_it(tmp_path):
    model = add_adapter(loaded("tiny-sft"), LORA, seed=0, zero3=False, task=TaskType.SEQ_CLS)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("score" in name for name in trained)
    assert all("lora_" in name or "score" in name for name in trained)
    assert not any("lora_" in name and "score" in name for name in trained)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.eval()
    expected = scores(model, TREES)
    assert (expected - scores(loaded("tiny-sft"), TREES)).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    merged = merged_model("tiny-sft", tmp_path, ModelConfig(), seed=9).eval()
    assert merged.score.forward.__self__ is merged.score
    torch.testing.assert_close(scores(merged, TREES), expected, rtol=0, atol=1e-5)


def test_a_head_trained_beside_an_adapter_on_a_bf16_base_is_kept_in_fp32():
    model = add_adapter(loaded("tiny-sft", dtype=torch.bfloat16), LORA, seed=0, zero3=False, task=TaskType.SEQ_CLS)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert scores(model.eval(), TREES).dtype == torch.float32


def test_an_adapter_on_the_score_head_is_refused():
    config = PeftConfig(method=PeftMethod.lora, target_modules=["score"])
    with pytest.raises(UserError, match="no layer for an adapter is called score"):
        add_adapter(tiny_scorer("llama"), config, seed=0, zero3=False, task=TaskType.SEQ_CLS)


def test_a_copy_reads_its_own_weights():
    model = tiny_scorer("llama")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.score.weight.zero_()
    assert scores(other, TREES).abs().max() == 0
    assert scores(model, TREES).abs().max() > 0
