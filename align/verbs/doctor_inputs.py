"""What `do=doctor` asks about inputs: paths, hub ids, the account of wandb; and what all ranks must share."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from align import artifacts
from align.config.effects import models_of
from align.config.errors import UserError
from align.config.keys import slots_of
from align.config.redaction import redacted
from align.config.schema import RunConfig
from align.data.prepare import slot_sources
from align.data.sources import TINY, Source, source_files
from align.models.load import EMBEDDED, is_hub_id, resolve_model
from align.stages.agreement import OF_A_NODE
from align.stages.context import flat, plain, without_run_dir
from align.stages.rows import maker_of
from align.tracking.wandb_run import check_wandb, wandb_mode
from align.verbs.doctor_lines import FAIL, OK, WARN, Line

HUB_SECONDS = 10.0
END_BYTES = 2**20
"""Of a large file the first and the last so many bytes, and its size, stand for all of it."""
MODEL_SUFFIXES = (".safetensors", ".json", ".bin", ".model", ".jinja")
Check = Callable[[RunConfig, Path], None]


def inputs(config: RunConfig, run_dir: Path, check: Check) -> Line:
    """Every wire of the chain, as a training proves it before it starts; `check` is `chain.check_chain`."""
    try:
        check(replace(config, log=replace(config.log, wandb=False)), run_dir)
    except UserError as error:
        found, _, todo = str(error).rpartition("; ")
        return Line("inputs", FAIL, found or todo, todo if found else "give a model or file that is there")
    models, sources = list(_models(config)), list(_sources(config))
    local = sum(Path(resolve_model(name)).is_dir() for name in models) + sum(bool(source_files(s)) for s in sources)
    embedded = sum(name in EMBEDDED for name in models) + sum(source.path.startswith(TINY) for source in sources)
    hub = sum(1 for _ in hub_ids(config))
    counts = f"{local - sum(name in EMBEDDED for name in models)} local, {embedded} embedded, {hub} of the hub"
    return Line("inputs", OK, f"models {len(models)}, data sources {len(sources)}: {counts}")


def hub(config: RunConfig) -> Line:
    """Whether each model and data set of the hub can be had, from there or, without a network, from the cache."""
    answers = [_hub_answer(*wanted, offline=_offline()) for wanted in hub_ids(config)]
    if not answers:
        return Line("hub", OK, "nothing of this run is on the hub")
    level = max((answer[0] for answer in answers), key=(OK, WARN, FAIL).index)
    todo = "; ".join(dict.fromkeys(answer[2] for answer in answers if answer[0] == level and answer[2]))
    return Line("hub", level, "; ".join(answer[1] for answer in answers), todo)


def hub_ids(config: RunConfig) -> Iterator[tuple[str, str, str | None]]:
    """(kind, id, revision) of each model and data set of the run that is on the hub."""
    for name in _models(config):
        if name not in EMBEDDED and not Path(name).expanduser().exists() and is_hub_id(name):
            yield "model", name, config.model.revision
    for source in _sources(config):
        if not source.path.startswith(TINY) and not Path(source.path).expanduser().exists() and is_hub_id(source.path):
            yield "dataset", source.path, None


def _offline() -> bool:
    return constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE") == "1"


def _hub_answer(kind: str, name: str, revision: str | None, *, offline: bool) -> tuple[str, str, str]:
    """(level, what was found, what to do)."""
    kept = "in the cache" if _is_cached(kind, name, revision) else "not in the cache"
    fetch = f"where there is a network: hf download {name}" + (" --repo-type dataset" if kind == "dataset" else "")
    if offline:
        level = OK if kept == "in the cache" else FAIL
        return level, f"{name}: {kept}, and HF_HUB_OFFLINE is set", f"{fetch}, or unset HF_HUB_OFFLINE"
    try:
        api = HfApi()
        api.auth_check(name, repo_type=kind)
        api.repo_info(name, repo_type=kind, revision=revision, timeout=HUB_SECONDS)
    except GatedRepoError:
        return FAIL, f"{name}: gated", f"ask for access at huggingface.co/{name}, then hf auth login"
    except RevisionNotFoundError:
        return FAIL, f"{name}: no revision {revision}", "check model.revision"
    except RepositoryNotFoundError:
        return FAIL, f"{name}: not on the hub, or private", "check the name; hf auth login if it is private"
    # The hub's client raises errors of several HTTP libraries.
    except Exception as error:
        reason = type(error).__name__ if not isinstance(error, HfHubHTTPError | OfflineModeIsEnabled) else "no answer"
        level = WARN if kept == "in the cache" else FAIL
        return (
            level,
            f"{name}: the hub cannot be reached ({reason}); {kept}",
            f"set HF_HUB_OFFLINE=1 if cached, else {fetch}",
        )
    return OK, f"{name}: on the hub, {kept}", ""


def _is_cached(kind: str, name: str, revision: str | None) -> bool:
    if kind == "model":
        return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    snapshots = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="dataset") / "snapshots"
    return snapshots.is_dir() and any(snapshots.iterdir())


def wandb(config: RunConfig) -> Line:
    """Whether rank 0 can log in to wandb, if the run has to."""
    try:
        mode = wandb_mode(config.log)
        check_wandb(config.log)
    except UserError as error:
        found, _, todo = str(error).partition("; ")
        return Line("wandb", FAIL, found, todo)
    if not config.log.wandb:
        return Line("wandb", OK, "not used (log=local)")
    said = {"online": "logged in", "offline": "offline: files only, nothing is sent", "disabled": "switched off"}
    return Line("wandb", OK, said[mode])


def _models(config: RunConfig) -> Iterator[str]:
    """Every model that the run takes in from outside, once."""
    run_dir = Path(config.run_dir)
    for name in dict.fromkeys(models_of(config)):
        if not Path(name).is_relative_to(run_dir):
            yield name


def _sources(config: RunConfig) -> Iterator[Source]:
    """Every data source that the run takes in from outside, once. Raises: UserError for one that leads nowhere."""
    for slot in _slots(config):
        yield from slot_sources(config.data, slot)


def _slots(config: RunConfig) -> list[str]:
    read = dict.fromkeys(slot for name in config.run for slot in slots_of(config, name))
    return [slot for slot in read if maker_of(config, slot) is None]


def shared_facts(config: RunConfig) -> dict[str, Any]:
    """What must be the same on every rank: config (key -> [digest, text]), config_digest, data, models (-> digest)."""
    settings = {key: value for key, value in plain(config).items() if key not in OF_A_NODE}
    settings = without_run_dir(settings, config.run_dir)
    digests = {source.path: _data_digest(source) for source in _sources(config)}
    models = {name: _folder_digest(Path(resolve_model(name)).expanduser()) for name in _models(config)}
    return {
        # A secret is compared by its digest, and shown as ***.
        "config": {key: _compared(key, value) for key, value in flat(settings).items()},
        "config_digest": artifacts.digest_value(settings),
        "data": digests,
        "models": models,
    }


def _compared(key: str, value: Any) -> list[str]:
    return [artifacts.digest_value(value)[:16], str(redacted(value, key))]


def _data_digest(source: Source) -> str:
    return _files_digest(source_files(source), Path(source.path).expanduser()) or source.path


def _folder_digest(folder: Path) -> str:
    files = sorted(f for f in folder.glob("*") if f.suffix in MODEL_SUFFIXES) if folder.is_dir() else []
    return _files_digest(files, folder) or "hub"


def _files_digest(files: list[Path], root: Path) -> str | None:
    """One digest of names, sizes, and both ends of each file: quick for terabytes; None of no files."""
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        name = str(file.relative_to(root)) if file != root and file.is_relative_to(root) else file.name
        size = file.stat().st_size
        digest.update(f"{name}:{size}:".encode())
        with open(file, "rb") as handle:
            digest.update(handle.read(END_BYTES))
            handle.seek(max(END_BYTES, size - END_BYTES))
            digest.update(handle.read(END_BYTES))
    return digest.hexdigest()
