"""Four models on one base: each reads as if it stood alone, and only what is trained moves and is saved."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, TaskType
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from align.config.errors import UserError
from align.config.schema import Layout, PeftConfig, PeftMethod
from align.data.forest import lay_out, lay_out_scores
from align.models.actor_critic import Read
from align.models.peft import add_adapter
from align.models.reward import as_scorer, score_batch
from align.models.shared_base import POLICY, VALUE, SharedBase
from tests.models.families import tiny
from tests.models.scorers import tiny_scorer
from tests.models.test_actor_critic import LAYOUTS, TEMPERATURE, TREES, batch_of, gradients, summed, trainer

FAMILIES = ["llama_tied", "gpt2", "qwen2_windows"]
PEFT = PeftConfig(method=PeftMethod.lora, r=4, alpha=8)
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


def disturb(parameters, seed: int = 0) -> None:
    """Adapters start as nothing; these compute something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def reward_adapter(folder: Path, name: str = "llama", r: int = 3) -> Path:
    """What the reward stage leaves with peft=lora."""
    config = PeftConfig(method=PeftMethod.lora, r=r, alpha=5)
    adapted = add_adapter(tiny_scorer(name), config, seed=0, zero3=False, task=TaskType.SEQ_CLS)
    disturb((p for p in adapted.parameters() if p.requires_grad), seed=5)
    adapted.save_pretrained(folder)
    return folder


def build(name: str = "llama", **options) -> SharedBase:
    settings = {"temperature": TEMPERATURE, "seed": 0, "zero3": False} | options
    return SharedBase.from_base(tiny(name), PEFT, **settings)


def trained(name: str = "llama", **options) -> SharedBase:
    """One whose policy and value have moved away from where they start."""
    model = build(name, **options)
    groups = model.parameter_groups()
    disturb(groups["policy"], seed=1)
    disturb(groups["value"], seed=2)
    return model


def plain_logps(model, logits_of) -> Tensor:
    """Log-probabilities of all tokens, each sequence in a forward of its own."""
    found = []
    for tree in TREES:
        for completion in tree.completions:
            logits = logits_of(torch.tensor([[*tree.prompt, *completion]]))[0, len(tree.prompt) - 1 : -1]
            logps = (logits.double() / TEMPERATURE).log_softmax(-1)
            found.append(logps.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1))
    return torch.cat(found)


def plain_scores(scorer, every_token: bool) -> Tensor:
    """Scores before every token, or at the last tokens, in padded rows."""
    batch = lay_out(TREES, Layout.padded, 0) if every_token else lay_out_scores(TREES, Layout.padded, 0)
    return score_batch(scorer, batch)


def loaded_scorer(name: str, folder: Path):
    return as_scorer(PeftModel.from_pretrained(tiny_scorer(name), str(folder)).merge_and_unload())


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_reading_is_that_of_a_model_of_its_own(name, tmp_path):
    folder = reward_adapter(tmp_path / "reward", name)
    model = trained(name, reward_adapter=folder, reward_centre=0.4)
    model.save_adapter(POLICY, tmp_path / "policy")
    model.save_adapter(VALUE, tmp_path / "value")
    policy = PeftModel.from_pretrained(tiny(name), str(tmp_path / "policy"))
    value, reward = loaded_scorer(name, tmp_path / "value"), loaded_scorer(name, folder)
    reference = tiny(name)
    expected = {
        "logps": plain_logps(model, lambda ids: policy(ids).logits),
        "reference": plain_logps(model, lambda ids: reference(ids).logits),
        "values": plain_scores(value, every_token=True),
        "scores": plain_scores(reward, every_token=False) - 0.4,
    }
    for layout in LAYOUTS:
        model.attach(layout)
        batch = batch_of(layout)
        readings = model(batch)
        found = {
            "logps": readings.logps,
            "reference": model(batch, read=Read.reference),
            "values": readings.values,
            "scores": model(lay_out_scores(TREES, layout, 0), read=Read.scores),
        }
        for reading, numbers in found.items():
            assert numbers.dtype == torch.float32
            scale = max(1.0, expected[reading].abs().max().item())
            torch.testing.assert_close(numbers.double() / scale, expected[reading].double() / scale, rtol=0, atol=1e-5)
    means = [numbers.abs().mean().item() for numbers in (found["logps"] - found["reference"], found["values"])]
    assert min(means) > 0.1


def test_at_the_start_policy_and_reference_are_one():
    model = build()
    batch = batch_of(Layout.padded)
    assert torch.equal(model(batch).logps, model.reference_logps(batch))
    assert model.has_own_reference and not model.has_own_reward


def test_a_value_model_starts_as_the_reward_model(tmp_path):
    model = build(reward_adapter=reward_adapter(tmp_path), reward_centre=0.4)
    model.initialise_value(scale=0.5, centre=0.4)
    batch = lay_out_scores(TREES, Layout.padded, 0)
    values = model(batch | {"targets": torch.zeros_like(batch["positions"])}).values
    torch.testing.assert_close(values, 0.5 * model.scores(batch))


@torch.no_grad()
def test_values_can_be_had_from_the_folder_of_the_value_adapter_alone(tmp_path):
    model = trained()
    model.initialise_value(scale=0.5, centre=0.3)
    model.save_adapter(VALUE, tmp_path / "value")
    model.save_adapter(POLICY, tmp_path / "policy")
    numbers = json.loads((tmp_path / "value/value.json").read_text())
    scores = plain_scores(loaded_scorer("llama", tmp_path / "value"), every_token=True)
    values = numbers["value_scale"] * (scores - numbers["reward_centre"])
    torch.testing.assert_close(values, model(batch_of(Layout.padded)).values, rtol=0, atol=1e-5)
    assert not (tmp_path / "policy/value.json").exists()


def test_without_a_reward_adapter_the_value_head_is_drawn_from_the_seed():
    heads = [build(seed=seed).heads["value"].weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert heads[0].std().item() == pytest.approx((heads[0].numel() + 1) ** -0.5, rel=0.35)


def test_gradients_reach_all_that_is_trained_and_nothing_else(tmp_path):
    model = trained(reward_adapter=reward_adapter(tmp_path))
    model.attach(Layout.forest)
    summed(model(batch_of())).backward()
    groups = model.parameter_groups()
    wanted = {id(p) for p in groups["policy"] + groups["value"]}
    assert {id(p) for p in model.parameters() if p.requires_grad} == wanted
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got == {name for name, p in model.named_parameters() if id(p) in wanted}
    assert all(model.get_parameter(name).grad.abs().max() > 0 for name in got)
    assert {name.split(".")[-2] for name in got} == {"policy", "value"}
    assert {id(p) for p in groups["policy"]}.isdisjoint(id(p) for p in groups["value"])


def test_the_gradient_of_one_adapter_is_what_it_is_without_the_other():
    model = trained()
    batch = batch_of(Layout.padded)
    model.reference_logps(batch)
    (model(batch).logps.sum() + model(batch).values.sum()).backward()
    model.reference_logps(batch)
    together = gradients(model)
    for wanted, group in (("logps", "policy"), ("values", "value")):
        model.zero_grad()
        getattr(model(batch), wanted).sum().backward()
        alone = {name: grad for name, grad in gradients(model).items() if f".{group}." in name}
        assert alone
        for name, grad in alone.items():
            torch.testing.assert_close(together[name], grad, rtol=1e-4, atol=1e-4)


def test_values_and_rewards_are_read_without_the_policys_adapter(tmp_path):
    model = trained(reward_adapter=reward_adapter(tmp_path))
    batch = batch_of(Layout.padded)
    before = model(batch), model.scores(batch), model.reference_logps(batch)
    disturb(model.parameter_groups()["policy"], seed=9)
    after = model(batch), model.scores(batch), model.reference_logps(batch)
    assert torch.equal(before[0].values, after[0].values)
    assert torch.equal(before[1], after[1]) and torch.equal(before[2], after[2])
    assert (before[0].logps - after[0].logps).abs().mean() > 0.1


def test_an_error_inside_a_reading_leaves_the_policy_active(monkeypatch):
    model = trained()
    batch = batch_of(Layout.padded)
    expected = model(batch).logps
    with pytest.raises(KeyError):
        model.scores({}) if model.has_own_reward else model._head_scores(VALUE, {})
    assert torch.equal(model(batch).logps, expected)


def test_generation_samples_from_the_policy(tmp_path):
    model, ids = trained(), torch.tensor([[5, 6, 7, 8]])
    model.save_policy_adapter(tmp_path)
    merged = PeftModel.from_pretrained(tiny("llama"), str(tmp_path)).merge_and_unload()
    settings = {"max_new_tokens": 12, "do_sample": False}
    expected = merged.generate(ids, **settings)
    assert not torch.equal(expected, tiny("llama").generate(ids, **settings))
    model.attach(Layout.forest)
    model(batch_of())
    with model.generating() as policy:
        assert torch.equal(policy.generate(ids, **settings), expected)


def test_four_models_take_little_more_memory_than_the_base(tmp_path):
    def base(auto=AutoModelForCausalLM):
        config = LlamaConfig(
            vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=8, tie_word_embeddings=True, pad_token_id=0, num_labels=1,
        )  # fmt: skip
        with torch.device("meta"):
            model = auto.from_config(config)
        return model.to_empty(device="cpu")

    def size(model) -> int:
        return sum(t.nbytes for t in [*model.parameters(), *model.buffers()])

    plain = base()
    before = size(plain)
    shape = PeftConfig(method=PeftMethod.lora, r=16)
    model = SharedBase.from_base(plain, shape, temperature=1.0, seed=0, zero3=False)
    model.save_adapter(VALUE, tmp_path)
    del model
    model = SharedBase.from_base(base(), shape, temperature=1.0, seed=0, zero3=False, reward_adapter=tmp_path)
    assert model.has_own_reward and model.has_value and model.has_own_reference
    assert before < size(model) < 1.35 * before


def test_a_checkpoint_holds_what_is_trained_and_restores_every_reading(tmp_path):
    folder = reward_adapter(tmp_path / "reward")
    model, batch = trained(reward_adapter=folder), batch_of(Layout.padded)
    model.initialise_value(scale=0.5, centre=0.25)
    groups = model.parameter_groups()
    state = model.state_dict()
    assert len(state) == len(groups["policy"]) + len(groups["value"]) + 1
    assert model.kept(torch.nn.Module.state_dict(model)).keys() == state.keys()
    save_file(state, tmp_path / "model.safetensors")
    other = build(reward_adapter=folder)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    for ours, theirs in zip(other(batch)[:2], model(batch)[:2], strict=True):
        assert torch.equal(ours, theirs)
    del state["heads.value.weight"]
    with pytest.raises(RuntimeError, match=r"heads\.value\.weight is missing"):
        other.load_state_dict(state, strict=False)


def test_an_adapter_can_be_written_from_gathered_tensors(tmp_path):
    model = trained()
    gathered = {name: tensor + 1 for name, tensor in torch.nn.Module.state_dict(model).items()}
    model.save_policy_adapter(tmp_path, gathered)
    for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        own = name.removeprefix("base_model.model.").replace(".weight", ".policy.weight")
        assert torch.equal(tensor, model.policy.get_parameter(own) + 1)


def test_the_trainer_saves_it_and_takes_it_up_again(tmp_path):
    whole, resumed = build(), build()
    for model in (whole, resumed):
        model.attach(Layout.forest)
    trainer(tmp_path / "whole", whole, 4).train()
    trainer(tmp_path / "resumed", resumed, 4).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    ours, theirs, fresh = resumed.state_dict(), whole.state_dict(), build().state_dict()
    assert sum(not torch.equal(theirs[name], fresh[name]) for name in fresh) == len(fresh) - 1
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-7)
    for name, tensor in tiny("llama").state_dict().items():
        name = name if name in whole.policy.state_dict() else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(whole.policy.state_dict()[name], tensor)


def test_without_a_value_model_only_the_policy_is_trained(tmp_path):
    model = trained(value=False, reward_adapter=reward_adapter(tmp_path))
    assert model(batch_of(Layout.padded)).values is None
    assert model.has_own_reward and not model.has_value
    assert model.parameter_groups()["value"] == []


def test_adapters_learn_in_fp32_but_under_zero3_in_the_precision_of_the_base():
    for zero3, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        model = SharedBase.from_base(tiny("llama").to(torch.bfloat16), PEFT, temperature=1.0, seed=0, zero3=zero3)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
        read = model(batch_of(Layout.padded))
        assert read.values.dtype == torch.float32 and not torch.equal(read.values, read.values.bfloat16().float())


def test_a_reward_model_that_is_not_there_is_not_asked():
    with pytest.raises(NotImplementedError):
        build().scores(batch_of(Layout.padded))


@pytest.mark.parametrize("method", ["activation_checkpointing_enable", "gradient_checkpointing_enable"])
def test_recomputing_activations_is_refused(method):
    with pytest.raises(UserError, match="peft=none"):
        getattr(build(), method)(activation_checkpointing_kwargs=None)


def test_adapters_on_a_layer_that_is_not_there_are_refused():
    wrong = PeftConfig(method=PeftMethod.lora, target_modules=["nowhere"])
    with pytest.raises(UserError, match="nowhere"):
        SharedBase.from_base(tiny("llama"), wrong, temperature=1.0, seed=0, zero3=False)


def test_a_reward_adapter_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(UserError, match="not an adapter"):
        build(reward_adapter=tmp_path / "nowhere")
    build().save_policy_adapter(tmp_path / "policy")
    with pytest.raises(UserError, match="score head"):
        build(reward_adapter=tmp_path / "policy")
    folder = reward_adapter(tmp_path / "reward")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    head = "base_model.model.score.weight"
    save_file({**tensors, head: torch.zeros(1, 8)}, file)
    with pytest.raises(
        UserError, match=r"score\.weight is \(1, 8\), not \(1, 32\); start the reward stage and PPO from"
    ):
        build(reward_adapter=folder)
    save_file({**tensors, "base_model.model.extra": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="extra is unknown"):
        build(reward_adapter=folder)
    some = next(name for name in tensors if "lora_A" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != some}, file)
    with pytest.raises(UserError, match=r"lora_A\.weight is missing"):
        build(reward_adapter=folder)


def test_dropout_of_the_reward_stage_does_not_blur_readings(tmp_path):
    folder = reward_adapter(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_dropout": 0.5}))
    model = trained(reward_adapter=folder).train()
    batch = batch_of(Layout.padded)
    assert torch.equal(model.scores(batch), model.scores(batch))
    assert torch.equal(model(batch).values, model(batch).values)
