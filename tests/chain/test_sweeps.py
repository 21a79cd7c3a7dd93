"""Sweeps for real: what members share, jobs in other processes, members that are ended early."""

import os
import re
import subprocess

import pytest

from align import cli
from align.artifacts import read_manifest
from align.tracking.members import State, members_of, read_member
from tests.launching import REPO, deepspeed, slow

FEW = (
    "+recipe=dpo", "run_dir=out", "cache_dir=cache", "data.preferences=[{path: 'tiny:preferences', take: 120}]",
    "data.held_out_fraction=0.2", "data=tiny", "stages.dpo.batch_size=8",
)  # fmt: skip


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def members(tmp_path):
    found = [read_member(path.parent) for path in sorted((tmp_path / "out").glob("*/member.json"))]
    assert {member.sweep for member in found} == {found[0].sweep}
    in_order = members_of(found[0].sweep, tmp_path / "out")
    assert sorted(in_order, key=lambda member: member.name) == sorted(found, key=lambda member: member.name)
    return in_order


def test_members_reuse_tokens_and_reference_and_one_may_be_pruned(tmp_path, capsys):
    # One learns next to nothing. The first step has a rate of 0, so the second tells them apart.
    sweep = ("stages.dpo.learning_rate=1e-3,1e-9", "stages.dpo.max_steps=4", "stages.dpo.eval_every=1")
    assert cli.main(["-m", *FEW, *sweep, "stages.dpo.prune=true", "sweep.prune_after=1"]) == 0
    said = capsys.readouterr()
    assert len(re.findall(r"^reference .*took", said.err, re.M)) == 2, "train and held out, once"
    assert len(list((tmp_path / "cache/rows").iterdir())) == 1
    behind, ahead = members(tmp_path)
    assert (ahead.state, behind.state) == (State.done, State.pruned)
    assert "dpo: pruned at step 2: the held-out loss was" in behind.says
    assert f"pruned    {behind.name}: {behind.says}" in said.out
    assert read_manifest(behind.folder / "dpo") is None
    manifest = read_manifest(ahead.folder / "dpo")
    assert manifest.parameters["trained"] == manifest.parameters["total"] > 900_000
    assert manifest.seconds > 0


def test_members_as_jobs_of_their_own(tmp_path, capsys):
    sweep = ("stages.dpo.beta=0.1,0.3", "stages.dpo.max_steps=1", "hydra/launcher=submitit_local", "peft=lora")
    assert cli.main(["-m", *FEW, *sweep]) == 0
    assert all(member.state is State.done for member in members(tmp_path))
    said = capsys.readouterr()
    assert "done (2 of 2 started are over)" in said.err
    table = said.out.splitlines()
    assert [len(line.split()) for line in table[2:4]] == [8, 8]
    assert {line.split()[2] for line in table[2:4]} == {"151,552"}


@slow
def test_members_on_two_ranks_share_a_process_group(tmp_path):
    sweep = ("stages.dpo.learning_rate=1e-3,1e-9,1e-8", "stages.dpo.max_steps=4", "stages.dpo.eval_every=1")
    prune = ("stages.dpo.prune=true", "sweep.prune_after=1", "stages.dpo.micro_batch_size=2")
    command = [*deepspeed("--no_local_rank"), "--module", "align", "-m", *FEW, *sweep, *prune, "deepspeed=zero2"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    states = {member.name.split("=")[1]: member.state for member in members(tmp_path)}
    assert states == {"0.001": State.done, "1e-09": State.pruned, "1e-08": State.pruned}
    assert done.stdout.count("dpo: reward accuracy  stages.dpo.learning_rate") == 1, "rank 0 alone ranks them"
