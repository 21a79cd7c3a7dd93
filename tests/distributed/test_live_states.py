"""The states that the estimate counts are those that DeepSpeed keeps, storage by storage, on one rank and on two."""

import json

import pytest

from align.distributed.memory import FP32, HALF, Sharding, state_bytes
from tests.launching import REPO, run_modes, slow, torchrun

CASES = [(stage, precision) for stage in (1, 2, 3) for precision in ("bf16", "fp32")]


@slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_states_are_what_deepspeed_keeps(ranks, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    script = REPO / "tests/distributed/live_states.py"
    run_modes(torchrun(ranks), script, tmp_path, {f"{s}-{p}": f"{s},{p}" for s, p in CASES})
    for stage, precision in CASES:
        found = json.loads((tmp_path / f"{stage}-{precision}.json").read_text())
        form = HALF if precision == "bf16" else FP32
        each = state_bytes(1, 0, Sharding(stage, False, ranks), form)
        # The largest layer's gathered weights and the small buffers come on top.
        assert found["backward"] == pytest.approx(sum(each.values()), abs=0.3), (stage, precision)
        kept = sum(each.values()) - (each["gradients"] if stage < 3 else 0)
        assert found["step"] == pytest.approx(kept, abs=0.3), (stage, precision)
