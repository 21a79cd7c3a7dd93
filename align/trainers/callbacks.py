"""What a training loop tells a person and the run folder."""

import time

from transformers import TrainerCallback

from align.tracking.local import MetricsLog
from align.tracking.progress import Progress
from align.tracking.wandb_run import WandbRun

END_OF_TRAINING = "train_loss"
LEFT_OUT = ("step", "total_flos", "train_runtime", "train_tokens_per_second")


class Report(TrainerCallback):
    """Every logged step goes to metrics.jsonl, to wandb and to the live line. Added on rank 0 only."""

    def __init__(self, stage: str, log: MetricsLog, wandb_run: WandbRun) -> None:
        self.stage, self.log, self.wandb_run = stage, log, wandb_run
        self.progress: Progress | None = None
        self.tokens_at, self.time_at = 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.log.keep_until(state.global_step - (1 if state.global_step == 0 else 0))
        self.progress = Progress(self.stage, state.max_steps, done=state.global_step)
        self.tokens_at, self.time_at = state.num_input_tokens_seen, time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if END_OF_TRAINING in logs:
            return
        metrics = {key: value for key, value in logs.items() if key not in LEFT_OUT}
        if "loss" in metrics:
            metrics["tokens_per_second"] = self._tokens_per_second(state)
        self.log.write(state.global_step, metrics)
        self.wandb_run.write(state.global_step, metrics)
        if "loss" in metrics and self.progress is not None:
            note = f"loss {metrics['loss']:.4f}  {metrics['tokens_per_second']:,.0f} tokens/s"
            self.progress.show(state.global_step, note)

    def _tokens_per_second(self, state) -> float:
        now = time.monotonic()
        tokens, seconds = state.num_input_tokens_seen - self.tokens_at, now - self.time_at
        self.tokens_at, self.time_at = state.num_input_tokens_seen, now
        return round(tokens / seconds, 1) if seconds > 0 else 0.0
