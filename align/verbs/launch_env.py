"""`do=env`: write the variables of this shell that a run reads to the file from which DeepSpeed takes them elsewhere.

The launcher sends only names that begin with PYTHON (and a few of MPI) to other nodes; the rest has to stand in
`.deepspeed_env`, or in the file that DS_ENV_FILE names.
"""

import os
import re
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from align.config.errors import UserError
from align.config.redaction import names_secret, redacted_text
from align.config.schema import RunConfig

WANTED = (
    "ALIGN_*", "HF_*", "HUGGINGFACE_*", "TRANSFORMERS_*", "TOKENIZERS_PARALLELISM", "XDG_CACHE_HOME",
    "NCCL_*", "GLOO_*", "UCX_*", "FI_*", "TORCH_*", "PYTORCH_*", "CUDA_*", "TRITON_*", "VLLM_*", "DS_*",
    "OMP_*", "MKL_*", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONUNBUFFERED",
    "WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_BASE_URL", "WANDB_SILENT",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
    "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
)  # fmt: skip
"""Names that are written if they are set and no secret."""
LAUNCHERS_OWN = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "NODE_RANK",
    "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "DS_ENV_FILE", "TORCHELASTIC_*",
)  # fmt: skip
"""Names that differ from rank to rank; one value for all would break the launch."""
LOGIN = "log in on each node instead (`wandb login`, `hf auth login`)"


def run_env(config: RunConfig) -> None:
    """Write the file and print each name written and each left out, with the reason; no value is printed.

    Raises: UserError for a name in `launch.env` that cannot be written, and rather than drop what someone else put
    into the file.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    file = Path(os.environ.get("DS_ENV_FILE", ".deepspeed_env"))
    named = config.launch.env
    _refuse_names(named)
    written, left_out = choose(os.environ, named)
    _refuse_loss(file, set(written) | set(left_out))
    secrets = [name for name in written if is_secret(name, os.environ[name])]
    _write(file, written, private=bool(secrets))
    print("\n".join(_report(file, written, left_out, len(os.environ), secrets)))


def choose(environment: Mapping[str, str], named: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Name -> its line of the file, and name -> why it is left out, for all that a run may read or that is a secret."""
    written: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for name, value in sorted(environment.items()):
        wanted = _matches(name, WANTED)
        if _matches(name, LAUNCHERS_OWN):
            left_out[name] = "the launcher sets it on each rank"
        elif name not in named and is_secret(name, value):
            left_out[name] = f"a secret; {LOGIN}, or add launch.env=[{name}]"
        elif not wanted and name not in named:
            continue
        elif (reason := _unwritable(value)) is not None:
            left_out[name] = reason
        else:
            written[name] = line(name, value)
    return written, left_out


def is_secret(name: str, value: str) -> bool:
    """Whether the name says so, or the look of the value: a key, an address with a password in it."""
    return names_secret(name) or redacted_text(value) != value


def line(name: str, value: str) -> str:
    """`NAME=value` as it has to stand in the file so that ranks on other nodes get the value.

    DeepSpeed puts a value with other than plain characters between double quotes and escapes nothing in it
    (deepspeed 0.19.8, launcher/multinode_runner.py); then pdsh replaces %h, %n, %u and %%, then a shell reads it.
    """
    return f"{name}=" + re.sub(r"%(?=[%hnu])", "%%", re.sub(r'([\\"$`])', r"\\\1", value))


def _unwritable(value: str) -> str | None:
    if "\n" in value or "\r" in value:
        return "its value has several lines, which the file cannot hold"
    if value != value.strip():
        return "its value begins or ends with a space, which DeepSpeed cuts off"
    return None


def _refuse_names(named: list[str]) -> None:
    for name in named:
        if _matches(name, LAUNCHERS_OWN):
            raise UserError(f"launch.env: {name} is set by the launcher on each rank; leave it out")
        if name not in os.environ:
            raise UserError(f"launch.env: {name} is not set in this shell; set it, or leave it out")
        if (reason := _unwritable(os.environ[name])) is not None:
            raise UserError(f"launch.env: {name} cannot be written: {reason}")


def _refuse_loss(file: Path, known: set[str]) -> None:
    """The file may be someone's own: what this verb would never write must not go with it."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    others = [name for name in (text.partition("=")[0].strip() for text in lines) if name not in known]
    lost = [name for name in others if not _matches(name, WANTED)]
    if lost:
        raise UserError(
            f"{file} has {', '.join(map(repr, lost))}, which would be lost; set it in this shell and add "
            f"launch.env=[{','.join(lost)}], or move the file away"
        )


def _write(file: Path, written: dict[str, str], *, private: bool) -> None:
    text = "".join(f"{entry}\n" for entry in written.values())
    try:
        handle, partial = tempfile.mkstemp(prefix=f"{file.name}.", dir=file.parent)
        with open(handle, "w", encoding="utf-8") as out:
            out.write(text)
        os.chmod(partial, 0o600 if private else 0o644)
        os.replace(partial, file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror})") from error


def _report(
    file: Path, written: dict[str, str], left_out: dict[str, str], variables: int, secrets: list[str]
) -> list[str]:
    width = max(map(len, [*written, *left_out]), default=0)
    lines = [f"{file}: {len(written)} of {variables} variables of this shell, {_mode(file)}"]
    lines += [f"  written   {name}" for name in written]
    lines += [f"  left out  {name:{width}}  {reason}" for name, reason in left_out.items()]
    others = variables - len(written) - len(left_out)
    lines.append(f"  left out  {others} others that no run reads; launch.env=[NAME] adds one")
    if secrets:
        lines.append(
            f"  {', '.join(secrets)}: secret. DeepSpeed prints every value it sends (deepspeed -q does not), and `ps` "
            f"shows it on every node; rather {LOGIN}"
        )
    return lines


def _mode(file: Path) -> str:
    return "readable by you alone" if file.stat().st_mode & 0o077 == 0 else "readable by all"


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
