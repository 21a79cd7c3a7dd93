"""The formulas of memory: against the paper, DeepSpeed's own, meta models, and what autograd really keeps."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from align.config.schema import Layout, ModelConfig, PeftConfig, PeftMethod
from align.data.forest import Tree, lay_out
from align.distributed import memory
from align.distributed.memory import AUTOCAST, FP32, GIB, HALF, HALF_BASE, Batch, Need, Shape, Sharding
from align.distributed.peak import STATUS, Peak
from align.losses.logprobs import token_logps
from align.models.actor_critic import read_tokens
from align.models.layout import attach, plain_model, scored_logits
from align.models.peft import add_adapter
from align.models.shape import CHECKED, shape_of
from align.trainers.trees import turn_dropout_off
from tests.models.families import FOREST, tiny

FAMILIES = ["llama", "qwen3", "gemma3", "phi3", "olmo2"]
TREES = [Tree(range(3, 53), [range(3, 63), range(3, 43)]), Tree(range(3, 43), [range(3, 33), range(3, 63)])]
LORA = PeftConfig(method=PeftMethod.lora, r=4)


def billions(total: dict[str, float]) -> float:
    return sum(total.values()) / 1e9


# Model states.


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_states_are_those_of_figure_1_of_the_zero_paper(stage, gigabytes):
    # 7.5e9 parameters on 64 ranks, K = 12; the figure rounds to a tenth.
    found = memory.state_bytes(7_500_000_000, 0, Sharding(stage, False, 64), HALF)
    assert billions(found) == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_states_of_zero2_and_its_offload_are_what_deepspeed_estimates(ranks):
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as estimate

    parameters = 8_030_261_248
    plain, offload = Sharding(2, False, ranks), Sharding(2, True, ranks)
    # Theirs are of the moment of the step, when gradients are there in 16 and in 32 bits.
    step = sum(memory.state_bytes(parameters, 0, plain, HALF).values()) + memory.step_bytes(parameters, plain)
    assert step == pytest.approx(estimate(parameters, ranks, 1, cpu_offload=False)[1], rel=1e-9)
    left = sum(memory.state_bytes(parameters, 0, offload, HALF).values())
    assert left == estimate(parameters, ranks, 1, cpu_offload=True)[1]


def test_plain_pytorch_keeps_four_fp32_numbers_a_parameter():
    model = tiny("llama").train()
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.tensor([[3, 4, 5]])).logits.sum().backward()
    optimizer.step()
    parameters = list(model.parameters())
    moments = [v for state in optimizer.state.values() for name, v in state.items() if name != "step"]
    kept = sum(t.nbytes for t in [*parameters, *(p.grad for p in parameters), *moments])
    found = memory.state_bytes(model.num_parameters(), 0, Sharding(None, False, 1), FP32)
    assert sum(found.values()) == kept


def test_frozen_weights_have_no_gradients_and_no_moments():
    plain = memory.state_bytes(10, 1000, Sharding(None, False, 1), HALF_BASE)
    assert plain == {"weights": 4 * 10 + 2 * 1000, "gradients": 40, "optimizer": 80}
    zero3 = memory.state_bytes(10, 1000, Sharding(3, False, 2), HALF)
    assert zero3 == {"weights": 2 * 1010 / 2, "gradients": 10, "optimizer": 12 * 10 / 2}


def test_offloaded_states_are_in_main_memory_and_not_on_the_device():
    sharding = Sharding(3, True, 4)
    assert sum(memory.state_bytes(1000, 0, sharding, HALF).values()) == 0
    assert memory.offloaded_bytes(1000, 0, sharding, HALF) == (4 + 8 + 4 + 2 + 2) * 1000 / 4
    assert memory.offloaded_bytes(1000, 0, replace(sharding, offload=False), HALF) == 0


# Shapes.


@pytest.mark.parametrize("name", list(FOREST))
def test_the_shape_on_the_meta_device_is_that_of_the_real_model(name, tmp_path):
    model = tiny(name)
    model.config.save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path), ModelConfig())
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (shape.layers, shape.hidden, shape.vocabulary) == (2, 32, 64)
    assert shape.checked == (model.config.model_type in CHECKED)
    adapted = shape_of(str(tmp_path), ModelConfig(), LORA)
    trained = add_adapter(model, LORA, seed=0, zero3=False)
    assert adapted.trained == sum(p.numel() for p in trained.parameters() if p.requires_grad)
    assert adapted.frozen == shape.parameters


# Activations, held against what autograd keeps.


class Kept:
    """Bytes of all tensors that a backward pass will need, weights left out, each storage once."""

    def __init__(self, model: torch.nn.Module):
        own = [*model.parameters(), *model.buffers()]
        self.own = {tensor.untyped_storage()._cdata for tensor in own}
        self.storages: dict[int, torch.UntypedStorage] = {}

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.storages[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


@contextmanager
def kept_by(model: torch.nn.Module) -> Iterator[Kept]:
    kept = Kept(model)
    with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor):
        yield kept


def batch_of(laid: dict[str, torch.Tensor], layout: Layout) -> Batch:
    rows, width = laid["input_ids"].shape
    forest = layout is Layout.forest
    squares = sum(int(tree.sum()) ** 2 for tree in laid["forest_table"][0, 0]) if forest else rows * width**2
    return Batch(rows * width, squares, forest=forest, scored=len(laid["targets"]))


def trainable(
    name: str, form: memory.Form, *, peft: PeftConfig | None, layout: Layout, checkpointing: bool
) -> PreTrainedModel:
    model = tiny(name).to(torch.bfloat16 if form.weight == 2 else torch.float32)
    if peft:
        model = add_adapter(model, peft, seed=0, zero3=form is HALF)
    turn_dropout_off(model)
    attach(model, layout)
    plain = plain_model(model.train())
    plain.config.use_cache = False
    if checkpointing:
        if peft:
            model.enable_input_require_grads()
        plain.gradient_checkpointing_enable({"use_reentrant": False})
    return model


FORMS = {"fp32": FP32, "bf16 as under DeepSpeed": HALF, "bf16 by autocast": AUTOCAST}


@pytest.mark.parametrize("layout", [Layout.forest, Layout.padded])
@pytest.mark.parametrize("form", list(FORMS.values()), ids=list(FORMS))
@pytest.mark.parametrize("name", FAMILIES)
def test_activations_are_what_autograd_keeps(name, form, layout, tmp_path):
    model = trainable(name, form, peft=None, layout=layout, checkpointing=False)
    model.config.save_pretrained(tmp_path)
    shape, laid = shape_of(str(tmp_path), ModelConfig()), lay_out(TREES, layout, 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=form is AUTOCAST), kept_by(model) as kept:
        scored_logits(model, laid)
    counted = memory.activation_bytes(shape, batch_of(laid, layout), form, checkpointing=False)
    counted += memory.weight_copy_bytes(shape, form)
    # Norms of gemma3 and olmo2 in bf16 keep one more copy.
    allowed = 0.18 if name in ("gemma3", "olmo2") and form is HALF else 0.15
    assert counted == pytest.approx(kept.bytes, rel=allowed)


@pytest.mark.parametrize("layout", [Layout.forest, Layout.padded])
@pytest.mark.parametrize("form", [FP32, HALF], ids=["fp32", "bf16"])
def test_activations_with_checkpointing_are_the_inputs_of_layers(form, layout, tmp_path):
    model = trainable("llama", form, peft=None, layout=layout, checkpointing=True)
    model.config.save_pretrained(tmp_path)
    shape, laid = shape_of(str(tmp_path), ModelConfig()), lay_out(TREES, layout, 0)
    with kept_by(model) as kept:
        scored_logits(model, laid)
    batch = batch_of(laid, layout)
    whole = memory.activation_bytes(shape, batch, form, checkpointing=True)
    # The layer that is computed again is not there yet when the forward pass ends.
    assert whole - memory.layer_bytes(shape, batch, form) == pytest.approx(kept.bytes, rel=0.15)
    assert whole < memory.activation_bytes(shape, batch, form, checkpointing=False)


ADAPTED = {
    "lora": LORA,
    "ia3": PeftConfig(method=PeftMethod.ia3, target_modules=None),
    "prefix": PeftConfig(method=PeftMethod.prefix, virtual_tokens=40),
    "prompt": PeftConfig(method=PeftMethod.prompt, virtual_tokens=40),
    "ptuning": PeftConfig(method=PeftMethod.ptuning, virtual_tokens=40),
}
PLACES = [(name, layout) for name in ("lora", "ia3") for layout in (Layout.forest, Layout.padded)]
PLACES += [(name, Layout.padded) for name in ("prefix", "prompt", "ptuning")]


@pytest.mark.parametrize("form", [FP32, HALF, HALF_BASE], ids=["fp32", "bf16 under DeepSpeed", "bf16 by autocast"])
@pytest.mark.parametrize(("name", "layout"), PLACES, ids=[f"{name}, {layout.value}" for name, layout in PLACES])
def test_activations_of_a_model_with_adapters(name, layout, form, tmp_path):
    peft = ADAPTED[name]
    model = trainable("llama", form, peft=peft, layout=layout, checkpointing=False)
    plain_model(model).config.save_pretrained(tmp_path)
    shape, laid = shape_of(str(tmp_path), ModelConfig(), peft), lay_out(TREES, layout, 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=form is HALF_BASE), kept_by(model) as kept:
        scored_logits(model, laid)
    batch = memory.with_virtual_tokens(shape, batch_of(laid, layout))
    counted = memory.activation_bytes(shape, batch, form, checkpointing=False)
    assert counted == pytest.approx(kept.bytes, rel=0.1)


def test_virtual_tokens_are_positions_of_each_row_and_of_a_prefix_keys_and_values_alone():
    batch, shape = Batch(tokens=3 * 100, squares=3 * 100**2, scored=50), replace(LOGITS_SHAPE, virtual=20)
    assert memory.with_virtual_tokens(LOGITS_SHAPE, batch) is batch
    # Of rows with virtual tokens all logits are made: those wanted are counted from the end.
    expected = Batch(tokens=3 * 120, squares=3 * 120**2, scored=50, projected=3 * 120)
    assert memory.with_virtual_tokens(shape, batch) == expected
    prefix = memory.with_virtual_tokens(replace(shape, prefix=True), batch)
    assert prefix == replace(batch, squares=3 * 100 * 120, cached=3 * 20)


# Logits, held against a profile of the allocator.


def peak_of(run) -> int:
    """The most bytes that were allocated at a time during `run`, on top of those before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    now = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


VOCABULARY, SCORED = 2000, 300
LOGITS_SHAPE = Shape(0, 0, 0, 1, 1, 1, 1, 1, 1, VOCABULARY)


@pytest.mark.parametrize("form", [FP32, HALF], ids=["fp32", "bf16"])
@pytest.mark.parametrize("gradients", [True, False])
def test_whole_logits_peak_as_counted(form, gradients):
    dtype = torch.float32 if form is FP32 else torch.bfloat16
    hidden = torch.randn(SCORED, 8, dtype=dtype, requires_grad=gradients)
    head, targets = torch.randn(VOCABULARY, 8, dtype=dtype), torch.randint(0, VOCABULARY, (SCORED,))

    def run() -> None:
        logps = token_logps(hidden @ head.T, targets)
        if gradients:
            logps.sum().backward()

    counted = memory.whole_logits_bytes(LOGITS_SHAPE, Batch(SCORED, 0, scored=SCORED), form, gradients=gradients)
    assert counted == pytest.approx(peak_of(run), rel=0.15)


@pytest.mark.parametrize("form", [FP32, HALF], ids=["fp32", "bf16"])
def test_chunked_logits_peak_as_counted(form, monkeypatch):
    monkeypatch.setattr("align.models.actor_critic.CHUNK_NUMBERS", 20 * VOCABULARY)
    monkeypatch.setattr(memory, "CHUNK_BYTES", 4 * 20 * VOCABULARY)
    dtype = torch.float32 if form is FP32 else torch.bfloat16
    hidden = torch.randn(SCORED, 8, dtype=dtype, requires_grad=True)
    head, targets = torch.randn(VOCABULARY, 8, dtype=dtype), torch.randint(0, VOCABULARY, (SCORED,))

    def run() -> None:
        read_tokens(hidden @ head.T, targets, temperature=1.0, entropies=False)[0].sum().backward()

    counted = memory.chunked_logits_bytes(LOGITS_SHAPE, Batch(SCORED, 0, scored=SCORED), form)
    assert counted == pytest.approx(peak_of(run), rel=0.25)


# Sums.


def test_a_need_peaks_at_its_largest_moment():
    need = Need({"weights": 10.0}, {"a": {"x": 1.0, "y": 5.0}, "b": {"x": 4.0}})
    assert (need.peak, need.peak_moment) == (16.0, "a")
    assert Need({"weights": 10.0}).peak == 10.0


def test_a_run_fits_where_a_tenth_is_left_and_is_tight_where_less_is():
    memory_ = 11 * GIB
    sizes = {9.0: "fits", 9.01: "tight", 10.0: "tight", 10.01: "does not fit"}
    assert {size: memory.verdict(size * GIB, memory_) for size in sizes} == sizes


def test_ddp_keeps_a_second_copy_of_the_gradients_and_zero_its_bucket():
    shape = replace(LOGITS_SHAPE, parameters=1000, largest=300)
    assert memory.buffer_bytes(shape, Sharding(None, False, 2), FP32, lazy=False) == 4000
    assert memory.buffer_bytes(shape, Sharding(None, False, 1), FP32, lazy=False) == 0
    assert memory.buffer_bytes(shape, Sharding(2, False, 2), HALF, lazy=False) == 2 * 2 * 5e8
    assert memory.buffer_bytes(shape, Sharding(2, False, 2), FP32, lazy=True) == 4 * 1000
    assert memory.buffer_bytes(shape, Sharding(3, False, 2), HALF, lazy=True) == 2 * (1000 + 1000)


def test_a_causal_model_of_transformers_has_the_parameters_that_are_counted():
    shape = shape_of("tiny-sft", ModelConfig())
    from align.models.load import resolve_model

    loaded = AutoModelForCausalLM.from_pretrained(resolve_model("tiny-sft"))
    assert shape.parameters == loaded.num_parameters()


def test_the_peak_of_a_process_is_counted_from_its_beginning_and_not_from_an_earlier_one():
    if not STATUS.exists():
        pytest.skip("no /proc here")
    large = bytearray(200 * 2**20)
    del large
    quiet = Peak.begin("cpu").taken()
    counting = Peak.begin("cpu")
    held = bytearray(64 * 2**20)
    held[:: 2**12] = b"x" * len(held[:: 2**12])
    taken = counting.taken()
    assert 60 * 2**20 < taken["peak_bytes"] < 100 * 2**20 and quiet["peak_bytes"] < 20 * 2**20
    assert taken["host_bytes"] >= taken["peak_bytes"] + counting.before - 2**20
