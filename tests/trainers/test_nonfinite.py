"""A step whose loss or gradient is not finite changes nothing, is counted and its rows are named."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from align.cli import main
from align.config.errors import UserError
from align.tracking.local import read_metrics
from align.trainers.nonfinite import SkippedSteps, poisoned
from align.trainers.pairs import PairTrainer
from align.trainers.sft import TokenWeightedTrainer
from tests.stages.runs import overrides

TRAINERS = {"sft": TokenWeightedTrainer, "dpo": PairTrainer}


def test_a_finite_loss_is_left_alone_and_another_has_no_gradient_that_is_a_number():
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    poisoned((x * x).sum()).backward()
    assert x.grad.tolist() == [4.0, 6.0]
    for bad in (math.inf, -math.inf, math.nan):
        x.grad = None
        # The gradient of this sum would be finite.
        poisoned((x * x).sum() + bad).backward()
        assert x.grad.isnan().all()


def counter(file: Path, limit: int, resumed_at: int = 0, good: Path | None = None) -> SkippedSteps:
    return SkippedSteps(
        "sft", file, limit=limit, resumed_at=resumed_at, main=True, describe=lambda row: f"row {row}",
        last_good=lambda: good,
    )  # fmt: skip


def test_it_counts_over_interruptions_and_names_rows_and_checkpoint_when_it_ends(tmp_path, capsys):
    file = tmp_path / "nonfinite.jsonl"
    first = counter(file, limit=2)
    first.add(3, [4, 5])
    first.add(9, [6])
    assert "sft: WARN step 3: the loss or its gradient is not finite; training rows 4, 5" in capsys.readouterr().err
    again = counter(file, limit=2, resumed_at=8, good=tmp_path / "checkpoint-8")
    assert again.count == 1
    again.add(9, [6])
    with pytest.raises(UserError, match=r"step 10: .* training rows 0, 1, 2, 3, 4, 5, 6, 7 and 12 more .*checkpoint-8"):
        again.add(10, list(range(20)))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 9, 10]
    assert lines[0]["rows"] == [{"row": 4, "text": "row 4"}, {"row": 5, "text": "row 5"}]


def test_each_skipped_step_and_the_end_are_alerts(tmp_path):
    told = []
    watched = SkippedSteps(
        "sft", tmp_path / "nonfinite.jsonl", limit=1, resumed_at=0, main=True, describe=str, last_good=lambda: None,
        alert=lambda title, text: told.append((title, text)),
    )  # fmt: skip
    watched.add(3, [4])
    with pytest.raises(UserError):
        watched.add(5, [6])
    assert [title for title, _ in told] == ["sft: a step was skipped", "sft: ended by steps that are not finite"]
    assert "step 3" in told[0][1] and "step 5" in told[1][1]


class Watch(TrainerCallback):
    """Weights and moments of the optimizer after every step, and what the batches of a step were made of."""

    def __init__(self):
        self.weights, self.moments, self.rates = [], [], []

    def on_step_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        self.weights.append([p.detach().clone() for p in model.parameters()])
        states = optimizer.state_dict()["state"]
        self.moments.append({k: {n: v.clone() for n, v in one.items()} for k, one in states.items()})
        self.rates.append(lr_scheduler.get_last_lr()[0])


def break_steps(monkeypatch, stage: str, steps: tuple[int, ...], how: str, watch: Watch) -> None:
    """In these steps (from 1) the loss is infinite, or only the gradient is no number."""
    kind = TRAINERS[stage]
    compute = kind.compute_loss
    begin = kind.__init__

    def init(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self.add_callback(watch)

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = compute(self, model, inputs, *args, **kwargs)
        if self.state.global_step + 1 not in steps or not model.training:
            return loss
        if how == "loss":
            return poisoned(loss + math.inf)
        loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    monkeypatch.setattr(kind, "__init__", init)
    monkeypatch.setattr(kind, "compute_loss", compute_loss)


@pytest.mark.parametrize(("stage", "how"), [("sft", "loss"), ("sft", "gradient"), ("dpo", "loss")])
def test_the_step_is_as_if_it_never_was(stage, how, tmp_path, monkeypatch, capsys):
    watch = Watch()
    break_steps(monkeypatch, stage, (3,), how, watch)
    short = (f"stages.{stage}.max_steps=5", f"stages.{stage}.batch_size=8", f"stages.{stage}.micro_batch_size=4")
    more = "stages.sft.packing=false" if stage == "sft" else "stages.dpo.policy=tiny-sft"
    assert main(overrides(tmp_path, f"run=[{stage}]", *short, more)) == 0
    same = [torch.equal(a, b) for a, b in zip(watch.weights[1], watch.weights[2], strict=True)]
    assert all(same) and not torch.equal(watch.weights[2][0], watch.weights[3][0])
    assert all(
        torch.equal(watch.moments[1][k][name], value)
        for k, one in watch.moments[2].items()
        for name, value in one.items()
    )
    assert len(set(watch.rates)) == 5
    lines = [line for line in read_metrics(tmp_path / f"run/{stage}/metrics.jsonl") if "eval_loss" not in line]
    assert [line.get("skipped_steps", 0) for line in lines] == [0, 0, 1, 0, 0]
    assert "loss" not in lines[2] and all(math.isfinite(lines[i]["loss"]) for i in (0, 1, 3, 4))
    error = capsys.readouterr().err
    assert f"{stage}: WARN step 3: the loss or its gradient is not finite; training rows" in error
    [line] = [json.loads(line) for line in (tmp_path / f"run/{stage}/nonfinite.jsonl").read_text().splitlines()]
    assert line["step"] == 3 and len(line["rows"]) == 8
    assert all("What is the colour of the" in row["text"] for row in line["rows"])


def test_the_rows_are_those_that_the_batch_was_made_of(tmp_path, monkeypatch):
    seen = []
    collate = []

    def init_collator(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        inner = self.data_collator

        def remember(rows):
            collate.append([row["input_ids"] for row in rows])
            return inner(rows)

        self.data_collator = remember

    begin = TokenWeightedTrainer.__init__
    rows_of_step = TokenWeightedTrainer.rows_of_step

    def remember_rows(self, *args, **kwargs):
        found = norm(self, *args, **kwargs)
        seen.append([self.train_rows[row]["input_ids"] for row in rows_of_step(self)])
        return found

    norm = TokenWeightedTrainer._get_grad_norm
    monkeypatch.setattr(TokenWeightedTrainer, "__init__", init_collator)
    monkeypatch.setattr(TokenWeightedTrainer, "_get_grad_norm", remember_rows)
    small = ("stages.sft.max_steps=11", "stages.sft.batch_size=6", "stages.sft.micro_batch_size=3")
    off = ("data.held_out_fraction=0", "stages.sft.packing=false")
    arguments = [one for one in overrides(tmp_path, "run=[sft]", *small, *off) if one != "data.held_out_fraction=0.2"]
    assert main(arguments) == 0
    # 40 rows: an epoch is 6 whole steps and one of 4 rows.
    assert [len(rows) for rows in seen] == [6, 6, 6, 6, 6, 6, 4, 6, 6, 6, 6][: len(seen)] and len(seen) == 11
    batches = iter(collate)
    for rows in seen:
        used = next(batches) + next(batches)
        assert sorted(used) == sorted(rows)


def test_one_more_than_allowed_ends_the_run_with_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    break_steps(monkeypatch, "sft", (3, 5), "loss", Watch())
    arguments = overrides(
        tmp_path, "run=[sft]", "stages.sft.max_steps=6", "stages.sft.save_every=2", "stages.sft.max_nonfinite_steps=1"
    )
    assert main(arguments) == 2
    error = capsys.readouterr().err
    checkpoint = tmp_path / "run/sft/checkpoints/checkpoint-4"
    assert f"the last good checkpoint is {checkpoint}" in error and "step 5: " in error
    assert not (tmp_path / "run/sft/manifest.json").exists()
