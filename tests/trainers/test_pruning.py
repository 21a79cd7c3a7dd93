"""The median rule, against Optuna's; members that are compared, and those that are not."""

import random

import optuna
import pytest

from align.config.best import FIGURES
from align.config.errors import Pruned
from align.config.schema import BestBy, SweepConfig
from align.tracking.local import MetricsLog
from align.tracking.members import Member, State
from align.trainers.pruning import Pruning

STEPS = range(2, 12, 2)


def leave(folder, curve: dict[int, float], state: State = State.done, sweep: str = "this") -> None:
    Member(sweep, folder.name, folder, state).write()
    (folder / "dpo").mkdir()
    log = MetricsLog(folder / "dpo/metrics.jsonl")
    for step, value in curve.items():
        log.write(step, {"loss": 0.1})
        log.write(step, {"eval_loss": value})


def ended_at(tmp_path, curve: dict[int, float], by: BestBy = BestBy.loss, **settings) -> int | None:
    """The step at which a member with this curve is pruned; None if it is not."""
    Member("this", "own", tmp_path / "own").write()
    figure = FIGURES[by]
    pruning = Pruning(SweepConfig(**settings), tmp_path / "own", "dpo", figure, "eval_loss")
    best = max if figure.higher else min
    seen = []
    for step, value in curve.items():
        seen.append(value)
        try:
            pruning.judge(best(seen), step, step / max(STEPS))
        except Pruned as pruned:
            assert pruned.figure == pytest.approx(best(seen), nan_ok=True)
            assert f"pruned at step {step}" in str(pruned)
            return step
    return None


@pytest.mark.parametrize("by", [BestBy.loss, BestBy.accuracy])
@pytest.mark.parametrize("seed", range(8))
def test_it_ends_whom_optuna_would(tmp_path, by, seed):
    draw = random.Random(seed)
    curves = [{step: round(draw.random(), 3) for step in STEPS} for _ in range(6)]
    direction = "maximize" if FIGURES[by].higher else "minimize"
    pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=3)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction=direction, pruner=pruner)
    for n, curve in enumerate(curves[:5]):
        leave(tmp_path / str(n), curve)
        trial = study.ask()
        for step, value in curve.items():
            trial.report(value, step)
        study.tell(trial, curve[max(STEPS)])
    trial, expected = study.ask(), None
    for step, value in curves[5].items():
        trial.report(value, step)
        # A member that has come to its end is not ended early any more.
        if expected is None and step < max(STEPS) and trial.should_prune():
            expected = step
    assert ended_at(tmp_path, curves[5], by, prune_after=5, prune_from_fraction=0.35) == expected


def test_the_seeds_show_members_that_are_ended_and_that_are_not(tmp_path):
    for n in range(4):
        leave(tmp_path / str(n), dict.fromkeys(STEPS, 0.5))
    assert ended_at(tmp_path, dict.fromkeys(STEPS, 0.6)) == 2
    assert ended_at(tmp_path, dict.fromkeys(STEPS, 0.5)) is None
    assert ended_at(tmp_path, dict.fromkeys(STEPS, 0.6), prune_from_fraction=0.5) == 6


@pytest.mark.parametrize(
    ("state", "sweep"), [(State.running, "this"), (State.pruned, "this"), (State.failed, "this"), (State.done, "other")]
)
def test_only_complete_members_of_the_same_sweep_count(tmp_path, state, sweep):
    for n in range(4):
        leave(
            tmp_path / str(n), dict.fromkeys(STEPS, 0.1), state if n == 3 else State.done, sweep if n == 3 else "this"
        )
    assert ended_at(tmp_path, dict.fromkeys(STEPS, 0.9)) is None
    assert ended_at(tmp_path, dict.fromkeys(STEPS, 0.9), prune_after=3) == 2


def test_a_figure_that_is_no_number_is_worse_than_any(tmp_path):
    for n in range(4):
        leave(tmp_path / str(n), dict.fromkeys(STEPS, 0.5))
    assert ended_at(tmp_path, {2: float("nan")}) == 2


def test_a_run_that_is_no_member_is_never_ended(tmp_path):
    (tmp_path / "own/dpo").mkdir(parents=True)
    Pruning(SweepConfig(prune_after=1), tmp_path / "own", "dpo", FIGURES[BestBy.loss], "eval_loss").judge(9.9, 2, 0.2)
