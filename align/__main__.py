"""The door: `python -m align`, and the console script `align`."""

import os
import re
import sys
import traceback
from types import TracebackType

from align import cli
from align.config.redaction import redacted_text


def main() -> int:
    """Run the command line that was typed; returns the exit code."""
    sys.excepthook = _print_without_secrets
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # A rank that is gone is named in one line; torch's own warning of it has twenty. Read when torch is imported.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # The deepspeed launcher adds --local_rank=N unless told --no_local_rank; the environment has the rank too.
    return cli.main([argument for argument in sys.argv[1:] if not re.fullmatch(r"--local[_-]rank=\d+", argument)])


def _print_without_secrets(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A traceback as Python prints it, but for keys and passwords."""
    sys.stderr.write(redacted_text("".join(traceback.format_exception(kind, error, trace))))


if __name__ == "__main__":
    sys.exit(main())
