"""The whole stage, from files to files, with scripted models in place of real ones."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

from align.artifacts import Manifest
from align.config.constitution import Constitution
from align.config.schema import ConstitutionalStage, DataConfig, RunConfig, SpeakerBackend, SpeakerConfig, Stages
from align.constitutional import outputs
from align.constitutional.drawing import seed_of
from align.distributed.runtime import Runtime
from align.generation.fake_speaker import FakeSpeaker
from align.stages import constitutional
from align.stages.context import RunContext
from tests.constitutional.making import ALONE, Say, Seen, Weigh, constitution, speaker

FILES = (
    outputs.DEMONSTRATIONS, outputs.PREFERENCES, outputs.UNPAIRED, outputs.TRACE, outputs.LEFT_OUT,
    constitutional.FIGURES, constitutional.REPORT,
)  # fmt: skip
SERVED = SpeakerConfig(backend=SpeakerBackend.server, model="fake", url="http://127.0.0.1:9/v1")


def of_chance(*parts: Any) -> float:
    """A number from 0 to 1 that looks drawn and depends on the parts alone."""
    return seed_of("of_chance", *parts) / 2**63


def some_answer(ask: Any, question: Seen) -> str:
    """An answer of every kind; half of the critiques find a flaw, one in ten has no mark."""
    draw = of_chance(ask.seed, ask.messages)
    number = int(1000 * draw)
    if question.kind == "critique":
        return f"Flaw: number {number} is wrong" if draw < 0.5 else "No flaw" if draw < 0.9 else f"hm, {number}?"
    if question.kind == "revision":
        return f"Village {number} has a well\u2028 größer than before, and neighbours who share what they bake."
    return f"People like the old market of village {number}."


def some_choice(choose: Any, question: Seen) -> Sequence[float]:
    draw = 0.01 + 0.98 * of_chance(question.request, question.first, question.second)
    return (math.log(draw) - 3, math.log(1 - draw) - 3)


def some_model(say: Say = some_answer, weigh: Weigh = some_choice, name: str = "fake") -> FakeSpeaker:
    """A model whose answers depend on each question alone, and differ from one to the next."""
    return speaker(say, weigh, name)


def write_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def prompt_rows(count: int) -> list[dict[str, Any]]:
    """Every third has turns before its last, every fourth a system message."""
    made = []
    for n in range(count):
        turns = [("user", f"What is good about village {n}?")]
        if n % 3 == 0:
            turns = [*turns, ("assistant", "Its well."), ("user", f"And about village {n + 1}?")]
        if n % 4 == 0:
            turns = [("system", "Be kind."), *turns]
        made.append({"prompt": [{"role": role, "content": content} for role, content in turns]})
    return made


def helpful_rows(count: int) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"Add {n} to 1."}, {"role": "assistant", "content": str(n + 1)}]}
        for n in range(count)
    ]


def write_constitution(file: Path, made: Constitution) -> str:
    """JSON is YAML too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(_given(asdict(made))))
    return str(file)


def _given(value: Any) -> Any:
    """Without empty texts and lists, which a constitution leaves out."""
    if isinstance(value, dict):
        return {key: _given(inner) for key, inner in value.items() if inner not in ("", ())}
    return list(map(_given, value)) if isinstance(value, tuple) else value


def context(folder: Path, stage: ConstitutionalStage, data: DataConfig, rank: Runtime = ALONE) -> RunContext:
    config = RunConfig(name="test", run=["constitutional"], cache_dir=str(folder / "cache"), data=data)
    config.stages = Stages(constitutional=stage)
    (folder / "run" / "constitutional").mkdir(parents=True, exist_ok=True)
    return RunContext(config, rank, folder / "run", "constitutional")


def run_whole(
    folder: Path,
    model: FakeSpeaker,
    *,
    prompts: Sequence[Mapping[str, Any]] | None = None,
    helpful: Sequence[Mapping[str, Any]] | None = None,
    made: Constitution | None = None,
    rank: Runtime = ALONE,
    **changes: Any,
) -> tuple[Path, Manifest]:
    """Run the stage in `folder`; returns the stage's folder and its manifest. The model has all three roles."""
    data = DataConfig(
        prompts=write_lines(folder / "prompts.jsonl", prompt_rows(10) if prompts is None else prompts),
        helpful=write_lines(folder / "helpful.jsonl", helpful) if helpful else None,
        held_out_fraction=0.0,
    )
    settings = {"filters": [], "rounds": 2, "judge_principles": 2, "generator": SERVED} | changes
    file = write_constitution(folder / "constitution.yaml", made or constitution("kind", "true", "brief"))
    stage = ConstitutionalStage(constitution=file, **settings)
    with patch.object(
        constitutional, "load_speakers", lambda *_: dict.fromkeys(("generator", "critic", "judge"), model)
    ):
        this = context(folder, stage, data, rank)
        return this.stage_dir, constitutional.run(stage, this)


def contents(stage_dir: Path) -> dict[str, bytes]:
    """Every file that the stage leaves, by name; paths in the page's title are those of the folder."""
    return {name: (stage_dir / name).read_bytes().replace(str(stage_dir).encode(), b"DIR") for name in FILES}
