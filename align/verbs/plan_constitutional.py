"""`do=plan` of the constitutional stage: what it would ask of its models, before anything is spent.

Local models answer a few of the prompts, which shows how long answers are and how fast they come. Servers are asked
nothing: their answers are taken as long as they may be, so the plan is a bound.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path

from align.config.constitution import Constitution, load_constitution
from align.config.schema import ConstitutionalStage, PairSource, RunConfig, SpeakerBackend
from align.constitutional.prompts import Questions
from align.constitutional.rows import PromptWork
from align.constitutional.work import Work, role_of
from align.data.prepare import prompts_to_answer
from align.distributed.runtime import Runtime, start
from align.stages.constitutional import check_stage, make, prompt_works
from align.stages.context import RunContext
from align.stages.speakers import load_speakers, speaker_configs
from align.tracking.progress import clock, say

TRIED_PROMPTS = 16
STAGE = "constitutional"


@dataclass
class Step:
    """What a step would take, for all prompts."""

    calls: float
    prompt_tokens: float
    new_tokens: float
    seconds: float | None


def plan_constitutional(config: RunConfig) -> list[str]:
    """Calls, tokens and time or price of each step, as lines. Writes nothing.

    Raises: UserError for what would refuse the stage.
    """
    stage = config.stages.constitutional
    assert stage is not None
    constitution = load_constitution(stage.constitution)
    check_stage(stage, constitution)
    rows = prompt_works(prompts_to_answer(config.data), stage)
    local = all(one.backend is SpeakerBackend.hf for one in speaker_configs(stage).values())
    steps = _tried(config, constitution, rows) if local else _bounds(stage, constitution, rows)
    return _lines(stage, steps, len(rows), local)


def _tried(config: RunConfig, constitution: Constitution, rows: Sequence[PromptWork]) -> dict[str, Step]:
    """The whole stage on the first prompts, in a folder that is thrown away, scaled up."""
    stage, some = config.stages.constitutional, rows[:TRIED_PROMPTS]
    assert stage is not None
    say(f"{STAGE}: trying {len(some)} prompts")
    runtime: Runtime = start(deepspeed=False, timeout_seconds=config.deepspeed.timeout_seconds)
    with tempfile.TemporaryDirectory() as folder:
        context = RunContext(config, runtime, Path(folder), STAGE)
        work = Work(Path(folder), runtime, STAGE)
        make(stage, constitution, some, load_speakers(stage, context), work)
    times = len(rows) / max(len(some), 1)
    return {
        name: Step(one.calls * times, one.prompt_tokens * times, one.new_tokens * times, one.seconds * times)
        for name, one in work.spent.items()
    }


def _bounds(stage: ConstitutionalStage, constitution: Constitution, rows: Sequence[PromptWork]) -> dict[str, Step]:
    """As much as it can be: every critique finds a flaw, and every answer is as long as it may be."""
    questions, principle = Questions(constitution), constitution.principles[0]
    reply, critique = "x " * stage.max_new_tokens, "x " * stage.max_critique_tokens
    longest = max(rows, key=lambda row: len(questions.transcript(row.conversation))).conversation
    pair = (longest, reply, reply, principle)
    asked = {
        "initial": (longest, stage.max_new_tokens),
        "critique": (questions.critique(longest, reply, principle), stage.max_critique_tokens),
        "revision": (questions.revision(longest, reply, critique, principle), stage.max_new_tokens),
        "judge": (questions.comparison(*pair), 0),
        "samples": (longest, stage.max_new_tokens),
        "contrast": (longest, stage.max_new_tokens),
    }
    found = {}
    for name, count in _calls(stage, constitution, len(rows)).items():
        chat, new = asked[name.split("_")[0]]
        prompt_tokens = sum(_tokens(turn["content"]) for turn in chat)
        found[name] = Step(count, count * prompt_tokens, count * new, None)
    return found


def _calls(stage: ConstitutionalStage, constitution: Constitution, prompts: int) -> dict[str, int]:
    """Questions of each step, at most; without chains of thought and the comparison of targets."""
    counts = {"initial": prompts}
    for number in range(1, stage.rounds + 1):
        counts |= {f"critique_{number}": prompts, f"revision_{number}": prompts}
        if stage.judge_revisions:
            counts[f"judge_revision_{number}"] = 2 * prompts
    pairs = {
        PairSource.none: 0,
        PairSource.random: prompts,
        PairSource.all: prompts * comb(stage.samples, 2),
        PairSource.best_worst: prompts * comb(stage.samples, 2),
        PairSource.revision_vs_initial: prompts * (stage.rounds > 0),
        PairSource.contrast: prompts,
    }[stage.pairs]
    if stage.pairs in (PairSource.random, PairSource.all, PairSource.best_worst):
        counts["samples"] = prompts * stage.samples
    if stage.pairs is PairSource.contrast:
        counts["contrast"] = 2 * prompts
    principles = 1 if stage.pairs is PairSource.contrast else min(stage.judge_principles, len(constitution.principles))
    return counts | {"judge": 2 * pairs * principles}


def _tokens(text: str) -> int:
    """About as many tokens as English text of this length has."""
    return max(1, len(text) // 4)


def _lines(stage: ConstitutionalStage, steps: dict[str, Step], prompts: int, local: bool) -> list[str]:
    configs, price = speaker_configs(stage), 0.0
    lines = [f"plan for {prompts:,} prompts" + ("" if local else ", at most"), ""]
    lines.append(f"  {'step':<20}{'model':<28}{'calls':>10}{'tokens read':>14}{'written':>12}")
    for name, step in steps.items():
        config = configs[role_of(name)]
        price += (step.prompt_tokens * config.prompt_price + step.new_tokens * config.completion_price) / 1e6
        numbers = f"{step.calls:>10,.0f}{step.prompt_tokens:>14,.0f}{step.new_tokens:>12,.0f}"
        lines.append(f"  {name:<20}{str(config.model)[-26:]:<28}{numbers}")
    sums = [sum(getattr(step, name) for step in steps.values()) for name in ("calls", "prompt_tokens", "new_tokens")]
    lines.append(f"  {'all':<48}{sums[0]:>10,.0f}{sums[1]:>14,.0f}{sums[2]:>12,.0f}")
    lines.append("")
    if local:
        seconds = sum(step.seconds or 0.0 for step in steps.values())
        lines.append(f"time     {clock(seconds)} on one rank, as the first {TRIED_PROMPTS} prompts went")
    if price:
        lines.append(f"price    {price:,.2f}" + ("" if local else " at most"))
    elif not local:
        lines.append("price    not known: set prompt_price and completion_price of each role, for a million tokens")
    return lines
