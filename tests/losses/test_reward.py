"""Each loss of a reward model against its plain formula, by value, by gradient and by what must not change it."""

import math
from dataclasses import replace
from itertools import combinations, pairwise, permutations

import pytest
import torch

from align.losses.reward import (
    OrdinalObjective,
    RegressionObjective,
    RewardObjective,
    TreeScores,
    bradley_terry_loss,
    centring_loss,
    cumulative_link_loss,
    pairs_in_trees,
    plackett_luce_loss,
    regression_loss,
)
from align.models.cut_points import ordered_cuts
from tests.oracles import sigmoid

CHOSEN, REJECTED = [1.5, -0.2, 3.0, 0.4], [0.5, 1.1, 3.0, -2.0]
LABELS, MARGINS = [1.0, 0.7, 0.5, 0.9], [0.0, 0.5, 0.0, 2.0]
SCORES = [0.3, -1.2, 2.0, 0.7]


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def pair_losses(chosen, rejected, p=LABELS, margin=MARGINS, smoothing=0.0):
    return bradley_terry_loss(*map(double, (chosen, rejected, p, margin)), label_smoothing=smoothing)


def ranking_loss(scores, ranks):
    one_tree = torch.zeros(len(scores), dtype=torch.long)
    return plackett_luce_loss(double(scores), double(ranks), one_tree, 1).item()


def plain_ranking_loss(scores, ranks):
    """Choice by choice, best first; tied completions out of the same risk set."""
    loss, choices = 0.0, 0
    for score, rank in zip(scores, ranks, strict=True):
        still_there = [s for s, r in zip(scores, ranks, strict=True) if r >= rank]
        loss -= math.log(math.exp(score) / sum(map(math.exp, still_there)))
        choices += len(still_there) > 1
    return loss / max(choices, 1)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_pair_loss_is_the_plain_formula(smoothing):
    expected = []
    for chosen, rejected, p, margin in zip(CHOSEN, REJECTED, LABELS, MARGINS, strict=True):
        won = sigmoid(chosen - rejected - margin)
        label = p * (1 - smoothing) + (1 - p) * smoothing
        expected.append(-label * math.log(won) - (1 - label) * math.log(1 - won))
    assert pair_losses(CHOSEN, REJECTED, smoothing=smoothing).tolist() == pytest.approx(expected, rel=1e-12)


def test_a_margin_must_be_passed_before_a_hard_pair_counts_as_won():
    assert pair_losses([2.0], [0.0], [1.0], [2.0]).item() == pytest.approx(math.log(2), rel=1e-12)
    assert pair_losses([2.0], [0.0], [1.0], [0.0]).item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-12)


@pytest.mark.parametrize(("p", "margin", "smoothing"), [(0.8, 0.0, 0.0), (0.8, 1.5, 0.0), (1.0, 1.5, 0.1), (0.5, 1, 0)])
def test_the_best_gap_is_the_margin_plus_the_labels_logit(p, margin, smoothing):
    label = p * (1 - smoothing) + (1 - p) * smoothing
    gap = double([margin + math.log(label / (1 - label))]).requires_grad_()
    bradley_terry_loss(gap, double([0]), double([p]), double([margin]), label_smoothing=smoothing).sum().backward()
    assert gap.grad.item() == pytest.approx(0, abs=1e-12)


def test_swapping_a_pair_its_label_and_its_margin_changes_nothing():
    swapped = pair_losses(REJECTED, CHOSEN, [1 - p for p in LABELS], [-m for m in MARGINS], 0.1)
    assert torch.allclose(pair_losses(CHOSEN, REJECTED, smoothing=0.1), swapped, rtol=1e-12)


@pytest.mark.parametrize("ranks", [[0, 1, 2, 3], [3, 1, 0, 2], [0, 0, 1, 2], [1, 0, 0, 0], [2, 0, 2, 1], [5, 5, 5, 5]])
def test_ranking_loss_is_the_plain_product_of_choices(ranks):
    assert ranking_loss(SCORES, ranks) == pytest.approx(plain_ranking_loss(SCORES, ranks), rel=1e-12)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_probabilities_of_all_rankings_add_up_to_one(k):
    total = sum(math.exp(-(k - 1) * ranking_loss(SCORES[:k], ranks)) for ranks in permutations(range(k)))
    assert total == pytest.approx(1, rel=1e-12)


def test_a_ranking_of_three_by_hand():
    # Odds 4 : 2 : 1, best first: 4/7 of all, then 2/3 of the rest.
    scores = [math.log(4), math.log(2), 0.0]
    assert ranking_loss(scores, [0, 1, 2]) == pytest.approx(-math.log(4 / 7 * 2 / 3) / 2, rel=1e-12)
    # The two best tie: both out of all three, then no choice is left.
    assert ranking_loss(scores, [0, 0, 1]) == pytest.approx(-math.log(4 / 7 * 2 / 7) / 2, rel=1e-12)
    # The two worst tie: the best out of three, then each out of the two.
    assert ranking_loss(scores, [0, 1, 1]) == pytest.approx(-math.log(4 / 7 * 2 / 3 * 1 / 3) / 3, rel=1e-12)


def test_a_ranking_of_two_is_bradley_terry_and_its_tie_is_a_label_of_one_half():
    for chosen, rejected in zip(CHOSEN, REJECTED, strict=True):
        hard = pair_losses([chosen], [rejected], [1.0], [0.0]).item()
        tied = pair_losses([chosen], [rejected], [0.5], [0.0]).item()
        assert ranking_loss([chosen, rejected], [0, 1]) == pytest.approx(hard, rel=1e-12)
        assert ranking_loss([rejected, chosen], [7, 3]) == pytest.approx(hard, rel=1e-12)
        assert ranking_loss([chosen, rejected], [0, 0]) == pytest.approx(tied, rel=1e-12)


def test_only_the_order_of_ranks_counts():
    assert ranking_loss(SCORES, [0, 3, 1, 3]) == ranking_loss(SCORES, [-5.5, 100, 0.25, 100])


# Three trees of 3, 1 and 2 completions, mixed up.
MIXED_SCORES, MIXED_TREE = [0.1, 2.0, -1.0, 0.5, 1.5, 0.0], [2, 0, 0, 1, 2, 0]
MIXED_RANKS = [0, 1, 0, 0, 1, 1]
BY_TREE = [([2.0, -1.0, 0.0], [1, 0, 1]), ([0.5], [0]), ([0.1, 1.5], [0, 1])]


def test_trees_of_different_sizes_in_any_order_are_as_if_alone():
    losses = plackett_luce_loss(double(MIXED_SCORES), double(MIXED_RANKS), torch.tensor(MIXED_TREE), 3)
    assert losses.tolist() == pytest.approx([plain_ranking_loss(*tree) for tree in BY_TREE], rel=1e-12)
    assert losses[1] == 0
    centring = centring_loss(double(MIXED_SCORES), torch.tensor(MIXED_TREE), 3)
    assert centring.tolist() == pytest.approx([(2 * sum(s) / len(s)) ** 2 for s, _ in BY_TREE], rel=1e-12)


def test_centring_a_pair_is_the_square_of_its_sum():
    centring = centring_loss(double([1.5, -0.25]), torch.tensor([0, 0]), 1)
    assert centring.item() == pytest.approx((1.5 - 0.25) ** 2, rel=1e-12)


def mixed(scores, p=(0.5, 0.5, 0.8), margin=(0, 0, 0.3)):
    return TreeScores(scores, double(MIXED_RANKS), torch.tensor(MIXED_TREE), double(p), double(margin))


def test_the_objective_takes_pairs_by_bradley_terry_and_larger_trees_by_plackett_luce():
    losses = RewardObjective(label_smoothing=0.1, centring_weight=0.01)(mixed(double(MIXED_SCORES)))
    own = [
        plain_ranking_loss(*BY_TREE[0]),
        0.0,
        pair_losses([0.1], [1.5], [0.8], [0.3], 0.1).item(),
    ]
    expected = [loss + 0.01 * (2 * sum(s) / len(s)) ** 2 for loss, (s, _) in zip(own, BY_TREE, strict=True)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)


def test_the_better_ranked_of_a_pair_is_the_chosen_one_wherever_it_stands():
    tree, p, margin = torch.tensor([0, 0, 1, 1]), double([0.9, 0.9]), double([0.5, 0.5])
    seen = TreeScores(double([2.0, 1.0, 1.0, 2.0]), double([0, 1, 1, 0]), tree, p, margin)
    first, second = RewardObjective()(seen).tolist()
    assert first == second == pytest.approx(pair_losses([2.0], [1.0], [0.9], [0.5]).item(), rel=1e-12)


def test_pairs_alone_and_rankings_alone_have_losses_and_gradients():
    for sizes in ([2, 2], [3, 4]):
        tree = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        scores = torch.linspace(-1, 1, sum(sizes)).requires_grad_()
        label = torch.tensor([0.9, 0.9])
        losses = RewardObjective()(TreeScores(scores, torch.arange(float(sum(sizes))), tree, label, 0 * label))
        losses.sum().backward()
        assert losses.dtype == torch.float32 and (losses > 0).all() and (scores.grad != 0).all()


def test_a_constant_on_a_trees_scores_changes_the_centring_only():
    shift = double([5.0, -3.0, 11.0])[torch.tensor(MIXED_TREE)]
    before, after = double(MIXED_SCORES), double(MIXED_SCORES) + shift
    objective = RewardObjective(label_smoothing=0.1)
    assert torch.allclose(objective(mixed(before)), objective(mixed(after)), rtol=1e-12)
    centred = RewardObjective(centring_weight=1.0)
    assert not torch.allclose(centred(mixed(before)), centred(mixed(after)), rtol=0.1)


def test_gradients_are_the_slopes():
    scores = double(MIXED_SCORES).requires_grad_()
    objective = RewardObjective(label_smoothing=0.1, centring_weight=0.3)
    assert torch.autograd.gradcheck(lambda s: objective(mixed(s)), (scores,))
    targets = double([1, 0, 4, 2, 2, 3])
    assert torch.autograd.gradcheck(lambda s: regression_loss(s, targets), (scores,))


def test_extreme_scores_stay_finite():
    scores = (1e4 * double(MIXED_SCORES)).requires_grad_()
    losses = RewardObjective(centring_weight=0.01)(mixed(scores))
    losses.sum().backward()
    assert torch.isfinite(losses).all() and torch.isfinite(scores.grad).all()


def test_half_precision_scores_are_taken_in_the_precision_of_the_labels():
    scores = double(MIXED_SCORES).bfloat16()
    assert torch.equal(RewardObjective()(mixed(scores)), RewardObjective()(mixed(scores.double())))


def test_regression_is_the_squared_error_of_each_completion():
    assert regression_loss(double([1.5, 4.0]), double([2.0, 1.0])).tolist() == [0.25, 9.0]


def test_pairs_in_trees_are_all_ordered_pairs_of_one_prompt_without_ties():
    better, worse = pairs_in_trees(double(MIXED_RANKS), torch.tensor(MIXED_TREE))
    expected = {
        (i, j) if MIXED_RANKS[i] < MIXED_RANKS[j] else (j, i)
        for i, j in combinations(range(6), 2)
        if MIXED_TREE[i] == MIXED_TREE[j] and MIXED_RANKS[i] != MIXED_RANKS[j]
    }
    assert sorted(zip(better.tolist(), worse.tolist(), strict=True)) == sorted(expected) and len(expected) == 3


@pytest.mark.parametrize("settings", [{"label_smoothing": 0.5}, {"label_smoothing": -0.1}, {"centring_weight": -1.0}])
def test_a_setting_without_meaning_is_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        RewardObjective(**settings)


CUTS = [-1.0, 0.5, 2.0]
LEVELS = (1.0, 2.0, 3.0, 5.0)


def above(scores, cuts=CUTS):
    return scores[:, None] - double(cuts)


def level_shares(score, cuts=CUTS):
    """P(level) of one score: differences of the logistic distribution function at the cuts."""
    below = [0.0, *(1 / (1 + math.exp(score - cut)) for cut in cuts), 1.0]
    return [high - low for low, high in pairwise(below)]


@pytest.mark.parametrize("level", range(4))
def test_ordinal_loss_is_the_logarithm_of_the_share_between_two_cuts(level):
    found = cumulative_link_loss(above(double(SCORES)), torch.full((4,), level))
    assert found.tolist() == pytest.approx([-math.log(level_shares(score)[level]) for score in SCORES], rel=1e-9)


def test_shares_of_all_levels_add_up_to_one_and_two_levels_are_logistic_regression():
    total = sum(torch.exp(-cumulative_link_loss(above(double(SCORES)), torch.full((4,), k))) for k in range(4))
    assert total.tolist() == pytest.approx([1.0] * 4, rel=1e-12)
    found = cumulative_link_loss(above(double(SCORES), [0.3]), torch.tensor([1, 0, 1, 0]))
    right = [sigmoid(s - 0.3) if up else 1 - sigmoid(s - 0.3) for s, up in zip(SCORES, [1, 0, 1, 0], strict=True)]
    assert found.tolist() == pytest.approx([-math.log(share) for share in right], rel=1e-12)


def rated(scores, ratings, cuts=CUTS):
    seen = mixed(scores)
    return replace(seen, ratings=double(ratings), above=above(scores, cuts) if cuts is not None else None)


RATINGS = [1.0, 5.0, 2.0, 3.0, 5.0, 2.0]


def test_gradients_of_the_ordinal_loss_are_the_slopes_in_scores_and_in_cuts():
    scores, free = double(MIXED_SCORES).requires_grad_(), double([-1.0, 0.2, -0.4]).requires_grad_()
    objective = OrdinalObjective(LEVELS)
    assert torch.autograd.gradcheck(lambda s, f: objective(rated_free(s, f)), (scores, free))


def rated_free(scores, free):
    return replace(mixed(scores), ratings=double(RATINGS), above=scores[:, None] - ordered_cuts(free))


def test_a_trees_loss_is_the_mean_over_its_completions_in_standard_units():
    regression = RegressionObjective(mean=3.0, std=2.0)(rated(double(MIXED_SCORES), RATINGS))
    errors = [(s - (r - 3) / 2) ** 2 for s, r in zip(MIXED_SCORES, RATINGS, strict=True)]
    assert regression.tolist() == pytest.approx(by_tree_means(errors), rel=1e-12)
    ordinal = OrdinalObjective(LEVELS)(rated(double(MIXED_SCORES), RATINGS))
    shares = [level_shares(s)[LEVELS.index(r)] for s, r in zip(MIXED_SCORES, RATINGS, strict=True)]
    assert ordinal.tolist() == pytest.approx(by_tree_means([-math.log(share) for share in shares]), rel=1e-9)


def by_tree_means(values):
    found = [[v for v, t in zip(values, MIXED_TREE, strict=True) if t == tree] for tree in range(3)]
    return [sum(one) / len(one) for one in found]


def test_scores_stand_for_ratings_in_the_unit_of_the_data():
    seen = rated(double(MIXED_SCORES), RATINGS)
    expected = [sum(share * level for share, level in zip(level_shares(s), LEVELS, strict=True)) for s in MIXED_SCORES]
    assert OrdinalObjective(LEVELS).predicted(seen).tolist() == pytest.approx(expected, rel=1e-9)
    assert RegressionObjective(3.0, 2.0).predicted(seen).tolist() == pytest.approx([3 + 2 * s for s in MIXED_SCORES])


def test_a_rating_between_two_levels_is_the_nearer_one():
    ratings = double([-9, 1, 1.4, 1.6, 3.9, 4.1, 5, 77])
    assert OrdinalObjective(LEVELS).level_of(ratings).tolist() == [0, 0, 0, 1, 2, 3, 3, 3]


def test_extreme_scores_of_any_level_stay_finite():
    scores = double([1e4, -1e4, 1e4, -1e4, 0.0, 1e4]).requires_grad_()
    losses = OrdinalObjective(LEVELS)(rated(scores, RATINGS))
    losses.sum().backward()
    assert torch.isfinite(losses).all() and torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("make", [lambda: RegressionObjective(2.0, 0.0), lambda: OrdinalObjective((2.0,))])
def test_ratings_that_are_all_the_same_are_refused(make):
    with pytest.raises(ValueError, match="all ratings are 2: there is nothing to learn"):
        make()
