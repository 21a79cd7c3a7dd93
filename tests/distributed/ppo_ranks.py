"""Runs the PPO stage in several ways in one process (each rank of a launch); leaves what each samples beside it.

Call: [deepspeed --num_gpus 2 --no_local_rank] ppo_ranks.py FOLDER MODE...   with MODE = name:key=value,key=value
FOLDER/reward_model is the reward model.
"""

import json
import sys
from pathlib import Path
from typing import Any

from align.config.schema import (
    Advantage,
    DeepSpeedConfig,
    KLController,
    ModelConfig,
    PeftConfig,
    PeftMethod,
    PPOStage,
    Precision,
    RewardScale,
    RunConfig,
    Stages,
    ZeroChoice,
)
from align.distributed import runtime
from align.stages.context import RunContext
from align.stages.table import RUN
from align.trainers.experience import Experience, ExperienceMaker
from align.trainers.quiet import quiet_libraries

UPDATES = 2


def shortness(prompts: list[Any], completions: list[str], rows: list[dict[str, Any]]) -> list[float | None]:
    """No score for one of the completions of most updates, so that ranks have unequal shares of what is trained."""
    return [None if len(text) % 25 == 0 else -len(text) / 50 for text in completions]


def stage(folder: Path, settings: dict[str, str]) -> PPOStage:
    return PPOStage(
        policy="tiny-sft",
        max_steps=UPDATES,
        completions_per_update=8,
        completions_per_prompt=2,
        batch_size=4,
        micro_batch_size=int(settings.get("micro", "2")),
        update_epochs=2,
        max_tokens=256,
        max_new_tokens=12,
        temperature=1.5,
        learning_rate=1e-4,
        value_learning_rate=2e-4,
        rewards={
            "preference": {"model": str(folder / "reward_model")},
            "short": {"function": "tests.distributed.ppo_ranks:shortness", "weight": 0.5},
        },
        advantage=Advantage(settings.get("advantage", "gae")),
        kl_controller=KLController.adaptive,
        kl_horizon_completions=40,
        reward_scale=RewardScale.running,
        pretraining_weight=0.1,
        ema_decay=0.8,
        sample_every=1,
        sample_prompts=3,
        save_every=0,
    )


def config(folder: Path, settings: dict[str, str]) -> RunConfig:
    zero = settings.get("zero")
    run = RunConfig(
        name="ranks",
        run=["ppo"],
        cache_dir=str(folder / "cache"),
        precision=Precision.fp32,
        model=ModelConfig(path="tiny-sft"),
        peft=PeftConfig(method=PeftMethod(settings.get("peft", "none")), r=4),
        deepspeed=DeepSpeedConfig(
            mode=ZeroChoice.none if zero is None else ZeroChoice.zero, stage=int(zero or 0), timeout_seconds=120
        ),
        stages=Stages(ppo=stage(folder, settings)),
    )
    run.data.prompts, run.data.text = "tiny:prompts", "tiny:text"
    return run


def keep_completions(file: Path) -> None:
    """From now on every experience that is made is added to a file by rank 0, and compared over ranks."""
    made: list[list[list[int]]] = []

    def kept(self: ExperienceMaker, update: int) -> Experience:
        seen = MAKE(self, update)
        assert len({str(part) for part in runtime.gather(seen.completions)}) == 1, "ranks hold other experiences"
        made.append(seen.completions)
        if self.accelerator.is_main_process:
            file.write_text(json.dumps(made))
        return seen

    ExperienceMaker.make = kept  # type: ignore[method-assign]


MAKE = ExperienceMaker.make


def main(folder: Path, modes: list[str]) -> None:
    quiet_libraries()
    for mode in modes:
        name, _, text = mode.partition(":")
        settings = dict(item.split("=") for item in text.split(",") if item)
        run = config(folder, settings)
        this = runtime.start(deepspeed="zero" in settings, timeout_seconds=120)
        (folder / name / "ppo").mkdir(parents=True, exist_ok=True)
        keep_completions(folder / name / "completions.json")
        RUN["ppo"](run.stages.ppo, RunContext(run, this, folder / name, "ppo"))
        runtime.barrier()
    runtime.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
