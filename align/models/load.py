"""From a name to a model: embedded names, folders and hub ids, each refused in one line when it cannot be used."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from align.config.errors import UserError
from align.config.schema import ModelConfig, Precision

EMBEDDED_DIR = Path(__file__).resolve().parent.parent / "world" / "models"
EMBEDDED = {
    "tiny-base": EMBEDDED_DIR / "base",
    "tiny-sft": EMBEDDED_DIR / "sft",
    "tiny-untrained": EMBEDDED_DIR / "base",
}
WEIGHT_FILES = ("*.safetensors", "*.bin")


def resolve_model(name: str) -> str:
    """The folder of an embedded name; any other name unchanged."""
    return str(EMBEDDED[name]) if name in EMBEDDED else name


def is_hub_id(name: str) -> bool:
    """Whether a name that is no existing folder reads as `organisation/model`."""
    parts = name.split("/")
    return len(parts) == 2 and all(part and not part.startswith((".", "~")) for part in parts)


def check_model(name: str, *, where: str) -> None:
    """Refuse a model that cannot be used, before anything runs. `where` is the config key that names it.

    Raises: UserError for a missing folder, one without config, weights or tokenizer.
    """
    path = Path(resolve_model(name))
    if not path.exists():
        if is_hub_id(name):
            return
        raise UserError(f"{where}={name}: no such folder, and not a hub id (organisation/model); check the path")
    if not (path / "config.json").is_file():
        raise UserError(f"{where}={name}: no config.json in it; give a folder written by save_pretrained")
    if not any(any(path.glob(pattern)) for pattern in WEIGHT_FILES):
        raise UserError(f"{where}={name}: no weights (*.safetensors) in it; give a folder written by save_pretrained")
    if not any((path / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise UserError(
            f"{where}={name}: no tokenizer in it; save the model's tokenizer there with tokenizer.save_pretrained"
        )


def load_tokenizer(name: str, model: ModelConfig, chat_template: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; `chat_template`, if given, replaces its own. A missing pad token becomes eos."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_model(name), revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: the tokenizer cannot be loaded: {_first_line(error)}") from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, model: ModelConfig, dtype: torch.dtype, *, seed: int) -> PreTrainedModel:
    """A causal language model with weights in `dtype`; random ones, drawn from `seed`, for `tiny-untrained`."""
    path = resolve_model(name)
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    if name == "tiny-untrained":
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: the model cannot be loaded: {_first_line(error)}") from error


def count_parameters(name: str, model: ModelConfig) -> int:
    """Parameters of a model, from its config alone (meta device, no weights read)."""
    config = AutoConfig.from_pretrained(
        resolve_model(name), revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code).num_parameters()


def check_saved_model(path: Path, model: ModelConfig) -> None:
    """Prove that a written folder holds every tensor of its architecture, in the right shape, without loading it.

    Raises: AssertionError naming the tensors; a manifest must never vouch for a model that does not load.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    tied = set(expected.all_tied_weights_keys)
    shapes = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
    wrong = [k for k, v in expected.state_dict().items() if k not in tied and shapes.get(k) != tuple(v.shape)]
    assert not wrong, f"{path}: {len(wrong)} tensors are missing or misshapen, {wrong[0]} first"


def use_bf16(precision: Precision, device: str) -> bool:
    """Whether the passes run in bf16: `auto` is bf16 on a GPU that has it, fp32 elsewhere."""
    if precision is Precision.auto:
        return device.startswith("cuda") and torch.cuda.is_bf16_supported()
    return precision is Precision.bf16


def context_length(path: str) -> int | None:
    """Longest sequence a model folder's config allows, if it says so."""
    config = Path(resolve_model(path)) / "config.json"
    if not config.is_file():
        return None
    values = json.loads(config.read_text(encoding="utf-8"))
    return values.get("max_position_embeddings") or values.get("n_positions")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
