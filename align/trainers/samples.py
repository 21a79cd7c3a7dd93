"""Greedy answers to the same held-out prompts every few updates: what a run has done to them, step by step."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from align.distributed import runtime
from align.tracking.local import json_line
from align.tracking.progress import Progress
from align.trainers.experience import answers
from align.trainers.ppo import PPOTrainer


class HeldOutSamples:
    """Answers the first prompts of a set with the policy as it is, scores them, and keeps them by update."""

    def __init__(self, trainer: PPOTrainer, rows: Dataset, file: Path):
        self.trainer, self.file = trainer, file
        self.rows = [rows[i] for i in range(min(trainer.settings.sample_prompts, len(rows)))]

    def take(self, update: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Lines {step, prompt, completion, score, tokens, ...} and their means, on every rank; rank 0 appends them."""
        trainer = self.trainer
        rank, ranks = trainer.accelerator.process_index, trainer.accelerator.num_processes
        lines = [line for part in runtime.gather(self._answer(self.rows[rank::ranks])) for line in part]
        lines.sort(key=lambda line: line["place"])
        for line in lines:
            line["step"] = update
        if trainer.accelerator.is_main_process:
            append(self.file, [{"step": update} | line for line in lines])
        return lines, means(lines)

    def _answer(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """One line a prompt of this rank; ranks without any still take part in what gathers weights."""
        trainer = self.trainer
        label = f"ppo: answering {len(self.rows)} held-out prompts"
        sampled = trainer.sample(
            [row["prompt_ids"] for row in rows],
            per_prompt=1,
            seeds=[0] * len(rows),
            temperature=0.0,
            progress=Progress(label, len(rows), active=trainer.accelerator.is_main_process, passing=True),
        )
        answered = answers(trainer.template, rows, sampled)
        with trainer.frozen_on_device():
            scores = {source.setting.name: source.scores(answered) for source in trainer.sources}
        places = {id(row): place for place, row in enumerate(self.rows)}
        return [
            {
                "place": places[id(row)],
                "prompt": one.prompt[-1].content,
                "completion": one.text,
                "score": _number(sum(s.weight * float(scores[s.name][i]) for s in trainer.rewards)),
                "scores": {name: _number(float(found[i])) for name, found in scores.items()},
                "tokens": len(one.completion_ids),
                "finished": one.finished,
            }
            for i, (row, one) in enumerate(zip(rows, answered, strict=True))
        ]


def _number(score: float) -> float | None:
    """None for a score that is none: JSON has no NaN."""
    return score if math.isfinite(score) else None


def means(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of the lines of one update; a score that is none is left out of its mean, which is not there without any."""
    scores = [line["score"] for line in lines if line["score"] is not None]
    scored = {"samples/score": sum(scores) / len(scores)} if scores else {}
    return scored | {
        "samples/tokens": sum(line["tokens"] for line in lines) / len(lines),
        "samples/unfinished": sum(not line["finished"] for line in lines) / len(lines),
    }


def append(file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Add lines to a JSONL file."""
    with open(file, "a", encoding="utf-8") as out:
        out.writelines(map(json_line, lines))


def read_samples(file: Path) -> list[dict[str, Any]]:
    """Every whole line; one torn by an interruption is left out."""
    lines = []
    for text in file.read_text(encoding="utf-8").split("\n") if file.is_file() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def keep_until(file: Path, update: int) -> None:
    """Forget lines of later updates, which a resumed run makes again."""
    kept = [line for line in read_samples(file) if line["step"] <= update]
    temporary = file.with_suffix(".tmp")
    temporary.write_text("".join(map(json_line, kept)), encoding="utf-8")
    temporary.replace(file)
