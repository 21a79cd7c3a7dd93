"""The sbatch template on a Slurm of two nodes: a whole run, the end of its time, and SIGTERM to the job.

A short part runs always where Slurm is; all of it: ALIGN_SLOW_TESTS=1 python -m pytest tests/distributed/test_slurm.py
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align.artifacts import damaged_outputs, read_manifest
from align.tracking.local import read_metrics
from tests.distributed import one_machine_slurm
from tests.distributed.one_machine_slurm import Slurm

pytestmark = pytest.mark.timeout(900)
slow = pytest.mark.skipif(not os.environ.get("ALIGN_SLOW_TESTS"), reason="takes minutes; set ALIGN_SLOW_TESTS=1")
REPO = Path(__file__).resolve().parents[2]
TEMPLATE, WRAPPER = REPO / "cluster/align.sbatch", REPO / "cluster/srun_rank.sh"
# What this machine has; the rest of the template is as it comes.
SIZE = ("--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=20")
FEW = ("+recipe=sft", "stages.sft.max_steps=4", "log.every=1", "deepspeed=zero2")
LONG = ("+recipe=sft", "stages.sft.max_steps=1500", "stages.sft.save_every=0", "deepspeed=zero2")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if missing := one_machine_slurm.missing():
        pytest.skip(f"no Slurm here: {missing}")
    made = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture
def submit(slurm, tmp_path):
    def run(*words: str) -> str:
        return slurm.submit(
            tmp_path, TEMPLATE, *words, options=SIZE,
            VENV=str(Path(sys.executable).parents[1]), CLUSTER=str(REPO / "cluster"), INTERFACE="lo",
            PYTHONPATH=str(REPO), ALIGN_CACHE=str(tmp_path / "cache"), HF_HUB_OFFLINE="1",
        )  # fmt: skip

    return run


def log_of(place: Path, job: str) -> str:
    return (place / f"slurm-{job}.log").read_text(errors="replace")


def wait_for_step(slurm: Slurm, job: str, place: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while max((line["step"] for line in read_metrics(place / "runs/sft/sft/metrics.jsonl")), default=0) < step:
        assert slurm.job(job)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING"), log_of(place, job)
        assert time.monotonic() < deadline, log_of(place, job)
        time.sleep(0.1)


def test_the_template_runs_on_two_nodes(slurm, submit, tmp_path):
    job = submit(*FEW)
    done = slurm.wait(job, ("COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL"), 400)
    assert (done["JobState"], done["ExitCode"], done["NumNodes"]) == ("COMPLETED", "0:0", "2"), log_of(tmp_path, job)
    manifest = read_manifest(tmp_path / "runs/sft/sft")
    assert (manifest.world_size, manifest.zero_stage, manifest.steps) == (2, 2, 4)
    assert damaged_outputs(tmp_path / "runs/sft/sft", manifest) == []
    assert sorted(file.name for file in (tmp_path / "runs/sft/logs").iterdir()) == ["rank-0.log", "rank-1.log"]


@slow
def test_a_job_whose_time_is_over_saves_is_queued_again_and_goes_on(slurm, submit, tmp_path):
    job = submit(*LONG)
    wait_for_step(slurm, job, tmp_path, 20)
    start = time.monotonic()
    # What Slurm sends five minutes before the limit.
    slurm.signal("USR1", job, "--batch")
    slurm.wait(job, ("PENDING",), 100)
    print(f"\nUSR1 to the batch script: saved and queued again after {time.monotonic() - start:.1f} s")
    saved = max(int(p.name.split("-")[1]) for p in (tmp_path / "runs/sft/sft/checkpoints").glob("checkpoint-*"))
    assert saved >= 20
    slurm.start_soon(job)
    wait_for_step(slurm, job, tmp_path, saved + 20)
    assert f"going on from step {saved}" in log_of(tmp_path, job)
    assert slurm.job(job)["Restarts"] == "1"
    slurm.signal("KILL", job, "--full")


@slow
def test_sigterm_to_a_job_saves_and_ends_it_well(slurm, submit, tmp_path):
    job = submit(*LONG)
    wait_for_step(slurm, job, tmp_path, 20)
    start = time.monotonic()
    slurm.signal("TERM", job)
    done = slurm.wait(job, ("COMPLETED", "FAILED", "CANCELLED"), 100)
    print(f"\nscancel --signal=TERM: {done['JobState']} {done['ExitCode']} after {time.monotonic() - start:.1f} s")
    assert (done["JobState"], done["ExitCode"]) == ("COMPLETED", "0:0"), log_of(tmp_path, job)
    assert "stopped by SIGTERM and saved at step" in log_of(tmp_path, job)


STEP = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "2(x2),3", "MASTER_ADDR": "first",
}  # fmt: skip


def told(**variables: str) -> dict[str, str]:
    """What the wrapper tells its command."""
    plain = {"PATH": os.environ["PATH"]} | STEP | variables
    done = subprocess.run([str(WRAPPER), "env"], env=plain, capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def test_the_wrapper_tells_each_rank_its_place():
    one = told()
    assert (one["RANK"], one["WORLD_SIZE"], one["LOCAL_RANK"], one["LOCAL_WORLD_SIZE"]) == ("5", "7", "1", "3")
    assert one["LOCAL_SIZE"] == "3" and one["MASTER_ADDR"] == "first"
    assert told(SLURM_NODEID="1")["LOCAL_WORLD_SIZE"] == "2"
    assert told(SLURM_STEP_ID="1")["MASTER_PORT"] != one["MASTER_PORT"], "two steps of a job may share a node"
    assert told(MASTER_PORT="1234")["MASTER_PORT"] == "1234"


def test_a_task_that_sees_one_gpu_takes_it():
    assert told(CUDA_VISIBLE_DEVICES="3")["LOCAL_RANK"] == "0"
    assert told(CUDA_VISIBLE_DEVICES="0,1,2")["LOCAL_RANK"] == "1"


@slow
def test_members_of_a_sweep_are_jobs_of_two_ranks(slurm, tmp_path):
    launcher = {
        "nodes": 2, "tasks_per_node": 1, "cpus_per_task": 1, "timeout_min": 20, "array_parallelism": 1,
    }  # fmt: skip
    words = [f"hydra.launcher.{key}={value}" for key, value in launcher.items()]
    few = (*FEW[1:], "hydra/launcher=submitit_slurm", "stages.sft.seed=1,2", "log.every=1")
    environment = {
        **slurm.environment, "PYTHONPATH": str(REPO), "ALIGN_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "align", "-m", "+recipe=sft", *few, *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=800)
    logs = "".join(file.read_text() for file in sorted(tmp_path.glob("runs/sft/.jobs/.submitit/*/*log.*")))
    assert done.returncode == 0, done.stderr + logs[-6000:]
    for seed in (1, 2):
        manifest = read_manifest(tmp_path / f"runs/sft/stages.sft.seed={seed}/sft")
        assert (manifest.world_size, manifest.zero_stage, manifest.steps, manifest.seed) == (2, 2, 4, seed)
    assert "done (2 of 2 started are over)" in done.stderr
    assert "sft: held-out loss  stages.sft.seed" in done.stdout
