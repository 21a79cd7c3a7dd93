"""Scores of a saved reward model for answers, shared among ranks."""

from collections.abc import Sequence

import torch

from align.config.schema import Layout
from align.data.forest import Tree, lay_out_scores
from align.distributed import runtime
from align.models import load
from align.models.adapters.saved import load_scorer
from align.models.reward import centred_scores
from align.stages.context import RunContext
from align.tracking.progress import Progress


def answer_scores(
    reward_model: str, trees: Sequence[Tree], context: RunContext, *, pad_token_id: int, micro_batch_size: int
) -> list[list[float]]:
    """Scores of each prompt's answers, less the model's centre; ranks share the prompts, and every rank gets all.

    The model is freed afterwards. micro_batch_size: prompts in a forward.
    """
    config, machine = context.config, context.runtime
    dtype = torch.bfloat16 if load.use_bf16(config.precision, machine.device) else torch.float32
    model = load_scorer(reward_model, config.model, dtype, seed=0).to(machine.device).eval()
    order = sorted(range(len(trees)), key=lambda i: -len(trees[i].prompt) - max(map(len, trees[i].completions)))
    mine = order[machine.rank :: machine.world_size]
    progress = Progress(f"{context.stage_name}: scoring", len(mine), active=machine.is_main, unit="rows")
    found: dict[int, list[float]] = {}
    for start in range(0, len(mine), micro_batch_size):
        taken = mine[start : start + micro_batch_size]
        laid_out = lay_out_scores([trees[i] for i in taken], Layout.padded, pad_token_id)
        batch = {name: value.to(machine.device) for name, value in laid_out.items()}
        with torch.no_grad():
            scores = iter(centred_scores(model, batch).tolist())
        found |= {i: [next(scores) for _ in trees[i].completions] for i in taken}
        progress.show(len(found))
    del model
    runtime.free_memory()
    everything = {index: values for part in runtime.gather(found) for index, values in part.items()}
    return [everything[index] for index in range(len(trees))]
