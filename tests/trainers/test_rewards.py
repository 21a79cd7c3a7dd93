"""The reward trainer: the same numbers whatever the layout, the split and the accumulation."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import TaskType
from transformers import TrainingArguments

from align.config.schema import Layout, ModelConfig, Order, PeftConfig, PeftMethod
from align.losses.reward import RewardObjective
from align.models.peft import add_adapter, merged_model
from align.models.reward import load_reward_model, score_batch
from align.trainers.arguments import CHECKPOINTING
from align.trainers.order import tree_tokens
from align.trainers.rewards import RewardTrainer
from tests.models.families import VOCABULARY
from tests.models.scorers import tiny_scorer

LAYOUTS = [Layout.forest, Layout.sequences, Layout.padded]
FIGURES = ["accuracy", "margin", "score/mean", "score/std", "score/chosen", "score/rejected"]


def trees(n: int, seed: int = 0, *, pairs_only: bool = False) -> Dataset:
    """Rows of pairs, some soft, some with a margin, some tied; every third a ranking of three or four."""
    generator = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return generator.integers(3, VOCABULARY, generator.integers(low, high)).tolist()

    rows = []
    for i in range(n):
        ranking = i % 3 == 2 and not pairs_only
        count = 3 + i % 2 if ranking else 2
        row = {"prompt_ids": ids(2, 14), "completion_ids": [ids(1, 12) for _ in range(count)]}
        row["ranks"] = [0.0, 2.0, 1.0, 1.0][:count] if ranking else [0.0, 1.0]
        row["p"] = 1.0 if ranking else (1.0, 0.7, 0.5)[i % 3 if pairs_only else i % 2]
        rows.append({**row, "margin": 0.5 * (i % 4 == 1) * (not ranking)})
    return Dataset.from_list(rows)


def trainer(model, rows, tmp_path, *, layout=Layout.forest, objective=None, held_out=None, order=None, **settings):
    defaults = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "max_steps": 1, "logging_steps": 1}
    defaults |= {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential"}
    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **(defaults | settings),
    )
    return RewardTrainer(
        model,
        args,
        objective or RewardObjective(),
        layout=layout,
        pad_token_id=0,
        train_dataset=rows,
        eval_dataset=held_out,
        order=order or Order.shuffled,
    )


def curve(built) -> list[float]:
    built.train()
    return [line["loss"] for line in built.state.log_history if "loss" in line]


def plain_scores(model, rows) -> list[torch.Tensor]:
    """Scores of each row by transformers' own forward, one sequence at a time."""
    return [
        torch.cat(
            [model(input_ids=torch.tensor([[*row["prompt_ids"], *ids]])).logits[0] for ids in row["completion_ids"]]
        )
        for row in rows
    ]


def gradient(model) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for _, parameter in sorted(model.named_parameters())])


def split(micro_batch: int, accumulation: int) -> dict[str, int]:
    return {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("micro_batch", "accumulation"), [(8, 1), (4, 2), (3, 2), (1, 8)])
def test_the_first_loss_of_pairs_under_a_zero_head_is_ln2(layout, micro_batch, accumulation, tmp_path):
    model = tiny_scorer("llama")
    torch.nn.init.zeros_(model.score.weight)
    rows = trees(8, pairs_only=True).remove_columns("margin").add_column("margin", [0.0] * 8)
    losses = curve(trainer(model, rows, tmp_path, layout=layout, **split(micro_batch, accumulation)))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)


def test_losses_and_gradients_are_those_of_plain_forwards_in_every_layout(tmp_path):
    rows, expected = trees(9), tiny_scorer("llama")
    pairs = rows.filter(lambda row: len(row["ranks"]) == 2)
    total = 0.0
    for row, scores in zip(pairs, plain_scores(expected, pairs), strict=True):
        gap = scores[0] - scores[1] - row["margin"]
        total -= row["p"] * torch.nn.functional.logsigmoid(gap) + (1 - row["p"]) * torch.nn.functional.logsigmoid(-gap)
    (total / len(pairs)).backward()
    for layout in LAYOUTS:
        model = tiny_scorer("llama")
        built = trainer(model, pairs, tmp_path, layout=layout)
        loss = built.compute_loss(model, built.data_collator(list(pairs)), num_items_in_batch=torch.tensor(len(pairs)))
        loss.backward()
        assert loss.item() == pytest.approx(total.item() / len(pairs), rel=1e-5)
        difference = gradient(model) - gradient(expected)
        assert difference.norm() / gradient(expected).norm() < 1e-5


def test_losses_and_gradients_of_rankings_are_the_same_in_every_layout(tmp_path):
    rows, found = trees(9, seed=1), []
    for layout in LAYOUTS:
        model = tiny_scorer("mistral_window")
        built = trainer(model, rows, tmp_path, layout=layout, objective=RewardObjective(centring_weight=0.1))
        losses, metrics = built.tree_losses(model, built.data_collator(list(rows)))
        losses.sum().backward()
        found.append((losses.detach(), metrics, gradient(model)))
    for losses, metrics, grad in found[1:]:
        torch.testing.assert_close(losses, found[0][0], rtol=0, atol=1e-5)
        torch.testing.assert_close(metrics, found[0][1], rtol=1e-5, atol=1e-5)
        assert (grad - found[0][2]).norm() / found[0][2].norm() < 1e-5


def test_ten_steps_are_the_same_in_every_layout_and_accumulation(tmp_path):
    rows = trees(40)
    plain = curve(trainer(tiny_scorer("llama"), rows, tmp_path, layout=Layout.padded, max_steps=10))
    assert plain[-1] < 0.9 * plain[0]
    for layout, sizes in [(Layout.forest, (8, 1)), (Layout.sequences, (4, 2)), (Layout.forest, (1, 8))]:
        other = curve(trainer(tiny_scorer("llama"), rows, tmp_path, layout=layout, max_steps=10, **split(*sizes)))
        assert other == pytest.approx(plain, rel=2e-5)


def test_a_last_partial_batch_is_a_mean_over_its_own_trees(tmp_path):
    epochs = {"max_steps": -1, "num_train_epochs": 2}
    whole = curve(trainer(tiny_scorer("llama"), trees(11), tmp_path, **epochs))
    parts = curve(trainer(tiny_scorer("llama"), trees(11), tmp_path, **epochs, **split(2, 4)))
    assert len(whole) == 4
    assert parts == pytest.approx(whole, rel=1e-5)


def test_figures_are_of_all_completions_and_untied_pairs_of_the_step(tmp_path):
    rows, lines = trees(7), []
    for sizes in ((8, 1), (3, 3)):
        built = trainer(tiny_scorer("llama"), rows, tmp_path, **split(*sizes))
        built.train()
        lines.append(built.state.log_history[0])
    assert {name: lines[1][name] for name in FIGURES} == pytest.approx(
        {name: lines[0][name] for name in FIGURES}, rel=1e-4
    )
    scores = [s.detach().double() for s in plain_scores(tiny_scorer("llama"), rows)]
    everything = torch.cat(scores)
    gaps, best, worst = [], [], []
    for row, s in zip(rows, scores, strict=True):
        if row["p"] == 0.5:
            continue
        ranks = row["ranks"]
        gaps += [s[i] - s[j] for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]
        best.append(s[ranks.index(0.0)])
        worst.append(s[ranks.index(max(ranks))])
    assert lines[0]["accuracy"] == pytest.approx(np.mean([gap > 0 for gap in gaps]))
    expected = {
        "margin": sum(gaps) / len(gaps),
        "score/mean": everything.mean(),
        "score/std": everything.std(correction=0),
        "score/chosen": sum(best) / len(best),
        "score/rejected": sum(worst) / len(worst),
    }
    for name, value in expected.items():
        assert lines[0][name] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name


def test_completions_that_share_the_best_rank_count_as_their_mean(tmp_path):
    row = {
        "prompt_ids": [5, 6],
        "completion_ids": [[7], [8, 9], [10]],
        "ranks": [0.0, 1.0, 0.0],
        "p": 1.0,
        "margin": 0.0,
    }
    built = trainer(tiny_scorer("llama"), Dataset.from_list([row]), tmp_path)
    built.train()
    (scores,) = plain_scores(tiny_scorer("llama"), [row])
    line = built.state.log_history[0]
    assert line["score/chosen"] == pytest.approx((scores[0] + scores[2]).item() / 2, rel=1e-4)
    assert line["margin"] == pytest.approx((scores[0] / 2 + scores[2] / 2 - scores[1]).item(), rel=1e-4)


def test_without_an_untied_pair_there_is_no_accuracy(tmp_path):
    rows = trees(4, pairs_only=True).remove_columns("p").add_column("p", [0.5] * 4)
    built = trainer(tiny_scorer("llama"), rows, tmp_path)
    built.train()
    line = built.state.log_history[0]
    assert "score/mean" in line and "accuracy" not in line and "margin" not in line


def test_evaluation_gives_the_same_names_and_weighs_a_short_last_batch_by_its_trees(tmp_path):
    held_out, results = trees(7, seed=5), []
    for size in (7, 4, 1):
        settings = {"per_device_eval_batch_size": size, "max_steps": 2}
        built = trainer(tiny_scorer("llama"), trees(8), tmp_path, held_out=held_out, **settings)
        built.train()
        results.append(built.evaluate())
        assert {f"eval_{name}" for name in FIGURES} <= set(built.state.log_history[-1])
    for other in results[1:]:
        for name in ("loss", *FIGURES):
            assert other[f"eval_{name}"] == pytest.approx(results[0][f"eval_{name}"], rel=1e-4), name


def test_training_sees_no_dropout(tmp_path):
    model = tiny_scorer("gpt2")
    assert any(module.p > 0 for module in model.modules() if isinstance(module, torch.nn.Dropout))
    built = trainer(model, trees(8), tmp_path, held_out=trees(8), learning_rate=0.0)
    losses = curve(built)
    assert losses[0] == pytest.approx(built.evaluate()["eval_loss"], rel=1e-5)


def test_activation_checkpointing_changes_nothing(tmp_path):
    plain = curve(trainer(tiny_scorer("llama"), trees(8), tmp_path, max_steps=3))
    again = curve(trainer(tiny_scorer("llama"), trees(8), tmp_path, max_steps=3, **{CHECKPOINTING: True}))
    assert again == pytest.approx(plain, rel=1e-6)


def test_deepspeed_in_bf16_leaves_labels_and_margins_in_full_precision(tmp_path, monkeypatch):
    built = trainer(tiny_scorer("llama"), trees(8), tmp_path)
    batch = built.data_collator(list(trees(8)))
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(built, "is_deepspeed_enabled", True)
    monkeypatch.setattr(type(built.accelerator.state), "deepspeed_plugin", plugin)
    prepared = built._prepare_inputs(batch)
    # These rows have no ratings, and NaN equals nothing.
    assert all(torch.equal(prepared[key].nan_to_num(), batch[key].nan_to_num()) for key in batch)
    assert prepared["ratings"].dtype == torch.float64
    assert {key: value.dtype for key, value in prepared.items()} == {key: value.dtype for key, value in batch.items()}


def test_tokens_of_a_tree_count_its_prompt_once():
    rows = trees(9)
    counted = [len(row["prompt_ids"]) + sum(map(len, row["completion_ids"])) for row in rows]
    assert tree_tokens(rows).tolist() == counted
    assert tree_tokens(rows.select([5, 2, 7])).tolist() == [counted[5], counted[2], counted[7]]
    assert tree_tokens(rows.select(range(3, 8))).tolist() == counted[3:8]


def test_the_stratified_order_takes_every_tree_once(tmp_path):
    rows, taken = trees(23), []
    rows = rows.remove_columns("margin").add_column("margin", [0.001 * i for i in range(23)])

    class Watched(RewardTrainer):
        def tree_losses(self, model, batch):
            taken.append([round(1000 * margin) for margin in batch["margin"].tolist()])
            return super().tree_losses(model, batch)

    built = trainer(tiny_scorer("llama"), rows, tmp_path, order=Order.stratified, max_steps=-1, num_train_epochs=1)
    built.__class__ = Watched
    built.train()
    assert sorted(row for batch in taken for row in batch) == list(range(23))
    assert [len(batch) for batch in taken] == [8, 8, 7]


def test_lora_trains_the_head_and_its_folder_gives_the_same_scores_again(tmp_path):
    base = load_reward_model("tiny-sft", ModelConfig(), torch.float32, seed=0)
    head = base.score.weight.detach().clone()
    lora = PeftConfig(method=PeftMethod.lora, r=2, alpha=4)
    model = add_adapter(base, lora, seed=0, zero3=False, task=TaskType.SEQ_CLS)
    built = trainer(model, trees(8), tmp_path, max_steps=3, learning_rate=1e-2, **{CHECKPOINTING: True})
    losses = curve(built)
    assert losses[-1] < losses[0]
    built.save_model(str(tmp_path / "adapter"))
    merged = merged_model("tiny-sft", tmp_path / "adapter", ModelConfig(), seed=5).eval()
    assert (merged.score.weight - head).abs().max() > 1e-3
    batch = built.data_collator(list(trees(8)))
    with torch.no_grad():
        again = score_batch(merged, built.data_collator.__class__(Layout.padded, 0)(list(trees(8))))
        torch.testing.assert_close(again, score_batch(model.eval(), batch), rtol=0, atol=1e-4)
