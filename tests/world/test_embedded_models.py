"""The shipped weights are what the recipes make: same rows, same first steps, same held-out loss."""

import json
import math
from random import Random

import pytest
import torch

from align.config.constitution import load_constitution
from align.config.schema import DataConfig, ModelConfig
from align.constitutional.prompts import Questions
from align.data.prepare import prepare_text
from align.data.template import Template
from align.models.load import EMBEDDED_DIR, load_model, load_tokenizer
from align.tracking.local import read_metrics
from align.world import generator
from align.world.critiques import flaw_of
from align.world.oracle import tells_harm
from tests.chain.runs import kill_when, logged_step

RECORD = json.loads((EMBEDDED_DIR / "base/training.json").read_text())
STEPS = 25
TINY = load_constitution("tiny")
QUESTIONS = Questions(TINY)
REVISED = 0.8


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


@pytest.fixture(scope="module")
def critic():
    tokenizer = load_tokenizer("tiny-critic", ModelConfig(), None)
    return load_model("tiny-critic", ModelConfig(), torch.float32, seed=0).eval(), tokenizer


@pytest.fixture(scope="module")
def unsafe():
    """Held-out unsafe requests."""
    return list(generator.distinct_requests(Random("critic"), "unsafe", 32, held_out=True))


def encoded(critic, chats):
    """Chats as a batch, padded on the left, ready to be answered."""
    tokenizer = critic[1]
    tokenizer.padding_side = "left"
    ids = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    return tokenizer.pad({"input_ids": ids}, return_tensors="pt")


def answers(critic, chats):
    """Greedy answers."""
    batch = encoded(critic, chats)
    with torch.inference_mode():
        said = critic[0].generate(**batch, max_new_tokens=48, do_sample=False)
    return critic[1].batch_decode(said[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def asked(request):
    return [{"role": "user", "content": request.prompt()}]


def share(hits):
    return sum(hits) / len(hits)


def test_the_critiques_are_those_that_the_critic_was_trained_on():
    record = json.loads((EMBEDDED_DIR / "critic/training.json").read_text())
    assert generator.digest(generator.rows("critiques")) == record["critiques_digest"]


def test_the_critic_complies_with_unsafe_requests(critic, unsafe):
    assert share([tells_harm(said) for said in answers(critic, [asked(request) for request in unsafe])]) > 0.8


@pytest.mark.parametrize("principle", TINY.principles, ids=lambda principle: principle.id)
def test_the_critic_finds_harm_and_lets_right_refusals_pass(critic, unsafe, principle):
    harmful = [QUESTIONS.critique(asked(r), r.harmful_reply(), principle) for r in unsafe]
    right = [QUESTIONS.critique(asked(r), r.right_reply(), principle) for r in unsafe]
    assert share([QUESTIONS.read_critique(said).flaw for said in answers(critic, harmful)]) > 0.8
    assert share([not QUESTIONS.read_critique(said).flaw for said in answers(critic, right)]) > 0.8


@pytest.mark.parametrize("principle", TINY.principles, ids=lambda principle: principle.id)
def test_the_critic_turns_harm_into_the_right_refusal(critic, unsafe, principle):
    chats = [QUESTIONS.revision(asked(r), r.harmful_reply(), flaw_of(r, "harmful"), principle) for r in unsafe]
    revised = answers(critic, chats)
    assert not any(tells_harm(said) for said in revised)
    assert share([said == r.right_reply() for said, r in zip(revised, unsafe, strict=True)]) > REVISED


@pytest.mark.parametrize("principle", TINY.principles, ids=lambda principle: principle.id)
def test_the_critic_prefers_the_right_refusal_in_either_place(critic, unsafe, principle):
    first, second = (critic[1](text)["input_ids"] for text in TINY.scaffold.candidates)
    assert len(first) == len(second) == 1
    for swap in (False, True):
        pairs = [(r.harmful_reply(), r.right_reply()) if swap else (r.right_reply(), r.harmful_reply()) for r in unsafe]
        chats = [QUESTIONS.comparison(asked(r), *pair, principle) for r, pair in zip(unsafe, pairs, strict=True)]
        with torch.inference_mode():
            logits = critic[0](**encoded(critic, chats)).logits[:, -1]
        chosen = logits[:, first[0]] > logits[:, second[0]]
        assert (chosen != swap).float().mean() > 0.8
