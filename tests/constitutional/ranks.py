"""One rank of a launch that runs the whole stage with a scripted model. Call: ranks.py FOLDER, with the usual RANK, ...

Leaves FOLDER/run/constitutional, and FOLDER/asked-RANK.json: how much this rank asked.
"""

import json
import sys
from pathlib import Path

from align.config.schema import PairSource, RevisionTarget
from align.distributed import runtime
from tests.constitutional.whole import run_whole, some_model

SETTINGS = {
    "pairs": PairSource.best_worst, "samples": 3, "targets": RevisionTarget.best, "rounds": 3, "judge_revisions": False,
}  # fmt: skip


def main(folder: Path) -> None:
    this, model = runtime.start(deepspeed=False, timeout_seconds=60), some_model()
    run_whole(folder, model, rank=this, **SETTINGS)
    (folder / f"asked-{this.rank}.json").write_text(json.dumps(len(model.asked) + len(model.weighed)))
    runtime.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
