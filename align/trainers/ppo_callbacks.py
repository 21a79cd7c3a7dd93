"""What happens between the updates of PPO: figures, guards, samples, checkpoints, and what a person sees of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from align.config.schema import Guard
from align.distributed import runtime
from align.tracking.local import MetricsLog
from align.tracking.progress import Progress, say
from align.tracking.wandb_run import WandbRun
from align.trainers.best import Best
from align.trainers.ppo import PPOTrainer
from align.trainers.reward_sources import ModelReward
from align.trainers.samples import HeldOutSamples, keep_until, means, read_samples

IN_MANIFEST = ("reward/score", "reward/total", "kl/nats_per_completion", "kl/nats_per_token", "completion/tokens",
               "completion/unfinished", "policy/entropy", "value/explained_variance", "tokens_per_second")  # fmt: skip


class UpdateEnd(TrainerCallback):
    """Ends an update after its last optimizer step: figures, guards, samples, best checkpoint. On every rank."""

    def __init__(
        self,
        trainer: PPOTrainer,
        samples: HeldOutSamples | None,
        wandb_run: WandbRun,
        resumed: Path | None,
        best: Best | None = None,
    ):
        self.trainer, self.samples, self.wandb_run, self.resumed = trainer, samples, wandb_run, resumed
        self.best = best
        # With what a checkpoint knows: the alarm that stopped a run, if it was interrupted after that.
        stops = (line["text"] for line in trainer.guards.raised if Guard(line["guard"]) in trainer.settings.stop_on)
        self.stopped_by: str | None = next(stops, None)
        self.since_saved: list[float] = []
        self.sampled: dict[int, dict[str, float]] = {}
        self.kept: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.start_average(self.resumed)
        if self.samples is not None:
            if self.trainer.accelerator.is_main_process:
                keep_until(self.samples.file, self.trainer.update if self.resumed else -1)
            runtime.barrier()
            earlier = read_samples(self.samples.file)
            by_update = {line["step"]: [x for x in earlier if x["step"] == line["step"]] for line in earlier}
            self.sampled = {update: means(lines) for update, lines in by_update.items()}
            for source in self.trainer.sources:
                if isinstance(source, ModelReward):
                    source.check_sample()
            if self.resumed is None:
                self._take_samples(0)

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        if trainer.average is not None:
            trainer.average.update()
        if state.global_step % trainer.steps_per_update:
            return
        update, last = trainer.update, trainer.update == trainer.updates
        figures = trainer.end_update()
        alarms = trainer.guards.observe(update, figures)
        for alarm in alarms:
            say(f"ppo: WARN {alarm.text}", active=trainer.accelerator.is_main_process)
            self.wandb_run.alert(f"ppo: {alarm.guard.value}", alarm.text)
            if alarm.guard in trainer.settings.stop_on and self.stopped_by is None:
                self.stopped_by = alarm.text
                control.should_training_stop = control.should_save = True
        every = trainer.settings.sample_every
        sampled = self.samples is not None and (last or self.stopped_by or (every and update % every == 0))
        if sampled:
            figures |= self._take_samples(update)
            if trainer.measure is not None:
                figures |= {f"eval_{name}": value for name, value in trainer.measure().items()}
        trainer.log(figures)
        if sampled and self.best is not None:
            self.best.judge(args, state, control, figures, update)
        self.since_saved.append(figures["objective"])
        if control.should_save:
            self._remember_best(args, state)

    def keep(self, update: int) -> None:
        """The weights are again those after `update`: what `summary` says of the end is of them. On every rank."""
        self.kept = update
        if self.samples is not None and update not in self.sampled:
            self._take_samples(update)

    def summary(self) -> dict[str, float]:
        """Figures of the first update and means over the last tenth of those up to the one whose weights are kept, and
        of the samples before and after; for the manifest."""
        kept = self.trainer.updates if self.kept is None else self.kept
        lines = [line for line in self.trainer.state.log_history if "reward/score" in line and line["step"] <= kept]
        found: dict[str, float] = {}
        # One update alone is a few hundred completions of whatever prompts came.
        for moment, of_moment in (("first", lines[:1]), ("last", lines[-max(1, len(lines) // 10) :])):
            for name in IN_MANIFEST:
                values = [line[name] for line in of_moment if name in line]
                if values:
                    found[f"{moment}/{name}"] = sum(values) / len(values)
        sampled = [self.sampled[update] for update in sorted(self.sampled) if update <= kept]
        for moment, means_of_moment in (("before", sampled[:1]), ("after", sampled[-1:])):
            for name, value in means_of_moment[0].items() if means_of_moment else ():
                found[f"{moment}/{name}"] = value
        measured = [line for line in self.trainer.state.log_history if line["step"] <= kept and _measured(line)]
        return found | {f"after/{name}": value for line in measured[-1:] for name, value in _measured(line).items()}

    def _take_samples(self, update: int) -> dict[str, float]:
        lines, figures = self.samples.take(update)
        self.sampled[update] = figures
        self.wandb_run.table("samples", update, lines)
        return figures

    def _remember_best(self, args: Any, state: Any) -> None:
        """The checkpoint that is about to be written is the best if its updates had the highest objective on average;
        the Trainer keeps the best one when it removes old ones."""
        objective = sum(self.since_saved) / len(self.since_saved)
        self.since_saved = []
        if self.trainer.settings.keep_best:
            return  # then `best` says which it is
        if self.stopped_by is None and (state.best_metric is None or objective > state.best_metric):
            state.best_metric, state.best_global_step = objective, state.global_step
            state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def _measured(line: Mapping[str, Any]) -> dict[str, float]:
    return {key.removeprefix("eval_"): value for key, value in line.items() if key.startswith("eval_")}


class KeepState(TrainerCallback):
    """Puts the rest of PPO's state into each checkpoint. Comes before the seal."""

    def __init__(self, trainer: PPOTrainer):
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        self.trainer.save_state(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class UpdateReport(TrainerCallback):
    """Every update goes to metrics.jsonl, to wandb and to the live line. Added on rank 0 only."""

    def __init__(self, stage: str, updates: int, first: int, log: MetricsLog, wandb_run: WandbRun):
        self.log, self.wandb_run = log, wandb_run
        self.progress = Progress(stage, updates, done=first, unit="update")

    def on_train_begin(self, args, state, control, **kwargs):
        self.log.keep(state.log_history)

    def on_log(self, args, state, control, logs=None, **kwargs):
        update = state.log_history[-1]["step"]
        self.log.write(update, logs)
        self.wandb_run.write(update, logs)
        note = (
            f"score {logs['reward/score']:+.3f}  KL {logs['kl/nats_per_completion']:.2f} nats  "
            f"{logs['completion/tokens']:.0f} tokens"
        )
        self.progress.show(update, note)
