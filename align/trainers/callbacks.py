"""What a training loop tells a person and the run folder."""

import math
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from align.config.errors import UserError
from align.tracking.local import MetricsLog
from align.tracking.progress import Progress, say
from align.tracking.wandb_run import WandbRun
from align.trainers.best import Best

END_OF_TRAINING = "train_loss"
LEFT_OUT = ("step", "total_flos", "train_runtime", "train_tokens_per_second")


class Report(TrainerCallback):
    """Every logged step goes to metrics.jsonl, to wandb and to the live line. Added on rank 0 only."""

    def __init__(self, stage: str, log: MetricsLog, wandb_run: WandbRun, best: Best | None = None) -> None:
        self.stage, self.log, self.wandb_run, self.best = stage, log, wandb_run, best
        self.training: Progress | None = None
        self.judging: Progress | None = None
        self.judged = 0
        self.note = ""
        self.step_began_at = self.seconds = 0.0
        self.tokens_then = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.log.keep(state.log_history)
        self.tokens_then = state.num_input_tokens_seen

    def on_step_begin(self, args, state, control, **kwargs):
        # Made here, so that judging before the first step does not count.
        if self.training is None:
            self.training = Progress(self.stage, state.max_steps, done=state.global_step, unit="step")
        self.step_began_at = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.monotonic() - self.step_began_at
        if not control.should_log:
            self.training.show(state.global_step, self.note)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if END_OF_TRAINING in logs:
            return
        metrics = {key: value for key, value in logs.items() if key not in LEFT_OUT}
        if "loss" in metrics:
            metrics["tokens_per_second"] = self._tokens_per_second(state)
            self.note = f"loss {metrics['loss']:.4f}  {metrics['tokens_per_second']:,.0f} tokens/s"
            self.training.show(state.global_step, self.note)
        self.log.write(state.global_step, metrics)
        self.wandb_run.write(state.global_step, metrics)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.judging is None:
            self.judging = Progress(f"{self.stage}: judging held-out rows", len(eval_dataloader), passing=True)
            self.judged = 0
        self.judged += 1
        self.judging.show(self.judged)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.judging = None
        moment = f"after step {state.global_step}" if state.global_step else "before the first step"
        say(f"{self.stage}: {held_out_figures(metrics, self.best)} {moment}")

    def _tokens_per_second(self, state) -> float:
        """Tokens of the steps since the last line, over the time these steps took, saving and judging left out."""
        tokens, seconds = state.num_input_tokens_seen - self.tokens_then, self.seconds
        self.tokens_then, self.seconds = state.num_input_tokens_seen, 0.0
        return round(tokens / seconds, 1) if seconds > 0 else 0.0


class StopAtNaN(TrainerCallback):
    """Ends training, on every rank, when the loss is no number any more: no later step can mend the weights."""

    def __init__(self, stage: str, alert: Callable[[str, str], None]) -> None:
        self.stage, self.alert = stage, alert

    def on_log(self, args, state, control, logs=None, **kwargs):
        if math.isfinite((logs or {}).get("loss", 0.0)):
            return
        text = f"the loss is {logs['loss']} at step {state.global_step}; nothing is saved from here on"
        self.alert(f"{self.stage}: the loss is no number", text)
        raise UserError(
            f"{self.stage}: {text}. Lower stages.{self.stage}.learning_rate, or look at the rows with do=check and "
            "do=preview"
        )


def held_out_figures(metrics: dict[str, Any], best: Best | None = None) -> str:
    """An evaluation in words: the loss, of pairs the reward accuracy, and the figure of `best_by`."""
    words = f"held-out loss {metrics['eval_loss']:.4f}"
    for name in ("eval_rewards/accuracies", "eval_accuracy"):
        if name in metrics:
            words += f", reward accuracy {metrics[name]:.1%}"
    if best is not None and best.key in metrics and best.key != "eval_loss":
        words += f", {best.figure.words.removeprefix('the ')} {metrics[best.key]:.4g}"
    return words
