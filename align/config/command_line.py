"""The command line of this process, for the record of what it makes."""

import shlex

from align.config.redaction import redacted_text

_typed: list[str] = []


def remember(command: str) -> None:
    """Keep the command line that is being run; of a sweep, that of the member that is being run. Keys are masked."""
    _typed[:] = [redacted_text(command)]


def typed() -> str | None:
    """The command line, as it can be typed again; None where Python calls align as a library."""
    return _typed[0] if _typed else None


def as_typed(arguments: list[str]) -> str:
    """Arguments as a person types them."""
    return " ".join(["python -m align", *map(shlex.quote, arguments)])
