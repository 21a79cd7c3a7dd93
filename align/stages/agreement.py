"""Before the first stage: every rank was started with the same config."""

from align import artifacts
from align.config.errors import UserError
from align.config.redaction import redacted
from align.config.schema import RunConfig
from align.distributed import runtime
from align.distributed.meeting import ranks_text
from align.stages.context import flat, plain, without_run_dir

OF_A_NODE = ("cache_dir", "run_dir", "launch")
"""Keys that may be other on each node: places on its own disk, ways to the shared one."""


def refuse_unequal_config(config: RunConfig) -> None:
    """Compare this rank's config with the others'. A collective.

    Raises: UserError, on every rank, naming the ranks that differ from rank 0, and the keys.
    """
    own = {key: value for key, value in plain(config).items() if key not in OF_A_NODE}
    own = without_run_dir(own, config.run_dir)
    digests = runtime.gather(artifacts.digest_value(own))
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if not others:
        return
    configs = [flat(redacted(given)) for given in runtime.gather(own)]
    first, other = configs[0], configs[others[0]]
    keys = [key for key in sorted(first | other) if first.get(key) != other.get(key)]
    shown = "; ".join(f"{key} is {first.get(key)} on rank 0, {other.get(key)} on rank {others[0]}" for key in keys[:5])
    raise UserError(
        f"{ranks_text(others)} of {len(digests)} were started with another config than rank 0: {shown or 'a secret'}; "
        "start every node with the same command line"
    )
