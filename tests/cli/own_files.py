"""A tiny model folder and a file of pairs, as a user would bring them, and the command line that trains on them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from align import cli
from tests.data.chat_tokenizers import chatml

POSITIONS = 256


def pairs(count: int) -> list[dict[str, str]]:
    """Sound preference rows."""
    return [{"prompt": f"Question {n}?", "chosen": f"Yes, {n}.", "rejected": f"No, {n}."} for n in range(count)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_model(folder: Path) -> Path:
    """A random Llama with a tokenizer that has a chat template."""
    tokenizer = chatml()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def command(model: Path, rows: Path, folder: Path, *more: str) -> list[str]:
    """Two steps of DPO on `rows`; the run and its cache are in `folder`."""
    return [
        "+recipe=dpo",
        "model=own",
        "data=files",
        f"model.path={model}",
        f"data.preferences={rows}",
        f"run_dir={folder / 'run'}",
        f"cache_dir={folder / 'cache'}",
        "precision=fp32",
        "stages.dpo.batch_size=4",
        "stages.dpo.micro_batch_size=4",
        "stages.dpo.max_tokens=128",
        "stages.dpo.max_steps=2",
        *more,
    ]


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run a command that must be refused: exit code 2, and the last line on stderr, returned, is the only `align:`."""
    code = cli.main(arguments)
    errors = capsys.readouterr().err
    assert code == cli.USER_ERROR, errors
    assert "Traceback" not in errors
    said = [line for line in errors.splitlines() if line.startswith("align: ")]
    assert said == errors.splitlines()[-1:]
    return said[0]


def finished(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[str, str]:
    """Run a command that must succeed; returns what it printed on stdout and stderr."""
    code = cli.main(arguments)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out, printed.err


def looks_complete(folder: Path) -> list[Path]:
    """Whatever below `folder` could be taken for the work of a finished stage."""
    return [path for name in ("manifest.json", "policy", "adapter") for path in folder.rglob(name)]
