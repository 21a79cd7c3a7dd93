"""TRL's RewardTrainer and ours on the same rows: losses, gradients and metrics."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from align.config.schema import Layout
from align.losses.reward import RewardObjective
from align.trainers.rewards import RewardTrainer
from tests.contract.test_trl_dpo import COMMON, word_tokenizer
from tests.models.families import VOCABULARY
from tests.models.scorers import tiny_scorer

trl = pytest.importorskip("trl")


def rows(margins: bool) -> list[dict]:
    """Pairs as prompt and completions; no sequence ends in the pad token, which TRL could not tell from padding."""
    generator = torch.Generator().manual_seed(3)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(4, VOCABULARY, (length,), generator=generator).tolist()

    return [
        {"prompt": ids(2, 14), "chosen": ids(1, 12), "rejected": ids(1, 12), "margin": 0.25 * (i % 5) * margins}
        for i in range(16)
    ]


def trl_trainer(model, pairs, tmp_path, **settings):
    args = trl.RewardConfig(output_dir=str(tmp_path), **COMMON, **settings)
    dataset = Dataset.from_list(
        [
            {**{f"{side}_ids": row["prompt"] + row[side] for side in ("chosen", "rejected")}, "margin": row["margin"]}
            for row in pairs
        ]
    )
    return trl.RewardTrainer(model=model, args=args, train_dataset=dataset, processing_class=word_tokenizer())


def our_trainer(model, pairs, objective, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), remove_unused_columns=False, **COMMON)
    dataset = Dataset.from_list(
        [
            {
                "prompt_ids": row["prompt"],
                "completion_ids": [row["chosen"], row["rejected"]],
                "ranks": [0.0, 1.0],
                "p": 1.0,
                "margin": row["margin"],
            }
            for row in pairs
        ]
    )
    return RewardTrainer(model, args, objective, layout=Layout.forest, pad_token_id=0, train_dataset=dataset)


@pytest.mark.parametrize(
    ("margins", "theirs", "ours"),
    [
        (False, {}, RewardObjective()),
        (True, {}, RewardObjective()),
        (True, {"center_rewards_coefficient": 0.1}, RewardObjective(centring_weight=0.1)),
    ],
)
def test_losses_gradients_and_metrics_equal_trls(margins, theirs, ours, tmp_path):
    theirs_trainer = trl_trainer(tiny_scorer("llama"), rows(margins), tmp_path, **theirs)
    ours_trainer = our_trainer(tiny_scorer("llama"), rows(margins), ours, tmp_path)
    for trainer in (theirs_trainer, ours_trainer):
        trainer.train()
    lines = zip(theirs_trainer.state.log_history[:4], ours_trainer.state.log_history[:4], strict=True)
    for their_line, our_line in lines:
        for name in ("loss", "grad_norm", "accuracy", "margin"):
            assert our_line[name] == pytest.approx(their_line[name], rel=5e-5, abs=1e-6), name
        assert our_line["score/mean"] == pytest.approx(their_line["mean_reward"], rel=1e-4, abs=1e-6)


def test_every_gradient_equals_trls(tmp_path):
    start = tiny_scorer("llama")
    theirs_trainer = trl_trainer(copy.deepcopy(start), rows(True), tmp_path)
    ours_trainer = our_trainer(copy.deepcopy(start), rows(True), RewardObjective(), tmp_path)
    gradients = []
    for trainer in (theirs_trainer, ours_trainer):
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch).backward()
        gradients.append(torch.cat([p.grad.flatten() for _, p in sorted(trainer.model.named_parameters())]))
    assert gradients[0].norm() > 0.1
    assert (gradients[1] - gradients[0]).norm() / gradients[0].norm() < 1e-5
