"""The exported model against the trained one: the same prompts, greedy, token by token and by log-probability."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from align.config.errors import UserError
from align.config.schema import ExportStage
from align.data.prepare import prepare_prompts
from align.data.records import PromptRow, RowRefused
from align.data.template import Template
from align.distributed.runtime import free_memory
from align.generation.greedy import greedy_read
from align.generation.vllm_greedy import vllm_read, why_not_vllm
from align.losses.parity import Parity, Read, parity
from align.models import load
from align.models.peft import merged_model
from align.models.trained import Trained, load_trained
from align.stages.context import RunContext
from align.stages.export_write import stored_dtype
from align.stages.rows import load_template

TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
"""Nats a token, by the coarsest number format that took part: what rounding does to weights and to activations."""


@dataclass(frozen=True)
class Asked:
    """The prompts that every model answers."""

    template: Template
    rows: list[PromptRow]
    prompts: list[list[int]]
    """Their token ids."""


def questions(stage: ExportStage, context: RunContext, found: Trained) -> Asked:
    """The first prompts that fit the model, by the template of the policy.

    Raises: UserError if the policy was trained on another template, or no prompt fits.
    """
    has_tokenizer = load.has_tokenizer(found.policy)
    template = load_template(context.config, found.policy if has_tokenizer else found.start)
    _check_template(found, template, "model.chat_template")
    rows, prompts = [], []
    for row in prepare_prompts(context.config.data).rows:
        try:
            ids = list(template.encode_prompt(row.messages, row.tools))
        except RowRefused:
            continue
        if found.longest is None or len(ids) + stage.max_new_tokens <= found.longest:
            rows.append(row)
            prompts.append(ids)
        if len(rows) == stage.max_prompts:
            break
    if not rows:
        raise UserError(f"data.prompts: none leaves room for stages.export.max_new_tokens={stage.max_new_tokens}")
    return Asked(template, rows, prompts)


class Comparison:
    """Models that answer the same prompts, each compared with the trained one."""

    def __init__(self, stage: ExportStage, context: RunContext, trained: Trained, asked: Asked):
        self.stage, self.context, self.trained, self.asked = stage, context, trained, asked
        self.found: dict[str, Parity] = {}
        self.left_out: dict[str, str] = {}
        """What was not compared, and why."""
        self._read: Read | None = None
        run, device = context.config, context.runtime.device
        self.dtype = torch.bfloat16 if load.use_bf16(run.precision, device) else torch.float32
        """Of the trained model as it is read here."""
        self.stored = stored_dtype(trained, run.model)

    def read_trained(self) -> None:
        """The trained model, its adapter unmerged, answers."""
        self._read = self.read(load_trained(self.trained, self.context.config.model, self.dtype))
        free_memory()

    def read(self, model: nn.Module) -> Read:
        """What a model does with the prompts and the trained model's replies."""
        tokenizer = self.asked.template.tokenizer
        stops = sorted(self.asked.template.stop_token_ids)
        pad = tokenizer.pad_token_id
        return greedy_read(
            model.to(self.context.runtime.device),
            self.asked.prompts,
            None if self._read is None else self._read.replies,
            stop_token_ids=stops,
            pad_token_id=stops[0] if pad is None else pad,
            max_new_tokens=self.stage.max_new_tokens,
        )

    def add(self, name: str, read: Read, *formats: torch.dtype) -> None:
        """Compare; `formats` are the number formats that this model has been through."""
        assert self._read is not None
        # A policy that was merged in training is as coarse as it was saved.
        coarse = [self.dtype, *formats, *([self.stored] if self.trained.whole else [])]
        tolerance = self.stage.tolerance_nats or max(TOLERANCE.get(dtype, 0.5) for dtype in coarse)
        self.found[name] = parity(self._read, read, tolerance)

    def try_as_served(self, model: PreTrainedModel) -> None:
        """Raises: UserError if the model cannot answer by the generation config of its folder."""
        ids = torch.tensor([self.asked.prompts[0]], device=model.device)
        config = deepcopy(model.generation_config)
        config.max_new_tokens = min(config.max_new_tokens or 4, 4)
        try:
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        except (ValueError, TypeError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"stages.export.generation={self.stage.generation}: {reason}") from error

    def with_vllm(self, folder: Path, dtype: torch.dtype) -> None:
        """vLLM answers by the folder, where it is installed."""
        reason = why_not_vllm(self.context.runtime.device) if self.stage.vllm else "stages.export.vllm=false"
        if reason is not None:
            self.left_out["vLLM"] = reason
            return
        assert self._read is not None
        read = vllm_read(
            str(folder),
            self.asked.prompts,
            self._read.replies,
            stop_token_ids=sorted(self.asked.template.stop_token_ids),
            max_new_tokens=self.stage.max_new_tokens,
            dtype=dtype,
            trust_remote_code=self.context.config.model.trust_remote_code,
        )
        self.add("vLLM", read, dtype)

    def check_template(self, folder: Path) -> None:
        """Raises: UserError unless the folder renders chats as the policy was trained on them."""
        exported = Template(load.load_tokenizer(str(folder), self.context.config.model, None))
        if exported.digest != self.asked.template.digest:
            raise UserError(f"{folder}: its tokenizer and chat template are not those of {self.trained.policy}")

    def lines(self) -> list[str]:
        """A table for people."""
        assert self._read is not None
        tokens = sum(map(len, self._read.replies))
        lines = [f"against the trained model, {len(self.asked.prompts)} greedy replies of {tokens} tokens:"]
        width = max(map(len, [*self.found, *self.left_out]))
        for name, one in self.found.items():
            ties = f", {one.near_ties} part at a near tie" if one.near_ties else ""
            lines.append(
                f"  {name:<{width}}  {one.same} of {one.prompts} the same{ties}; log-probability of a token off by "
                f"{one.largest:.2g} nats at most, {one.mean:.2g} on average (passes up to {one.tolerance:g})"
            )
        return lines + [f"  {name:<{width}}  not compared: {reason}" for name, reason in self.left_out.items()]

    def refuse_mismatch(self) -> None:
        """Raises: UserError naming the first model that is beyond the tolerance."""
        for name, one in self.found.items():
            if one.fault:
                raise UserError(
                    f"export: {name} is not the trained model: {one.fault}, and {one.tolerance:g} nats pass "
                    "(stages.export.tolerance_nats); nothing was exported"
                )

    def texts(self) -> list[str]:
        """The trained model's replies."""
        assert self._read is not None
        return [self.asked.template.tokenizer.decode(ids, skip_special_tokens=True) for ids in self._read.replies]


def compare_model(comparison: Comparison, name: str, folder: Path | None) -> PreTrainedModel:
    """The model whole, in memory (None) or of a folder: loaded, compared under `name`, and returned."""
    settings, trained = comparison.context.config.model, comparison.trained
    if folder is not None:
        model = load.load_model(str(folder), settings, "auto", seed=0)
    elif trained.whole:
        finer = comparison.dtype is torch.float32 or comparison.stored is torch.float32
        dtype = torch.float32 if finer else comparison.stored
        model = load.load_model(trained.policy, settings, dtype, seed=trained.seed)
    else:
        assert trained.adapter is not None
        model = merged_model(str(trained.base), trained.adapter, settings, seed=trained.seed)
    comparison.add(name, comparison.read(model.eval()), model.dtype)
    return model


def compare_adapter(comparison: Comparison, folder: Path) -> None:
    """The base with the exported adapter folder on it."""
    trained = comparison.trained
    exported = Trained(str(folder), False, folder, trained.base, trained.manifest)
    model = load_trained(exported, comparison.context.config.model, comparison.dtype)
    comparison.add("adapter on its base", comparison.read(model))
    del model
    free_memory()
    comparison.check_template(folder)


def _check_template(found: Trained, template: Template, where: str) -> None:
    trained_on = None if found.manifest is None else found.manifest.template_digest
    if trained_on is not None and template.digest != trained_on:
        raise UserError(
            f"{found.policy}: its tokenizer and chat template are not those it was trained on; leave {where} out, or "
            "put the folder's own files back"
        )
