"""Virtual tokens: what is sampled and read from a saved policy is what PEFT's plain forward computes."""

import io
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoTokenizer

from align import cli
from align.artifacts import read_json
from align.chain import run_chain
from align.config.errors import UserError
from align.config.schema import ModelConfig
from align.config.store import compose_run
from align.generation.answer_logps import token_logps_alone
from align.generation.batching import Rules
from align.generation.rollout import draw, sample
from align.generation.seeds import row_uniforms
from align.generation.streaming import Stream
from align.models.adapters.saved import load_speaker
from align.models.load import load_model
from align.models.trained import load_trained, trained_model
from tests.launching import slow
from tests.stages.runs import run

METHODS = ("prompt", pytest.param("prefix", marks=slow), pytest.param("ptuning", marks=slow))
PROMPTS = [[7, 30, 41, 52], [9, 33, 12, 80, 14, 60, 61], [5, 99, 31]]


@pytest.fixture(scope="module", params=METHODS)
def policy(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    words = ("stages.sft.packing=false", "stages.sft.batch_size=8", "stages.sft.micro_batch_size=8")
    run(folder, "run=[sft]", f"peft={request.param}", "stages.sft.learning_rate=3e-2", *words)
    return folder / "run" / "sft" / "policy"


def plain_forward(policy: Path):
    """PEFT on the base, asked for whole sequences one at a time, without a cache."""
    base = load_model("tiny-base", ModelConfig(), torch.float32, seed=0)
    model = PeftModel.from_pretrained(base, str(policy)).eval()

    def logits(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -len(ids) :]

    return logits


def test_greedy_answers_are_those_of_a_plain_forward(policy):
    model, logits = load_speaker(str(policy), ModelConfig(), torch.float32, seed=0), plain_forward(policy)
    options = {"per_prompt": 1, "stop_token_ids": [], "pad_token_id": 1, "max_new_tokens": 6, "temperature": 0.0}
    drawn = sample(model, PROMPTS, seeds=[0, 1, 2], batch_size=4, progress=None, **options)
    base = load_model("tiny-base", ModelConfig(), torch.float32, seed=0)
    assert drawn != sample(base, PROMPTS, seeds=[0, 1, 2], batch_size=4, progress=None, **options)
    for prompt, completion in zip(PROMPTS, drawn, strict=True):
        ids = list(prompt)
        for token, logp in zip(completion.ids, completion.logps, strict=True):
            last = logits(ids)[-1].log_softmax(-1)
            assert last.argmax().item() == token
            assert logp == pytest.approx(last[token].item(), abs=1e-4)
            ids.append(token)


def test_answers_are_weighed_as_a_plain_forward_does(policy):
    model, logits = load_speaker(str(policy), ModelConfig(), torch.float32, seed=0), plain_forward(policy)
    rows = [(PROMPTS[0], [11, 12, 13]), (PROMPTS[1], [40])]
    with torch.no_grad():
        read = list(token_logps_alone(model.eval(), rows, pad_token_id=1, batch_size=2))
    for (prompt, answer), found in zip(rows, read, strict=True):
        logps = logits([*prompt, *answer]).log_softmax(-1)
        expected = [logps[len(prompt) - 1 + k, token].item() for k, token in enumerate(answer)]
        assert found == pytest.approx(expected, abs=1e-4)


ASKED = ("What is the colour of the sky of villager 1?", "Where does the owl live?")


def pefts_replies(folder: Path, new_tokens: int) -> list[str]:
    """What PEFT alone says to `ASKED`, by the files of a folder: greedy, until the template's stop token."""
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    replies = []
    for text in ASKED:
        chat = [{"role": "user", "content": text}]
        asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        stop = tokenizer.convert_tokens_to_ids("<|end|>")
        said = model.eval().generate(**asked, max_new_tokens=new_tokens, do_sample=False, eos_token_id=stop)
        replies.append(tokenizer.decode(said[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))
    return replies


def test_chat_says_greedily_what_peft_says(policy, tmp_path, monkeypatch, capsys):
    lines = [ASKED[0], "/reset", ASKED[1]]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    words = [f"model.path={policy}", f"run_dir={tmp_path}/run", "chat.max_new_tokens=16", "precision=fp32"]
    assert cli.main(["+recipe=chat", *words]) == 0
    said = [line.partition(":") for line in capsys.readouterr().out.splitlines()]
    replies = [text.strip() for who, _, text in said if who == "sft/policy"]
    assert replies == [reply.strip() for reply in pefts_replies(policy, 16)]


def test_a_sampled_answer_is_drawn_from_a_plain_forward(policy):
    model, logits = load_trained(trained_model(str(policy)), ModelConfig(), torch.float32), plain_forward(policy)
    ids = list(PROMPTS[1])
    for uniform in row_uniforms([5], 8)[0]:
        token, _ = draw(logits(ids)[-1:], torch.tensor([uniform]), 1.0)
        ids.append(token.item())
    pieces = list(Stream(model, PROMPTS[1], Rules(frozenset(), 1, 8, 1.0), lambda new: " ".join(map(str, new)), seed=5))
    assert "".join(pieces) == " ".join(map(str, ids[len(PROMPTS[1]) :])) and len(pieces) == 8


def test_virtual_tokens_take_their_places_of_what_a_model_reads(policy):
    found, base = trained_model(str(policy)), load_model("tiny-base", ModelConfig(), torch.float32, seed=0)
    assert found.longest == base.config.max_position_embeddings - 16


def export(policy: Path, folder: Path, *words: str) -> int:
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{text}"}}\n' for text in ASKED))
    own = [f"run_dir={folder}/run", f"cache_dir={folder}/cache", f"data.prompts={prompts}", "precision=fp32"]
    return cli.main(["+recipe=export", f"model.path={policy}", *own, "stages.export.max_new_tokens=16", *words])


def test_the_exported_adapter_is_the_trained_model_to_peft_alone(policy, tmp_path):
    assert export(policy, tmp_path, "stages.export.forms=[adapter]") == 0
    folder, logits = tmp_path / "run/export/adapter", plain_forward(policy)
    told = read_json(tmp_path / "run/export/verification.json")
    assert list(told["compared"]) == ["adapter on its base"] and told["compared"]["adapter on its base"]["same"] == 2
    assert told["replies"] == pefts_replies(folder, 16)
    with torch.no_grad():
        alone = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found = alone(input_ids=torch.tensor([PROMPTS[1]]), use_cache=False).logits[0, -len(PROMPTS[1]) :]
        base = alone.get_base_model()(input_ids=torch.tensor([PROMPTS[1]])).logits[0]
    assert (found - logits(PROMPTS[1])).abs().max() < 1e-4 < (found - base).abs().max()


@pytest.mark.parametrize("forms", ["[model]", "[model,adapter]", "[model,gguf]", "[gguf]"])
def test_no_whole_model_is_exported_of_it(policy, tmp_path, capsys, forms):
    assert export(policy, tmp_path, f"stages.export.forms={forms}") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.endswith("but no weights can take this adapter up; write stages.export.forms=[adapter]")


def test_no_stage_trains_on_from_it(policy, tmp_path):
    with pytest.raises(UserError, match=r"an adapter, not a whole model; p\w+ cannot be merged, so"):
        run(tmp_path, "run=[dpo]", f"stages.dpo.policy={policy}")


@slow
def test_evaluate_asks_it(policy, tmp_path):
    words = [
        "+recipe=evaluate", f"run_dir={tmp_path}/run", f"cache_dir={tmp_path}/cache", "precision=fp32",
        f"+stages.evaluate.models.trained={policy}", "stages.evaluate.max_prompts=8",
        "stages.evaluate.max_new_tokens=8", "stages.evaluate.kl_prompts=4", "stages.evaluate.max_pairs=8",
    ]  # fmt: skip
    (manifest,) = run_chain(compose_run(words).config)
    assert [entry["name"] for entry in manifest.inputs if "trained" in entry["name"]]
    # Another model than its base: the virtual tokens were there when it was asked.
    assert any("kl" in name and "trained" in name and value > 0.01 for name, value in manifest.metrics.items())
