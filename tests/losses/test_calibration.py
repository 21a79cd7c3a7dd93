"""Judging scores: against scipy, against hand-worked cases, and against sets whose calibration is known."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from align.config.errors import UserError
from align.losses.calibration import (
    accuracy,
    accuracy_by,
    brier_score,
    expected_calibration_error,
    pearson,
    preferred_side,
    quantile_edges,
    rating_figures,
    reliability_bins,
    right_answers,
    spearman,
    summary,
    wilson_interval,
)


def array(*values):
    return np.array(values, dtype=np.float64)


def pairs_with_truth(pairs, temperature, seed=0):
    """Scores of pairs whose labels were drawn with P(first is better) = sigmoid(gap / temperature)."""
    draw = np.random.default_rng(seed)
    first, second = draw.normal(size=(2, pairs)) * 1.5
    won = draw.random(pairs) < 1 / (1 + np.exp(-(first - second) / temperature))
    return np.where(won, first, second), np.where(won, second, first)


@pytest.mark.parametrize(("right", "count"), [(0, 1), (1, 1), (7, 10), (95, 100), (0, 40), (1234, 2000)])
def test_the_interval_is_scipys_wilson(right, count):
    expected = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right / count, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_accuracy_counts_equal_scores_half():
    found = accuracy(array(2, 1, 0, 5), array(1, 1, 3, -5))
    assert found.share == 2.5 / 4 and found.count == 4
    assert 0 <= found.low < found.share < found.high <= 1


def test_confidence_and_outcome_are_of_the_side_the_model_prefers():
    ln3 = math.log(3)
    confidence, outcome = preferred_side(array(ln3, 0, 1), array(0, ln3, 1), array(1, 0.9, 1))
    assert confidence.tolist() == pytest.approx([0.75, 0.75, 0.5])
    assert outcome.tolist() == pytest.approx([1, 0.1, 0.5])


def test_extreme_scores_have_confidence_one_without_a_warning():
    with np.errstate(all="raise", under="ignore"):
        confidence, outcome = preferred_side(array(1e5, -1e5), array(-1e5, 1e5), array(1, 1))
    assert confidence.tolist() == [1, 1] and outcome.tolist() == [1, 0]


def test_bins_hold_their_pairs_and_the_last_is_closed():
    bins = reliability_bins(array(0.5, 0.54, 0.62, 0.75, 1.0), array(1, 0, 1, 1, 0), bins=5)
    assert [(round(b.start, 9), round(b.end, 9), b.count) for b in bins] == [
        (0.5, 0.6, 2),
        (0.6, 0.7, 1),
        (0.7, 0.8, 1),
        (0.9, 1.0, 1),
    ]
    assert bins[0].confidence == pytest.approx(0.52) and bins[0].accuracy == 0.5
    assert (bins[0].low, bins[0].high) == wilson_interval(0.5, 2)


def test_calibration_error_and_brier_score_by_hand():
    confidence, outcome = array(0.6, 0.6, 0.9, 0.9), array(1, 0, 1, 1)
    assert expected_calibration_error(confidence, outcome) == pytest.approx((2 * 0.1 + 2 * 0.1) / 4)
    assert brier_score(confidence, outcome) == pytest.approx((0.4**2 + 0.6**2 + 2 * 0.1**2) / 4)
    assert brier_score(array(0.8), array(0.75)) == pytest.approx(0.75 * 0.2**2 + 0.25 * 0.8**2)


def test_brier_score_is_the_same_for_chosen_as_for_the_preferred_side():
    chosen, rejected = pairs_with_truth(200, 1.0)
    p_chosen = 1 / (1 + np.exp(rejected - chosen))
    of_preferred = brier_score(*preferred_side(chosen, rejected, np.ones(200)))
    assert of_preferred == pytest.approx(float(np.mean((p_chosen - 1) ** 2)), rel=1e-12)


def test_a_calibrated_set_has_no_calibration_error_and_one_too_sure_or_unsure_has():
    errors = {}
    for temperature in (1.0, 3.0, 1 / 3):
        chosen, rejected = pairs_with_truth(20_000, temperature)
        errors[temperature] = expected_calibration_error(*preferred_side(chosen, rejected, np.ones(20_000)))
    assert errors[1.0] < 0.015
    assert errors[3.0] > 0.1 and errors[1 / 3] > 0.1


def test_quantile_groups_are_equally_full_and_equal_values_stay_together():
    values = np.random.default_rng(1).permutation(100).astype(np.float64)
    groups = accuracy_by(np.ones(100), values, quantile_edges(values, 5))
    assert [(g.smallest, g.largest, g.count) for g in groups] == [(n, n + 19, 20) for n in range(0, 100, 20)]
    lumpy = array(0, 0, 0, 0, 0, 0, 0, 8)
    groups = accuracy_by(right_answers(lumpy, array(*[1] * 8)), lumpy, quantile_edges(lumpy, 4))
    assert [(g.smallest, g.largest, g.accuracy, g.count) for g in groups] == [(0, 0, 0, 7), (8, 8, 1, 1)]


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_scipys(ties):
    draw = np.random.default_rng(2)
    first, second = draw.normal(size=(2, 60))
    second = second + first
    if ties:
        first, second = np.round(first), np.round(second)
    assert pearson(first, second) == pytest.approx(stats.pearsonr(first, second).statistic, rel=1e-12)
    assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic, rel=1e-12)


def test_a_correlation_with_what_does_not_vary_is_not_a_number_made_up():
    assert pearson(array(1, 2, 3), array(0.1, 0.1, 0.1)) is None
    assert spearman(array(2, 2), array(1, 3)) is None


def judged(**changes):
    columns = {
        "chosen": array(2, 1, 0, 3, 1),
        "rejected": array(1, 2, -1, 0, 4),
        "p": array(1, 1, 1, 0.8, 0.5),
        "margin": array(0, 0, 1, 1, 0),
        "chosen_tokens": array(10, 10, 30, 5, 7),
        "rejected_tokens": array(5, 20, 30, 4, 9),
    }
    return summary(**(columns | changes))


def test_the_summary_judges_decided_pairs_and_calibrates_on_ties_too():
    found = judged()
    figures, tables = found["figures"], found["tables"]
    assert figures["accuracy"] == 3 / 4 and figures["pairs"] == 5 and figures["pairs_tied"] == 1
    assert (figures["accuracy_low"], figures["accuracy_high"]) == wilson_interval(0.75, 4)
    assert sum(row["count"] for row in tables["reliability"]) == 5
    for name in ("by_score_margin", "by_label_margin", "by_longer_side", "by_length_difference"):
        assert sum(row["count"] for row in tables[name]) == 4
    assert figures["score_margin"] == pytest.approx((1 - 1 + 1 + 3) / 4)


def test_the_summary_tells_longer_from_shorter_answers():
    found = judged()
    sides = [(row["smallest"], row["accuracy"], row["count"]) for row in found["tables"]["by_longer_side"]]
    assert sides == [(-1, 0, 1), (0, 1, 1), (1, 1, 2)]
    # Of the three unequal pairs the labels take the longer answer twice, the model each time.
    assert found["figures"]["labels_take_longer"] == pytest.approx(2 / 3)
    assert found["figures"]["model_takes_longer"] == 1
    tokens = [10, 10, 30, 5, 7, 5, 20, 30, 4, 9]
    assert found["figures"]["length_spearman"] == pytest.approx(
        stats.spearmanr([2, 1, 0, 3, 1, 1, 2, -1, 0, 4], tokens).statistic
    )


def test_completions_given_once_are_what_length_is_correlated_over():
    figures = judged(completions=(array(1, 2, 3, math.nan), array(1, 2, 4, 9)))["figures"]
    assert figures["length_spearman"] == 1
    assert figures["length_pearson"] == pytest.approx(stats.pearsonr([1, 2, 3], [1, 2, 4]).statistic)


def test_scores_that_are_not_finite_are_left_out_and_counted():
    found = judged(chosen=array(2, math.nan, 0, 3, 1), rejected=array(1, 2, -1, math.inf, 4))
    assert found["figures"]["pairs_not_finite"] == 2 and found["figures"]["accuracy"] == 1
    with pytest.raises(UserError, match=r"none of 5 .* \(5 with scores that are not finite"):
        judged(chosen=np.full(5, math.nan))
    with pytest.raises(UserError, match="5 ties"):
        judged(p=np.full(5, 0.5))


def test_the_summary_is_json_with_no_nan_and_leaves_out_what_is_not_defined():
    found = judged(chosen_tokens=np.full(5, 6), rejected_tokens=np.full(5, 6))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert not {"length_pearson", "length_spearman", "model_takes_longer"} & set(found["figures"])
    assert len(found["tables"]["by_length_difference"]) == 1


def test_scores_are_held_against_ratings_by_scipy_and_answers_without_one_do_not_count():
    generator = np.random.default_rng(0)
    ratings = generator.integers(1, 6, 40).astype(float)
    scores = ratings + generator.normal(size=40) * 2
    figures = rating_figures(np.append(scores, 99.0), np.append(ratings, np.nan), np.append(2 * scores, 99.0))
    assert figures["rated"] == 40
    assert figures["rating_pearson"] == pytest.approx(stats.pearsonr(scores, ratings)[0], rel=1e-9)
    assert figures["rating_spearman"] == pytest.approx(stats.spearmanr(scores, ratings)[0], rel=1e-9)
    assert figures["rating_rmse"] == pytest.approx(math.sqrt(sum((2 * scores - ratings) ** 2) / 40), rel=1e-9)
    assert figures["rating_spread"] == pytest.approx(math.sqrt(sum((ratings.mean() - ratings) ** 2) / 40), rel=1e-9)


def test_without_ratings_there_are_no_figures_and_without_a_unit_no_error():
    assert rating_figures(array(1, 2), array(np.nan, np.nan)) == {}
    assert set(rating_figures(array(1, 2), array(3, 3))) == {"rated", "rating_spread"}
