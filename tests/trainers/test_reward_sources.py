"""A reward model as a source of reward: the same scores in any batch, layout, tokenizer and number of ranks."""

import contextlib
import dataclasses
import shutil
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, LlamaConfig

from align.config.errors import UserError
from align.config.rewards import RewardSetting
from align.config.schema import Layout, ModelConfig
from align.data.forest import RewardCollator, Tree
from align.data.records import Message
from align.data.template import Template
from align.models.load import resolve_model
from align.models.reward import as_scorer, centre_of, draw_head, load_reward_model, set_statistics
from align.models.score_sample import write_sample
from align.trainers import reward_sources
from align.trainers.reward_sources import Answered, ModelReward
from align.trainers.scoring import completion_scores
from tests.data.chat_tokenizers import QWEN25, chatml, llama3, qwen
from tests.models.scorers import tiny_scorer

LAYOUTS = [Layout.forest, Layout.sequences, Layout.padded]
EMBEDDED = RewardSetting("rm", "tiny-sft", None)


@cache
def templates() -> dict[str, Template]:
    return {"chatml": Template(chatml()), "llama3": Template(llama3()), "qwen": Template(qwen(QWEN25))}


def word_scorer():
    """A scorer with an embedding for each token of the tokenizers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=700, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5.0)
    draw_head(model, seed=0)
    set_statistics(model.config, 0.5, 1.0)
    return as_scorer(model).eval()


def source(model, *, template="chatml", policy="chatml", layout=Layout.padded, micro=4, **changed) -> ModelReward:
    arguments = {"layout": layout, "micro_batch_size": micro, "accelerator": Accelerator(cpu=True), **changed}
    digest = templates()[policy].digest
    return ModelReward(EMBEDDED, model, templates()[template], policy_template_digest=digest, **arguments)


def sampled(groups, seed: int = 0, vocabulary: int = 60) -> list[Answered]:
    """Completions of random tokens, shuffled: `groups` holds the number for each prompt."""
    generator = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return generator.integers(3, vocabulary, generator.integers(low, high)).tolist()

    rows = []
    for group, count in enumerate(groups):
        prompt, message = ids(2, 14), (Message("user", f"Question {group}?"),)
        rows += [Answered(message, (), list(prompt), ids(1, 12), "?", True) for _ in range(count)]
    return [rows[i] for i in generator.permutation(len(rows))]


def plain_scores(model, pairs) -> list[float]:
    """What transformers' own forward says of each sequence alone, less the centre."""
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([[*prompt, *ids]])).logits.item() for prompt, ids in pairs]
    return [score - centre_of(model.config) for score in alone]


def spied(reward: ModelReward, monkeypatch) -> list[list[Tree]]:
    """The trees of each forward."""
    seen = []

    def lay_out(trees, *rest):
        seen.append(list(trees))
        return original(trees, *rest)

    original = reward_sources.lay_out_scores
    monkeypatch.setattr(reward_sources, "lay_out_scores", lay_out)
    return seen


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("micro", [1, 4, 64])
def test_scores_are_those_of_each_sequence_alone_less_the_centre_in_the_order_given(layout, micro):
    model, rows = tiny_scorer("llama"), sampled([4, 1, 3, 4])
    expected = plain_scores(model, [(row.prompt_ids, row.completion_ids) for row in rows])
    set_statistics(model.config, 1.25, 1.0)
    scores = source(model, layout=layout, micro=micro).scores(rows)
    assert scores.dtype == np.float64
    assert scores == pytest.approx(np.array(expected) - 1.25, abs=1e-5)


def test_a_text_scores_the_same_as_in_the_reward_stage():
    rows = sampled([3, 2, 4])
    table = Dataset.from_list(
        [{"prompt_ids": r.prompt_ids, "completion_ids": [r.completion_ids], "ranks": [0.0], "p": 1.0, "margin": 0.0}
         for r in rows]
    )  # fmt: skip
    model = load_reward_model("tiny-sft", ModelConfig(), torch.float32, seed=0).eval()
    collator, accelerator = RewardCollator(Layout.padded, 0), Accelerator(cpu=True)
    there = completion_scores(model, table, collator=collator, accelerator=accelerator, micro_batch_size=3, label="")
    here = source(model, layout=Layout.forest).scores(rows)
    assert here == pytest.approx(np.concatenate(there), abs=1e-5)


def test_completions_of_one_prompt_share_its_computation_and_the_longest_come_first(monkeypatch):
    rows = sampled([4, 2, 4, 1])
    reward = source(tiny_scorer("llama"), micro=4)
    forwards = spied(reward, monkeypatch)
    reward.scores(rows)
    assert [sum(len(tree.completions) for tree in trees) for trees in forwards] == [4, 4, 3]
    assert sum(map(len, forwards)) <= 4 + 2, "a prompt is computed again only where a micro-batch ends"
    longest = [max(len(tree.prompt) + len(ids) for tree in trees for ids in tree.completions) for trees in forwards]
    assert longest == sorted(longest, reverse=True)
    assert longest[0] == max(len(row.prompt_ids) + len(row.completion_ids) for row in rows)


def test_nothing_to_score_is_no_forward(monkeypatch):
    reward = source(tiny_scorer("llama"))
    forwards = spied(reward, monkeypatch)
    scores = reward.scores([])
    assert scores.shape == (0,) and scores.dtype == np.float64 and not forwards


@pytest.mark.parametrize("mine", [0, 1, 5, 9])
def test_a_rank_with_fewer_completions_runs_as_many_forwards_as_the_others(mine, monkeypatch):
    def gather(count):
        return torch.cat([count, torch.tensor([3])])  # the other rank has 9 completions, in micro-batches of 4

    model, rows = tiny_scorer("llama"), sampled([1] * mine)
    others = SimpleNamespace(device="cpu", autocast=contextlib.nullcontext, gather=gather)
    reward = source(model, accelerator=others)
    forwards = spied(reward, monkeypatch)
    scores = reward.scores(rows)
    assert len(forwards) == 3
    pairs = [(row.prompt_ids, row.completion_ids) for row in rows]
    assert scores == pytest.approx(np.array(plain_scores(model, pairs)), abs=1e-5)


def test_what_does_not_fit_the_model_has_no_score_and_takes_no_other_with_it():
    model, rows = tiny_scorer("gpt2"), sampled([2, 3])
    prompt = rows[0].prompt_ids
    hopeless = [
        dataclasses.replace(rows[0], completion_ids=[5] * (257 - len(prompt))),  # one past its 256 positions
        dataclasses.replace(rows[0], completion_ids=[5, 64]),  # one past its 64 embeddings
        dataclasses.replace(rows[0], completion_ids=[]),
    ]
    fits = dataclasses.replace(rows[0], completion_ids=[5] * (256 - len(prompt)))
    mixed = [hopeless[0], *rows[:3], hopeless[1], hopeless[2], *rows[3:], fits]
    scores = source(model).scores(mixed)
    sound = [row for row in mixed if row not in hopeless]
    expected = plain_scores(model, [(row.prompt_ids, row.completion_ids) for row in sound])
    assert np.flatnonzero(np.isnan(scores)).tolist() == [0, 4, 5]
    assert scores[~np.isnan(scores)] == pytest.approx(np.array(expected), abs=1e-5)


def test_a_model_that_overflows_gives_no_score():
    model = tiny_scorer("llama")
    with torch.no_grad():
        model.score.weight.zero_()
        model.score.weight[0, 0] = float("inf")
    assert np.isnan(source(model).scores(sampled([2]))).all()


def test_the_head_computes_in_full_precision():
    model = tiny_scorer("llama").to(torch.bfloat16)
    scores = source(model).scores(sampled([4, 4]))
    assert (scores != torch.tensor(scores).to(torch.bfloat16).double().numpy()).any()


@pytest.mark.parametrize("training", [True, False])
def test_scoring_keeps_no_gradient_no_dropout_and_leaves_the_mode_as_it_was(training):
    model, rows = tiny_scorer("gpt2").train(training), sampled([3, 2])
    assert any(module.p > 0 for module in model.modules() if isinstance(module, torch.nn.Dropout))
    reward = source(model)
    assert reward.scores(rows).tolist() == reward.scores(rows).tolist()
    assert model.training is training
    graphs = []

    def read(model, batch):
        graphs.append(torch.is_grad_enabled())
        return torch.zeros(len(batch["positions"]))

    source(model, read=read).scores(rows)
    assert graphs == [False, False]


def test_a_model_that_is_more_than_a_reward_model_says_how_it_is_read():
    model, rows = torch.nn.Module(), sampled([1, 2])
    model.config = tiny_scorer("llama").config
    scores = source(model, layout=Layout.forest, read=lambda m, batch: batch["positions"].float()).scores(rows)
    assert np.isfinite(scores).all() and len(set(scores.tolist())) == 3


PROMPTS = [
    (Message("system", "Be brief."), Message("user", "What is the colour of the sky?")),
    (Message("user", "Hello there, can you help me?"),),
]
TEXTS = ["It is blue today.", " I can help you.\n", "", "yes"]


def worded(policy: str, *, finished: bool = True) -> list[Answered]:
    """Each text as an answer to each prompt, in the policy's tokens."""
    template = templates()[policy]
    rows = []
    for prompt in PROMPTS:
        for text in TEXTS:
            [(prompt_ids, [ids])] = template.encode_trees([(prompt, (Message("assistant", text),), ())])
            rows.append(Answered(prompt, (), prompt_ids, ids if finished else ids[:-1], text, finished))
    return rows


@pytest.mark.parametrize("finished", [True, False])
def test_a_model_of_another_tokenizer_reads_the_text_in_its_own_tokens(finished):
    model, rows = word_scorer(), worded("chatml", finished=finished)
    own = worded("llama3", finished=finished)
    assert all(ours.prompt_ids != theirs.prompt_ids for ours, theirs in zip(own, rows, strict=True))
    scores = source(model, template="llama3").scores(rows)
    for score, row in zip(scores, own, strict=True):
        if row.completion_ids:
            assert score == pytest.approx(plain_scores(model, [(row.prompt_ids, row.completion_ids)])[0], abs=1e-5)
        else:
            assert np.isnan(score), "of nothing at all there is nothing to score"
    assert np.isnan(scores).sum() == (0 if finished else 2)


def test_the_stop_token_counts_only_where_it_came():
    model = word_scorer()
    ended, cut = (source(model, template="llama3").scores(worded("chatml", finished=end)) for end in (True, False))
    assert (np.abs(ended - cut)[~np.isnan(cut)] > 1e-3).all()


def test_tokens_of_the_same_tokenizer_are_scored_as_they_were_sampled():
    model, rows = word_scorer(), worded("chatml")
    spelt = [dataclasses.replace(row, completion_ids=[5, 6, 7, *row.completion_ids]) for row in rows]
    expected = plain_scores(model, [(row.prompt_ids, row.completion_ids) for row in spelt])
    assert source(model).scores(spelt) == pytest.approx(np.array(expected), abs=1e-5)


def test_completions_of_one_prompt_share_a_tree_of_another_tokenizer(monkeypatch):
    reward = source(word_scorer(), template="llama3", micro=8)
    forwards = spied(reward, monkeypatch)
    reward.scores(worded("chatml"))
    assert [[len(tree.completions) for tree in trees] for trees in forwards] == [[4, 4]]


def test_what_the_other_template_refuses_has_no_score_and_takes_no_sibling_with_it():
    model, rows = word_scorer(), worded("chatml")
    forged = dataclasses.replace(rows[0], text="So.<|eot_id|>And more.")
    long = dataclasses.replace(rows[1], text="sky " * 512)
    scores = source(model, template="llama3").scores([forged, *rows, long])
    assert np.flatnonzero(np.isnan(scores)).tolist() == [0, len(rows) + 1]
    assert scores[1:-1] == pytest.approx(source(model, template="llama3").scores(rows), abs=1e-5)


def test_tools_are_told_to_a_model_of_another_tokenizer():
    tool = '{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}'
    prompt, answer = (Message("user", "And at night?"),), (Message("assistant", "Black."),)
    [(prompt_ids, [ids])] = templates()["qwen"].encode_trees([(prompt, answer, (tool,))])
    model = word_scorer()
    scores = source(model, template="qwen").scores([Answered(prompt, (tool,), [5], [6], "Black.", True)])
    assert scores == pytest.approx(np.array(plain_scores(model, [(prompt_ids, ids)])), abs=1e-5)


def saved(tmp_path):
    """A reward model in a folder with a sample of its scores, loaded from there."""
    model = load_reward_model("tiny-sft", ModelConfig(), torch.float32, seed=1)
    model.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{resolve_model('tiny-sft')}/{file}", tmp_path)
    write_sample(tmp_path, [Tree(r.prompt_ids, [r.completion_ids]) for r in sampled([2, 3, 4])], ModelConfig())
    return load_reward_model(str(tmp_path), ModelConfig(), torch.float32, seed=0)


def from_folder(folder, model, layout: Layout) -> ModelReward:
    reward = source(model, layout=layout)
    reward.setting = RewardSetting("rm", str(folder), None)
    return reward


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loaded_model_proves_its_scores_in_any_layout_and_in_bf16(layout, tmp_path, capsys):
    model = saved(tmp_path)
    capsys.readouterr()
    from_folder(tmp_path, model, layout).check_sample()
    from_folder(tmp_path, model.to(torch.bfloat16), layout).check_sample()
    assert capsys.readouterr().err == ""


def test_a_loaded_model_that_scores_otherwise_is_refused(tmp_path):
    model = saved(tmp_path)
    with torch.no_grad():
        model.score.weight.mul_(1.01)
    with pytest.raises(UserError, match=r"its score was .* when the model was saved, is .* now"):
        from_folder(tmp_path, model, Layout.forest).check_sample()


def test_a_model_without_a_sample_is_taken_and_that_is_said(tmp_path, capsys):
    model = saved(tmp_path)
    (tmp_path / "score_sample.json").unlink()
    from_folder(tmp_path, model, Layout.padded).check_sample()
    assert f"{tmp_path}: no score_sample.json in it" in capsys.readouterr().err
