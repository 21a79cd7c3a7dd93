"""The manifest of a stage: written last, so that whoever finds it may trust everything beside it."""

import hashlib
import json
import os
import subprocess
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from align.config.errors import UserError
from align.config.redaction import redacted

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
STARTED = "started.json"
MODEL_CARD = "README.md"
PACKAGES = ("align-train", "torch", "transformers", "trl", "peft", "deepspeed", "datasets", "accelerate", "tokenizers")


@dataclass
class Manifest:
    """What a stage was, took in and left behind."""

    stage: str
    config: dict[str, Any]
    config_digest: str
    inputs: list[dict[str, str]]
    outputs: list[dict[str, Any]] = field(default_factory=list)
    rows: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    world_size: int = 1
    zero_stage: int | None = None
    memory: dict[str, float] = field(default_factory=dict)
    """Of the rank that took most: `planned_bytes` of the device as do=plan counts them, `peak_bytes` that it took,
    `host_bytes` of the process. On a CPU the peak is what main memory grew by."""
    parameters: dict[str, int] = field(default_factory=dict)
    """`trained`, and in `total`, of the policy (of PPO also of the value model)."""
    seconds: float = 0.0
    """That the stage took in the launch that completed it."""
    template_digest: str | None = None
    packages: dict[str, str] = field(default_factory=dict)
    git_commit: str | None = None
    schema_version: int = SCHEMA_VERSION


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is either whole or not there."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that is either whole or not there: temporary file, fsync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> Any | None:
    """The content of a JSON file, or None if it is not there."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not JSON: {error.msg}; delete the folder to start this stage again"
        ) from None


def digest_value(value: Any) -> str:
    """sha256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def list_outputs(stage_dir: Path, names: list[str]) -> list[dict[str, Any]]:
    """Path, sha256 and bytes of every file under the named outputs of a stage."""
    files: list[Path] = []
    for name in names:
        path = stage_dir / name
        found = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        assert found and all(p.is_file() for p in found), f"the stage did not write {path}"
        files += found
    return [{"path": str(p.relative_to(stage_dir)), "sha256": digest_file(p), "bytes": p.stat().st_size} for p in files]


def digest_model(path: Path) -> str:
    """Digest of a model folder: weights, config, tokenizer. Read from the manifest of the stage that wrote it, if any.

    Raises: UserError if the folder holds no weights.
    """
    manifest = read_json(path.parent / MANIFEST)
    signed = None if manifest is None else digest_of_output(manifest["outputs"], path.name)
    if signed is not None:
        return signed
    files = sorted(p for p in path.iterdir() if p.suffix in {".safetensors", ".json", ".bin", ".model", ".jinja"})
    if not files:
        raise UserError(f"{path}: no model files here; give a Hugging Face model folder or a hub id")
    return digest_value({f"{path.name}/{p.name}": _digest_once(p) for p in files})


def _digest_once(path: Path) -> str:
    """As `digest_file`, of weights that several stages take in: read again only if they have been written since."""
    stat = path.stat()
    return _digest_of_version(path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@cache
def _digest_of_version(path: Path, *version: int) -> str:
    return digest_file(path)


def digest_of_output(outputs: list[dict[str, Any]], name: str) -> str | None:
    """Digest of what a stage signed for under a name, as `digest_model` or a data slot gives it to the stage that takes
    it in: of a model folder without its card, or of one file. None if there is no such output."""
    card = f"{name}/{MODEL_CARD}"
    inside = {o["path"]: o["sha256"] for o in outputs if o["path"].startswith(f"{name}/") and o["path"] != card}
    if inside:
        return digest_value(inside)
    return next((o["sha256"] for o in outputs if o["path"] == name), None)


def damaged_outputs(stage_dir: Path, manifest: Manifest) -> list[str]:
    """Outputs that are missing or not what the manifest says; empty if the stage stands.

    A file of the right size is read again only if it was written after the manifest.
    """
    problems = []
    signed_at = (stage_dir / MANIFEST).stat().st_mtime_ns
    for output in manifest.outputs:
        path = stage_dir / output["path"]
        if not path.is_file():
            problems.append(f"{output['path']} is missing")
        elif path.stat().st_size != output["bytes"]:
            problems.append(f"{output['path']} has {path.stat().st_size} bytes, not {output['bytes']}")
        elif path.stat().st_mtime_ns > signed_at and digest_file(path) != output["sha256"]:
            problems.append(f"{output['path']} was changed after the stage was complete")
    return problems


def read_manifest(stage_dir: Path) -> Manifest | None:
    """The manifest of a complete stage, or None."""
    value = read_json(stage_dir / MANIFEST)
    if value is None:
        return None
    if value.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{stage_dir / MANIFEST}: schema version {value.get('schema_version')}, this align reads {SCHEMA_VERSION}; "
            "use another run_dir"
        )
    return Manifest(**value)


def write_manifest(stage_dir: Path, manifest: Manifest) -> None:
    """The last act of a stage. Call on rank 0 after a barrier."""
    manifest.packages = package_versions()
    manifest.git_commit = git_commit()
    write_json(stage_dir / MANIFEST, redacted(asdict(manifest)))


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """Commit of the checkout that the run was started in, if it is one."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
