"""Losses of a reward model: one loss a tree (a prompt and its completions), from a score for each completion.

Three objectives, each a callable on `TreeScores`: `RewardObjective` learns which completion is better,
`RegressionObjective` and `OrdinalObjective` learn the ratings that the data has (larger is better).

Symbols: a score r(x, y) is the reward model's number for completion y of prompt x; in `ranks` the smaller is the
better and equal is a tie; `tree` holds the index of each completion's tree, 0 to trees - 1, in any order; `p` is the
probability that the completion called chosen is better (1 = a hard label). Scores are fp32 or fp64, never half: the
loss of a pair that is far apart is a small difference of large numbers.

Shapes: S completions, in trees of any sizes. What compares completions of one prompt does not change when a constant
is added to all its scores; `centring_loss`, `regression_loss` and `cumulative_link_loss` are what fix that constant.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from align.config.errors import UserError


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, p: Tensor, margin: Tensor, *, label_smoothing: float
) -> Tensor:
    """Cross-entropy of the label against P(chosen is better) = sigmoid(chosen - rejected - margin).

    Shapes: all (pairs,). `margin` is a handicap of the chosen completion in logits, wherever the label comes from: the
    loss is smallest at chosen - rejected = margin + logit(p), p after smoothing. So at p = 1 the gap must pass the
    margin before the pair counts as won; at p < 1 the margin widens the gap that p alone asks for; and a tie
    (p = 0.5) is fitted by a gap of exactly the margin, which is why a tie should have none. Swapping a pair means
    p -> 1 - p and margin -> -margin.
    Source: Touvron et al. 2023 (Llama 2), arXiv:2307.09288, eq. 2; without margin Ouyang et al. 2022, arXiv:2203.02155,
    eq. 1 for K = 2; smoothing as in `align.losses.pairwise`.
    """
    label = p * (1 - label_smoothing) + (1 - p) * label_smoothing
    gap = chosen - rejected - margin
    return -label * F.logsigmoid(gap) - (1 - label) * F.logsigmoid(-gap)


def plackett_luce_loss(scores: Tensor, ranks: Tensor, tree: Tensor, trees: int) -> Tensor:
    """Negative log-likelihood of each tree's ranking, a mean over its choices.

    The ranking is read as choices, best first: each completion is chosen with softmax probability out of those that
    are not ranked before it. Tied completions are all chosen out of the same ones, each other included (Breslow), so
    a tie draws its scores together. The loss is divided by the number of choices that had an alternative: K - 1, or K
    where the last place is shared. So a tree weighs like a pair whatever its K, a tree of two is Bradley-Terry, and a
    tie of two is Bradley-Terry at p = 0.5. A tree of one, or of none here, has no choice and the loss 0.
    Shapes: scores, ranks and tree (S,); returns (trees,). Takes memory for S x S numbers.
    Source: Plackett 1975, Applied Statistics 24; ties: Breslow 1974, Biometrics 30.
    """
    same_tree = tree[:, None] == tree[None, :]
    open_to_choice = same_tree & (ranks[None, :] >= ranks[:, None])
    others = scores[None, :].masked_fill(~open_to_choice, -torch.inf)
    choice_nll = torch.logsumexp(others, dim=1) - scores
    had_alternative = (open_to_choice.sum(1) > 1).to(scores.dtype)
    return _tree_sums(choice_nll, tree, trees) / _tree_sums(had_alternative, tree, trees).clamp(min=1)


def centring_loss(scores: Tensor, tree: Tensor, trees: int) -> Tensor:
    """Squared double of each tree's mean score, (2/K sum r)^2: draws scores to a mean of zero.

    For a pair it is (r_chosen + r_rejected)^2, TRL's term; the mean instead of the sum, so that a weight means the
    same for every K. Shapes: scores and tree (S,); returns (trees,).
    Source: Eisenstein et al. 2023, arXiv:2312.09244, eq. 2, for pairs.
    """
    completions = _tree_sums(torch.ones_like(scores), tree, trees)
    return (2 * _tree_sums(scores, tree, trees) / completions.clamp(min=1)) ** 2


def regression_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Squared error to a rating, one for each completion: (scores - targets)^2, all (completions,).

    The distance of two levels of a scale is taken as it is written; `cumulative_link_loss` takes only their order.
    Ratings that only say which of one prompt's completions is better are a ranking with ties: `plackett_luce_loss`.
    Source: Wang et al. 2024 (HelpSteer2), arXiv:2406.08673, its regression reward models.
    """
    return (scores - targets) ** 2


def cumulative_link_loss(above: Tensor, level: Tensor) -> Tensor:
    """Negative log-likelihood of each completion's level under a cumulative logit model, (completions,).

    P(level >= k) = sigmoid(score - cut_k) with ordered cuts, k = 1 ... K - 1, so level k has the probability that lies
    between two of them: sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), whose logarithm stays finite
    wherever the score is. With K = 2 it is logistic regression.
    Shapes: above (completions, K - 1) = score - cut, falling along a row; level (completions,) long, 0 to K - 1.
    Source: McCullagh 1980, JRSS B 42, section 2.1 (proportional odds).
    """
    cuts = above.shape[1]
    has_lower, has_upper = level > 0, level < cuts
    lower = above.gather(1, (level - 1).clamp(min=0)[:, None]).squeeze(1)
    upper = above.gather(1, level.clamp(max=cuts - 1)[:, None]).squeeze(1)
    zero = torch.zeros_like(lower)
    passed = torch.where(has_lower, F.logsigmoid(lower), zero)
    stopped = torch.where(has_upper, F.logsigmoid(-upper), zero)
    # Where a level has one border only, a gap of 1 stands in: what `where` leaves out must be finite too.
    between = has_lower & has_upper
    gap = torch.where(between, lower - upper, torch.ones_like(lower))
    return -(passed + stopped + torch.where(between, torch.log(-torch.expm1(-gap)), zero))


@dataclass(frozen=True)
class TreeScores:
    """What a reward loss sees: S completions of all trees in any order, and two numbers a tree."""

    scores: Tensor
    """(S,)"""
    ranks: Tensor
    """(S,) Smaller is better, equal is a tie."""
    tree: Tensor
    """(S,) The tree of each completion."""
    p: Tensor
    """(trees,) fp32 or fp64. Of a pair: the probability that the better ranked (of a tie, the first) is better."""
    margin: Tensor
    """(trees,) In the precision of p. Of a pair; see `bradley_terry_loss`."""
    ratings: Tensor | None = None
    """(S,) In the precision of p. The data's own scores, larger is better; NaN where there is none."""
    above: Tensor | None = None
    """(S, K - 1) score - cut, of a model that has cut points."""


@dataclass(frozen=True)
class RewardObjective:
    """Bradley-Terry for trees of two, Plackett-Luce for larger ones, plus centring_weight times the centring loss."""

    label_smoothing: float = 0.0
    """Assumed share of swapped labels, in [0, 0.5). Of pairs only: a larger ranking has no order to swap it with."""
    centring_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing={self.label_smoothing} must lie in [0, 0.5)")
        if not self.centring_weight >= 0:
            raise UserError(f"centring_weight={self.centring_weight} must be 0 or more")

    def __call__(self, seen: TreeScores) -> Tensor:
        """Loss of each tree, shape (trees,), in the precision of p."""
        trees = len(seen.p)
        scores = seen.scores.to(seen.p.dtype)
        is_pair = torch.bincount(seen.tree, minlength=trees) == 2
        ranked = ~is_pair[seen.tree]
        losses = plackett_luce_loss(scores[ranked], seen.ranks[ranked], seen.tree[ranked], trees)
        losses = losses.masked_scatter(is_pair, self._pair_losses(scores, seen, is_pair))
        if self.centring_weight:
            losses = losses + self.centring_weight * centring_loss(scores, seen.tree, trees)
        return losses

    def predicted(self, seen: TreeScores) -> Tensor | None:
        """None: comparisons give scores no unit in which to predict ratings."""
        return None

    def _pair_losses(self, scores: Tensor, seen: TreeScores, is_pair: Tensor) -> Tensor:
        """Loss of each tree of two, in the order of the trees."""
        by_rank = torch.argsort(seen.ranks, stable=True)
        best_first = by_rank[torch.argsort(seen.tree[by_rank], stable=True)]
        of_pairs = best_first[is_pair[seen.tree[best_first]]]
        chosen, rejected = scores[of_pairs].view(-1, 2).unbind(1)
        p, margin = seen.p[is_pair], seen.margin[is_pair]
        return bradley_terry_loss(chosen, rejected, p, margin, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class RegressionObjective:
    """Squared error to standardised ratings, a mean over each tree's completions; ratings are never NaN."""

    mean: float
    """Mean and standard deviation of the ratings to train on: rating = mean + std x score."""
    std: float

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise UserError(f"all ratings are {self.mean:g}: there is nothing to learn from them")

    def __call__(self, seen: TreeScores) -> Tensor:
        """Loss of each tree, shape (trees,), in the precision of p."""
        targets = (seen.ratings - self.mean) / self.std
        return _tree_means(regression_loss(seen.scores.to(targets), targets), seen)

    def predicted(self, seen: TreeScores) -> Tensor:
        """The rating that each completion's score stands for, (S,)."""
        return self.mean + self.std * seen.scores.to(seen.p)


@dataclass(frozen=True)
class OrdinalObjective:
    """Cumulative-link loss of ratings that come in levels, a mean over each tree's completions."""

    levels: tuple[float, ...]
    """The K ratings that there are, rising. A rating between two of them counts as the nearer one."""

    def __post_init__(self) -> None:
        if len(self.levels) < 2:
            raise UserError(f"all ratings are {self.levels[0]:g}: there is nothing to learn from them")
        assert list(self.levels) == sorted(set(self.levels))

    def __call__(self, seen: TreeScores) -> Tensor:
        """Loss of each tree, shape (trees,), in the precision of p."""
        return _tree_means(cumulative_link_loss(seen.above.to(seen.p), self.level_of(seen.ratings)), seen)

    def level_of(self, ratings: Tensor) -> Tensor:
        """The number of each rating's level, long (S,)."""
        levels = torch.tensor(self.levels, dtype=ratings.dtype, device=ratings.device)
        return torch.bucketize(ratings, (levels[1:] + levels[:-1]) / 2)

    def predicted(self, seen: TreeScores) -> Tensor:
        """The expected rating of each completion, (S,)."""
        levels = seen.p.new_tensor(self.levels)
        return levels[0] + torch.sigmoid(seen.above.to(seen.p)) @ levels.diff()


Objective = RewardObjective | RegressionObjective | OrdinalObjective


def pairs_in_trees(ranks: Tensor, tree: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (better, worse) of all pairs of completions of one tree, each (pairs,); ties are in none of them."""
    ordered = (tree[:, None] == tree[None, :]) & (ranks[:, None] < ranks[None, :])
    better, worse = ordered.nonzero(as_tuple=True)
    return better, worse


def _tree_means(values: Tensor, seen: TreeScores) -> Tensor:
    trees = len(seen.p)
    return _tree_sums(values, seen.tree, trees) / _tree_sums(torch.ones_like(values), seen.tree, trees).clamp(min=1)


def _tree_sums(values: Tensor, tree: Tensor, trees: int) -> Tensor:
    return values.new_zeros(trees).index_add(0, tree, values)
