"""The exported folders: weights in one number format, tokenizer, chat template, generation config."""

import difflib
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from align.config.errors import UserError
from align.config.schema import ExportDtype, ExportStage, ModelConfig
from align.data.template import Template
from align.models.load import ADAPTER_CONFIG, check_saved_model, load_config, resolve_model, save_tokenizer
from align.models.trained import Trained
from align.stages.saving import make_readable

DTYPES = {ExportDtype.fp32: torch.float32, ExportDtype.bf16: torch.bfloat16, ExportDtype.fp16: torch.float16}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
"""Of a generation config: they say how to sample, and so that it is done."""


def stored_dtype(found: Trained, model: ModelConfig) -> torch.dtype:
    """The number format of a policy's weights, or of an adapter's base."""
    dtype = load_config(found.start, model).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def wanted_dtype(stage: ExportStage, stored: torch.dtype) -> torch.dtype:
    return DTYPES.get(stage.dtype, stored)


def format_name(dtype: torch.dtype) -> str:
    return next((form.value for form, known in DTYPES.items() if known is dtype), str(dtype))


def check_generation(values: Mapping[str, Any]) -> None:
    """Raises: UserError for what is no setting of a generation config, or contradicts another."""
    known = set(vars(GenerationConfig())) - {"eos_token_id", "pad_token_id", "bos_token_id", "transformers_version"}
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            own = (
                " is set by the chat template" if key.endswith("_token_id") else " is no setting of a generation config"
            )
            raise UserError(f"stages.export.generation.{key}{own}{hint}")
    _generation_config(GenerationConfig(), values)


def _generation_config(config: GenerationConfig, values: Mapping[str, Any]) -> GenerationConfig:
    given = dict(values)
    if any(key in given for key in SAMPLING):
        given.setdefault("do_sample", True)
    config.update(**given)
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise UserError(f"stages.export.generation: {' '.join(str(error).split())}") from error
    return config


def write_model(
    model: PreTrainedModel, template: Template, folder: Path, stage: ExportStage, dtype: torch.dtype
) -> None:
    """Weights in `dtype`, tokenizer, chat template and generation config. The model is changed to that number format.

    Raises: UserError for a number that the format cannot hold.
    """
    model.to(dtype)
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"{name} holds numbers that {stage.dtype.value} cannot; use stages.export.dtype=bf16")
    config = model.generation_config or GenerationConfig()
    before = config.eos_token_id
    stops = set(before if isinstance(before, list) else [before]) - {None} | template.stop_token_ids
    config.eos_token_id = sorted(stops) if len(stops) > 1 else next(iter(stops))
    config.pad_token_id = template.tokenizer.pad_token_id
    model.generation_config = _generation_config(config, stage.generation)
    model.config.use_cache = True
    model.save_pretrained(folder, max_shard_size=stage.max_shard_size)
    save_tokenizer(template.tokenizer, folder)
    check_saved_model(folder, ModelConfig())
    make_readable(folder)


def write_adapter(found: Trained, template: Template, folder: Path) -> None:
    """The adapter alone, which names its base, with tokenizer and chat template."""
    assert found.adapter is not None
    folder.mkdir(parents=True)
    for file in found.adapter.glob("adapter_*"):
        shutil.copy(file, folder / file.name)
    base = Path(resolve_model(str(found.base)))
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(base.resolve()) if base.is_dir() else str(found.base)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_tokenizer(template.tokenizer, folder)
    make_readable(folder)


def tensor_digests(model: PreTrainedModel) -> dict[str, str]:
    """Name -> sha256 of each tensor's number format, shape and bytes."""
    found = {}
    for name, tensor in model.state_dict().items():
        plain = tensor.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy())
        found[name] = digest.hexdigest()
    return found
