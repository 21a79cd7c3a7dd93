"""Training on ratings: held-out errors fall, figures are those of plain formulas, cut points are learnt and kept."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import TaskType
from scipy import stats
from transformers.trainer_utils import SaveStrategy

from align.config.schema import Layout, PeftConfig, PeftMethod, RewardStage, RewardTarget
from align.losses.reward import RewardObjective
from align.models.cut_points import add_cut_points, cut_parameter, cut_points, drop_cut_points
from align.models.peft import add_adapter
from align.models.reward import as_ratings, ratings_of, set_ratings
from align.trainers.ratings import all_ratings, level_counts, objective_of, rating_scale
from tests.models.families import VOCABULARY
from tests.models.scorers import tiny_scorer
from tests.trainers.test_rewards import plain_scores, trainer


def rated_rows(n: int, seed: int) -> Dataset:
    """Trees of one to three answers; rating 1 to 5: 0, 2 ... 8 of its tokens are the last one."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        ratings = generator.permutation(5)[: 1 + i % 3] + 1
        answers = [
            generator.permutation(np.where(np.arange(8) < 2 * (rating - 1), VOCABULARY - 1, 3)).tolist() + [5]
            for rating in ratings
        ]
        scores = [float(rating) for rating in ratings]
        row = {"prompt_ids": generator.integers(3, VOCABULARY, 4).tolist(), "completion_ids": answers}
        rows.append(row | {"ranks": [-s for s in scores], "p": 1.0, "margin": 0.0, "scores": scores})
    return Dataset.from_list(rows)


def built(target: RewardTarget, tmp_path, model=None, *, layout=Layout.forest, **settings):
    rows, held_out = rated_rows(64, 0), rated_rows(24, 1)
    model = model or tiny_scorer("llama")
    objective = objective_of(RewardStage(objective=target), rows)
    if target is RewardTarget.ordinal:
        add_cut_points(model, level_counts(objective, rows))
    return trainer(model, rows, tmp_path, layout=layout, objective=objective, held_out=held_out, **settings)


@pytest.mark.parametrize("target", [RewardTarget.regression, RewardTarget.ordinal])
def test_training_lowers_the_error_on_held_out_rows_below_that_of_the_mean(target, tmp_path):
    made = built(target, tmp_path, max_steps=60, learning_rate=3e-3, per_device_train_batch_size=16)
    before = made.evaluate()
    made.train()
    after = made.evaluate()
    spread = all_ratings(made.eval_dataset).std()
    assert after["eval_rating/rmse"] < 0.6 * spread < before["eval_rating/rmse"]
    assert after["eval_loss"] < 0.6 * before["eval_loss"]
    assert after["eval_rating/pearson"] > 0.8


@pytest.mark.parametrize("layout", [Layout.forest, Layout.sequences, Layout.padded])
@pytest.mark.parametrize("target", list(RewardTarget))
def test_figures_are_those_of_plain_forwards_in_every_layout(target, layout, tmp_path):
    scores = torch.cat(plain_scores(tiny_scorer("llama"), rated_rows(24, 1))).double().detach()
    made = built(target, tmp_path, layout=layout)
    figures, ratings = made.evaluate(), all_ratings(made.eval_dataset)
    assert figures["eval_rating/pearson"] == pytest.approx(stats.pearsonr(scores.numpy(), ratings)[0], abs=1e-5)
    scale = rating_scale(made.objective, cut_points(made.model))
    if target is RewardTarget.comparison:
        assert scale is None and "eval_rating/rmse" not in figures
    else:
        error = np.sqrt(np.mean((as_ratings(scale, scores).numpy() - ratings) ** 2))
        assert figures["eval_rating/rmse"] == pytest.approx(error, rel=1e-4)


def test_rows_without_ratings_count_in_no_figure_of_ratings(tmp_path):
    rows = rated_rows(12, 0).remove_columns("scores")
    assert np.isnan(all_ratings(rows)).all()
    figures = trainer(tiny_scorer("llama"), rows, tmp_path, objective=RewardObjective(), held_out=rows).evaluate()
    assert "eval_accuracy" in figures and not any("rating" in name for name in figures)


def test_cut_points_start_at_the_shares_of_the_levels_and_are_learnt_in_order_at_their_own_rate(tmp_path):
    made = built(RewardTarget.ordinal, tmp_path, max_steps=10, learning_rate=1e-6)
    shares = np.cumsum(np.bincount(all_ratings(made.train_dataset).astype(int))[1:-1]) / len(
        all_ratings(made.train_dataset)
    )
    start = cut_points(made.model)
    assert start == pytest.approx(np.log(shares / (1 - shares)).tolist(), abs=1e-5)
    made.train()
    after = np.array(cut_points(made.model))
    assert (np.diff(after) > 0).all() and np.abs(after - start).max() > 0.01
    assert np.abs(after - start).max() < 0.5


def test_an_adapter_trains_cut_points_and_a_saved_model_has_none(tmp_path):
    peft = PeftConfig(method=PeftMethod.lora, r=2)
    model = add_adapter(tiny_scorer("llama"), peft, seed=0, zero3=False, task=TaskType.SEQ_CLS)
    made = built(RewardTarget.ordinal, tmp_path, model, max_steps=2)
    assert cut_parameter(model).requires_grad
    before = cut_points(model)
    made.train()
    assert cut_points(model) != before
    drop_cut_points(model)
    assert cut_points(model) is None and not any("cuts" in name for name in model.state_dict())


def test_training_goes_on_from_a_checkpoint_with_its_cut_points(tmp_path):
    settings = {"max_steps": 4, "save_steps": 2, "lr_scheduler_type": "linear"}
    whole = built(RewardTarget.ordinal, tmp_path, **settings)
    whole.args.save_strategy = SaveStrategy.STEPS
    whole.train()
    again = built(RewardTarget.ordinal, tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert cut_points(again.model) == pytest.approx(cut_points(whole.model), abs=1e-6)


def test_the_unit_of_ratings_travels_with_the_config_and_leaves_with_another_training():
    config = tiny_scorer("llama").config
    set_ratings(config, {"mean": 3.0, "std": 2.0})
    assert ratings_of(config, torch.tensor([0.5])).tolist() == [4.0]
    assert type(config).from_dict(config.to_dict()).reward_ratings == {"mean": 3.0, "std": 2.0}
    set_ratings(config, None)
    assert ratings_of(config, torch.tensor([0.5])) is None and "reward_ratings" not in config.to_dict()


def test_more_scores_than_levels_are_sent_to_regression():
    rows = rated_rows(30, 0).map(lambda row, i: {"scores": [s + i / 100 for s in row["scores"]]}, with_indices=True)
    with pytest.raises(ValueError, match=r"different scores, .* Set stages.reward.objective=regression"):
        objective_of(RewardStage(objective=RewardTarget.ordinal), rows)


def test_the_unit_is_the_mean_and_the_spread_of_the_answers_to_train_on():
    rows = rated_rows(30, 0)
    ratings = [score for scores in rows["scores"] for score in scores]
    objective = objective_of(RewardStage(objective=RewardTarget.regression), rows)
    assert (objective.mean, objective.std) == pytest.approx((np.mean(ratings), np.std(ratings)))
