"""While a stage trains: which of its evaluations is the best by `best_by`, and whether better ones still come."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback

from align.config.best import FIGURES, key_of
from align.config.schema import StageConfig
from align.tracking.progress import say
from align.trainers.pruning import Pruning

Alert = Callable[[str, str], None]
"""Takes a title and a text; `align.tracking.wandb_run.WandbRun.alert`, which is silent on other ranks."""


class SoFar(NamedTuple):
    """The evaluations of a run after its first step."""

    best_step: int
    """0: none of them gave a number."""
    best: float
    since: int
    """Evaluations after the best one; all of them where there is none."""


class Best(TrainerCallback):
    """With keep_best it saves after each evaluation that is the best so far, and the Trainer keeps that checkpoint;
    with stop_after it ends training after so many that are not. In a sweep it may end the member. On every rank.

    The model before the first step does not count.
    """

    def __init__(
        self, name: str, stage: StageConfig, *, active: bool, alert: Alert, pruning: Pruning | None = None
    ) -> None:
        self.name, self.stage, self.active, self.alert, self.pruning = name, stage, active, alert, pruning
        self.figure, self.key = FIGURES[stage.best_by], key_of(name, stage)
        self.stopped = False

    def on_train_begin(self, args, state, control, **kwargs):
        # The Trainer forgets a folder that is gone, but not how good it was.
        if state.best_model_checkpoint is None:
            state.best_metric = None

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.judge(args, state, control, metrics, state.global_step)

    def judge(self, args: Any, state: Any, control: Any, line: Mapping[str, Any], moment: int) -> None:
        """What an evaluation that is logged already makes of the run. moment: its `step` in the log."""
        if moment == 0:
            return
        value = float(line.get(self.key, math.nan))
        if self.stage.keep_best and math.isfinite(value) and self.figure.better(value, state.best_metric):
            state.best_metric, state.best_global_step = value, state.global_step
            state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            control.should_save = True
        found = self.so_far(state.log_history)
        if self.stage.stop_after and found.since >= self.stage.stop_after and not self.stopped:
            self.stopped = control.should_training_stop = True
            # A run that is interrupted now goes on from an older checkpoint, and stops at this step again.
            control.should_save = False
            best = f"the {found.best:.4g} of step {found.best_step}" if found.best_step else "no number at all"
            text = (
                f"stopped at step {moment}: {self.figure.words} was not better than {best} in {found.since} "
                "evaluations in a row"
            )
            say(f"{self.name}: {text}", active=self.active)
            self.alert(f"{self.name}: stopped early", text)
        if self.pruning is not None and not self.stopped:
            self.pruning.judge(found.best, moment, state.global_step / state.max_steps)

    def so_far(self, log: Sequence[Mapping[str, Any]]) -> SoFar:
        """Of a log of evaluations, of which the last of a step counts. An evaluation without the figure is none that
        is better."""
        values = {line["step"]: float(line.get(self.key, math.nan)) for line in log if self._judged(line)}
        best_step, best, since = 0, math.nan, 0
        for step, value in values.items():
            better = math.isfinite(value) and self.figure.better(value, best if best_step else None)
            best_step, best, since = (step, value, 0) if better else (best_step, best, since + 1)
        return SoFar(best_step, best, since)

    def _judged(self, line: Mapping[str, Any]) -> bool:
        return line["step"] > 0 and ("eval_loss" in line or "samples/tokens" in line)

    def where(self) -> str:
        """What the best evaluation is known by."""
        return f"{self.figure.words} was {'highest' if self.figure.higher else 'lowest'}"


class HeldOutGuard(TrainerCallback):
    """Says so where the held-out loss goes the wrong way. Added on rank 0 only."""

    ABOVE_START, IN_A_ROW = 0.02, 3
    """Share of the first loss by which a later one is above it; rises in a row that are no noise of one evaluation."""

    def __init__(self, name: str, alert: Alert) -> None:
        self.name, self.alert = name, alert
        self.told: set[str] = set()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        losses = {line["step"]: line["eval_loss"] for line in state.log_history if "eval_loss" in line}
        text = held_out_alarm(list(losses.values()), self.ABOVE_START, self.IN_A_ROW)
        if text and text[0] not in self.told:
            self.told.add(text[0])
            line = f"step {state.global_step}: {text[1]}; lower stages.{self.name}.learning_rate or train for less long"
            say(f"{self.name}: WARN {line}")
            self.alert(f"{self.name}: held-out loss", line)


def held_out_alarm(losses: Sequence[float], above_start: float, in_a_row: int) -> tuple[str, str] | None:
    """(kind, words) of what is wrong with held-out losses, the one before the first step first; None if nothing is."""
    if len(losses) < 2:
        return None
    first, now = losses[0], losses[-1]
    if not math.isfinite(now) or now > first + above_start * abs(first):
        return "above", f"the held-out loss is {now:.4g}, and it was {first:.4g} before the first step"
    recent = losses[-in_a_row - 1 :]
    if len(recent) > in_a_row and all(later > earlier for earlier, later in pairwise(recent)):
        return "rising", f"the held-out loss has risen {in_a_row} times in a row, from {recent[0]:.4g} to {now:.4g}"
    return None
