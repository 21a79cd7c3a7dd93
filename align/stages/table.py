"""Which code runs a stage, and what it leaves for the next one."""

from collections.abc import Callable

from align.artifacts import Manifest
from align.stages import classify, constitutional, dpo, evaluate, export, ppo, reward, score, sft

RUN: dict[str, Callable[..., Manifest]] = {
    "pretrain": sft.run,
    "sft": sft.run,
    "reward": reward.run,
    "score": score.run,
    "dpo": dpo.run,
    "ppo": ppo.run,
    "constitutional": constitutional.run,
    "evaluate": evaluate.run,
    "classify": classify.run,
    "export": export.run,
}
