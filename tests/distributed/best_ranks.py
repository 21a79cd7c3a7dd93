"""Runs SFT, judged by figures of the evaluate stage, in several ways in one process (each rank of a launch).

Call: [deepspeed --num_gpus 2 --no_local_rank] best_ranks.py FOLDER MODE...   with MODE = name:key=value,key=value
FOLDER/reward_model is the judge.
"""

import sys
from pathlib import Path

from align.config.schema import (
    BestBy,
    BestConfig,
    DataConfig,
    DeepSpeedConfig,
    JudgeConfig,
    JudgeKind,
    ModelConfig,
    Precision,
    RunConfig,
    SFTStage,
    Stages,
    ZeroChoice,
)
from align.distributed import runtime
from align.stages.context import RunContext
from align.stages.table import RUN
from align.trainers.quiet import quiet_libraries


def config(folder: Path, name: str, settings: dict[str, str]) -> RunConfig:
    by = BestBy(settings["by"])
    zero = settings.get("zero")
    judge = JudgeConfig(JudgeKind.reward, reward_model=str(folder / "reward_model"))
    return RunConfig(
        name="best",
        run_dir=str(folder / name),
        cache_dir=str(folder / "cache"),
        precision=Precision.fp32,
        model=ModelConfig(path="tiny-base"),
        data=DataConfig(
            demonstrations="tiny:demonstrations", preferences="tiny:preferences", prompts="tiny:prompts",
            text="tiny:text",
        ),
        deepspeed=DeepSpeedConfig(mode=ZeroChoice.zero if zero else ZeroChoice.none, stage=int(zero or 2)),
        best=BestConfig(
            baseline="tiny-base", judge=judge if by is BestBy.win_rate else JudgeConfig(), rows=3, max_new_tokens=12
        ),
        stages=Stages(
            sft=SFTStage(
                policy="tiny-base", max_steps=4, eval_every=2, save_every=0, batch_size=4, micro_batch_size=2,
                max_tokens=128, learning_rate=1e-3, keep_best=True, best_by=by,
            )
        ),
    )  # fmt: skip


def main(folder: Path, modes: list[str]) -> None:
    quiet_libraries()
    for mode in modes:
        name, _, words = mode.partition(":")
        settings = dict(word.split("=") for word in words.split(","))
        made = config(folder, name, settings)
        this = runtime.start(deepspeed="zero" in settings, timeout_seconds=300)
        context = RunContext(made, this, Path(made.run_dir), "sft")
        context.stage_dir.mkdir(parents=True, exist_ok=True)
        RUN["sft"](made.stages.sft, context)
        runtime.barrier()
    runtime.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
