"""What looks like a key or a password is written as `***` wherever a run writes a config or a line. Imports no torch.

Two signs: the name of a value (`api_key`, `hf_token`, `password`), and the look of it (`hf_...`, `sk-...`, a URL with a
password); so is what stands in an environment variable with such a name. A name that ends in `_env` names a variable
and is kept, as are numbers and `max_tokens`.
"""

import os
import re
from typing import Any

MASK = "***"
_SECRET_NAME = r"(?:key|token|passwords?|passwd|passphrase|secrets?|credentials?|apikey|authorization)"
# Settings of models and of this library that end in "token" or "key" and are no secrets.
_PLAIN_NAME = r"(?:eos|bos|pad|unk|sep|cls|mask|stop|end|start|special|additional|per|image|audio|video|new|next|last)"
_NAME_ENDS = re.compile(rf"(?:^|[^a-z]){_SECRET_NAME}$")
_NAME_IS_PLAIN = re.compile(rf"(?:^|[^a-z]){_PLAIN_NAME}[^a-z]+(?:token|key)$")
_WORD_BORDER = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

_LOOKS = (
    re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}"),
    # Words joined by hyphens after "sk-" have no digit, or no letter beside it.
    re.compile(r"(?<![A-Za-z0-9])sk-(?=[\w-]*\d)(?=[\w-]*[A-Za-z])[\w-]{20,}"),
    re.compile(r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Z])"),
    re.compile(r"(?<![A-Za-z0-9])(?:gh[opsur]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,})"),
    re.compile(r"(?<![A-Za-z0-9])xox[abprs]-[\w-]{10,}"),
    re.compile(r"(?<![A-Za-z0-9])wandb_v\d+_[\w-]{20,}"),
    re.compile(r"(?<![A-Za-z0-9])local-[0-9a-f]{40}(?![0-9a-f])"),
    re.compile(r"(?<![A-Za-z0-9])eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"),
)
_BEARER = re.compile(r"(?i)\b((?:bearer|basic)\s+)(?=[\w.~+/=-]*\d)[\w.~+/=-]{8,}")
_URL_PASSWORD = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://[^\s/:@]*):[^\s/@]+@")
_URL_USER_ONLY = re.compile(r"(?i)\b(https?://)(?=[^\s/:@]*\d)[^\s/:@]{20,}@")
# `name=value` as on a command line or in a URL, and `name: value` as in a header or a YAML line.
_NAMED = re.compile(rf"(?i)([\w.-]*{_SECRET_NAME})(=|\s*:\s+|\"\s*:\s*)(\"[^\"\n]*\"|'[^'\n]*'|[^\s,;&}}\])]+)")


def names_secret(name: str) -> bool:
    """Whether a value under this name is to be kept to oneself: `wandb.api_key`, `hfToken`; not `max_tokens`."""
    words = _WORD_BORDER.sub("_", name).lower()
    return bool(_NAME_ENDS.search(words)) and not _NAME_IS_PLAIN.search(words)


def redacted(value: Any, name: str = "") -> Any:
    """A config as JSON types, with `***` for each text that its name or its look makes a secret. Numbers stay.

    name: the key that the value stands under.
    """
    if isinstance(value, dict):
        return {key: redacted(inner, name if names_secret(name) else str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(inner, name) for inner in value]
    if not isinstance(value, str):
        return value
    return MASK if value and names_secret(name) else redacted_text(value)


def redacted_text(text: str) -> str:
    """A line of a log or an error with `***` for what looks like a key, and for what stands after the name of one."""
    for secret in _secrets_of_environment():
        text = text.replace(secret, MASK)
    for look in _LOOKS:
        text = look.sub(MASK, text)
    text = _BEARER.sub(rf"\g<1>{MASK}", text)
    text = _URL_PASSWORD.sub(rf"\g<1>:{MASK}@", text)
    text = _URL_USER_ONLY.sub(rf"\g<1>{MASK}@", text)
    return _NAMED.sub(_named, text)


def _named(found: re.Match[str]) -> str:
    name, sign, value = found.groups()
    return f"{name}{sign}{MASK}" if names_secret(name) and not _is_plain(name, sign, value) else found.group()


def _is_plain(name: str, sign: str, value: str) -> bool:
    """Whether what stands after a name is a number, or part of a sentence: `settings are key=value`."""
    if re.fullmatch(r"[-+.\d]+(?:e[-+]?\d+)?", value):
        return True
    has_digit, in_prose = re.search(r"\d", value) is not None, ":" in sign and '"' not in sign
    if name.lower() in ("key", "token"):
        return in_prose or not (has_digit or len(value) >= 16)
    return in_prose and not has_digit


def _secrets_of_environment() -> list[str]:
    """Values of variables such as WANDB_API_KEY and HF_TOKEN, longest first; short ones, paths and words are none."""
    values = {value for name, value in os.environ.items() if names_secret(name)}
    return sorted((v for v in values if len(v) >= 12 and "/" not in v and re.search(r"\d", v)), key=len, reverse=True)
