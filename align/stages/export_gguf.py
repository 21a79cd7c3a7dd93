"""A GGUF file for llama.cpp, by the converter that its authors keep up, where that is installed."""

import json
import shutil
import subprocess
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from align.config.errors import UserError
from align.config.schema import GGUFType
from align.models.load import SENTENCEPIECE, sentencepiece_file

GGUF = "model.gguf"
COMMANDS = ("convert_hf_to_gguf.py", "llama-convert-hf-to-gguf")
"""What llama.cpp's converter is called: by its packages, and by its own pip package."""
MAGIC = b"GGUF"


def converter() -> str:
    """Raises: UserError if it is not installed."""
    found = next((path for name in COMMANDS if (path := shutil.which(name))), None)
    if found is None:
        raise UserError(
            f"stages.export.forms has gguf, but llama.cpp's converter ({' or '.join(COMMANDS)}) is not on the PATH; "
            "install llama.cpp, or leave gguf out"
        )
    return found


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises: UserError for a SentencePiece tokenizer whose own file is gone.

    The converter then gives every piece the same score (llama.cpp of 2026-10), and llama.cpp merges by scores.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pieces = backend is not None and json.loads(backend.to_str())["model"].get("byte_fallback")
    if pieces and sentencepiece_file(tokenizer.name_or_path) is None:
        raise UserError(
            f"stages.export.forms has gguf, but {tokenizer.name_or_path} lacks {SENTENCEPIECE}, and without its scores "
            "llama.cpp would cut text otherwise; copy it there from the model that training started from"
        )


def write_gguf(model: Path, file: Path, form: GGUFType) -> str:
    """Convert an exported folder; returns what to say. Raises: UserError with the converter's last line if it fails."""
    partial = file.with_name(f"partial-{file.name}")
    command = [converter(), str(model), "--outfile", str(partial), "--outtype", form.value]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise UserError(
            f"{Path(command[0]).name} does not convert {model}: {said[-1] if said else f'exit code {done.returncode}'}"
        )
    if not partial.is_file() or partial.read_bytes()[:4] != MAGIC:
        raise UserError(f"{Path(command[0]).name} has written no GGUF file for {model}")
    partial.rename(file)
    return f"{file}: {file.stat().st_size / 1e6:,.1f} MB, {form.value}; llama.cpp has not been asked to answer by it"
