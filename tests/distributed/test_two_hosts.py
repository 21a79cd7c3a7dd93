"""Two hosts, each with its own network, name and sshd: launches, equal losses, the death of a host, a cut cable.

It takes a quarter of an hour, so it runs only when asked for:
ALIGN_SLOW_TESTS=1 python -m pytest tests/distributed/test_two_hosts.py
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align.artifacts import damaged_outputs, read_manifest
from align.config.errors import RankLost
from align.tracking.local import read_metrics
from tests.distributed.hosts import Hosts, Run

pytestmark = pytest.mark.timeout(1200)
slow = pytest.mark.skipif(
    not os.environ.get("ALIGN_SLOW_TESTS"), reason="takes a quarter of an hour; set ALIGN_SLOW_TESTS=1"
)
COMMON = ("log.every=1", "deepspeed.timeout_seconds=120")
FEW = {
    "sft": ("stages.sft.max_steps=4",),
    "sft_dpo": ("stages.sft.max_steps=4", "stages.dpo.max_steps=4", "stages.evaluate.max_prompts=2"),
    "rlhf": (
        "stages.sft.max_steps=2", "stages.reward.max_steps=2", "stages.evaluate.max_prompts=2",
        "stages.ppo.max_steps=2", "stages.ppo.completions_per_update=8", "stages.ppo.batch_size=8",
        "stages.ppo.micro_batch_size=2", "stages.ppo.update_epochs=1", "stages.ppo.max_new_tokens=16",
        "stages.ppo.value_warmup_updates=0",
        "stages.ppo.sample_prompts=2",
    ),
}  # fmt: skip
STAGES = {"sft": ["sft"], "sft_dpo": ["sft", "dpo"], "rlhf": ["sft", "reward", "ppo"]}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    made = Hosts(tmp_path_factory.mktemp("two-hosts"))
    if missing := made.missing():
        pytest.skip(f"no two hosts here: {missing}")
    made.up()
    yield made
    made.call("down")


@pytest.fixture(scope="module")
def alone(hosts):
    """Recipe -> the run folder of one process, made once."""
    made: dict[tuple[str, ...], Path] = {}

    def run(recipe: str, *overrides: str) -> Path:
        if (key := (recipe, *overrides)) not in made:
            place = hosts.folder / f"alone-{len(made)}"
            place.mkdir()
            words = [sys.executable, "-m", "align", f"+recipe={recipe}", *COMMON, *overrides]
            done = subprocess.run(words, cwd=place, env=hosts.shell(), capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            made[key] = place / "runs" / recipe
        return made[key]

    return run


def launch(hosts: Hosts, way: str, place: Path, recipe: str, *overrides: str) -> Run:
    place.mkdir(exist_ok=True)
    ways = {"hostfile": hosts.by_hostfile, "no_ssh": hosts.without_ssh, "torchrun": hosts.by_torchrun}
    return ways[way](place, f"+recipe={recipe}", *COMMON, *overrides)


def losses(stage: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(stage / "metrics.jsonl") if "loss" in line]


def assert_same_losses(found: Path, expected: Path, stages: list[str]) -> None:
    for stage in stages:
        one, two = losses(expected / stage), losses(found / stage)
        assert len(one) == len(two) >= 2
        differences = [abs(a - b) / abs(b) for a, b in zip(two, one, strict=True)]
        print(f"\n{stage}: {len(one)} losses, largest relative difference {max(differences):.1e}")
        assert max(differences) < 1e-5, stage
        manifest = read_manifest(found / stage)
        assert manifest is not None and manifest.world_size == 2
        assert manifest.steps == read_manifest(expected / stage).steps
        assert damaged_outputs(found / stage, manifest) == []


def ended(run: Run, codes: set[int]) -> None:
    found = run.wait(400)
    assert set(found.values()) == codes, f"{found}\n{run.output()[-6000:]}"


def check_logs(run_dir: Path) -> None:
    first, second = ((run_dir / f"logs/rank-{rank}.log").read_text() for rank in (0, 1))
    assert "rank 0 of 2 on nodea" in first and "rank 1 of 2 on nodeb" in second
    assert first.splitlines()[-1].endswith("ended well") and second.splitlines()[-1].endswith("ended well")


@slow
def test_a_run_on_two_hosts_is_that_of_one_process(hosts, alone):
    place, few = hosts.folder / "short", FEW["sft"]
    run = launch(hosts, "no_ssh", place, "sft", *few, "deepspeed=zero2")
    ended(run, {0})
    assert_same_losses(place / "runs/sft", alone("sft", *few), ["sft"])
    check_logs(place / "runs/sft")


WAYS = [
    *(
        (recipe, zero, way)
        for recipe in ("sft_dpo", "rlhf")
        for zero in ("zero2", "zero3")
        for way in ("hostfile", "no_ssh")
    ),
    ("sft_dpo", "zero3", "torchrun"),
]


@slow
@pytest.mark.parametrize(("recipe", "zero", "way"), WAYS)
def test_chains_on_two_hosts_are_those_of_one_process(recipe, zero, way, hosts, alone):
    place = hosts.folder / f"{recipe}-{zero}-{way}"
    run = launch(hosts, way, place, recipe, *FEW[recipe], f"deepspeed={zero}")
    ended(run, {0})
    print(f"\n{recipe} {zero} {way}: {time.monotonic() - run.started:.0f} s")
    assert_same_losses(place / "runs" / recipe, alone(recipe, *FEW[recipe]), STAGES[recipe])
    check_logs(place / "runs" / recipe)


LONG = ("stages.sft.max_steps=4", "stages.dpo.max_steps=30", "stages.dpo.save_every=5", "stages.evaluate.max_prompts=2")


def wait_for_step(run: Run, stage: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while max((line["step"] for line in read_metrics(stage / "metrics.jsonl")), default=0) < step:
        assert time.monotonic() < deadline, run.output()[-6000:]
        assert all(process.poll() is None for process in run.launchers.values()), run.output()[-6000:]
        time.sleep(0.05)


@slow
@pytest.mark.parametrize("way", ["hostfile", "no_ssh"])
def test_a_run_that_lost_a_host_names_it_ends_and_goes_on(way, hosts, alone):
    place = hosts.folder / f"killed-{way}"
    run_dir = place / "runs/sft_dpo"
    run = launch(hosts, way, place, "sft_dpo", *LONG, "deepspeed=zero2")
    wait_for_step(run, run_dir / "dpo", 12)
    hosts.call("kill", "nodeb")
    seconds = hosts.gone_after("nodea", 60)
    codes = run.wait(60)
    print(f"\nhost killed, {way}: ranks of the other gone after {seconds:.1f} s; launchers {codes}")
    assert codes["nodea"] != 0
    assert re.search(r"align: rank 1 \(nodeb, pid \d+\) not heard of", run.output())
    assert "rank 1 (nodeb" in (run_dir / "logs/rank-0.log").read_text()
    hosts.up()
    again = launch(hosts, way, place, "sft_dpo", *LONG, "deepspeed=zero2")
    ended(again, {0})
    assert "going on from step 10" in again.output()
    assert_same_losses(run_dir, alone("sft_dpo", *LONG), ["sft", "dpo"])


@slow
@pytest.mark.parametrize("way", ["hostfile", "no_ssh"])
def test_a_cut_cable_ends_both_hosts_within_the_timeout(way, hosts):
    place, timeout = hosts.folder / f"cut-{way}", 30
    overrides = ("stages.sft.max_steps=4", "stages.dpo.max_steps=2000", "deepspeed=zero2")
    run = launch(hosts, way, place, "sft_dpo", *overrides, f"deepspeed.timeout_seconds={timeout}")
    try:
        wait_for_step(run, place / "runs/sft_dpo/dpo", 5)
        start = time.monotonic()
        hosts.call("cut")
        hosts.gone_after("nodea", timeout + 5)
        first = time.monotonic() - start
        hosts.gone_after("nodeb", timeout + 5)
        print(f"\ncable cut, {way}: nodea's ranks gone after {first:.1f} s, both {time.monotonic() - start:.1f} s")
        assert time.monotonic() - start < timeout + 5
        if way == "no_ssh":
            # By hostfile the launcher waits on for its ssh, as long as ssh's own settings say.
            assert set(run.wait(20).values()) == {RankLost.exit_code}, run.output()[-4000:]
    finally:
        hosts.up()
    logs = [(place / f"runs/sft_dpo/logs/rank-{rank}.log").read_text() for rank in (0, 1)]
    assert re.search(r"align: rank 1 \(nodeb, pid \d+\) not heard of", logs[0])
    assert re.search(r"align: rank 0 \(nodea, pid \d+\) not heard of", logs[1])
