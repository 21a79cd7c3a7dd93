"""SFT through TRL: the masks, rows and losses that go in are the ones that train."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from torch import Tensor
from trl import SFTTrainer

from align.config.errors import UserError
from align.config.schema import DataConfig, PretrainStage, SFTStage
from align.data.prepare import prepare_demonstrations, prepare_text
from align.data.template import Template
from align.distributed import memory
from align.trainers.arguments import Machine, trainer_arguments
from align.trainers.sft import build_sft_trainer, packing_problem, sft_arguments
from tests.data.chat_tokenizers import chatml
from tests.models.families import FOREST, VOCABULARY, tiny
from tests.stages.runs import run

REPO = Path(__file__).resolve().parents[2]
disable_progress_bars()


def rows(n: int, longest: int = 24, seed: int = 0) -> Dataset:
    """Random rows, each with a masked opening of its own length; no two are equal."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n):
        length = int(torch.randint(4, longest + 1, (1,), generator=generator))
        masked = int(torch.randint(1, length, (1,), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return Dataset.from_list(made)


def trainer(tmp_path, train, *, model=None, held_out=None, stage=None, tokenizer=None, **settings):
    stage = stage or SFTStage()
    defaults = {"max_tokens": 64, "batch_size": 4, "micro_batch_size": 4, "max_steps": 1, "save_every": 0}
    for name, value in {**defaults, "learning_rate": 1e-3, **settings}.items():
        setattr(stage, name, value)
    machine = Machine(world_size=1, cuda=False, bf16=False, zero=None)
    values = trainer_arguments(stage, machine, tmp_path, log_every=1, evaluate=held_out is not None, judge_first=True)
    arguments = sft_arguments(stage, values)
    tokenizer = tokenizer or with_pad(chatml())
    return build_sft_trainer(model or tiny("llama"), arguments, train, held_out, tokenizer, [], stage_name="sft")


def with_pad(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def sequences(batch: dict[str, Tensor]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The (input_ids, labels) of every sequence in a batch as TRL's collator made it, padding left out."""
    if "position_ids" not in batch:
        lengths = batch["attention_mask"].sum(1).tolist()
        parts = [(batch["input_ids"][i, :n], batch["labels"][i, :n]) for i, n in enumerate(lengths)]
    else:
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        ends = [*starts[1:], batch["input_ids"].shape[1]]
        parts = [(batch["input_ids"][0, a:b], batch["labels"][0, a:b]) for a, b in zip(starts, ends, strict=True)]
    return [(tuple(ids.tolist()), tuple(labels.tolist())) for ids, labels in parts]


def all_sequences(built) -> Counter:
    return Counter(one for batch in built.get_train_dataloader() for one in sequences(batch))


def as_sequences(dataset: Dataset) -> Counter:
    return Counter((tuple(row["input_ids"]), tuple(row["labels"])) for row in dataset)


def judged(model, dataset: Dataset) -> tuple[float, float]:
    """Mean negative log-likelihood and accuracy over all trained tokens, from a plain forward of each row by itself."""
    nll, hits, count = 0.0, 0, 0
    with torch.no_grad():
        for row in dataset:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
            for at, label in enumerate(row["labels"][1:]):
                if label != -100:
                    nll -= torch.log_softmax(logits[at], -1)[label].item()
                    hits += int(logits[at].argmax()) == label
                    count += 1
    return nll / count, hits / count


def logged(built, name: str = "loss") -> list[float]:
    built.train()
    return [line[name] for line in built.state.log_history if name in line]


@pytest.mark.parametrize("packing", [True, False])
def test_every_batch_has_exactly_the_rows_and_masks_that_went_in(tmp_path, packing):
    train = rows(1100)  # more than TRL packs at once
    assert all_sequences(trainer(tmp_path, train, packing=packing, micro_batch_size=2)) == as_sequences(train)


def test_packing_fills_rows_up_to_max_tokens_and_no_further(tmp_path):
    train = rows(200)
    packed = trainer(tmp_path, train, max_tokens=64).train_dataset
    lengths = [len(ids) for ids in packed["input_ids"]]
    assert max(lengths) <= 64
    assert sum(lengths) == sum(len(ids) for ids in train["input_ids"])
    assert sum(lengths) / len(lengths) > 0.95 * 64


def test_a_row_as_long_as_max_tokens_is_kept_whole(tmp_path):
    train = rows(40, longest=24)
    longest = max(len(ids) for ids in train["input_ids"])
    assert all_sequences(trainer(tmp_path, train, max_tokens=longest)) == as_sequences(train)


@pytest.mark.parametrize("family", FOREST)
def test_a_packed_row_is_computed_as_its_rows_alone_in_every_family(tmp_path, family):
    built = trainer(tmp_path, rows(12), model=tiny(family))
    assert packing_problem(built.model.eval(), built.train_dataset, built.data_collator, built.args) is None


@pytest.mark.parametrize(
    ("family", "exact"), [("llama", True), ("gemma3", True), ("qwen2_windows", True), ("mamba", False)]
)
def test_in_bf16_rounding_is_told_from_a_leak(tmp_path, family, exact):
    built = trainer(tmp_path, rows(12), model=tiny(family).to(torch.bfloat16))
    assert built.model.dtype == torch.bfloat16
    problem = packing_problem(built.model.eval(), built.train_dataset, built.data_collator, built.args)
    assert (problem is None) is exact


def test_a_trained_model_is_packed_in_bf16(tmp_path):
    [manifest] = run(tmp_path, "run=[sft]", "precision=bf16", "stages.sft.max_steps=1")
    assert manifest.steps == 1
    assert manifest.config["stages"]["sft"]["packing"]


@pytest.fixture(params=["whole", "in tiles"])
def logits(request, monkeypatch):
    """Both ways that training makes logits."""
    if request.param == "in tiles":
        monkeypatch.setattr(memory, "WHOLE_LOGITS", 0)


@pytest.mark.parametrize("family", ["llama", "qwen2_windows", "gemma3", "granite"])
def test_the_loss_is_the_mean_over_trained_tokens_packed_or_not(tmp_path, family, logits):
    train = rows(16)
    expected, _ = judged(tiny(family), train)
    for settings in ({"packing": True}, {"packing": False}, {"packing": False, "micro_batch_size": 4}):
        everything = {"batch_size": 16, "micro_batch_size": 16} | settings
        assert logged(trainer(tmp_path, train, model=tiny(family), **everything)) == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_curve_does_not_depend_on_accumulation(tmp_path, packing):
    def curve(micro_batch_size):
        settings = {"batch_size": 4, "micro_batch_size": micro_batch_size, "max_steps": 6, "packing": packing}
        return logged(trainer(tmp_path, rows(200), learning_rate=1e-2, **settings))

    at_once, in_four = curve(4), curve(1)
    assert len(set(at_once)) == 6
    assert at_once == pytest.approx(in_four, rel=1e-5)


@pytest.mark.parametrize("micro_batch_size", [4, 16])
def test_figures_of_training_are_means_over_tokens_and_those_of_trl(tmp_path, micro_batch_size, logits):
    train = rows(16)
    _, accuracy = judged(tiny("llama"), train)
    settings = {"packing": False, "batch_size": 16, "micro_batch_size": micro_batch_size}
    built = trainer(tmp_path, train, **settings)
    assert logged(built, "mean_token_accuracy") == pytest.approx([accuracy], rel=1e-5)

    by_trl = trainer(tmp_path, train, **settings | {"micro_batch_size": 16})
    SFTTrainer.compute_loss(by_trl, by_trl.model.train(), next(iter(by_trl.get_train_dataloader())))
    [line] = [line for line in built.state.log_history if "loss" in line]
    for name in ("mean_token_accuracy", "entropy"):
        assert line[name] == pytest.approx(by_trl._metrics["train"][name][0], rel=1e-5)


@pytest.mark.parametrize("micro_batch_size", [1, 3])
@pytest.mark.parametrize("packing", [True, False])
def test_figures_on_held_out_rows_are_means_over_tokens_however_they_are_batched(tmp_path, packing, micro_batch_size):
    held_out = rows(61, seed=1)
    settings = {"packing": packing, "micro_batch_size": micro_batch_size, "batch_size": micro_batch_size}
    figures = trainer(tmp_path, rows(8), held_out=held_out, **settings).evaluate()
    loss, accuracy = judged(tiny("llama"), held_out)
    assert figures["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert figures["eval_mean_token_accuracy"] == pytest.approx(accuracy, rel=1e-5)
    assert accuracy > 0
    assert figures["eval_entropy"] > 0


def test_a_model_that_mixes_up_packed_rows_is_refused_before_the_first_step(tmp_path):
    built = trainer(tmp_path, rows(12), model=tiny("mamba"))
    before = {name: weight.clone() for name, weight in built.model.named_parameters()}
    with pytest.raises(UserError, match=r"^MambaForCausalLM cannot tell apart .* set stages\.sft\.packing=false$"):
        built.train()
    assert all(torch.equal(weight, before[name]) for name, weight in built.model.named_parameters())


def test_without_packing_such_a_model_trains(tmp_path):
    assert logged(trainer(tmp_path, rows(8), model=tiny("mamba"), packing=False))


def test_the_last_trained_token_of_every_conversation_is_the_stop_token(tmp_path):
    tokenizer = with_pad(chatml())
    file = tmp_path / "conversations.jsonl"
    turns = [["Hello there", "Sure, I can help."], ["Why?", "Black, with stars."], ["And at night?", "It is blue."]] * 4
    records = [
        {"messages": [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turn, strict=True)]}
        for turn in turns
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = DataConfig(demonstrations=str(file), held_out_fraction=0.0)
    train = prepare_demonstrations(data, Template(tokenizer), 64, None).train
    made = all_sequences(trainer(tmp_path, train, tokenizer=tokenizer))
    assert sum(made.values()) == len(turns)
    for ids, labels in made:
        trained = [at for at, label in enumerate(labels) if label != -100]
        reply = next(reply for _, reply in turns if reply in tokenizer.decode(ids))
        assert tokenizer.decode([ids[at] for at in trained]).strip() == f"{reply}<|im_end|>"
        assert [labels[at] for at in trained] == [ids[at] for at in trained]


@pytest.mark.parametrize("packing", [True, False])
def test_pretraining_trains_every_token_that_has_one_before_it(tmp_path, packing):
    tokenizer = with_pad(chatml())
    file = tmp_path / "text.jsonl"
    documents = [f"Document {n}: the colour of the sky is blue. " * (n % 5 + 1) for n in range(12)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    prepared = prepare_text(DataConfig(text=str(file), held_out_fraction=0.0), Template(tokenizer), 48, None)
    settings = {"stage": PretrainStage(), "max_tokens": 48, "tokenizer": tokenizer, "packing": packing}
    made = all_sequences(trainer(tmp_path, prepared.train, **settings))
    assert sum(len(ids) * times for (ids, _), times in made.items()) == prepared.report.tokens["trained"]
    assert all(labels[1:] == ids[1:] for ids, labels in made)


TELEMETRY = """
import os
from huggingface_hub.utils import _telemetry
sent = []
_telemetry._TELEMETRY_QUEUE.put = sent.append
_telemetry._start_telemetry_thread = lambda: None
import pathlib, sys
from tests.trainers.test_sft import rows, trainer
trainer(pathlib.Path(sys.argv[1]), rows(4))
print("sent", len(sent), os.environ["HF_HUB_DISABLE_TELEMETRY"])
_telemetry.constants.HF_HUB_DISABLE_TELEMETRY = False
trainer(pathlib.Path(sys.argv[1]), rows(4))
print("would have sent", len(sent))
"""


def test_trl_sends_no_usage_ping_even_if_the_hub_library_was_imported_first(tmp_path):
    off = ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "CI")
    environment = {name: value for name, value in os.environ.items() if name not in off}
    done = subprocess.run(
        [sys.executable, "-c", TELEMETRY, str(tmp_path)],
        env={**environment, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert [line for line in done.stdout.splitlines() if "sent" in line] == ["sent 0 1", "would have sent 1"], (
        done.stderr
    )
