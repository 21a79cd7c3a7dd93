"""From the experience of an update to what each token is trained on: rewards, advantages, returns."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from align.config.rewards import RewardSetting
from align.config.schema import Advantage, KLEstimator, KLPlace, PPOStage, RewardScale
from align.losses.controllers import RunningMoments
from align.losses.ppo import (
    explained_variance,
    gae,
    group_normalised,
    importance_weights,
    kl_estimate,
    leave_one_out,
    rewards_to_go,
    token_rewards,
    whiten,
)
from align.trainers.experience import Experience

# How far rewards may stay from 1 standard deviation while there is only one of them.
SMALLEST_STD = 1e-6


@dataclass
class Targets:
    """What the tokens of an experience are trained on; (B,) or (B, T), zeros where nothing is trained."""

    trained: Tensor
    """(B, T) bool: sampled tokens of valid completions."""
    advantages: Tensor
    returns: Tensor
    """(B, T) what values are drawn to; zeros without a value model."""
    weights: Tensor
    """(B, T) importance weights of the sampler's mismatch."""
    figures: dict[str, float]
    """Of the whole update, by the names that metrics.jsonl has."""


def find_targets(
    seen: Experience,
    settings: PPOStage,
    rewards: list[RewardSetting],
    *,
    kl_coefficient: float,
    moments: RunningMoments,
) -> Targets:
    """Rewards, advantages and returns of all completions, the same on every rank; updates `moments`.

    A completion is valid if it has text and every source scored it. The others are counted, and nothing is learnt from
    them.
    """
    score = sum(setting.weight * seen.scores[setting.name] for setting in rewards)
    valid = np.isfinite(score) & ~seen.empty.numpy()
    total = _total_reward(np.where(valid, score, 0.0), valid, seen, settings, moments)
    trained = seen.mask & torch.from_numpy(valid)[:, None]
    kl = kl_estimate(seen.logps, seen.reference_logps, settings.kl_estimator).masked_fill(~trained, 0)
    in_reward = kl_coefficient if settings.kl_place is KLPlace.reward else 0.0
    advantages, returns = _advantages(seen, settings, total, kl, trained, torch.from_numpy(valid), in_reward)
    weights = importance_weights(seen.logps, seen.sampler_logps, cap=settings.importance_cap)
    figures = _score_figures(seen, score, total, valid) | _token_figures(seen, trained, kl_coefficient)
    if settings.advantage is Advantage.gae:
        figures["value/explained_variance"] = explained_variance(seen.values, returns, trained, reduce=_alone)
    figures["rollout/importance_weight"] = _mean(weights, trained)
    return Targets(trained, advantages, returns, weights.masked_fill(~trained, 0), figures)


def _alone(sums: Tensor) -> Tensor:
    """Every rank has the whole experience, so there is nothing to add."""
    return sums


def _total_reward(
    score: np.ndarray, valid: np.ndarray, seen: Experience, settings: PPOStage, moments: RunningMoments
) -> Tensor:
    """What a completion is rewarded with, (B,) in fp32: scaled, clipped, less penalties; 0 where it is not valid."""
    if settings.reward_scale is RewardScale.running:
        moments.update(torch.from_numpy(score[valid]))
        score = score / (moments.std if moments.count > 1 and moments.std > SMALLEST_STD else 1.0)
    if settings.reward_clip:
        score = score.clip(-settings.reward_clip, settings.reward_clip)
    score = score - settings.missing_stop_penalty * ~seen.finished.numpy()
    score = score - settings.length_penalty_per_token * seen.lengths.numpy()
    return torch.from_numpy(np.where(valid, score, 0.0)).float()


def _advantages(
    seen: Experience, settings: PPOStage, total: Tensor, kl: Tensor, trained: Tensor, valid: Tensor, coefficient: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (B, T), zeros where nothing is trained. coefficient: of the KL in the reward."""
    kind, zeros = settings.advantage, torch.zeros_like(kl)
    if kind in (Advantage.rloo, Advantage.grpo):
        outcome = total - coefficient * kl.sum(1)
        if kind is Advantage.rloo:
            found = (outcome - leave_one_out(outcome, seen.group, valid)) * _has_company(seen.group, valid)
        else:
            found = group_normalised(outcome, seen.group, valid)
        return (found[:, None] * trained).float(), zeros
    rewards = token_rewards(total, kl, trained, kl_coefficient=coefficient)
    if kind is Advantage.reinforce_plus_plus:
        return whiten(rewards_to_go(rewards, trained, gamma=settings.gamma), trained, reduce=_alone), zeros
    advantages, returns = gae(rewards, seen.values, trained, gamma=settings.gamma, lam=settings.gae_lambda)
    return whiten(advantages, trained, reduce=_alone), returns


def _has_company(group: Tensor, valid: Tensor) -> Tensor:
    """(B,) 1 where another completion of the prompt is valid: without one there is no baseline to learn from."""
    kept = group[valid]
    return torch.tensor([bool(ok) and int((kept == g).sum()) > 1 for g, ok in zip(group, valid, strict=True)]).float()


def _score_figures(seen: Experience, score: np.ndarray, total: Tensor, valid: np.ndarray) -> dict[str, float]:
    figures = {f"reward/{name}": _finite_mean(found) for name, found in seen.scores.items()}
    figures["reward/score"] = _finite_mean(score)
    figures["reward/total"] = float(total[torch.from_numpy(valid)].double().mean()) if valid.any() else 0.0
    figures["reward/total_std"] = float(total[torch.from_numpy(valid)].double().std()) if valid.sum() > 1 else 0.0
    lengths = seen.lengths.double()
    unscored = np.mean([not np.isfinite(one) for one in score])
    return figures | {
        "completion/tokens": float(lengths.mean()),
        "completion/unfinished": float((~seen.finished).double().mean()),
        "completion/empty": float(seen.empty.double().mean()),
        "completion/unscored": float(unscored),
        "completion/trained": float(valid.mean()),
    }


def _token_figures(seen: Experience, trained: Tensor, coefficient: float) -> dict[str, float]:
    """KL is k1 here whatever the penalty is made of: the estimate without bias."""
    kl = kl_estimate(seen.logps, seen.reference_logps, KLEstimator.k1).masked_fill(~seen.mask, 0)
    mismatch = kl_estimate(seen.sampler_logps, seen.logps, KLEstimator.k3)
    return {
        "kl/nats_per_completion": float(kl.double().sum(1).mean()),
        "kl/nats_per_token": _mean(kl, seen.mask),
        "kl/coefficient": coefficient,
        "policy/entropy": _mean(seen.entropies, seen.mask),
        "rollout/mismatch_kl": _mean(mismatch, seen.mask),
    }


def _mean(values: Tensor, mask: Tensor) -> float:
    return float(values[mask].double().mean()) if mask.any() else 0.0


def _finite_mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else 0.0
