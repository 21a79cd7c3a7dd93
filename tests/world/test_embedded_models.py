"""The shipped weights are what the recipes make: same rows, same first steps, same held-out loss."""

import json
import math

import pytest
import torch

from align.config.schema import DataConfig, ModelConfig
from align.data.prepare import prepare_text
from align.data.template import Template
from align.models.load import EMBEDDED_DIR, load_model, load_tokenizer
from align.tracking.local import read_metrics
from align.world import generator
from tests.chain.runs import kill_when, logged_step

RECORD = json.loads((EMBEDDED_DIR / "base/training.json").read_text())
STEPS = 25


def test_the_text_is_the_text_that_the_base_model_was_trained_on():
    assert generator.digest(generator.rows("text")) == RECORD["text_digest"]


def test_the_weights_have_the_held_out_loss_of_their_training():
    tokenizer = load_tokenizer("tiny-base", ModelConfig(), None)
    held_out = prepare_text(
        DataConfig(text="tiny:text"), Template(tokenizer), RECORD["settings"]["max_tokens"], None
    ).held_out.select(range(600))
    model = load_model("tiny-base", ModelConfig(), torch.float32, seed=0).eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in held_out:
            ids = torch.tensor([row["input_ids"]])
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    # 600 documents stand for all; the weights are stored in bf16.
    assert total / tokens == pytest.approx(RECORD["held_out_loss"], rel=0.05)


@pytest.mark.timeout(300)
def test_the_pretrain_recipe_starts_on_the_recorded_curve(tmp_path):
    stage = tmp_path / "runs/pretrain/pretrain"
    kill_when(lambda: logged_step(stage) >= STEPS, tmp_path, "+recipe=pretrain")
    losses = [line["loss"] for line in read_metrics(stage / "metrics.jsonl") if "loss" in line][:STEPS]
    assert losses == pytest.approx(RECORD["losses"][:STEPS], rel=0.02)
    assert losses[0] == pytest.approx(math.log(len(load_tokenizer("tiny-base", ModelConfig(), None))), rel=0.15)
    assert losses[-1] < 0.8 * losses[0]
