"""Virtual tokens: what is sampled and read from a saved policy is what PEFT's plain forward computes."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from align.chain import run_chain
from align.config.errors import UserError
from align.config.schema import ModelConfig
from align.config.store import compose_run
from align.generation.answer_logps import token_logps_alone
from align.generation.rollout import sample
from align.models.adapters.saved import load_speaker
from align.models.load import load_model
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
