"""`do=plan`: what a run would take, before it is started. From configs and rows alone: no weights, no GPU."""

from align.config.schema import RunConfig
from align.distributed.runtime import launched_rank
from align.stages.rows import trained_stages
from align.trainers.quiet import quiet_libraries
from align.verbs.plan_machine import planned_target, target_lines
from align.verbs.plan_training import disk_lines, plan_stage

UNPLANNED = {
    "score": "trains nothing; it takes the reward model's weights and one batch",
    "evaluate": "trains nothing; it takes the weights of one model after the other",
    "classify": "trains nothing; it takes the weights of one model after the other",
    "export": "trains nothing; it takes the weights of one model, and writes them once more",
}
TRUST = """\
how far to trust it: model states are exact counts; activations were within 18 % of what autograd keeps, for the model
types that docs/memory.md names; buffers are DeepSpeed's defaults. Not counted: fragmentation, other programs on the
device. "fits" leaves a tenth free for that. No GPU has been held against it yet: tests/gpu/test_memory.py does."""


def run_plan(config: RunConfig) -> None:
    """Print a part for each stage of the run, then the disk it needs. Writes nothing but tokenised rows, to the cache.

    Raises: UserError for what would refuse a stage.
    """
    quiet_libraries()
    target = planned_target(config)
    parts = [target_lines(config, target)]
    plans = {name: plan_stage(config, name, target) for name in trained_stages(config)}
    for name in config.run:
        if name == "constitutional":
            from align.verbs.plan_constitutional import plan_constitutional

            parts.append(["constitutional", *plan_constitutional(config)])
        elif name in UNPLANNED:
            parts.append([f"{name}: {UNPLANNED[name]}"])
        else:
            parts.append(plans[name].lines())
    if plans:
        parts += [disk_lines(config, list(plans.values())), TRUST.splitlines()]
    if launched_rank() == 0:
        print("\n\n".join("\n".join(part) for part in parts))
