"""The ratings of rows to train on: their scale, and the objective that a reward stage asks for."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from align.config.errors import UserError
from align.config.schema import RewardStage, RewardTarget
from align.losses.reward import Objective, OrdinalObjective, RegressionObjective, RewardObjective

MOST_LEVELS = 20
"""More different ratings than this are numbers rather than levels: each would need answers enough to place its cut."""


def all_ratings(rows: Dataset) -> np.ndarray:
    """The data's score of every completion, rows in order, float64 (completions,); NaN where there is none."""
    if "scores" not in rows.column_names:
        return np.full(sum(map(len, rows["ranks"])), np.nan)
    chunks = rows.select_columns(["scores"]).with_format("arrow")[:]["scores"].chunks
    return np.concatenate([np.empty(0), *(chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks)])


def objective_of(stage: RewardStage, rows: Dataset) -> Objective:
    """The objective of a stage; mean, spread and levels are those of the completions in `rows`, copies included.

    Raises: UserError for ratings that are all the same, or too many different ones for levels.
    """
    if stage.objective is RewardTarget.comparison:
        return RewardObjective(label_smoothing=stage.label_smoothing, centring_weight=stage.centring_weight)
    ratings = all_ratings(rows)
    assert np.isfinite(ratings).all(), "rows without scores are left out before training"
    if stage.objective is RewardTarget.regression:
        return RegressionObjective(float(ratings.mean()), float(ratings.std()))
    levels = np.unique(ratings)
    if len(levels) > MOST_LEVELS:
        raise UserError(
            f"stages.reward.objective=ordinal: the rows have {len(levels):,} different scores, from {levels[0]:g} to "
            f"{levels[-1]:g}; at most {MOST_LEVELS} can be levels. Set stages.reward.objective=regression"
        )
    return OrdinalObjective(tuple(levels.tolist()))


def level_counts(objective: OrdinalObjective, rows: Dataset) -> Tensor:
    """Completions of each level, long (K,)."""
    ratings = torch.from_numpy(all_ratings(rows))
    return torch.bincount(objective.level_of(ratings), minlength=len(objective.levels))


def rating_scale(objective: Objective, cuts: Sequence[float] | None) -> Mapping[str, Any] | None:
    """What `align.models.reward.set_ratings` keeps: how ratings are read off scores; None for comparisons."""
    if isinstance(objective, RegressionObjective):
        return {"mean": objective.mean, "std": objective.std}
    if isinstance(objective, OrdinalObjective):
        assert cuts is not None
        return {"levels": list(objective.levels), "cuts": list(cuts)}
    return None
