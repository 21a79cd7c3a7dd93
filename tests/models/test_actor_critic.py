"""Policy and value model as one module: what it reads, what it trains, what it saves."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainingArguments

from align.config.schema import Layout
from align.data.forest import Tree, lay_out
from align.models import actor_critic
from align.models.actor_critic import ActorCritic, Read, read_tokens
from align.models.attention import FOREST_ATTENTION
from tests.models.families import VOCABULARY, tiny
from tests.models.scorers import tiny_scorer

LAYOUTS = (Layout.forest, Layout.sequences, Layout.padded)
TEMPERATURE = 0.7


def random_trees(seed: int = 0) -> list[Tree]:
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    return [Tree(ids(prompt), [ids(n) for n in lengths]) for prompt, *lengths in ((5, 7, 3), (2, 1, 6), (9, 4))]


TREES = random_trees()


def build(name: str = "llama", *, critic: bool = True) -> ActorCritic:
    return ActorCritic(tiny(name), tiny_scorer(name, seed=1) if critic else None, temperature=TEMPERATURE)


def batch_of(layout: Layout = Layout.forest, trees: list[Tree] = TREES) -> dict[str, Tensor]:
    return lay_out(trees, layout, 0)


def plain_readings(model: ActorCritic) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, values and entropies of all tokens, each sequence in a plain forward alone."""
    logps, values, entropies = [], [], []
    for tree in TREES:
        for completion in tree.completions:
            ids = torch.tensor([[*tree.prompt, *completion]])
            places = slice(len(tree.prompt) - 1, len(tree.prompt) - 1 + len(completion))
            with torch.no_grad():
                logits = model.policy(ids).logits[0, places].double()
                hidden = model.critic.base_model(ids).last_hidden_state[0, places]
            found = torch.distributions.Categorical(logits=logits / TEMPERATURE)
            logps.append(found.log_prob(torch.tensor(completion)))
            entropies.append(found.entropy())
            values.append(hidden.double() @ model.critic.score.weight[0].double())
    return tuple(torch.cat(parts) for parts in (logps, values, entropies))


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "qwen2_windows"])
def test_in_every_layout_the_readings_are_those_of_plain_forwards(name):
    model = build(name)
    logps, values, entropies = plain_readings(model)
    assert values.std() > 0.05
    for layout in LAYOUTS:
        model.attach(layout)
        read = model(batch_of(layout), entropies=True)
        assert {reading.dtype for reading in read} == {torch.float32}
        torch.testing.assert_close(read.logps.double(), logps, rtol=0, atol=1e-5)
        torch.testing.assert_close(read.values.double(), values, rtol=0, atol=1e-5)
        torch.testing.assert_close(read.entropies.double(), entropies, rtol=0, atol=1e-5)


def test_attach_switches_both_models():
    model = build()
    model.attach(Layout.forest)
    assert model.policy.config._attn_implementation == model.critic.config._attn_implementation == FOREST_ATTENTION


def test_in_bf16_readings_are_fp32_numbers():
    model = build().to(torch.bfloat16)
    for reading in model(batch_of(Layout.padded), entropies=True):
        assert reading.dtype == torch.float32
        assert not torch.equal(reading, reading.to(torch.bfloat16).float())


def test_entropies_are_read_only_when_asked_for():
    model = build()
    assert model(batch_of(Layout.padded)).entropies is None
    assert model(batch_of(Layout.padded), entropies=True).entropies.requires_grad


@pytest.mark.parametrize("entropies", [False, True])
def test_a_chunk_at_a_time_gives_the_same_numbers_and_gradients(entropies, monkeypatch):
    logits = torch.randn(13, VOCABULARY, dtype=torch.float64).float().mul_(3).requires_grad_()
    targets = torch.randint(VOCABULARY, (13,))

    def found() -> tuple[Tensor, Tensor]:
        logps, entropy = read_tokens(logits, targets, temperature=TEMPERATURE, entropies=entropies)
        readings = torch.stack([logps, entropy]) if entropies else logps[None]
        weights = torch.arange(readings.numel()).view_as(readings) / 10
        return readings.detach(), torch.autograd.grad((readings * weights).sum(), logits)[0]

    whole = found()
    monkeypatch.setattr(actor_critic, "CHUNK_NUMBERS", 3 * VOCABULARY)
    for ours, theirs in zip(found(), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_of_many_half_precision_logits_no_fp32_copy_waits_for_the_backward_pass(monkeypatch):
    monkeypatch.setattr(actor_critic, "CHUNK_NUMBERS", 4 * VOCABULARY)
    logits = torch.randn(64, VOCABULARY, dtype=torch.bfloat16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        read_tokens(logits, torch.zeros(64, dtype=torch.long), temperature=TEMPERATURE, entropies=True)
    assert sum(t.numel() for t in saved if t.dtype == torch.float32) < 4 * VOCABULARY


def test_entropy_of_logits_with_forbidden_tokens_is_a_number_with_a_gradient():
    logits = torch.tensor([[1.0, 1.0, -torch.inf]], requires_grad=True)
    _, entropy = read_tokens(logits, torch.tensor([0]), temperature=1.0, entropies=True)
    assert entropy.item() == pytest.approx(torch.tensor(2.0).log().item())
    entropy.sum().backward()
    assert logits.grad.isfinite().all()


def summed(readings) -> Tensor:
    """A loss in which every token's log-probability and value has a weight of its own."""
    weights = torch.linspace(0.5, 1.5, len(readings.logps))
    return (weights * readings.logps).sum() + (weights * readings.values**2).sum()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "mixtral"])
def test_every_trained_parameter_gets_a_gradient_in_every_forward(name):
    model = build(name)
    model.attach(Layout.forest)
    summed(model(batch_of())).backward()
    groups = model.parameter_groups()
    trained = [id(p) for group in groups.values() for p in group]
    assert sorted(trained) == sorted(id(p) for p in model.parameters())
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert {id(p) for p in groups["policy"]} == {id(p) for p in model.policy.parameters()}


def test_frozen_parameters_are_in_no_group():
    model = build()
    model.policy.get_input_embeddings().weight.requires_grad_(False)
    model.critic.score.weight.requires_grad_(False)
    groups = model.parameter_groups()
    for group, whole in ((groups["policy"], model.policy), (groups["value"], model.critic)):
        assert len(group) == len(list(whole.parameters())) - 1


def test_two_forwards_of_a_step_add_up():
    model, batches = build(), [batch_of(), batch_of(trees=random_trees(1))]
    model.attach(Layout.forest)
    expected: dict[str, Tensor] = {}
    for batch in batches:
        model.zero_grad()
        summed(model(batch)).backward()
        expected = {name: grad + expected.get(name, 0) for name, grad in gradients(model).items()}
    model.zero_grad()
    sum(summed(model(batch)) for batch in batches).backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-4)


def test_recomputed_activations_give_the_same_gradients():
    plain = build().train()
    plain.attach(Layout.forest)
    recomputed = copy.deepcopy(plain)
    recomputed.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    assert all(backbone.is_gradient_checkpointing for backbone in recomputed.backbones)
    for model in (plain, recomputed):
        summed(model(batch_of())).backward()
    ours, theirs = gradients(recomputed), gradients(plain)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)


def test_without_a_value_model_there_are_no_values():
    model = build(critic=False)
    read = model(batch_of(Layout.padded))
    assert read.values is None and not model.has_value
    assert model.parameter_groups()["value"] == []
    torch.testing.assert_close(read.logps, build()(batch_of(Layout.padded)).logps)


def test_reference_and_reward_are_models_of_their_own():
    model = build()
    assert not (model.has_own_reference or model.has_own_reward)
    for read in (Read.reference, Read.scores):
        with pytest.raises(NotImplementedError):
            model(batch_of(Layout.padded), read=read)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_no_log_probability_has_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        ActorCritic(tiny("llama"), None, temperature=temperature)


def test_a_value_model_starts_as_the_reward_it_comes_from():
    model = build()
    before = model(batch_of(Layout.padded)).values
    model.initialise_value(scale=0.3, centre=1.7)
    torch.testing.assert_close(model(batch_of(Layout.padded)).values, 0.3 * (before - 1.7), rtol=1e-5, atol=1e-6)


def test_the_scale_of_values_is_kept_exactly_by_bf16_and_by_a_checkpoint():
    model = build()
    model.initialise_value(scale=1 / 3, centre=-2 / 7)
    other = build()
    other.load_state_dict(model.to(torch.bfloat16).state_dict())
    assert other.value_affine == model.value_affine == (1 / 3, -2 / 7)


@pytest.mark.parametrize("wrong", [{"scale": 0.0}, {"scale": float("inf")}, {"centre": float("nan")}])
def test_a_value_scale_that_is_no_number_is_refused(wrong):
    with pytest.raises(ValueError, match="finite"):
        build().initialise_value(**wrong)


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "gemma3"])
def test_what_is_saved_is_safe_to_write_and_restores_every_reading(name, tmp_path):
    model = build(name)
    model.initialise_value(scale=0.5, centre=0.25)
    expected = model(batch_of(Layout.padded))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = build(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    found = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert found.missing_keys == found.unexpected_keys == []
    for ours, theirs in zip(other(batch_of(Layout.padded))[:2], expected[:2], strict=True):
        assert torch.equal(ours, theirs)


def test_of_every_tensor_only_what_is_saved_is_kept():
    model = build("llama_tied")
    every = torch.nn.Module.state_dict(model)
    assert "policy.lm_head.weight" in every
    assert model.kept(every).keys() == model.state_dict().keys() == every.keys() - {"policy.lm_head.weight"}
    assert torch.nn.Sequential(model).state_dict().keys() == {f"0.{name}" for name in model.state_dict()}


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_of_another_model_is_refused(strict):
    model = build()
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r"critic\.score\.weight is missing"):
        model.load_state_dict({n: t for n, t in state.items() if n != "critic.score.weight"}, strict=strict)
    with pytest.raises(RuntimeError, match=r"policy\.extra is unknown"):
        model.load_state_dict({**state, "policy.extra": torch.zeros(1)}, strict=strict)


def test_the_cache_is_on_while_generating_and_off_after():
    model, ids = build(), torch.tensor([[5, 6, 7, 8]])
    expected = tiny("llama").generate(ids, max_new_tokens=8, do_sample=False)
    model.attach(Layout.forest)
    model.config.use_cache = False
    with pytest.raises(KeyError), model.generating() as policy:
        assert policy.config.use_cache
        assert policy(ids).past_key_values is not None
        assert torch.equal(policy.generate(ids, max_new_tokens=8, do_sample=False), expected)
        raise KeyError
    assert not model.config.use_cache
    assert model.policy(ids).past_key_values is None


class SumTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs.pop("labels")
        return summed(model(inputs)) / 100


def trainer(folder, model: ActorCritic, steps: int) -> SumTrainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=1, learning_rate=1e-2, save_steps=2,
        remove_unused_columns=False, report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    rows = [batch_of(trees=random_trees(seed)) for seed in range(4)]
    return SumTrainer(model, arguments, data_collator=lambda got: {**got[0], "labels": None}, train_dataset=rows)


def test_the_trainer_saves_it_and_takes_it_up_again(tmp_path):
    whole, resumed = build("llama_tied"), build("llama_tied")
    for model in (whole, resumed):
        model.attach(Layout.forest)
        model.initialise_value(scale=0.7, centre=0.1)
    trainer(tmp_path / "whole", whole, 4).train()
    resumed.initialise_value(scale=1.0, centre=0.0)
    trainer(tmp_path / "resumed", resumed, 4).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.value_affine == (0.7, 0.1)
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert not torch.equal(theirs["critic.score.weight"], tiny_scorer("llama_tied", seed=1).score.weight)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-7)
