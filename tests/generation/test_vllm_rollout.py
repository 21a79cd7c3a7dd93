"""Rollouts by vLLM, on a stand-in for it: what is sampled with which weights, and what is refused."""

import sys
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from align.config.errors import UserError
from align.config.schema import Advantage, PeftConfig, PeftMethod, PPOStage, RolloutEngine
from align.generation.checkpoint_weights import checkpoint_weights
from align.generation.rollout import sample
from align.generation.vllm_rollout import ROLLOUT, VllmSampler
from align.models.shared_base import SharedBase
from align.stages import ppo as stage_of_ppo
from align.tracking.progress import Progress
from align.trainers.samples import HeldOutSamples
from tests.generation import stand_in_vllm
from tests.models.families import tiny
from tests.trainers.actors import STOPS, actor, build, lines, prompt_rows, stage, weights

PROMPTS = [[5, 9, 33], [40, 3], [17, 21, 22, 60, 8]]
PEFT = PeftConfig(method=PeftMethod.lora, r=4, alpha=8)


@pytest.fixture(autouse=True)
def llm(monkeypatch):
    return stand_in_vllm.install(monkeypatch)


@pytest.fixture
def folder(tmp_path):
    return saved(tiny("llama"), tmp_path / "policy")


def saved(model, folder):
    """A model whose own generation config would change every number."""
    model.generation_config.update(do_sample=True, top_k=2, temperature=3.0, eos_token_id=STOPS[1])
    model.save_pretrained(folder)
    return str(folder)


def engine(folder, **options) -> VllmSampler:
    return VllmSampler(folder, **({"max_tokens": 64, "dtype": torch.float32, "seed": 0, "batch_size": 8} | options))


def loaded(folder, model) -> VllmSampler:
    sampler = engine(folder)
    sampler.load(checkpoint_weights(model))
    return sampler


def completions(sampler, prompts=PROMPTS, **changes):
    settings = {
        "per_prompt": 1, "stop_token_ids": STOPS[:1] + STOPS[2:], "max_new_tokens": 12, "temperature": 0.7,
        "progress": None,
    } | changes  # fmt: skip
    settings.setdefault("seeds", list(range(50, 50 + len(prompts) * settings["per_prompt"])))
    return sampler.sample(prompts, **settings)


def assert_logps(model, prompts, sampled, temperature=0.7):
    """Those of a plain forward of each prompt with its own completion."""
    for prompt, one in zip(prompts, sampled, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *one.ids]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(one.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(one.logps), expected, rtol=0, atol=1e-4)


def changed(model, by=1.3):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(by)
    return model


def test_log_probabilities_are_those_of_the_loaded_weights_at_the_temperature_prompt_after_prompt(folder):
    model = changed(tiny("llama"))
    sampled = completions(loaded(folder, model), per_prompt=3)
    assert_logps(model, [prompt for prompt in PROMPTS for _ in range(3)], sampled)
    assert len({tuple(one.ids) for one in sampled}) == 9


def test_greedy_completions_are_those_of_generate_and_the_models_own_stop_token_stops_nothing(folder):
    model = changed(tiny("llama"), 0.5)
    prompts = [[token, token + 1] for token in range(14, 54)]
    options = {"stop_token_ids": STOPS[2:], "max_new_tokens": 12, "temperature": 0.0}
    ours = completions(loaded(folder, model), prompts, **options)
    options |= {"per_prompt": 1, "seeds": [0] * 40, "pad_token_id": 0, "batch_size": 64, "progress": None}
    expected = sample(model, prompts, **options)
    assert [(one.ids, one.finished) for one in ours] == [(one.ids, one.finished) for one in expected]
    for one, other in zip(ours, expected, strict=True):
        assert one.logps == pytest.approx(other.logps, abs=1e-4)
    assert {one.finished for one in ours} == {True, False}
    assert any(STOPS[1] in one.ids[:-1] for one in ours), "the prompts of this test are to meet the model's own"


def test_a_completion_ends_with_the_stop_token_or_at_the_limit(folder):
    sampled = completions(loaded(folder, tiny("llama")), PROMPTS * 8, temperature=1.0, max_new_tokens=5)
    for one in sampled:
        assert one.finished == (one.ids[-1] in (STOPS[0], *STOPS[2:]))
        assert len(one.ids) == len(one.logps) <= 5 and (one.finished or len(one.ids) == 5)
    assert {one.finished for one in sampled} == {True, False}


def test_a_completion_depends_on_its_own_seed_alone(folder):
    model, order = tiny("llama"), [2, 0, 1]
    together = completions(loaded(folder, model), seeds=[7, 2**62, 9])
    sampler = engine_again(folder, model)
    assert completions(sampler, [PROMPTS[i] for i in order], seeds=[[7, 2**62, 9][i] for i in order]) == [
        together[i] for i in order
    ]
    assert completions(engine_again(folder, model), seeds=[8, 2**62, 9])[0].ids != together[0].ids


def engine_again(folder, model):
    stand_in_vllm.LLM.started.clear()
    return loaded(folder, model)


def test_each_load_is_what_the_next_rollout_samples_from(folder):
    sampler, model = engine(folder), tiny("llama")
    for _ in range(3):
        sampler.load(checkpoint_weights(changed(model, 1.2)))
        assert_logps(model, PROMPTS, completions(sampler))
    with pytest.raises(AssertionError, match="earlier policy"):
        completions(sampler)


def test_the_engine_sleeps_but_for_a_rollout_and_stops_when_closed(folder, llm):
    sampler = engine(folder)
    (inside,) = llm.started
    assert inside.asleep == {"weights", "kv_cache"}
    sampler.load(checkpoint_weights(tiny("llama")))
    assert inside.asleep == {"kv_cache"}
    assert completions(sampler, []) == [] and inside.asleep == {"weights", "kv_cache"}
    sampler.close()
    assert not llm.started


def test_weights_that_are_missing_are_refused(folder):
    sampler = engine(folder)
    few = [(name, tensor) for name, tensor in checkpoint_weights(tiny("llama")) if "layers.1.mlp" not in name]
    with pytest.raises(UserError, match=r"3 weights of vLLM's model .*layers\.1\.mlp\.down_proj"):
        sampler.load(few)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "qwen2_moe", "mixtral", "gemma3"])
def test_weights_are_those_of_the_files_of_the_model(name, tmp_path):
    from safetensors.torch import load_file

    model = tiny(name)
    model.save_pretrained(tmp_path)
    files, ours = load_file(tmp_path / "model.safetensors"), dict(checkpoint_weights(model))
    assert files.keys() == ours.keys()
    assert all(torch.equal(files[key], ours[key]) for key in files)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adapter_is_folded_in_and_the_trained_weights_stay_as_they_are(name, dtype):
    model = tiny(name).to(dtype)
    plain = {key: tensor.clone() for key, tensor in model.named_parameters()}
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    before = {key: tensor.clone() for key, tensor in adapted.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        found = dict(checkpoint_weights(adapted.get_base_model()))
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapted.named_parameters())
    merged = dict(adapted.merge_and_unload().named_parameters())
    assert found.keys() == merged.keys() == plain.keys()
    for key, tensor in merged.items():
        assert found[key].dtype is dtype
        torch.testing.assert_close(found[key], tensor, rtol=1e-2 if dtype is torch.bfloat16 else 1e-6, atol=1e-5)
    assert sum(not torch.equal(found[key], plain[key]) for key in plain) > 4


def test_of_a_shared_base_the_policys_adapter_is_loaded_and_no_other(folder):
    shared = SharedBase.from_base(tiny("llama"), PEFT, temperature=0.7, seed=0, zero3=False)
    with torch.no_grad():
        for name, parameter in shared.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    sampler, before = engine(folder), weights(shared.parameters())
    with shared.generating() as policy:
        sampler.load(checkpoint_weights(policy))
        sampled = completions(sampler)
        assert_logps(policy, PROMPTS, sampled)
        with shared._under("value"), pytest.raises(AssertionError):
            assert_logps(policy, PROMPTS, sampled)
    assert all(map(torch.equal, before, shared.parameters()))


# In training.


def updates(tmp_path, settings, engine, count=3, **options):
    trainer = build(tmp_path, settings, updates=count, samples=True, **options)
    trainer.engine = engine
    return trainer


@pytest.mark.parametrize("advantage", [Advantage.gae, Advantage.rloo])
def test_every_update_and_every_sample_is_of_the_policy_as_it_is_then(tmp_path, folder, llm, advantage):
    settings = stage(advantage=advantage, completions_per_prompt=2, learning_rate=0.02, sample_every=1)
    trainer = updates(tmp_path, settings, engine(folder))
    trainer.train()
    figures = lines(trainer)
    assert len(figures) == 3 and all(one["rollout/mismatch_kl"] < 1e-6 for one in figures)
    assert all(one["rollout/importance_weight"] == pytest.approx(1, abs=1e-3) for one in figures)
    assert any(one["policy/approx_kl"] > 1e-3 for one in figures), "without steps nothing could be stale"
    assert llm.started[0].calls >= 3 + 4


def test_a_policy_that_has_moved_since_is_corrected_for_by_importance_weights(tmp_path, folder):
    sampler = engine(folder)
    first = actor(stage())
    load = sampler.load
    sampler.load = lambda _: load(checkpoint_weights(first.policy))
    trainer = updates(tmp_path, stage(learning_rate=0.002), sampler, count=2)
    trainer.train()
    fresh, stale = lines(trainer)
    assert fresh["rollout/mismatch_kl"] < 1e-6 < 1e-4 < stale["rollout/mismatch_kl"]
    assert abs(stale["rollout/importance_weight"] - 1) > 1e-3


def test_an_engine_with_other_weights_than_the_policys_is_refused(tmp_path, folder):
    sampler = engine(folder)
    load = sampler.load
    sampler.load = lambda _: load(checkpoint_weights(changed(tiny("llama"), 4.0)))
    trainer = updates(tmp_path, stage(), sampler)
    with pytest.raises(UserError, match=r"nats a token.*rollout=hf"):
        trainer.maker.make(0)


def test_the_engine_answers_for_as_many_prompts_as_the_rollout_has(tmp_path, folder):
    by_hf = build(tmp_path, stage(completions_per_prompt=2), prompts=prompt_rows(12)).maker.make(0)
    trainer = updates(tmp_path, stage(completions_per_prompt=2), engine(folder), prompts=prompt_rows(12))
    by_vllm = trainer.maker.make(0)
    assert by_vllm.prompts == by_hf.prompts and by_vllm.group.tolist() == by_hf.group.tolist()
    torch.testing.assert_close(by_vllm.sampler_logps, by_vllm.logps, rtol=0, atol=2e-5)


def test_held_out_prompts_are_answered_greedily_by_the_engine_too(tmp_path, folder):
    rows, found = prompt_rows(5, seed=9), []
    for sampler in (None, engine(folder)):
        trainer = updates(tmp_path, stage(temperature=1.3), sampler)
        changed(trainer.inner.policy)
        found.append(HeldOutSamples(trainer, rows, tmp_path / "samples.jsonl").take(0))
    assert found[0] == found[1]


# Refusals.


def refused_at_the_door(settings, device="cuda:0"):
    """The stage, with a context that holds nothing of what loading would need."""
    with pytest.raises(UserError) as refusal:
        stage_of_ppo.run(settings, SimpleNamespace(runtime=SimpleNamespace(device=device)))
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_without_vllm_or_a_gpu_the_stage_is_refused_before_anything_is_loaded(monkeypatch):
    settings = PPOStage(policy="nowhere", rollout=RolloutEngine.vllm)
    assert "no GPU" in refused_at_the_door(settings, "cpu")
    monkeypatch.setitem(sys.modules, "vllm", None)
    line = refused_at_the_door(settings)
    assert "stages.ppo.rollout=vllm" in line and "pip install vllm" in line and "stages.ppo.rollout=hf" in line


def test_a_temperature_that_vllm_changes_is_refused():
    with pytest.raises(UserError, match=r"stages\.ppo\.temperature=0\.005"):
        ROLLOUT.check(device="cuda", temperatures={"stages.ppo.temperature": 0.005})
    ROLLOUT.check(device="cuda", temperatures={"stages.ppo.temperature": 0.01})


def test_what_vllm_says_when_it_does_not_start_is_one_line(folder):
    with pytest.raises(UserError, match="1 validation error gpu_memory_utilization is too much; set") as refusal:
        engine(folder, memory_share=1.5)
    assert "\n" not in str(refusal.value) and folder in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "word"), [({"finish_reason": "abort"}, "abort"), ({"logp": float("nan")}, "numbers")]
)
def test_a_completion_that_is_none_is_refused(folder, llm, change, word):
    sampler = loaded(folder, tiny("llama"))
    output = SimpleNamespace(
        token_ids=[4], finish_reason=change.get("finish_reason", "stop"),
        logprobs=[{4: SimpleNamespace(logprob=change.get("logp", -1.0))}],
    )  # fmt: skip
    prompt = PROMPTS[0]
    llm.started[0].generate = lambda *_, **__: [SimpleNamespace(prompt_token_ids=prompt, outputs=[output])]
    with pytest.raises(UserError, match=word):
        completions(sampler, [prompt])


def test_progress_is_shown_to_the_end(folder):
    progress = Progress("rollout", 3, active=True, passing=True)
    completions(loaded(folder, tiny("llama")), progress=progress)
    assert progress.finished
