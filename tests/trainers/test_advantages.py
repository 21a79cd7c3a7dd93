"""From scores to what each token is trained on, worked by hand."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from align.config.rewards import RewardSetting
from align.config.schema import Advantage, KLEstimator, KLPlace, RewardScale
from align.losses.controllers import RunningMoments
from align.trainers.advantages import Targets, find_targets
from align.trainers.experience import Experience
from tests.oracles import gae
from tests.trainers.actors import stage

LENGTHS = (3, 2, 1, 2)
SETTINGS = [RewardSetting("mine", None, "some:function")]
QUIET = {"missing_stop_penalty": 0.0, "reward_clip": 0.0, "kl_coefficient": 0.0}


def ragged(rows: list[list[float]]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def experience(scores: list[float], **changed) -> Experience:
    """Four completions of 3, 2, 1 and 2 tokens; the first two answer one prompt, the others another."""
    mask = torch.arange(3)[None] < torch.tensor(LENGTHS)[:, None]
    logps = ragged([[-1.0, -2.0, -0.5], [-1.5, -0.25], [-3.0], [-1.0, -1.0]])
    columns = {
        "prompts": [[5]] * 4,
        "completions": [[9] * length for length in LENGTHS],
        "group": torch.tensor([4, 4, 7, 7]),
        "finished": torch.tensor([True] * 4),
        "empty": torch.tensor([False] * 4),
        "scores": {"mine": np.array(scores)},
        "mask": mask,
        "sampler_logps": logps.clone(),
        "logps": logps,
        "reference_logps": logps.clone(),
        "entropies": torch.ones(4, 3) * mask,
        "values": torch.zeros(4, 3),
    }
    return Experience(**(columns | changed))


def targets(seen: Experience, *, rewards=None, coefficient: float = 0.0, moments=None, **changed) -> Targets:
    return find_targets(
        seen, stage(**(QUIET | changed)), rewards or SETTINGS, kl_coefficient=coefficient,
        moments=moments or RunningMoments(),
    )  # fmt: skip


def plainly_whitened(rows: list[list[float]]) -> list[list[float]]:
    flat = np.array([number for row in rows for number in row])
    return [[(number - flat.mean()) / math.sqrt(flat.var(ddof=1) + 1e-8) for number in row] for row in rows]


def assert_rows(found: Tensor, expected: list[list[float]]) -> None:
    """Numbers of each row, and zeros behind them."""
    wide = ragged([[float(number) for number in row] for row in expected])
    torch.testing.assert_close(found, torch.nn.functional.pad(wide, (0, 3 - wide.shape[1])), rtol=1e-5, atol=1e-6)


def test_gae_takes_the_score_at_the_last_token_and_the_kl_at_each():
    values = ragged([[0.5, 0.25, -0.5], [1.0, 0.0], [2.0], [0.0, 1.0]])
    kl = [[0.5, -0.25, 0.0], [0.25, 0.5], [1.0], [0.0, 0.125]]
    seen = experience([1.0, -1.0, 2.0, 0.5], values=values)
    seen.reference_logps = seen.logps - ragged(kl)
    found = targets(seen, coefficient=0.2, gamma=0.9, gae_lambda=0.5)
    rewards = [[-0.1, 0.05, 1.0], [-0.05, -0.1 - 1.0], [-0.2 + 2.0], [0.0, -0.025 + 0.5]]
    advantages = [gae(one, values[row].tolist()[: len(one)], 0.9, 0.5) for row, one in enumerate(rewards)]
    # By hand, the first completion: errors 1.5, 0.05 - 0.45 - 0.25 = -0.65 and -0.1 + 0.225 - 0.5 = -0.375.
    assert advantages[0] == pytest.approx([-0.375 + 0.45 * (-0.65 + 0.45 * 1.5), -0.65 + 0.45 * 1.5, 1.5])
    returns = [
        [advantage + value for advantage, value in zip(one, values[row].tolist(), strict=False)]
        for row, one in enumerate(advantages)
    ]
    assert_rows(found.returns, returns)
    assert_rows(found.advantages, plainly_whitened(advantages))
    explained = 1 - np.var([a for one in advantages for a in one]) / np.var([r for one in returns for r in one])
    assert found.figures["value/explained_variance"] == pytest.approx(explained, rel=1e-5)


def test_rloo_compares_with_the_other_completion_of_the_prompt():
    seen = experience([1.0, 3.0, 2.0, -2.0])
    seen.reference_logps = seen.logps - ragged([[1.0, 1.0, 1.0], [0.0, 0.5], [0.0], [2.0, 2.0]])
    found = targets(seen, coefficient=0.5, advantage=Advantage.rloo, completions_per_prompt=2)
    # Outcomes: 1 - 1.5, 3 - 0.25, 2, -2 - 2.
    assert_rows(found.advantages, [[-0.5 - 2.75] * 3, [2.75 + 0.5] * 2, [2.0 + 4.0], [-4.0 - 2.0] * 2])
    assert not found.returns.any()
    assert "value/explained_variance" not in found.figures


def test_grpo_is_the_standard_score_within_the_prompt():
    found = targets(experience([1.0, 3.0, 2.0, -2.0]), advantage=Advantage.grpo, completions_per_prompt=2)
    small, large = 1 / (math.sqrt(2) + 1e-4), 2 / (math.sqrt(8) + 1e-4)
    assert_rows(found.advantages, [[-small] * 3, [small] * 2, [large], [-large] * 2])


def test_reinforce_plus_plus_is_the_whitened_sum_of_later_rewards():
    seen = experience([1.0, -1.0, 2.0, 0.5])
    seen.reference_logps = seen.logps - ragged([[0.5, -0.25, 1.0], [0.25, 0.5], [1.0], [0.0, 0.125]])
    found = targets(seen, coefficient=0.2, gamma=0.5, advantage=Advantage.reinforce_plus_plus)
    # Rewards -0.1, 0.05, 0.8; -0.05, -1.1; 1.8; 0, 0.475.
    sums = [[-0.1 + 0.025 + 0.2, 0.05 + 0.4, 0.8], [-0.05 - 0.55, -1.1], [1.8], [0.2375, 0.475]]
    assert_rows(found.advantages, plainly_whitened(sums))


@pytest.mark.parametrize("advantage", list(Advantage))
def test_with_the_kl_in_the_loss_it_is_not_in_the_reward_but_still_in_the_figures(advantage):
    seen = experience([1.0, 3.0, 2.0, -2.0], values=torch.rand(4, 3, generator=torch.Generator().manual_seed(0)))
    own = targets(seen, coefficient=0.5, advantage=advantage, completions_per_prompt=2)
    assert own.figures["kl/nats_per_completion"] == own.figures["kl/nats_per_token"] == 0.0
    seen.reference_logps = seen.logps - ragged([[0.0, 0.0, 0.0], [3.5, 3.5], [0.0], [2.0, 2.0]])
    options = {"coefficient": 0.5, "advantage": advantage, "completions_per_prompt": 2}
    in_loss = targets(seen, **options, kl_place=KLPlace.loss)
    in_reward = targets(seen, **options, kl_place=KLPlace.reward)
    torch.testing.assert_close(in_loss.advantages, own.advantages)
    assert (in_reward.advantages - own.advantages).abs().max() > 0.1
    for found in (in_loss, in_reward):
        assert found.figures["kl/nats_per_completion"] == pytest.approx((0 + 7 + 0 + 4) / 4)
        assert found.figures["kl/nats_per_token"] == pytest.approx(11 / 8)
        assert found.figures["kl/coefficient"] == 0.5


@pytest.mark.parametrize("estimator", list(KLEstimator))
def test_the_penalty_in_the_reward_is_the_chosen_estimate(estimator):
    seen = experience([0.0, 0.0, 0.0, 0.0])
    seen.reference_logps = seen.logps - ragged([[0.5, -0.25, 1.0], [0.25, 0.5], [1.0], [0.0, -2.0]])
    plain = {KLEstimator.k1: lambda d: d, KLEstimator.k2: lambda d: d * d / 2,
             KLEstimator.k3: lambda d: math.exp(-d) - 1 + d}[estimator]  # fmt: skip
    found = targets(seen, coefficient=1.0, kl_estimator=estimator, gae_lambda=1.0)
    rows = [[0.5, -0.25, 1.0], [0.25, 0.5], [1.0], [0.0, -2.0]]
    assert_rows(found.returns, [[-sum(map(plain, row[at:])) for at in range(len(row))] for row in rows])
    assert found.figures["kl/nats_per_token"] == pytest.approx(sum(map(sum, rows)) / 8)


def test_rewards_are_clipped_before_penalties_are_taken_off():
    seen = experience([5.0, -7.0, 0.5, 9.0], finished=torch.tensor([True, False, True, False]))
    settings = {"reward_clip": 3.0, "missing_stop_penalty": 4.0, "length_penalty_per_token": 0.25}
    found = targets(seen, **settings, gae_lambda=1.0)
    # At the last token stands the whole reward: score, less 4 without a stop token, less 0.25 a token.
    expected = [3.0 - 0.75, -3.0 - 4.0 - 0.5, 0.5 - 0.25, 3.0 - 4.0 - 0.5]
    assert_rows(found.returns, [[total] * length for total, length in zip(expected, LENGTHS, strict=True)])
    assert found.figures["reward/total"] == pytest.approx(np.mean(expected))
    assert found.figures["reward/total_std"] == pytest.approx(np.std(expected, ddof=1))
    assert found.figures["reward/score"] == pytest.approx(7.5 / 4)
    assert found.figures["completion/unfinished"] == 0.5
    assert found.figures["completion/tokens"] == 2.0


def test_a_sum_of_rewards_is_weighted_and_every_source_has_its_figure():
    seen = experience([])
    seen.scores = {"good": np.array([1.0, 2.0, 3.0, 4.0]), "bad": np.array([1.0, 0.0, np.nan, 1.0])}
    rewards = [RewardSetting("good", None, "a:b", 0.5), RewardSetting("bad", None, "a:c", -2.0)]
    found = targets(seen, rewards=rewards, gae_lambda=1.0)
    assert found.returns[:, 0].tolist() == [0.5 - 2.0, 1.0, 0.0, 2.0 - 2.0]
    assert found.figures["reward/good"] == 2.5
    assert found.figures["reward/bad"] == pytest.approx(2 / 3)
    assert found.figures["reward/score"] == pytest.approx((-1.5 + 1.0 + 0.0) / 3)


def test_running_scale_divides_by_the_deviation_of_all_scores_so_far_and_goes_on():
    moments, history = RunningMoments(), []
    for scores in ([1.0, 5.0, -3.0, 2.0], [10.0, 20.0, -30.0, 0.0]):
        history += scores
        found = targets(experience(scores), moments=moments, reward_scale=RewardScale.running, gae_lambda=1.0)
        expected = np.array(scores) / np.std(history, ddof=1)
        torch.testing.assert_close(found.returns[:, 0].double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)
        # The figure stays in the unit of the score.
        assert found.figures["reward/score"] == pytest.approx(np.mean(scores))
    assert moments.count == 8


def test_scores_that_are_none_do_not_reach_the_running_scale():
    moments = RunningMoments()
    seen = experience([1.0, math.nan, 3.0, 100.0], empty=torch.tensor([False, False, False, True]))
    targets(seen, moments=moments, reward_scale=RewardScale.running)
    assert (moments.count, moments.mean) == (2, 2.0)


def test_equal_scores_are_not_blown_up_by_the_running_scale():
    found = targets(experience([2.0] * 4), reward_scale=RewardScale.running, gae_lambda=1.0)
    assert found.returns[:, 0].tolist() == [2.0] * 4


@pytest.mark.parametrize("advantage", list(Advantage))
def test_empty_and_unscored_completions_are_counted_and_carry_nothing(advantage):
    unscored = experience([1.0, math.nan, 2.0, 50.0], empty=torch.tensor([False, False, False, True]))
    options = {"advantage": advantage, "completions_per_prompt": 2, "missing_stop_penalty": 1.0}
    found = targets(unscored, **options, coefficient=0.1)
    assert found.trained.sum(1).tolist() == [3, 0, 1, 0]
    for name in ("advantages", "returns", "weights"):
        column = getattr(found, name)
        assert column.isfinite().all() and not column[[1, 3]].any(), name
    figures = found.figures
    assert all(map(math.isfinite, figures.values()))
    assert (figures["completion/empty"], figures["completion/unscored"], figures["completion/trained"]) == (
        0.25,
        0.25,
        0.5,
    )
    if advantage in (Advantage.rloo, Advantage.grpo):
        assert not found.advantages.any(), "with no other completion of the prompt there is nothing to compare with"
    else:
        assert found.advantages[[0, 2]].abs().sum() > 1
        # What is left is whitened by itself.
        assert found.advantages[found.trained].mean().item() == pytest.approx(0.0, abs=1e-6)


def test_a_score_for_an_empty_completion_does_not_serve_as_a_baseline():
    seen = experience([1.0, 4.0, 2.0, 50.0], empty=torch.tensor([False, False, False, True]))
    found = targets(seen, advantage=Advantage.rloo, completions_per_prompt=2)
    assert_rows(found.advantages, [[-3.0] * 3, [3.0] * 2, [0.0], [0.0, 0.0]])


def test_importance_weights_correct_to_the_trainer_and_are_capped():
    seen = experience([1.0, 2.0, 3.0, 4.0])
    seen.sampler_logps = seen.logps - torch.log(torch.tensor([[0.5, 3.0, 1.0]])) * seen.mask
    capped = targets(seen, importance_cap=2.0)
    assert_rows(capped.weights, [[0.5, 2.0, 1.0], [0.5, 2.0], [0.5], [0.5, 2.0]])
    assert capped.figures["rollout/importance_weight"] == pytest.approx(9 / 8)
    assert capped.figures["rollout/mismatch_kl"] > 0.05
    off = targets(seen, importance_cap=0.0)
    assert_rows(off.weights, [[1.0] * length for length in LENGTHS])
