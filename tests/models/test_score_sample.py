"""The sample of scores that a reward model carries: it passes for that model, and for nothing else."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from align.config.errors import UserError
from align.config.schema import Layout, ModelConfig
from align.data.forest import Tree, lay_out_scores
from align.models.load import resolve_model
from align.models.reward import centred_scores, load_reward_model, set_statistics
from align.models.score_sample import MOST, SAMPLE, check_sample, write_sample
from tests.models.test_layout import random_trees

TREES = random_trees([(9, 8, 5), (4, 3, 7), (5, 2, 12), (11, 6, 1), (3, 4, 4)])


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved reward model with a sample of its scores."""
    model = load_reward_model("tiny-sft", ModelConfig(), torch.float32, seed=3)
    set_statistics(model.config, 1.5, 0.25)
    model.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{resolve_model('tiny-sft')}/{file}", tmp_path)
    write_sample(tmp_path, TREES, ModelConfig())
    return tmp_path


def loaded(folder: Path, dtype: torch.dtype = torch.float32):
    return load_reward_model(str(folder), ModelConfig(), dtype, seed=0).eval()


def scorer(model):
    """All rows in one padded batch: another way than the one in which the sample was made."""

    def score(pairs):
        batch = lay_out_scores([Tree(prompt, (ids,)) for prompt, ids in pairs], Layout.padded, 0)
        with torch.no_grad():
            return centred_scores(model, batch).tolist()

    return score


def refusal(folder: Path, model, dtype: torch.dtype = torch.float32) -> str:
    with pytest.raises(UserError) as error:
        check_sample(str(folder), scorer(model), dtype)
    return str(error.value)


def test_the_sample_holds_what_transformers_own_forward_says_less_the_centre(folder):
    stored, model = json.loads((folder / SAMPLE).read_text()), loaded(folder)
    rows = stored["rows"]
    assert len(rows) == MOST
    pairs = [(list(tree.prompt), list(ids)) for tree in TREES for ids in tree.completions]
    assert [(row["prompt_ids"], row["completion_ids"]) for row in rows] == pairs[:MOST]
    with torch.no_grad():
        plain = [model(input_ids=torch.tensor([prompt + ids])).logits.item() for prompt, ids in pairs[:MOST]]
    assert [row["score"] for row in rows] == pytest.approx(np.array(plain) - 1.5, abs=1e-5)
    assert stored["std"] == pytest.approx(max(np.std([row["score"] for row in rows]), 0.25))


def test_the_spread_of_demonstrations_counts_where_the_sample_lies_close_together(folder):
    write_sample(folder, [TREES[0], TREES[0]], ModelConfig())
    close = json.loads((folder / SAMPLE).read_text())
    assert np.std([row["score"] for row in close["rows"]]) < 0.25 == close["std"]


def test_the_model_as_it_was_saved_passes(folder):
    assert check_sample(str(folder), scorer(loaded(folder)), torch.float32) is None


def test_a_score_in_bf16_is_held_to_what_bf16_can_do(folder):
    half = loaded(folder, torch.bfloat16)
    assert check_sample(str(folder), scorer(half), torch.bfloat16) is None
    assert "standard deviations off (at most 0.001)" in refusal(folder, half, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_head_another_centre_or_another_backbone_is_refused(folder, dtype):
    damages = [
        lambda model: torch.nn.init.normal_(model.score.weight),
        lambda model: set_statistics(model.config, 0.0, 0.25),
        lambda model: torch.nn.init.zeros_(model.base_model.layers[0].mlp.down_proj.weight),
    ]
    for damage in damages:
        model = loaded(folder, dtype)
        damage(model)
        assert f"{folder / SAMPLE} row " in refusal(folder, model, dtype)


def test_the_refusal_names_the_worst_row_and_both_scores(folder):
    rows = json.loads((folder / SAMPLE).read_text())["rows"]
    expected = [row["score"] for row in rows]
    found = [*expected]
    found[2], found[5] = found[2] + 0.5, found[5] - 1.0
    with pytest.raises(UserError) as error:
        check_sample(str(folder), lambda pairs: found, torch.float32)
    assert f"row 6: its score was {expected[5]:.5g} when the model was saved, is {found[5]:.5g} now" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_score_that_is_no_number_is_refused(folder):
    with pytest.raises(UserError, match=r"row 1: .* is nan now"):
        check_sample(str(folder), lambda pairs: [float("nan")] * len(pairs), torch.bfloat16)


def test_a_model_from_elsewhere_is_taken_on_trust_and_that_is_said(folder):
    (folder / SAMPLE).unlink()
    line = check_sample(str(folder), scorer(loaded(folder)), torch.float32)
    assert line == f"{folder}: no score_sample.json in it, so its scores are taken on trust"
    assert "taken on trust" in check_sample("someone/reward-model", scorer(None), torch.float32)


@pytest.mark.parametrize("content", ["{}", '{"std": 1, "rows": [{"score": 1}]}', "[]", '{"std": 1, "rows": []}'])
def test_a_file_that_is_no_sample_is_refused(folder, content):
    (folder / SAMPLE).write_text(content)
    assert "not a sample of scores" in refusal(folder, loaded(folder))


def test_a_model_without_finite_scores_gets_no_sample(folder):
    model = loaded(folder)
    torch.nn.init.constant_(model.score.weight, float("nan"))
    model.save_pretrained(folder)
    (folder / SAMPLE).unlink()
    with pytest.raises(UserError, match="the saved model's scores are no finite numbers"):
        write_sample(folder, TREES, ModelConfig())
    assert not (folder / SAMPLE).exists()
