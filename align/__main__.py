"""The door: `python -m align`, and the console script `align`."""

import re
import sys

from align import cli


def main() -> int:
    """Run the command line that was typed; returns the exit code."""
    # The deepspeed launcher adds --local_rank=N unless told --no_local_rank; the environment has the rank too.
    return cli.main([argument for argument in sys.argv[1:] if not re.fullmatch(r"--local[_-]rank=\d+", argument)])


if __name__ == "__main__":
    sys.exit(main())
