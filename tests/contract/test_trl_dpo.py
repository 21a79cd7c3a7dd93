"""TRL's DPOTrainer and ours on the same rows: losses, gradients and metrics."""

import copy

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainingArguments

from align.config.schema import Layout
from align.losses.pairwise import PairObjective
from align.trainers.pairs import PairTrainer
from align.trainers.reference import add_reference_logps, reference_engine, reference_logps
from tests.models.families import VOCABULARY, tiny

trl = pytest.importorskip("trl")

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "max_grad_norm": 0.0,
    "dataloader_pin_memory": False,
}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token: `w7` is 7."""
    words = {"<pad>": 0, "</s>": 2, **{f"w{i}": i for i in range(VOCABULARY) if i not in (0, 2)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def texts(equal_lengths: bool) -> Dataset:
    generator = torch.Generator().manual_seed(3)

    def words(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return " " + " ".join(f"w{i}" for i in torch.randint(4, VOCABULARY, (length,), generator=generator).tolist())

    high = 6 if equal_lengths else 12
    return Dataset.from_list(
        [{"prompt": words(2, 14), "chosen": words(5, high), "rejected": words(2, 12)} for _ in range(16)]
    )


def trl_trainer(model, rows, tmp_path, **settings):
    args = trl.DPOConfig(output_dir=str(tmp_path), **COMMON, **settings)
    return trl.DPOTrainer(
        model=model, ref_model=tiny("llama"), args=args, train_dataset=rows, processing_class=word_tokenizer()
    )


def our_trainer(model, tokenised, objective, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), remove_unused_columns=False, **COMMON)
    rows = tokenised.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    rows = rows.add_column("p", [1.0] * len(rows)).add_column("margin", [0.0] * len(rows))
    trainer = PairTrainer(model, args, objective, layout=Layout.forest, pad_token_id=0, train_dataset=rows)
    logps = reference_logps(
        reference_engine(tiny("llama"), trainer.accelerator),
        rows,
        collator=type(trainer.data_collator)(Layout.padded, 0),
        accelerator=trainer.accelerator,
        micro_batch_size=4,
    )
    trainer.train_dataset = add_reference_logps(rows, logps)
    return trainer


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"loss_type": ["sigmoid"], "beta": 0.3}, PairObjective(beta=0.3)),
        ({"loss_type": ["hinge"]}, PairObjective(loss="hinge")),
        ({"loss_type": ["ipo"]}, PairObjective(loss="ipo")),
        ({"loss_type": ["robust"], "label_smoothing": 0.2}, PairObjective(loss="robust", label_smoothing=0.2)),
        ({"loss_type": ["sigmoid_norm"], "beta": 2.0}, PairObjective(loss="sigmoid_norm", beta=2.0)),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, PairObjective(nll_weight=0.5)),
    ],
)
def test_losses_gradients_and_metrics_equal_trls(theirs, ours, tmp_path):
    # TRL's `sft` is a mean over the tokens of the batch, ours over each pair's: the same on equal lengths.
    theirs_trainer = trl_trainer(tiny("llama"), texts("sft" in theirs["loss_type"]), tmp_path, **theirs)
    ours_trainer = our_trainer(tiny("llama"), theirs_trainer.train_dataset, ours, tmp_path)
    for trainer in (theirs_trainer, ours_trainer):
        trainer.train()
    lines = zip(theirs_trainer.state.log_history[:4], ours_trainer.state.log_history[:4], strict=True)
    for their_line, our_line in lines:
        for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected"):
            assert our_line[name] == pytest.approx(their_line[name], rel=1e-5), name
        # Differences of sums near -30, which TRL takes in fp32.
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert our_line[name] == pytest.approx(their_line[name], rel=1e-4, abs=5e-6), name


def test_every_gradient_equals_trls(tmp_path):
    start = tiny("llama")
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    theirs_trainer = trl_trainer(copy.deepcopy(start), texts(False), tmp_path)
    ours_trainer = our_trainer(copy.deepcopy(start), theirs_trainer.train_dataset, PairObjective(), tmp_path)
    gradients = []
    for trainer in (theirs_trainer, ours_trainer):
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch).backward()
        gradients.append(torch.cat([p.grad.flatten() for _, p in sorted(trainer.model.named_parameters())]))
    assert gradients[0].norm() > 0.1
    assert (gradients[1] - gradients[0]).norm() / gradients[0].norm() < 1e-5
