"""Policy and value model learn the same on one process, under DDP and under ZeRO-3, also when taken up again."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import REPO, deepspeed
from tests.models.ranks import RANKS, build, train

WAYS = ["separate-ddp", "separate-zero3", "shared-ddp", "shared-zero3"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The folder with what each way has saved."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [*deepspeed("--no_local_rank", ranks=RANKS), str(REPO / "tests/models/ranks.py"), folder, *WAYS],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "missing keys" not in done.stderr and "unexpected keys" not in done.stderr
    return folder


@pytest.mark.skipif(
    not os.environ.get("ALIGN_SLOW_TESTS"),
    reason="takes a minute, and tests/distributed/test_ppo_ranks.py trains the same modules; set ALIGN_SLOW_TESTS=1",
)
@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_ranks_learn_what_one_process_learns(kind, saved, tmp_path):
    expected = train(tmp_path, f"{kind}-one", accumulation=RANKS).model.state_dict()
    start = build(kind, zero3=False).state_dict()
    moved = {name: (expected[name] - start[name]).double().abs().max() for name in expected}
    assert min(moved[name] for name in moved if name != "value_bits") > 1e-6
    for way in (way for way in WAYS if way.startswith(kind)):
        for name in (way, f"{way}-resumed"):
            found = load_file(saved / f"{name}.safetensors")
            assert found.keys() == expected.keys()
            for key in expected:
                difference = (found[key] - expected[key]).double().abs().max()
                assert difference <= 0.01 * moved[key] + 2e-7, (name, key)
            assert torch.equal(found["value_bits"], expected["value_bits"])
