"""Bottleneck adapters under PEFT's own interface, against the formulas of their papers."""

import copy

import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model

from align.config.errors import UserError
from align.config.schema import ModelConfig, PeftConfig, PeftMethod, Placement
from align.models.adapters.bottleneck import BottleneckConfig, places
from align.models.adapters.configs import adapter_config
from align.models.load import load_model
from align.models.peft import add_adapter

IDS = torch.randint(5, 200, (2, 20), generator=torch.Generator().manual_seed(1))


def base():
    return load_model("tiny-base", ModelConfig(), torch.float32, seed=0).eval()


def settings(placement: Placement = Placement.houlsby, **more) -> PeftConfig:
    return PeftConfig(method=PeftMethod.bottleneck, r=4, placement=placement, target_modules=None, **more)


def drawn(model, seed: int):
    """The same adapter with ways up that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bottleneck_" in name and parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("placement", Placement)
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_does(placement):
    adapted = add_adapter(base(), settings(placement), seed=0, zero3=False)
    assert torch.equal(logits(adapted), logits(base()))
    assert (logits(drawn(adapted, 0)) - logits(base())).abs().max() > 1e-2
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), logits(base()))


def test_layers_sit_where_the_papers_have_them():
    model = base()
    assert set(places(model, Placement.houlsby)) == {"mlp", "o_proj"}
    assert places(model, Placement.pfeiffer) == places(model, Placement.parallel) == ["mlp"]
    layers, d = model.config.num_hidden_layers, model.config.hidden_size
    each = 2 * d * 4 + d + 4
    for placement, count in ((Placement.houlsby, 2), (Placement.pfeiffer, 1), (Placement.parallel, 1)):
        trained, _ = add_adapter(base(), settings(placement), seed=0, zero3=False).get_nb_trainable_parameters()
        assert trained == count * layers * each


@pytest.mark.parametrize("placement", [Placement.pfeiffer, Placement.parallel])
def test_a_layer_computes_the_formula(placement):
    adapted = drawn(add_adapter(base(), settings(placement), seed=0, zero3=False), 3)
    layer = adapted.get_base_model().model.layers[0].mlp
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    x = torch.randn(3, 5, adapted.config.hidden_size)
    with torch.no_grad():
        given = layer.base_layer(x)
        inner = x if placement is Placement.parallel else given
        expected = given + torch.nn.functional.gelu(inner @ down.weight.T + down.bias) @ up.weight.T + up.bias
        assert torch.allclose(layer(x), expected, atol=1e-6)


def test_saved_adapters_load_under_names_and_are_switched_by_peft(tmp_path):
    expected = {}
    for name, seed in (("kind", 1), ("terse", 2)):
        trained = drawn(add_adapter(base(), settings(), seed=0, zero3=False), seed)
        expected[name] = logits(trained)
        trained.save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(base(), str(tmp_path / "kind"), adapter_name="kind")
    model.load_adapter(str(tmp_path / "terse"), adapter_name="terse")
    for name in ("kind", "terse", "kind"):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected[name])
    model.delete_adapter("kind")
    model.set_adapter("terse")
    assert torch.equal(logits(model), expected["terse"])


def test_only_the_active_adapter_is_trained():
    config = adapter_config(base(), settings(), TaskType.CAUSAL_LM)
    model = get_peft_model(base(), config, adapter_name="one")
    model.add_adapter("two", copy.deepcopy(config))
    model.set_adapter("two")
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"two"}


def test_merging_is_refused_by_peft_itself():
    with pytest.raises(ValueError, match="cannot be merged"):
        add_adapter(base(), settings(), seed=0, zero3=False).merge_and_unload()


def test_all_linear_is_no_place_for_layers():
    with pytest.raises(UserError, match=r"^peft.target_modules=all-linear: bottleneck layers sit where"):
        add_adapter(base(), PeftConfig(method=PeftMethod.bottleneck), seed=0, zero3=False)


def test_named_places_take_the_place_of_the_papers():
    named = PeftConfig(method=PeftMethod.bottleneck, r=4, target_modules=["down_proj"])
    adapted = add_adapter(base(), named, seed=0, zero3=False)
    assert isinstance(adapted.active_peft_config, BottleneckConfig)
    wrapped = {name.split(".")[-3] for name, p in adapted.named_parameters() if p.requires_grad}
    assert wrapped == {"bottleneck_down", "bottleneck_up"}
    assert all("down_proj" in name for name, p in adapted.named_parameters() if p.requires_grad)
