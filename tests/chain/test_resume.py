"""kill -9 anywhere, retype the command: the same weights, bit for bit."""

from pathlib import Path

import pytest

from align.artifacts import read_manifest
from align.tracking.local import read_metrics
from tests.chain.runs import finish, kill_when, logged_step, weights
from tests.launching import slow

SFT = ("+recipe=sft_dpo", "precision=fp32", "stages.sft.max_steps=6", "stages.sft.save_every=2")
DPO = ("+recipe=sft_dpo", "precision=fp32", "stages.dpo.max_steps=6", "stages.dpo.save_every=2")
TRAINED = (*SFT, *DPO[2:], "run=[sft,dpo]")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish(folder, *TRAINED)
    return folder / "runs/sft_dpo"


@pytest.mark.timeout(400)
def test_a_chain_killed_at_any_moment_ends_in_the_same_weights(uninterrupted, tmp_path):
    run_dir = tmp_path / "runs/sft_dpo"
    sft, dpo = run_dir / "sft", run_dir / "dpo"
    moments = [
        lambda: logged_step(sft) >= 3,
        lambda: (sft / "policy.partial").exists(),
        lambda: (dpo / "started.json").exists(),
        lambda: (dpo / "checkpoints/checkpoint-2").exists(),
        lambda: logged_step(dpo) >= 5,
    ]
    for moment in moments:
        kill_when(moment, tmp_path, *TRAINED)
    output = finish(tmp_path, *TRAINED)
    assert "sft: complete, skipped" in output
    assert "dpo: going on from step" in output
    assert weights(run_dir, "sft") == weights(uninterrupted, "sft")
    assert weights(run_dir, "dpo") == weights(uninterrupted, "dpo")


def test_a_resumed_stage_logs_every_step_once(uninterrupted, tmp_path):
    run_dir = tmp_path / "runs/sft_dpo"
    command = (*SFT, "run=[sft]")
    kill_when(lambda: logged_step(run_dir / "sft") >= 4, tmp_path, *command)
    finish(tmp_path, *command)
    steps = [line["step"] for line in read_metrics(run_dir / "sft/metrics.jsonl") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    losses = [line["loss"] for line in read_metrics(run_dir / "sft/metrics.jsonl") if "loss" in line]
    expected = [line["loss"] for line in read_metrics(uninterrupted / "sft/metrics.jsonl") if "loss" in line]
    assert losses == expected


@slow
def test_one_launch_equals_two(uninterrupted, tmp_path):
    finish(tmp_path, *SFT, "run=[sft]")
    finish(tmp_path, *DPO, "run=[dpo]")
    run_dir = tmp_path / "runs/sft_dpo"
    assert weights(run_dir, "sft") == weights(uninterrupted, "sft")
    assert weights(run_dir, "dpo") == weights(uninterrupted, "dpo")


def test_a_finished_run_is_skipped_and_a_changed_config_is_refused_by_name(uninterrupted):
    folder = uninterrupted.parents[1]
    before = (uninterrupted / "dpo/manifest.json").read_bytes()
    assert "dpo: complete, skipped" in finish(folder, *TRAINED)
    output = finish(folder, *TRAINED, "stages.dpo.beta=0.3", expect=2)
    assert "stages.dpo.beta was 0.1, is 0.3" in output
    assert "Traceback" not in output
    assert (uninterrupted / "dpo/manifest.json").read_bytes() == before


def test_a_manifest_vouches_for_every_file_of_the_policy(uninterrupted):
    manifest = read_manifest(uninterrupted / "sft")
    files = {f"policy/{p.name}" for p in (uninterrupted / "sft/policy").iterdir()}
    assert {o["path"] for o in manifest.outputs} == files
    assert not (uninterrupted / "sft/checkpoints").exists()
