"""SIGTERM and SIGUSR1: every rank stops after the same step, saves, and ends with exit code 0.

A signal reaches one rank, or all of them at different moments (DeepSpeed's launcher passes SIGTERM on to one rank after
another). So while training it is only noted, and the ranks agree on it after each step.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from align.config.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """What this process was told. Outside of training, where nothing waits to be saved, it ends the run at once."""

    def __init__(self) -> None:
        self.number = 0
        self._held = False

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Inside, the signals come here; in another thread than the main one they stay as they are."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.number = 0
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, a signal is noted and no more: whoever is inside asks `agreed` where the ranks meet.

        Raises: Stopped on the way out, if one came that nobody inside ended for.
        """
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self.number:
            raise Stopped(f"stopped by {signal.Signals(self.number).name}")

    def _note(self, number: int, frame: object) -> None:
        # A second one is only noted: it must not break the save that the first one began.
        first, self.number = not self.number, number
        if first and not self._held:
            raise Stopped(f"stopped by {signal.Signals(number).name}")

    def agreed(self) -> str | None:
        """The signal that any rank has had, or None. A collective: call it at the same place on every rank."""
        number = self.number
        if dist.is_initialized() and dist.get_world_size() > 1:
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            flag = torch.tensor([number], device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            number = int(flag.item())
        return signal.Signals(number).name if number else None


STOP = StopSignal()
"""A process has one set of signal handlers, so there is one of these."""


class StopTogether(TrainerCallback):
    """Saves and ends training after the step in which any rank was told to stop. On every rank."""

    def __init__(self, stage: str, every: int = 1) -> None:
        """every: optimizer steps after which a checkpoint holds all there is; of PPO those of an update."""
        self.stage, self.every = stage, every
        self.signal: str | None = None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self.check(control)

    def check(self, control) -> bool:
        """Ask all ranks; if one was told to stop, let the Trainer save what there is and end. A collective."""
        self.signal = self.signal or STOP.agreed()
        if self.signal is not None:
            control.should_save = control.should_training_stop = True
            # Judging may take longer than the grace period; it is made up for when the stage goes on.
            control.should_evaluate = False
        return self.signal is not None

    def on_prediction_step(self, args, state, control, **kwargs):
        self.signal = self.signal or STOP.agreed()
        if self.signal is not None:
            where = f"while judging held-out rows at step {state.global_step}"
            raise Stopped(f"{self.stage}: stopped by {self.signal} {where}")

    def end(self, step: int) -> None:
        """Call it on every rank when the Trainer has returned. Raises: Stopped if it ended because of a signal."""
        if self.signal is not None:
            raise Stopped(f"{self.stage}: stopped by {self.signal} and saved at step {step}")
