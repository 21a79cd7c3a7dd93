"""A run on two ranks that was told to stop goes on with one or three: the same rows, the same losses."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from align.config.errors import UserError
from align.config.schema import PeftConfig, PeftMethod, PPOStage, SFTStage
from align.distributed.elastic import mend_optimizer, settings_of
from align.stages import session as sessions
from align.tracking.local import read_metrics
from tests.distributed.elastic_ranks import BATCH, STEPS
from tests.launching import deepspeed

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "tests/distributed/elastic_ranks.py"
STOP_AFTER = 4
MODES = {
    "zero3": "zero=3",
    "ddp": "stage=sft",
    "zero1": "zero=1",
    "zero2": "zero=2",
    "zero3_bf16": "zero=3,precision=bf16",
    "zero2_bf16": "zero=2,precision=bf16",
    "reward_zero3": "stage=reward,zero=3",
    "reward_zero2": "stage=reward,zero=2",
    "sft_zero3": "stage=sft,zero=3",
    "sft_packed_zero2": "stage=sft,zero=2,packing=true",
}


def launch(ranks: int, folder: Path, stop_after: int) -> None:
    words = [f"{name}:{settings}" for name, settings in MODES.items()]
    done = subprocess.run(
        [*deepspeed("--no_local_rank", ranks=ranks), str(SCRIPT), str(folder), str(stop_after), *words],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int, Path]:
    """0: two ranks that nothing happened to. Else: stopped on two ranks, then gone on with on so many."""
    root = tmp_path_factory.mktemp("elastic")
    launch(2, root / "0", 0)
    launch(2, root / "stopped", STOP_AFTER)
    for mode in MODES:
        # Only the last rank was told, and every rank has saved.
        assert seen(root / "stopped" / mode)[0].endswith(f"stopped by SIGTERM and saved at step {STOP_AFTER}")
    for ranks in (1, 3):
        shutil.copytree(root / "stopped", root / str(ranks))
        launch(ranks, root / str(ranks), 0)
    return {int(folder.name): folder for folder in root.iterdir() if folder.name.isdecimal()}


def seen(folder: Path) -> tuple[str, dict[int, list[int]], dict[int, float]]:
    ended = json.loads((folder / "ended.json").read_text())
    lines = read_metrics(next(folder.glob("*/metrics.jsonl")))
    rows = {int(step): rows for step, rows in ended["rows"].items()}
    return ended["ended"], rows, {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.timeout(3600)
@pytest.mark.skipif(not os.environ.get("ALIGN_SLOW_TESTS"), reason="takes minutes; set ALIGN_SLOW_TESTS=1")
@pytest.mark.parametrize("ranks", (1, 3))
@pytest.mark.parametrize("mode", MODES)
def test_the_losses_go_on_as_if_the_ranks_were_the_same(mode, ranks, folders):
    _, rows, expected = seen(folders[0] / mode)
    ended, rows_after, losses = seen(folders[ranks] / mode)
    assert ended == "done", ended
    assert sorted(losses) == sorted(expected) == list(range(1, STEPS + 1))
    # What bf16 rounds depends on how much of a batch a rank has.
    tolerance = 2e-2 if "bf16" in mode else 1e-5
    assert losses == pytest.approx(expected, rel=tolerance)
    assert sorted(rows_after) == list(range(STOP_AFTER + 1, STEPS + 1))
    assert all(rows_after[step] == rows[step] for step in rows_after)
    if "packing" not in MODES[mode]:
        first_epoch = [row for step in (1, 2, 3) for row in rows[step]]
        assert len(set(first_epoch)) == 3 * BATCH
    assert not list((folders[ranks] / mode).rglob("*universal*"))


IDENTITY = {"world_size": 2, "zero_stage": 2, "rows": "0123"}
REFUSED = {
    "other rows": (SFTStage(), {"rows": "4567"}, "changed: rows 0123 -> 4567; go back to what it was"),
    "no ZeRO": (SFTStage(), {"zero_stage": None, "world_size": 1}, "zero_stage 2 -> None; add deepspeed=zero2"),
    "LoRA under ZeRO": (SFTStage(), {"world_size": 4, "peft": "lora"}, "changed: world_size 2 -> 4; go back"),
    "PPO": (PPOStage(), {"world_size": 4}, "changed: world_size 2 -> 4; go back to what it was"),
}


def refuse(monkeypatch, stage, identity: dict, mine: dict) -> None:
    peft = PeftConfig(method=PeftMethod(mine.pop("peft", "none")))
    monkeypatch.setattr(sessions, "_identity", lambda session: mine)
    context = SimpleNamespace(stage_dir=Path("run/sft"), config=SimpleNamespace(peft=peft))
    session = SimpleNamespace(stage=stage, context=context, zero_stage=mine["zero_stage"])
    sessions._refuse_foreign(session, Path("checkpoint-4"), identity)


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_go_on_is_refused_with_the_way_out(why, monkeypatch):
    stage, others, words = REFUSED[why]
    with pytest.raises(UserError) as refused:
        refuse(monkeypatch, stage, IDENTITY, IDENTITY | others)
    assert words in str(refused.value)


def test_other_ranks_alone_are_taken_but_not_under_zero_0(monkeypatch):
    for zero_stage in (None, 1, 2, 3):
        identity = IDENTITY | {"zero_stage": zero_stage}
        refuse(monkeypatch, SFTStage(), identity, identity | {"world_size": 3})
    with pytest.raises(UserError, match="world_size 2 -> 3"):
        refuse(monkeypatch, SFTStage(), IDENTITY | {"zero_stage": 0}, IDENTITY | {"zero_stage": 0, "world_size": 3})


def test_an_optimizer_that_deepspeed_filled_wrongly_is_mended():
    groups = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW(
        [{"params": [groups[0]], "weight_decay": 0.1}, {"params": [groups[1]], "weight_decay": 0.0}], lr=1.0
    )
    own, shared = settings_of(optimizer), torch.tensor(4.0)
    for parameter in groups:
        optimizer.state[parameter] = {"step": shared, "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
        parameter.grad = torch.ones(2)
    for group in optimizer.param_groups:
        group |= {"weight_decay": 0.1, "lr": 0.5}
    mend_optimizer(optimizer, own)
    optimizer.step()
    assert [optimizer.state[parameter]["step"].item() for parameter in groups] == [5.0, 5.0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
