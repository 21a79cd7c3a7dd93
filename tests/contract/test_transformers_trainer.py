"""What the pair trainer and the layouts rely on in transformers."""

import inspect

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, Trainer, TrainingArguments
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices

from align.config.schema import Layout
from align.models.layout import attach
from tests.models.families import FOREST, tiny


def test_num_items_counts_shift_labels_and_not_shifted_labels(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    trainer = Trainer(tiny("llama"), args)
    trainer.model_accepts_loss_kwargs = True
    labels = torch.ones(3, dtype=torch.long)
    batches = iter([{"labels": labels, "shift_labels": labels}, {"labels": labels[:2], "shift_labels": labels[:2]}])
    _, items = trainer.get_batch_samples(batches, 2, torch.device("cpu"))
    assert items.item() == 5


def test_the_hooks_we_override_have_the_parameters_we_expect():
    assert {"model", "inputs", "return_outputs", "num_items_in_batch"} <= set(
        inspect.signature(Trainer.compute_loss).parameters
    )
    assert {"model", "inputs", "prediction_loss_only", "ignore_keys"} <= set(
        inspect.signature(Trainer.prediction_step).parameters
    )
    assert list(inspect.signature(Trainer.log).parameters) == ["self", "logs", "start_time"]
    assert Trainer.loss_is_scaled_for_ga is None


def test_a_4d_integer_mask_reaches_the_layers_as_it_is():
    table = torch.tensor([[[[0, 3, 2, 2]]]])
    embeddings = torch.zeros(1, 7, 32)
    config = tiny("llama").config
    mask = create_causal_mask(config, embeddings, table, past_key_values=None, position_ids=None)
    assert mask is table


@pytest.mark.parametrize("name", FOREST)
def test_every_family_hands_our_attention_function_the_mask_and_the_scale(name):
    seen = []

    def spy(module, query, key, value, attention_mask, scaling=None, **kwargs):
        seen.append((attention_mask, scaling))
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register("align_spy", spy)
    AttentionMaskInterface.register("align_spy", lambda *args, **kwargs: None)
    model = tiny(name)
    model.set_attn_implementation("align_spy")
    table = torch.tensor([[[[0, 3, 2, 2]]]])
    types = model.config.to_dict().get("layer_types") or []
    mask = {"full_attention": table, "sliding_attention": table} if "sliding_attention" in types else table
    model(input_ids=torch.zeros(1, 7, dtype=torch.long), attention_mask=mask, use_cache=False)
    assert len(seen) == 2
    assert all(mask is table for mask, _ in seen)
    assert "logits_to_keep" in inspect.signature(type(model).forward).parameters


def test_logits_to_keep_takes_positions_in_any_order_and_repeated():
    model, ids = tiny("llama"), torch.tensor([[5, 6, 7, 8]])
    whole = model(input_ids=ids).logits[0]
    kept = model(input_ids=ids, logits_to_keep=torch.tensor([2, 0, 2])).logits[0]
    torch.testing.assert_close(kept, whole[[2, 0, 2]])


def test_restarting_positions_are_seen_as_packed_sequences():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    assert find_packed_sequence_indices(positions).tolist() == [[0, 0, 0, 1, 1, 2]]


def test_the_attention_function_is_not_saved_with_the_model(tmp_path):
    model = tiny("llama")
    attach(model, Layout.forest)
    model.save_pretrained(tmp_path)
    assert "align" not in (tmp_path / "config.json").read_text()
