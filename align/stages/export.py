"""A trained model as a folder to serve, proven to answer as it did when it was trained."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from align import artifacts
from align.artifacts import Manifest
from align.config.errors import UserError
from align.config.schema import ExportForm, ExportStage
from align.distributed import runtime
from align.losses.parity import Parity
from align.models.load import load_config, merges
from align.models.reward import has_score_head
from align.models.trained import BASE, Trained, trained_in_4_bits, trained_model
from align.stages.context import RunContext, stage_record
from align.stages.export_compare import Comparison, compare_adapter, compare_model, questions
from align.stages.export_gguf import GGUF, check_tokenizer, converter, write_gguf
from align.stages.export_push import check_push, push
from align.stages.export_write import (
    check_generation,
    format_name,
    stored_dtype,
    tensor_digests,
    wanted_dtype,
    write_adapter,
    write_model,
)
from align.stages.session import input_digests, log_manifest
from align.tracking.model_card import exported_card
from align.tracking.progress import say

EXPORTED, ADAPTER, VERIFICATION = "model", "adapter", "verification.json"


def run(stage: ExportStage, context: RunContext) -> Manifest:
    """Write `model/`, `adapter/` and `model.gguf`, as far as they are asked for, and `verification.json`."""
    found = trained_model(stage.policy)
    _check(stage, context, found)
    compared: dict[str, Parity] = {}
    if context.runtime.is_main:
        compared = _export(stage, context, found)
    runtime.barrier()
    manifest = _manifest(stage, context, found, compared)
    log_manifest(manifest, context)
    return manifest


def _check(stage: ExportStage, context: RunContext, found: Trained) -> None:
    """Raises: UserError for what cannot be exported as it was asked for, before anything is loaded."""
    forms = "stages.export.forms"
    if not stage.forms:
        raise UserError(f"{forms} is empty; name what to write, such as {forms}=[model]")
    if found.adapter is not None and not merges(found.adapter) and {ExportForm.model, ExportForm.gguf} & {*stage.forms}:
        form = "model" if ExportForm.model in stage.forms else "gguf"
        raise UserError(f"{forms} has {form}, but no weights can take this adapter up; write {forms}=[adapter]")
    if ExportForm.gguf in stage.forms:
        if ExportForm.model not in stage.forms:
            raise UserError(f"{forms}: gguf is made of the exported model; write {forms}=[model,gguf]")
        converter()
    if ExportForm.adapter in stage.forms and found.adapter is None:
        way = "on a base in 4 bits, which is not kept" if trained_in_4_bits(found.manifest) else "whole"
        raise UserError(f"{forms} has adapter, but {stage.policy} was trained {way}; leave adapter out")
    config = load_config(found.start, context.config.model)
    if has_score_head(config):
        raise UserError(
            f"stages.export.policy={stage.policy}: a reward model; it gives no replies to compare, and is a plain "
            "folder that any tool loads as it is"
        )
    check_generation(stage.generation)
    if stage.push_to is not None:
        check_push(stage, found)


def _export(stage: ExportStage, context: RunContext, found: Trained) -> dict[str, Parity]:
    """Everything, on rank 0; returns how each model compares with the trained one."""
    asked = questions(stage, context, found)
    if ExportForm.gguf in stage.forms:
        check_tokenizer(asked.template.tokenizer)
    comparison = Comparison(stage, context, found, asked)
    say(f"export: the trained model answers {len(asked.prompts)} prompts")
    comparison.read_trained()
    folders: dict[str, Path] = {}
    if ExportForm.model in stage.forms:
        folders[EXPORTED] = _write_and_compare(comparison)
    if ExportForm.adapter in stage.forms:
        folders[ADAPTER] = _fresh(context, ADAPTER)
        write_adapter(found, asked.template, folders[ADAPTER])
        compare_adapter(comparison, folders[ADAPTER])
    for line in comparison.lines():
        say(f"export: {line}")
    comparison.refuse_mismatch()
    told = _told(comparison)
    for name, folder in folders.items():
        card = exported_card(found.manifest, found.policy, context.run_dir, told, adapter_of=_base(found, name))
        (folder / artifacts.MODEL_CARD).write_text(card, encoding="utf-8")
        whole = context.stage_dir / name
        shutil.rmtree(whole, ignore_errors=True)
        folder.rename(whole)
    artifacts.write_json(context.stage_dir / VERIFICATION, told)
    if ExportForm.gguf in stage.forms:
        say(f"export: {write_gguf(context.stage_dir / EXPORTED, context.stage_dir / GGUF, stage.gguf_type)}")
    if stage.push_to is not None:
        first = EXPORTED if ExportForm.model in stage.forms else ADAPTER
        say(f"export: {push(context.stage_dir / first, stage)}")
    return comparison.found


def _write_and_compare(comparison: Comparison) -> Path:
    """`model.partial/`, compared before and after it was written."""
    stage, context, found = comparison.stage, comparison.context, comparison.trained
    folder = _fresh(context, EXPORTED)
    dtype = wanted_dtype(stage, stored_dtype(found, context.config.model))
    merged = compare_model(comparison, "merged in memory", None)
    write_model(merged, comparison.asked.template, folder, stage, dtype)
    written = tensor_digests(merged)
    del merged
    runtime.free_memory()
    reloaded = compare_model(comparison, f"reloaded folder, {format_name(dtype)}", folder)
    if tensor_digests(reloaded) != written:
        raise UserError(f"{folder}: its weights are not those that were written; is the disk sound?")
    comparison.try_as_served(reloaded)
    del reloaded
    runtime.free_memory()
    comparison.with_vllm(folder, dtype)
    comparison.check_template(folder)
    return folder


def _fresh(context: RunContext, name: str) -> Path:
    folder = context.stage_dir / f"{name}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _base(found: Trained, name: str) -> str | None:
    return found.base if name == ADAPTER else None


def _told(comparison: Comparison) -> dict[str, Any]:
    """What `verification.json` holds."""
    return {
        "prompts": [row.messages[-1].content for row in comparison.asked.rows],
        "replies": comparison.texts(),
        "template_digest": comparison.asked.template.digest,
        "template_is_the_one_trained_on": comparison.trained.manifest is not None,
        "compared": {name: asdict(one) for name, one in comparison.found.items()},
        "left_out": comparison.left_out,
    }


def _manifest(stage: ExportStage, context: RunContext, found: Trained, compared: dict[str, Parity]) -> Manifest:
    record = stage_record(context.config, context.stage_name, context.run_dir)
    inputs = input_digests(stage.policy, "policy")
    if found.adapter is not None and found.whole:
        inputs += input_digests(str(found.base), BASE)
    names = [form.value for form in stage.forms if form is not ExportForm.gguf] + [VERIFICATION]
    names += [GGUF] * (ExportForm.gguf in stage.forms)
    figures = {
        f"{name}/{figure}": float(value)
        for name, one in compared.items()
        for figure, value in (("largest_nats", one.largest), ("mean_nats", one.mean), ("same_replies", one.same))
    }
    return Manifest(
        stage=context.stage_name,
        config=record,
        config_digest=artifacts.digest_value(record),
        inputs=inputs,
        outputs=artifacts.list_outputs(context.stage_dir, names) if context.runtime.is_main else [],
        rows={"read": stage.max_prompts, "kept": stage.max_prompts, "dropped": {}},
        metrics=figures,
        world_size=context.runtime.world_size,
        template_digest=None if found.manifest is None else found.manifest.template_digest,
    )
