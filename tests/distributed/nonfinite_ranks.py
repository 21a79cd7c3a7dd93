"""Trains DPO with a loss that is no number on rank 1 alone in step 3; writes what became of weights and figures.

Call: deepspeed --num_gpus 2 --no_local_rank nonfinite_ranks.py FOLDER MODE...   with MODE as in curves.py
"""

import json
import math
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from align.config.schema import Precision
from align.distributed import runtime, zero
from align.stages.context import RunContext
from align.stages.table import RUN
from align.trainers.pairs import PairTrainer
from align.trainers.quiet import quiet_libraries
from tests.distributed.curves import config

STEPS, BAD = 5, 3


class Watch(TrainerCallback):
    """A digest of the whole weights after every step."""

    def __init__(self):
        self.sums = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        parameters = list(model.parameters())
        with zero.whole(parameters):
            self.sums.append(sum(p.detach().double().abs().sum().item() for p in parameters))


def main(folder: Path, modes: list[str]) -> None:
    quiet_libraries()
    compute, begin = PairTrainer.compute_loss, PairTrainer.__init__
    watches: list[Watch] = []

    def init(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        watches.append(Watch())
        self.add_callback(watches[-1])

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training and self.state.global_step + 1 == BAD and self.args.process_index == 1:
            inputs["reference_chosen_logps"] = inputs["reference_chosen_logps"] * math.inf
        return compute(self, model, inputs, *args, **kwargs)

    PairTrainer.compute_loss, PairTrainer.__init__ = compute_loss, init
    for mode in modes:
        name, _, text = mode.partition(":")
        settings = dict(item.split("=") for item in text.split(",") if item)
        run = config(folder, settings)
        run.data.preferences, run.stages.dpo.max_steps = "tiny:preferences", STEPS
        run.precision = Precision(settings.get("precision", "fp32"))
        this = runtime.start(deepspeed="zero" in settings, timeout_seconds=120)
        (folder / name / "dpo").mkdir(parents=True, exist_ok=True)
        try:
            RUN["dpo"](run.stages.dpo, RunContext(run, this, folder / name, "dpo"))
            error = ""
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        found = {"weights": watches[-1].sums, "error": error}
        (folder / name / f"rank-{this.rank}.json").write_text(json.dumps(found))
        runtime.barrier()
    runtime.stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
