"""Trains a stage for some steps, or goes on with it, in several ways in one process (each rank of a launch).

Call: [deepspeed --num_gpus N --no_local_rank] elastic_ranks.py FOLDER STOP_AFTER MODE...
with MODE = name:key=value,key=value. STOP_AFTER above 0: it is told to stop after that step, and leaves a checkpoint.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

from transformers import Trainer, TrainerCallback

from align.chain import _run_stage
from align.config.errors import Stopped
from align.config.schema import (
    DeepSpeedConfig,
    DPOStage,
    Layout,
    ModelConfig,
    PeftConfig,
    PeftMethod,
    Precision,
    RewardStage,
    RunConfig,
    SFTStage,
    Stages,
    ZeroChoice,
)
from align.distributed import runtime
from align.trainers.quiet import quiet_libraries
from align.trainers.stopping import STOP
from align.trainers.surviving import SurvivingTrainer

STEPS, BATCH, ROWS = 8, 12, 36
"""Three steps an epoch, without a partial one; twelve rows divide among one, two and three ranks."""
PACKED_ROWS, PACKED_TOKENS = 400, 64
"""More than eight batches of packed rows: several ranks fill the last batch of an epoch with rows that repeat."""
STAGES = {"dpo": DPOStage, "reward": RewardStage, "sft": SFTStage}


def config(folder: Path, name: str, settings: dict[str, str]) -> RunConfig:
    zero, stage_name = settings.get("zero"), settings.get("stage", "dpo")
    packed = settings.get("packing") == "true"
    own = {"packing": packed} if stage_name == "sft" else {"layout": Layout.forest}
    stage = STAGES[stage_name](
        policy="tiny-sft", max_steps=STEPS, learning_rate=3e-4, weight_decay=0.1, batch_size=BATCH, micro_batch_size=2,
        max_tokens=PACKED_TOKENS if packed else 512, save_every=100, **own,
    )  # fmt: skip
    run = RunConfig(
        name="elastic",
        run=[stage_name],
        run_dir=str(folder / name),
        cache_dir=str(folder / "cache"),
        precision=Precision(settings.get("precision", "fp32")),
        model=ModelConfig(path="tiny-sft"),
        peft=PeftConfig(method=PeftMethod(settings.get("peft", "none"))),
        deepspeed=DeepSpeedConfig(
            mode=ZeroChoice.none if zero is None else ZeroChoice.zero, stage=int(zero or 0), timeout_seconds=120
        ),
        stages=Stages(**{stage_name: stage}),
    )
    kind = "demonstrations" if stage_name == "sft" else "preferences"
    setattr(run.data, kind, [{"path": f"tiny:{kind}", "take": PACKED_ROWS if packed else ROWS}])
    if stage_name == "reward":
        run.data.demonstrations = "tiny:demonstrations"
    run.data.held_out_fraction = 0.0
    return run


class StopAfter(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        # The last rank alone is told.
        if state.global_step + 1 == self.step and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def main(folder: Path, stop_after: int, modes: list[str]) -> None:
    quiet_libraries()
    begin, norm = Trainer.__init__, SurvivingTrainer._get_grad_norm
    rows: dict[int, list[int]] = {}

    def init(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self.add_callback(StopAfter(stop_after))

    def remember(self, *args, **kwargs):
        rows[self.state.global_step + 1] = self.rows_of_step()
        return norm(self, *args, **kwargs)

    # Of transformers: TRL's trainers lie between it and ours.
    Trainer.__init__, SurvivingTrainer._get_grad_norm = init, remember
    for mode in modes:
        name, _, text = mode.partition(":")
        run = config(folder, name, dict(item.split("=") for item in text.split(",") if item))
        [stage] = run.run
        this = runtime.start(deepspeed="zero" in text, timeout_seconds=120)
        rows.clear()
        ended = "done"
        try:
            with STOP.caught():
                _run_stage(run, stage, folder / name, this)
        except Stopped as stopped:
            ended = str(stopped)
        except Exception:
            ended = traceback.format_exc()
        if this.is_main:
            (folder / name / "ended.json").write_text(json.dumps({"ended": ended, "rows": rows}))
        runtime.barrier()
    runtime.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
