"""The pair trainer: the same numbers whatever the layout, the split and the accumulation."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from align.config.schema import Layout
from align.losses.pairwise import PairObjective
from align.trainers.arguments import CHECKPOINTING
from align.trainers.pairs import PairTrainer
from align.trainers.reference import add_reference_logps, reference_engine, reference_logps
from tests import oracles
from tests.models.families import VOCABULARY, tiny

LAYOUTS = [Layout.forest, Layout.sequences, Layout.padded]


def pairs(n: int, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    rows = [{"prompt_ids": ids(2, 14), "chosen_ids": ids(1, 12), "rejected_ids": ids(1, 12)} for _ in range(n)]
    return Dataset.from_list([{**row, "p": 1.0, "margin": 0.0} for row in rows])


def trainer(model, rows, tmp_path, *, layout=Layout.forest, objective=None, reference=True, held_out=None, **settings):
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
    built = PairTrainer(
        model,
        args,
        objective or PairObjective(),
        layout=layout,
        pad_token_id=0,
        train_dataset=rows,
        eval_dataset=held_out,
    )
    if reference:
        built.train_dataset = referenced(built, rows)
        built.eval_dataset = held_out and referenced(built, held_out)
    return built


def referenced(built, rows, micro_batch_size=5):
    logps = reference_logps(
        reference_engine(built.model, built.accelerator),
        rows,
        collator=built.data_collator,
        accelerator=built.accelerator,
        micro_batch_size=micro_batch_size,
    )
    return add_reference_logps(rows, logps)


def curve(built) -> list[float]:
    built.train()
    return [line["loss"] for line in built.state.log_history if "loss" in line]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("micro_batch", "accumulation"), [(8, 1), (4, 2), (3, 2), (1, 8)])
def test_first_loss_is_ln2(layout, micro_batch, accumulation, tmp_path):
    split = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
    losses = curve(trainer(tiny("llama"), pairs(8), tmp_path, layout=layout, **split))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)


def test_twenty_steps_are_the_same_in_every_layout_and_accumulation(tmp_path):
    rows = pairs(40)
    plain = curve(trainer(tiny("llama"), rows, tmp_path, layout=Layout.padded, max_steps=20))
    assert plain[-1] < 0.7 * plain[0]
    for layout, micro_batch in [(Layout.forest, 8), (Layout.sequences, 8), (Layout.forest, 2)]:
        split = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": 8 // micro_batch}
        other = curve(trainer(tiny("llama"), rows, tmp_path, layout=layout, max_steps=20, **split))
        assert other == pytest.approx(plain, rel=1e-5, abs=1e-7)


def test_loss_and_gradient_are_those_of_the_plain_formula(tmp_path):
    model, rows = tiny("llama"), pairs(6)
    built = trainer(model, rows, tmp_path)
    policy = tiny("llama")
    with torch.no_grad():
        for parameter, other in zip(model.parameters(), policy.parameters(), strict=True):
            other.add_(torch.randn_like(other), alpha=0.01)
            parameter.copy_(other)
    expected = oracles.dpo_batch_loss(policy, tiny("llama"), list(rows), beta=0.1)
    expected.backward()
    batch = built.data_collator([built.train_dataset[i] for i in range(6)])
    loss = built.compute_loss(model, batch, num_items_in_batch=torch.tensor(6))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours = torch.cat([p.grad.flatten() for p in model.parameters()])
    theirs = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_a_last_partial_batch_is_a_mean_over_its_own_pairs(tmp_path):
    rows = pairs(11)
    # One epoch is a step of 8 pairs and a step of 3; in micro-batches of 2 the last holds a single pair.
    whole = curve(trainer(tiny("llama"), rows, tmp_path, max_steps=-1, num_train_epochs=3))
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert len(whole) == 6
    parts = curve(trainer(tiny("llama"), rows, tmp_path, max_steps=-1, num_train_epochs=3, **split))
    assert parts == pytest.approx(whole, rel=1e-5)


def test_soft_label_of_one_half_has_no_gradient_at_the_start(tmp_path):
    rows = pairs(4).remove_columns("p").add_column("p", [0.5] * 4)
    built = trainer(tiny("llama"), rows, tmp_path)
    batch = built.data_collator([built.train_dataset[i] for i in range(4)])
    built.compute_loss(built.model, batch).backward()
    assert max(p.grad.abs().max().item() for p in built.model.parameters()) < 1e-6


def test_lora_reference_is_the_base_with_the_adapter_off(tmp_path):
    def adapted():
        torch.manual_seed(1)
        return get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))

    rows = pairs(8)
    losses = curve(trainer(adapted(), rows, tmp_path))
    expected = oracles.dpo_batch_loss(adapted().eval(), tiny("llama"), list(rows), beta=0.1)
    assert abs(losses[0] - math.log(2)) > 1e-3
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)


def test_training_metrics_are_means_over_all_pairs_of_the_step(tmp_path):
    rows = pairs(7)
    metrics = []
    for split in ({}, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}):
        objective = PairObjective(nll_weight=0.1)
        built = trainer(tiny("llama"), rows, tmp_path, objective=objective, max_steps=3, **split)
        built.train()
        metrics.append(built.state.log_history[2])
    for name in ("rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "nll"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-4)
    chosen = sum(
        sum(t.item() for t in oracles.token_logps(tiny("llama"), row["prompt_ids"], row["chosen_ids"])) for row in rows
    )
    built = trainer(tiny("llama"), rows, tmp_path)
    built.train()
    assert built.state.log_history[0]["logps/chosen"] == pytest.approx(chosen / 7, rel=1e-5)
    assert built.state.log_history[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_evaluation_gives_the_same_names_and_weighs_a_short_last_batch_by_its_pairs(tmp_path):
    rows, held_out = pairs(8), pairs(7, seed=5)
    results = []
    for size in (7, 4):
        settings = {"per_device_eval_batch_size": size, "max_steps": 3}
        built = trainer(tiny("llama"), rows, tmp_path, held_out=held_out, **settings)
        built.train()
        results.append(built.evaluate())
        logged = built.state.log_history[-1]
        train_names = {name for name in built.state.log_history[0] if "/" in name}
        assert {f"eval_{name}" for name in train_names} <= set(logged)
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen", "eval_rewards/accuracies"):
        assert results[1][name] == pytest.approx(results[0][name], rel=1e-5)
    assert results[0]["eval_loss"] != pytest.approx(math.log(2), abs=1e-4)


def test_training_does_not_see_dropout(tmp_path):
    model = tiny("gpt2")
    assert any(module.p > 0 for module in model.modules() if isinstance(module, torch.nn.Dropout))
    losses = curve(trainer(model, pairs(8), tmp_path))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)


def test_activation_checkpointing_changes_nothing(tmp_path):
    plain = curve(trainer(tiny("llama"), pairs(8), tmp_path, max_steps=3))
    again = curve(trainer(tiny("llama"), pairs(8), tmp_path, max_steps=3, **{CHECKPOINTING: True}))
    assert again == pytest.approx(plain, rel=1e-6)


def test_reference_does_not_depend_on_batches_or_on_training_mode(tmp_path):
    rows = pairs(9)
    built = trainer(copy.deepcopy(tiny("llama")).train(), rows, tmp_path, reference=False)
    expected = referenced(built, rows, micro_batch_size=9)
    for size in (1, 4):
        again = referenced(built, rows, micro_batch_size=size)
        for name in ("reference_chosen_logps", "reference_rejected_logps"):
            assert list(again[name]) == pytest.approx(list(expected[name]), abs=1e-5)
    first = rows[0]
    alone = sum(t.item() for t in oracles.token_logps(tiny("llama"), first["prompt_ids"], first["rejected_ids"]))
    assert expected[0]["reference_rejected_logps"] == pytest.approx(alone, abs=1e-4)
