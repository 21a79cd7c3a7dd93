"""kill -9 at 20 random moments of saves: what was sealed is taken up, and the run ends in the same weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chain.runs import REPO, environment, weights

KILLS = 20
COMMAND = (
    "+recipe=sft_dpo", "run=[sft]", "precision=fp32", "data.held_out_fraction=0", f"stages.sft.max_steps={3 * KILLS}",
    "stages.sft.save_every=1", "stages.sft.batch_size=2", "stages.sft.micro_batch_size=1", "stages.sft.packing=false",
)  # fmt: skip
pytestmark = pytest.mark.skipif(not os.environ.get("ALIGN_SLOW_TESTS"), reason="takes minutes; set ALIGN_SLOW_TESTS=1")


def killed(folder: Path, kills: int, ranks: int, *more: str) -> list[dict]:
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed_saves.py")), str(folder), str(kills), str(ranks)]
        + [*COMMAND, *more],
        cwd=REPO,
        env=environment(folder.parent),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(1900)
@pytest.mark.parametrize("ranks", [1, 2])
def test_no_sealed_checkpoint_is_lost(ranks, tmp_path):
    zero = ("deepspeed=zero2",) if ranks > 1 else ()
    assert killed(tmp_path / "whole", 0, ranks, *zero) == [{"exit_codes": [0] * ranks}]
    *seen, last = killed(tmp_path / "killed", KILLS, ranks, *zero)
    assert last == {"exit_codes": [0] * ranks}
    assert [one["taken"] for one in seen] == [one["before"] for one in seen]
    # The save before the one that was broken off was sealed.
    assert all(one["after"] >= one["before"] + 1 for one in seen)
    assert sum(one["unsealed"] for one in seen) >= KILLS // 4, "too few kills came in the middle of a save"
    assert weights(tmp_path / "killed/run", "sft") == weights(tmp_path / "whole/run", "sft")
