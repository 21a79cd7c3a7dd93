"""What every trainer of this library adds to transformers' own so that a run survives: see docs/reliability.md."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed
from transformers.trainer_utils import EvalLoopOutput

from align.config.errors import Stopped
from align.distributed import elastic, runtime
from align.models.actor_critic import cache_on
from align.models.layout import plain_model
from align.trainers.nonfinite import SkippedSteps
from align.trainers.out_of_memory import BatchNamingTrainer
from align.trainers.whole import gathered


class SurvivingTrainer(BatchNamingTrainer):
    """Skips steps that are not finite, breaks off an evaluation when told to stop, seeds ranks that are new.

    Losses have to go through `nonfinite.poisoned`.
    """

    skipped: SkippedSteps | None = None
    """Set before training; without it a step that is not finite is skipped and nobody hears of it."""
    measure: Callable[[], dict[str, float]] | None = None
    """Further figures of the policy as it is, by name, for each evaluation. Set before training; for every rank."""
    _logged_at = _skipped_since = 0

    @property
    def train_rows(self) -> Any:
        """The rows that `rows_of_step` counts."""
        return self.train_dataset

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; remembers its settings, which a checkpoint of other ranks would lose."""
        optimizer = super().create_optimizer(*args, **kwargs)
        self.optimizer_settings = elastic.settings_of(optimizer)
        return optimizer

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """The Trainer's, with what is measured of the policy beside the loss on held-out rows."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.measure is not None:
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in self.measure().items()})
        return output

    @contextlib.contextmanager
    def generating(self) -> Iterator[PreTrainedModel]:
        """Inside: the policy as it is with whole weights, ready to sample and to be read; ZeRO-3 gathers them once.

        Call it on every rank; inside, each may do something else.
        """
        self.model_wrapped.eval()
        with (
            cache_on(plain_model(self.model)) as policy,
            gathered(self.model_wrapped, policy),
            self.accelerator.autocast(),
        ):
            yield policy

    # What a subclass adds up over steps, and takes back of one that was skipped.

    def figures_so_far(self) -> Any:
        """What `forget_figures` needs to take back all figures that came after this moment."""

    def forget_figures(self, before: Any) -> None:
        """Take back the figures that came after `before`."""

    def rows_of_step(self) -> list[int]:
        """Rows of the training set in the optimizer step that is under way, over all ranks, ascending."""
        loader, args, ranks = self.callback_handler.train_dataloader, self.args, self.accelerator.num_processes
        updates = math.ceil(len(loader) / args.gradient_accumulation_steps)
        epoch, update = divmod(self.state.global_step, updates)
        batch = args.train_batch_size * args.gradient_accumulation_steps * ranks
        order = getattr(loader.dataset, "order", None)
        if order is None:
            batches = loader.batch_sampler
            sampler = copy.copy(getattr(batches, "batch_sampler", batches).sampler)
            if hasattr(sampler, "set_epoch"):
                # The generator is that of the epoch under way.
                sampler.generator = None
                sampler.set_epoch(epoch)
            order = list(sampler)
        return sorted({int(row) for row in order[update * batch : (update + 1) * batch]})

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Tensor | int | None]:
        """The micro-batches of the next optimizer step; remembers the figures before it."""
        found = super().get_batch_samples(*args, **kwargs)
        self._before = self._tr_loss.clone(), self.figures_so_far()
        return found

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm over all ranks, None under ZeRO-0. Where it is no number the step is skipped."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is None:
            self._refuse_bad_step()
        elif not math.isfinite(norm):
            self._skip_step(model)
        return norm

    def _refuse_bad_step(self) -> None:
        """ZeRO-0 gives no norm and has taken the step, whatever it was: what is saved must be older."""
        if self.skipped is not None and any(runtime.gather(not self._tr_loss.isfinite().item())):
            self.skipped.refuse(self.state.global_step + 1, self.rows_of_step(), "deepspeed.stage=0 cannot skip a step")

    def _skip_step(self, model: nn.Module) -> None:
        if self.is_deepspeed_enabled:
            # ZeRO has left the step out by itself. The schedule goes by steps, so it moves on as without ZeRO.
            assert self.accelerator.optimizer_step_was_skipped, "DeepSpeed took a step whose gradient is not finite"
            self.lr_scheduler.step()
        else:
            # Without gradients the optimizer leaves weights and moments as they are.
            model.zero_grad(set_to_none=True)
        loss, figures = self._before
        self._tr_loss.copy_(loss)
        self.forget_figures(figures)
        self._skipped_since += 1
        if self.skipped is not None:
            self.skipped.add(self.state.global_step + 1, self.rows_of_step())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A line of training is of the steps since the last one that were not skipped."""
        if "loss" in logs:
            steps = self.state.global_step - max(self._logged_at, self._initial_global_step)
            skipped = self._skipped_since
            self._logged_at, self._skipped_since = self.state.global_step, 0
            if skipped:
                logs["skipped_steps"] = skipped
                loss = logs.pop("loss")
                if steps > skipped:
                    logs["loss"] = loss * steps / (steps - skipped)
        super().log(logs, start_time)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's, broken off when a rank is told to stop; then what has been trained is saved first."""
        try:
            return super()._evaluate(*args, **kwargs)
        except Stopped:
            if self.state.global_step == self._initial_global_step:
                raise
            self.control.should_save = self.control.should_training_stop = True
            self.control.should_evaluate = False
            return {}

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The Trainer's; a rank that the checkpoint does not know gets numbers of its own."""
        if checkpoint is not None:
            set_seed(self.args.seed + 1000 * self.args.process_index + self.state.global_step)
        super()._load_rng_state(checkpoint)
