"""A base in 4 bits: what is rounded and what is not, LoftQ's start, the optimizer, and the memory that is counted."""

from importlib.util import find_spec

import pytest
import torch
from peft import TaskType

from align.config.errors import UserError
from align.config.schema import AdapterStart, ModelConfig, PeftConfig, PeftMethod, Precision
from align.models.adapters.quantised import compute_exactly, dequantised, quantisation
from align.models.load import load_model
from align.models.peft import add_adapter
from align.models.reward import load_reward_model
from align.models.shape import shape_of
from align.trainers.sft import build_sft_trainer
from tests.adapters.cells import Cell, outcome
from tests.launching import slow

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
QLORA = PeftConfig(method=PeftMethod.qlora, r=8)
IDS = torch.randint(5, 200, (2, 20), generator=torch.Generator().manual_seed(1))


def base(peft: PeftConfig = QLORA, *, load=load_model):
    rounded = quantisation(peft, bf16=False)
    model = load("tiny-base", ModelConfig(), torch.float32, seed=0, quantisation=rounded)
    compute_exactly(model)
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def packed(model) -> dict:
    return {name: p for name, p in model.named_parameters() if type(p).__name__ == "Params4bit"}


@needs_bitsandbytes
def test_linear_layers_are_nf4_and_what_reads_out_is_not():
    model = base()
    assert {name.split(".")[-2] for name in packed(model)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    states = [p.quant_state for p in packed(model).values()]
    assert all(state.quant_type == "nf4" and state.nested for state in states)
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.float32
    single = base(PeftConfig(method=PeftMethod.qlora, double_quantisation=False))
    assert not any(p.quant_state.nested for p in packed(single).values())


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("precision", "bf16", "expected"),
    [
        (Precision.auto, False, torch.float32),
        (Precision.auto, True, torch.bfloat16),
        (Precision.fp32, True, torch.float32),
        (Precision.bf16, False, torch.bfloat16),
    ],
)
def test_what_4_bits_are_computed_in(precision, bf16, expected):
    peft = PeftConfig(method=PeftMethod.qlora, compute_precision=precision)
    assert quantisation(peft, bf16=bf16).bnb_4bit_compute_dtype == expected


@needs_bitsandbytes
def test_the_base_made_whole_is_what_the_4_bits_stand_for():
    rounded, exact = base(), load_model("tiny-base", ModelConfig(), torch.float32, seed=0)
    expected = logits(rounded)
    whole = dequantised(rounded)
    assert not packed(whole) and not hasattr(whole.config, "quantization_config")
    assert (logits(whole) - expected).abs().max() < 1e-4
    assert (expected - logits(exact)).abs().max() > 0.1


@needs_bitsandbytes
def test_loftq_starts_nearer_to_the_exact_base():
    exact, rounded = load_model("tiny-base", ModelConfig(), torch.float32, seed=0), base()
    peft = PeftConfig(method=PeftMethod.qlora, r=32, init=AdapterStart.loftq)
    started = add_adapter(base(), peft, seed=0, zero3=False)

    def off(model) -> float:
        return (logits(model) - logits(exact)).abs().mean().item()

    assert off(started) < 0.8 * off(rounded)


@needs_bitsandbytes
def test_a_reward_model_keeps_its_head_in_fp32_and_trains_it():
    model = add_adapter(base(load=load_reward_model), QLORA, seed=0, zero3=False, task=TaskType.SEQ_CLS)
    head = [p for name, p in model.named_parameters() if "score.modules_to_save" in name]
    assert [p.dtype for p in head] == [torch.float32] and head[0].requires_grad
    model(input_ids=IDS, attention_mask=torch.ones_like(IDS), positions=torch.tensor([19, 39])).sum().backward()
    assert head[0].grad.abs().max() > 0


@needs_bitsandbytes
@pytest.mark.parametrize("stage", ["dpo", pytest.param("reward", marks=slow)])
def test_a_cell_works(stage, tmp_path):
    assert outcome(Cell("qlora", stage), tmp_path / "cell") == "works, forest"


@slow
@needs_bitsandbytes
@pytest.mark.parametrize(("paged", "maker"), [("true", "bitsandbytes"), ("false", "torch")])
def test_the_optimizer_is_bitsandbytes_paged_one_unless_told_otherwise(paged, maker, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "align.stages.sft.build_sft_trainer",
        lambda *args, **options: seen.append(trainer := build_sft_trainer(*args, **options)) or trainer,
    )
    outcome(Cell("qlora", "sft", packed=False), tmp_path / "cell", f"peft.paged_optimizer={paged}")
    optimizer = seen[0].optimizer.optimizer
    assert type(optimizer).__name__ == "AdamW" and type(optimizer).__module__.startswith(maker)
    assert all(p.dtype == torch.float32 for p in seen[0].model.parameters() if p.requires_grad)


def test_do_plan_counts_the_4_bits():
    shape = shape_of("tiny-base", ModelConfig(), QLORA)
    exact = shape_of("tiny-base", ModelConfig(), PeftConfig(method=PeftMethod.lora, r=8))
    assert shape.adapter == exact.adapter and exact.quantised == 0
    # Four layers of four squares of 128 and three sides of 128 x 320.
    assert shape.quantised == 4 * (4 * 128 * 128 + 3 * 128 * 320)


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_without_bitsandbytes_it_is_one_line():
    with pytest.raises(UserError, match=r"^peft=qlora needs bitsandbytes, which is not installed; pip install "):
        quantisation(QLORA, bf16=False)
