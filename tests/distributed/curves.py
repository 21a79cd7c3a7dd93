"""Runs the DPO or the reward stage in several ways in one process (each rank of a launch); leaves every metrics.jsonl.

Call: [deepspeed --num_gpus 2 --no_local_rank] curves.py FOLDER MODE...   with MODE = name:key=value,key=value
"""

import sys
from pathlib import Path

from align.config.schema import (
    DeepSpeedConfig,
    DPOStage,
    Layout,
    ModelConfig,
    Offload,
    PeftConfig,
    PeftMethod,
    Precision,
    RewardStage,
    RunConfig,
    Stages,
    ZeroChoice,
)
from align.distributed import runtime
from align.stages.context import RunContext
from align.stages.table import RUN
from align.trainers.quiet import quiet_libraries

STEPS = 20
STAGES = {"dpo": DPOStage, "reward": RewardStage}


def config(folder: Path, settings: dict[str, str]) -> RunConfig:
    zero, name = settings.get("zero"), settings.get("stage", "dpo")
    stage = STAGES[name](
        policy="tiny-sft",
        max_steps=STEPS,
        learning_rate=1e-4,
        batch_size=8,
        micro_batch_size=int(settings.get("micro", "8")),
        max_tokens=512,
        save_every=0,
        layout=Layout(settings.get("layout", "forest")),
    )
    return RunConfig(
        name="curves",
        run=[name],
        cache_dir=str(folder / "cache" / settings.get("cache", "shared")),
        precision=Precision.fp32,
        model=ModelConfig(path="tiny-sft"),
        peft=PeftConfig(method=PeftMethod(settings.get("peft", "none"))),
        deepspeed=DeepSpeedConfig(
            mode=ZeroChoice.none if zero is None else ZeroChoice.zero,
            stage=int(zero or 0),
            offload=Offload(settings.get("offload", "none")),
            timeout_seconds=120,
        ),
        stages=Stages(**{name: stage}),
    )


def main(folder: Path, modes: list[str]) -> None:
    quiet_libraries()
    for mode in modes:
        name, _, text = mode.partition(":")
        settings = dict(item.split("=") for item in text.split(",") if item)
        run = config(folder, settings)
        run.data.preferences, run.data.demonstrations = "tiny:preferences", "tiny:demonstrations"
        [stage] = run.run
        this = runtime.start(deepspeed="zero" in settings, timeout_seconds=120)
        (folder / name / stage).mkdir(parents=True, exist_ok=True)
        RUN[stage](getattr(run.stages, stage), RunContext(run, this, folder / name, stage))
        runtime.barrier()
    runtime.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
