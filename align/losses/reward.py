"""Losses of a reward model: one loss a tree (a prompt and its completions), from a score for each completion.

Symbols: a score r(x, y) is the reward model's number for completion y of prompt x; in `ranks` the smaller is the
better and equal is a tie; `tree` holds the index of each completion's tree, 0 to trees - 1, in any order; `p` is the
probability that the completion called chosen is better (1 = a hard label). Scores are fp32 or fp64, never half: the
loss of a pair that is far apart is a small difference of large numbers.

Shapes: S completions, in trees of any sizes. What compares completions of one prompt does not change when a constant
is added to all its scores; `centring_loss` and `regression_loss` are what fix that constant.
There is no ordinal loss: a cumulative-link model (McCullagh 1980) needs thresholds that are learned. Fixed evenly,
they take the levels for equally spaced, which is what `regression_loss` does without a noise scale to choose.
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

    Levels of a scale count as equally far apart, and the score becomes a number on that scale. Ratings that only say
    which of one prompt's completions is better are a ranking with ties: `plackett_luce_loss`.
    Source: Wang et al. 2024 (HelpSteer2), arXiv:2406.08673, its regression reward models.
    """
    return (scores - targets) ** 2


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

    def _pair_losses(self, scores: Tensor, seen: TreeScores, is_pair: Tensor) -> Tensor:
        """Loss of each tree of two, in the order of the trees."""
        by_rank = torch.argsort(seen.ranks, stable=True)
        best_first = by_rank[torch.argsort(seen.tree[by_rank], stable=True)]
        of_pairs = best_first[is_pair[seen.tree[best_first]]]
        chosen, rejected = scores[of_pairs].view(-1, 2).unbind(1)
        p, margin = seen.p[is_pair], seen.margin[is_pair]
        return bradley_terry_loss(chosen, rejected, p, margin, label_smoothing=self.label_smoothing)


def pairs_in_trees(ranks: Tensor, tree: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (better, worse) of all pairs of completions of one tree, each (pairs,); ties are in none of them."""
    ordered = (tree[:, None] == tree[None, :]) & (ranks[:, None] < ranks[None, :])
    better, worse = ordered.nonzero(as_tuple=True)
    return better, worse


def _tree_sums(values: Tensor, tree: Tensor, trees: int) -> Tensor:
    return values.new_zeros(trees).index_add(0, tree, values)
