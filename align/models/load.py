"""From a name to a model: embedded names, folders and hub ids, each refused in one line when it cannot be used."""

import difflib
import json
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from align.config.errors import UserError
from align.config.schema import ModelConfig, Precision

EMBEDDED_DIR = Path(__file__).resolve().parent.parent / "world" / "models"
EMBEDDED = {
    "tiny-base": EMBEDDED_DIR / "base",
    "tiny-sft": EMBEDDED_DIR / "sft",
    "tiny-critic": EMBEDDED_DIR / "critic",
    "tiny-untrained": EMBEDDED_DIR / "base",
}
LOAD_ERRORS = (OSError, ValueError, RuntimeError, ImportError, SafetensorError, UnpicklingError)
"""What transformers raises for weights that are not there, not sound, or pickles with code in them."""
WEIGHT_FILES = ("*.safetensors", "*.bin")
ADAPTER_CONFIG = "adapter_config.json"
NEVER_WHOLE = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "BOTTLENECK")
"""PEFT's names of the methods that no weight can take up."""
SHARD_INDEX = "model.safetensors.index.json"
SENTENCEPIECE = "tokenizer.model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", SENTENCEPIECE)


def resolve_model(name: str) -> str:
    """The folder of an embedded name; any other name unchanged."""
    return str(EMBEDDED[name]) if name in EMBEDDED else name


def is_hub_id(name: str) -> bool:
    """Whether a name that is no existing folder reads as `organisation/model`."""
    parts = name.split("/")
    return len(parts) == 2 and all(part and not part.startswith((".", "~")) for part in parts)


def check_model(name: str, *, where: str, pickled: bool = False, adapters: bool = False) -> None:
    """Refuse a model that cannot be used, before anything runs. `where` is the config key that names it.

    pickled: whether weights may be pickles (*.bin). adapters: whether a base with an adapter will do, as a stage with
    peft.keep_adapter or with a method that cannot be merged leaves it. Raises: UserError for a missing folder, or one
    without sound config, whole weights or tokenizer.
    """
    path = Path(resolve_model(name))
    if not path.exists():
        if is_hub_id(name):
            return
        hint = _near_sibling(path) or "; check the path"
        raise UserError(f"{where}={name}: no such folder, and not a hub id (organisation/model){hint}")
    if is_adapter(path):
        if not adapters or not (path / "config.json").is_file():
            raise UserError(f"{where}={name}: an adapter, not a whole model; {_way_to_whole(path)}")
        said = f"{where}={name}: its base, base_model_name_or_path"
        check_model(adapter_base(path), where=said, pickled=pickled)
        return
    if not (path / "config.json").is_file():
        raise UserError(f"{where}={name}: no config.json in it; give a folder written by save_pretrained")
    _config_values(path)
    _check_weights(path, f"{where}={name}", pickled=pickled)
    if not has_tokenizer(name):
        raise UserError(
            f"{where}={name}: no tokenizer in it; save the model's tokenizer there with tokenizer.save_pretrained"
        )


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, which is of use only with its base."""
    return (folder / ADAPTER_CONFIG).is_file()


def adapter_base(folder: Path) -> str:
    """The model that the adapter in a folder was trained on. Raises: UserError if the folder does not say."""
    said = _json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not said:
        raise UserError(f"{folder / ADAPTER_CONFIG}: it names no base_model_name_or_path; write it in")
    return str(said)


def merges(folder: Path) -> bool:
    """Whether the base's weights can take up the adapter in a folder."""
    return _json_object(folder / ADAPTER_CONFIG).get("peft_type") not in NEVER_WHOLE


def virtual_tokens(folder: Path) -> int:
    """Tokens that the adapter in a folder puts in front of every row; 0 for one that sits in layers."""
    return _json_object(folder / ADAPTER_CONFIG).get("num_virtual_tokens") or 0


def _way_to_whole(folder: Path) -> str:
    kind = str(_json_object(folder / ADAPTER_CONFIG).get("peft_type"))
    if not merges(folder):
        return (
            f"{kind.lower()} cannot be merged, so it can be evaluated and asked but not trained further; train it with "
            "a method that can: peft=lora, qlora, dora, adalora or ia3"
        )
    return f"merge it with +recipe=export model.path={folder}, or train it without peft.keep_adapter, which merges it"


def _near_sibling(path: Path) -> str:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _config_values(folder: Path) -> dict[str, Any]:
    """What a folder's config.json says. Raises: UserError if it is not a JSON object."""
    return _json_object(folder / "config.json")


def _json_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}; copy or download it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: an object was expected, found {type(values).__name__}; copy or download it again")
    return values


def _check_weights(path: Path, where: str, *, pickled: bool) -> None:
    """Every shard is there and its header is sound; no tensor is read."""
    if not any(any(path.glob(pattern)) for pattern in WEIGHT_FILES):
        raise UserError(f"{where}: no weights (*.safetensors) in it; give a folder written by save_pretrained")
    if not pickled and not any(path.glob("*.safetensors")):
        raise UserError(
            f"{where}: its weights are pickles (*.bin), a format that can carry code; save it again with "
            "save_pretrained, or set model.pickled_weights=true"
        )
    if (path / SHARD_INDEX).is_file():
        shards = sorted(set(_json_object(path / SHARD_INDEX).get("weight_map", {}).values()))
        absent = [shard for shard in shards if not (path / shard).is_file()]
        if absent:
            raise UserError(
                f"{where}: {len(absent)} of {len(shards)} weight files are missing, {absent[0]} first; "
                "copy or download them again"
            )
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{file}: not a sound safetensors file: {_first_line(error)}; copy or download it again"
            ) from error


def has_tokenizer(name: str) -> bool:
    """Whether a folder holds a tokenizer; a hub id is taken to have one."""
    folder = Path(resolve_model(name))
    return not folder.is_dir() or any((folder / file).is_file() for file in TOKENIZER_FILES)


def load_tokenizer(name: str, model: ModelConfig, chat_template: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; `chat_template`, if given, replaces its own. A missing pad token becomes eos."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_model(name), revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    # The tokenizers library raises a bare Exception for a file that it does not understand.
    except Exception as error:
        raise not_loaded(name, "tokenizer", error) from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer, and the SentencePiece file that it was made from: its scores are nowhere else."""
    tokenizer.save_pretrained(folder)
    source = sentencepiece_file(tokenizer.name_or_path)
    if source is not None:
        shutil.copyfile(source, folder / SENTENCEPIECE)


def sentencepiece_file(name: str) -> Path | None:
    """Of a tokenizer's folder, or of the hub's cache, if it has one. Asks no server."""
    folder = Path(resolve_model(name))
    if folder.is_dir():
        return folder / SENTENCEPIECE if (folder / SENTENCEPIECE).is_file() else None
    cached = try_to_load_from_cache(name, SENTENCEPIECE) if is_hub_id(name) else None
    return Path(cached) if isinstance(cached, str) else None


def load_model(
    name: str, model: ModelConfig, dtype: torch.dtype | Literal["auto"], *, seed: int, quantisation: Any = None
) -> PreTrainedModel:
    """A causal language model, weights in `dtype` (`auto`: as stored); random ones, by `seed`, for `tiny-untrained`.

    quantisation: transformers' config of it, or None.
    Raises: UserError if it cannot be loaded whole: transformers fills in what is missing with random numbers.
    """
    path = resolve_model(name)
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    if quantisation is not None:
        options["quantization_config"] = quantisation
    if name == "tiny-untrained":
        torch.manual_seed(seed)
        refuse_to_quantise_nothing(quantisation)
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=None if model.pickled_weights else True,
            **options,
        )
    except LOAD_ERRORS as error:
        raise not_loaded(name, "model", error) from error
    refuse_made_up(name, report)
    return loaded


def refuse_to_quantise_nothing(quantisation: Any) -> None:
    """Raises: UserError if weights that are drawn, and not read, are to be quantised."""
    if quantisation is not None:
        raise UserError("peft=qlora: tiny-untrained has no weights to round to 4 bits; take tiny-base")


def refuse_made_up(name: str, report: dict[str, Any]) -> None:
    """Refuse a model with tensors that its weight files lack or hold in another shape."""
    wrong = [f"{key} is missing" for key in sorted(report["missing_keys"])]
    wrong += [
        f"{key} is {tuple(found)} in the file, {tuple(wanted)} by the config"
        for key, found, wanted in sorted(report["mismatched_keys"], key=lambda entry: entry[0])
    ]
    if wrong:
        raise UserError(
            f"{name}: {len(wrong)} tensors do not fit config.json, {wrong[0]}; give the config and the weights that "
            "save_pretrained wrote together"
        )


def not_loaded(name: str, part: str, error: Exception) -> UserError:
    """The one line for a part of a model that cannot be loaded."""
    if isinstance(error, UnpicklingError):
        return UserError(f"{name}: its pickle holds more than tensors; save the weights again with save_pretrained")
    if "cannot be loaded with `safetensors`" in str(error):
        return UserError(f"{name}: the hub has no safetensors of it; take another model, or model.pickled_weights=true")
    if "contains custom code" in str(error):
        return UserError(
            f"{name}: the {part} brings code of its own; read it, then set model.trust_remote_code=true, or take a "
            "model that transformers knows"
        )
    reason = f"{type(error).__name__}: {_first_line(error)}"
    if Path(resolve_model(name)).exists():
        return UserError(f"{name}: the {part} cannot be loaded ({reason}); save it again with save_pretrained")
    return UserError(f"{name}: no such folder here, and the hub does not give the {part} ({reason}); check the name")


def load_config(name: str, model: ModelConfig) -> PreTrainedConfig:
    """The config of a model. Raises: UserError if it cannot be read."""
    try:
        return AutoConfig.from_pretrained(
            resolve_model(name), revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise not_loaded(name, "config", error) from error


def check_saved_model(path: Path, model: ModelConfig) -> None:
    """Prove that a written folder holds every tensor of its architecture, in the right shape, without loading it.

    Raises: AssertionError naming the tensors; a manifest must never vouch for a model that does not load.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    scores = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    with torch.device("meta"):
        expected = auto.from_config(config, trust_remote_code=model.trust_remote_code)
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
    folder = Path(resolve_model(path))
    if not (folder / "config.json").is_file():
        return None
    values = _config_values(folder)
    return values.get("max_position_embeddings") or values.get("n_positions")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
