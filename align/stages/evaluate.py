"""Several models answer the same prompts; where the data knows the truth, an oracle judges them."""

import gc
import json
from pathlib import Path

import torch

from align import artifacts
from align.artifacts import Manifest
from align.config.schema import DataConfig, EvaluateStage
from align.data.held_out import first_turn, held_out_rows, position
from align.data.prepare import PreparedPrompts, prepare_prompts
from align.data.records import PromptRow
from align.data.template import Template, chat_template_text
from align.distributed import runtime
from align.generation.hf import complete
from align.models import load
from align.stages.context import RunContext, stage_record
from align.stages.rows import BAD_ROWS
from align.stages.session import input_digests, log_manifest
from align.tracking.progress import Progress
from align.world import oracle

SAMPLES = "samples.jsonl"
SCORES = "scores.json"
EMBEDDED_PROMPTS = "tiny:prompts"


def run(stage: EvaluateStage, context: RunContext) -> Manifest:
    """Write `samples.jsonl` (a prompt and every model's reply a line) and `scores.json` (figures by model)."""
    prompts = prepare_prompts(context.config.data)
    if context.runtime.is_main:
        prompts.report.bad_rows.write(context.stage_dir / BAD_ROWS)
    prompts.rows = _chosen(prompts.rows, stage, context.config.data)
    replies = {name: _replies(name, path, prompts, stage, context) for name, path in stage.models.items()}
    figures = {}
    if context.config.data.prompts == EMBEDDED_PROMPTS:
        rows = [prompt.row for prompt in prompts.rows]
        figures = {name: oracle.figures(rows, texts) for name, texts in replies.items()}
    if context.runtime.is_main:
        _write_samples(context.stage_dir / SAMPLES, prompts, replies)
        artifacts.write_json(context.stage_dir / SCORES, {"oracle": figures, "prompts": len(prompts.rows)})
    runtime.barrier()
    manifest = _manifest(stage, context, prompts, figures)
    log_manifest(manifest, context)
    return manifest


def _chosen(rows: list[PromptRow], stage: EvaluateStage, data: DataConfig) -> list[PromptRow]:
    """The prompts to answer: the first of each kind of the embedded world; else the first that no stage trained on.

    Every row counts where none is held out (data.held_out_fraction=0, or too few rows).
    """
    if data.prompts == EMBEDDED_PROMPTS:
        by_kind: dict[str, list[PromptRow]] = {}
        for row in rows:
            by_kind.setdefault(row.row["kind"], []).append(row)
        return [row for kind in by_kind.values() for row in kind[: stage.max_prompts]]
    unseen = held_out_rows([position(first_turn(row.messages)) for row in rows], data.held_out_fraction)
    chosen = [row for row, held in zip(rows, unseen, strict=True) if held] or rows
    return list({row.messages: row for row in chosen}.values())[: stage.max_prompts]


def _replies(name: str, path: str, prompts: PreparedPrompts, stage: EvaluateStage, context: RunContext) -> list[str]:
    """One model's replies in prompt order; each rank answers its share, every rank gets all."""
    config, run = context.config, context.runtime
    tokenizer = load.load_tokenizer(path, config.model, chat_template_text(config.model.chat_template))
    template = Template(tokenizer)
    dtype = torch.bfloat16 if load.use_bf16(config.precision, run.device) else torch.float32
    model = load.load_model(path, config.model, dtype, seed=stage.seed).to(run.device)
    share = prompts.rows[run.rank :: run.world_size]
    texts = complete(
        model,
        tokenizer,
        [template.encode_prompt(prompt.messages, prompt.tools) for prompt in share],
        stop_token_ids=sorted(template.stop_token_ids),
        max_new_tokens=stage.max_new_tokens,
        batch_size=stage.batch_size,
        temperature=stage.temperature,
        seed=stage.seed + run.rank,
        progress=Progress(f"{context.stage_name}: {name} answers", len(share), active=run.is_main),
    )
    del model
    gc.collect()
    shares = runtime.gather(texts)
    return [shares[i % run.world_size][i // run.world_size] for i in range(len(prompts.rows))]


def _write_samples(path: Path, prompts: PreparedPrompts, replies: dict[str, list[str]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for index, prompt in enumerate(prompts.rows):
            line = {"prompt": prompt.messages, "replies": {name: texts[index] for name, texts in replies.items()}}
            file.write(json.dumps(line, ensure_ascii=False, default=vars) + "\n")


def _manifest(stage: EvaluateStage, context: RunContext, prompts: PreparedPrompts, figures: dict) -> Manifest:
    record = stage_record(context.config, context.stage_name, context.run_dir)
    inputs = [digest for name, path in stage.models.items() for digest in input_digests(path, name)]
    return Manifest(
        stage=context.stage_name,
        config=record,
        config_digest=artifacts.digest_value(record),
        inputs=inputs + prompts.inputs,
        outputs=artifacts.list_outputs(context.stage_dir, [SAMPLES, SCORES]) if context.runtime.is_main else [],
        rows={"read": prompts.read, "kept": len(prompts.rows), "dropped": prompts.report.dropped},
        metrics={f"oracle/{name}/{key}": value for name, row in figures.items() for key, value in row.items()},
        seed=stage.seed,
        world_size=context.runtime.world_size,
    )
