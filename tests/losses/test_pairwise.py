"""Each loss against its plain formula, by value and by gradient."""

import pytest
import torch

from align.losses.pairwise import PairLogps, PairObjective
from tests import oracles

POLICY = [(-3.0, -5.5), (-20.0, -11.0), (-7.25, -7.0), (-0.5, -30.0)]
REFERENCE = [(-4.0, -5.0), (-18.0, -12.5), (-7.0, -7.5), (-2.0, -3.0)]
TOKENS = [(3, 5), (11, 6), (4, 4), (1, 17)]
LABELS = [1.0, 0.7, 0.5, 1.0]


def logps(policy: torch.Tensor, p: list[float] = LABELS) -> PairLogps:
    reference, labels = torch.tensor(REFERENCE, dtype=torch.float64), torch.tensor(p, dtype=torch.float64)
    tokens = torch.tensor(TOKENS, dtype=torch.float64)
    return PairLogps(*policy.unbind(1), *reference.unbind(1), *tokens.unbind(1), labels)


def plain(name: str, i: int, policy: list[tuple[float, float]], beta: float, smoothing: float) -> float:
    chosen, rejected = (policy[i][k] - REFERENCE[i][k] for k in (0, 1))
    p, (chosen_tokens, rejected_tokens) = LABELS[i], TOKENS[i]
    return {
        "sigmoid": lambda: oracles.dpo(chosen, rejected, beta, p, smoothing),
        "robust": lambda: oracles.robust_dpo(chosen, rejected, beta, p, smoothing),
        "hinge": lambda: oracles.hinge(chosen, rejected, beta, p),
        "ipo": lambda: oracles.ipo(chosen, rejected, chosen_tokens, rejected_tokens, beta, p),
        "sigmoid_norm": lambda: oracles.dpo(chosen / chosen_tokens, rejected / rejected_tokens, beta, p, smoothing),
    }[name]()


CASES = [("sigmoid", 0.0), ("sigmoid", 0.2), ("robust", 0.1), ("hinge", 0.0), ("ipo", 0.0), ("sigmoid_norm", 0.1)]


@pytest.mark.parametrize(("name", "smoothing"), CASES)
def test_loss_is_the_plain_formula(name, smoothing):
    objective = PairObjective(loss=name, beta=0.3, label_smoothing=smoothing)
    losses = objective(logps(torch.tensor(POLICY, dtype=torch.float64)))
    expected = [plain(name, i, POLICY, 0.3, smoothing) for i in range(4)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("name", "smoothing"), CASES)
def test_gradient_is_the_slope_of_the_plain_formula(name, smoothing):
    objective = PairObjective(loss=name, beta=0.3, label_smoothing=smoothing)
    policy = torch.tensor(POLICY, dtype=torch.float64).requires_grad_()
    objective(logps(policy)).sum().backward()
    for i in range(4):
        for k in (0, 1):
            step = 1e-5
            up, down = ([list(row) for row in POLICY] for _ in range(2))
            up[i][k] += step
            down[i][k] -= step
            slope = (plain(name, i, up, 0.3, smoothing) - plain(name, i, down, 0.3, smoothing)) / (2 * step)
            assert policy.grad[i, k].item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_nll_term_adds_the_mean_over_the_pairs_own_tokens():
    seen = logps(torch.tensor(POLICY, dtype=torch.float64))
    added = PairObjective(nll_weight=0.5)(seen) - PairObjective()(seen)
    assert added.tolist() == pytest.approx([0.5 * -POLICY[i][0] / TOKENS[i][0] for i in range(4)], rel=1e-9)


def test_swapping_a_pair_and_its_label_changes_nothing():
    policy = torch.tensor(POLICY, dtype=torch.float64)
    seen = logps(policy)
    swapped = PairLogps(
        seen.rejected,
        seen.chosen,
        seen.reference_rejected,
        seen.reference_chosen,
        seen.rejected_tokens,
        seen.chosen_tokens,
        1 - seen.p,
    )
    for name, smoothing in CASES:
        objective = PairObjective(loss=name, label_smoothing=smoothing)
        assert torch.allclose(objective(seen), objective(swapped), rtol=1e-12)


def test_extreme_log_ratios_stay_finite():
    policy = torch.tensor([[-5000.0, -1.0]] * 4).double().requires_grad_()
    losses = PairObjective(beta=1.0)(logps(policy))
    losses.sum().backward()
    assert torch.isfinite(losses).all() and torch.isfinite(policy.grad).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "sigmoyd"},
        {"beta": 0.0},
        {"label_smoothing": 0.5},
        {"loss": "ipo", "label_smoothing": 0.1},
        {"loss": "hinge", "label_smoothing": 0.1},
    ],
)
def test_a_setting_without_meaning_is_refused(settings):
    with pytest.raises(ValueError, match=str(next(reversed(settings)))):
        PairObjective(**settings)
