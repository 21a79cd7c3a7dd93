"""Breaks runs on two CPU ranks in every way that docs/reliability.md lists, for real, and writes its table.

    python benchmarks/faults.py [--folder DIR] [--saves 20] [--only NAME ...]

Each fault hits supervised fine-tuning of the embedded model under ZeRO-2, started by DeepSpeed's launcher. Then the
same command is typed again, and must end in the weights of a run that nothing happened to. A full disk needs root.
"""

import argparse
import contextlib
import datetime
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

REPO = Path(__file__).resolve().parents[1]
DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
STEPS, SAVE_EVERY, HIT_AT = 12, 4, 6
LONGEST_SECONDS = 240
SHOWN = 230


@dataclass
class Outcome:
    """What one fault did, and what the same command made of it."""

    fault: str
    sees: str = ""
    seconds: float = 0.0
    code: str = ""
    done: int = 0
    resumed: int = 0
    same: bool = False
    note: str = ""

    def row(self) -> str:
        lost = max(0, self.done - self.resumed)
        cells = [self.fault, self.sees.replace("|", "\\|"), f"{self.seconds:.0f} s", self.code, str(self.done)]
        cells += [str(self.resumed), str(lost), "the same" if self.same else "OTHERS"]
        return "| " + " | ".join(cells) + " |" + (f"\n{self.note}" if self.note else "")


class Run:
    """One run folder and the command that is typed for it."""

    def __init__(self, folder: Path, cache: Path, *, save_every: int = SAVE_EVERY, steps: int = STEPS):
        self.folder, self.cache, self.logs = folder, cache, 0
        folder.mkdir(parents=True, exist_ok=True)
        self.command = [
            DEEPSPEED, "--num_gpus", "2", "--no_local_rank", "--module", "align", "+recipe=sft_dpo", "run=[sft]",
            "deepspeed=zero2", "precision=fp32", f"stages.sft.max_steps={steps}", f"stages.sft.save_every={save_every}",
            "data.held_out_fraction=0", f"run_dir={folder / 'run'}",
        ]  # fmt: skip

    @property
    def stage(self) -> Path:
        return self.folder / "run" / "sft"

    def start(self) -> "Started":
        self.logs += 1
        log = self.folder.with_name(f"{self.folder.name}-{self.logs}.log")
        environment = {**os.environ, "ALIGN_CACHE": str(self.cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
        with open(log, "w") as out:
            process = subprocess.Popen(
                self.command, cwd=self.folder, env=environment, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        return Started(self, process, log)

    def step(self) -> int:
        """The newest step that was logged."""
        file = self.stage / "metrics.jsonl"
        steps = re.findall(r'"step": (\d+)', file.read_text()) if file.is_file() else []
        return max(map(int, steps), default=0)

    def newest_sealed(self) -> int:
        seals = (self.stage / "checkpoints").glob("checkpoint-*/sealed.json")
        return max((int(seal.parent.name.split("-")[1]) for seal in seals), default=0)

    def weights(self) -> str | None:
        file = self.stage / "manifest.json"
        if not file.is_file():
            return None
        outputs = json.loads(file.read_text())["outputs"]
        return next(one["sha256"] for one in outputs if one["path"] == "policy/model.safetensors")


class Started:
    """A run under way: the launcher of deepspeed, launch.py below it, the ranks below that."""

    def __init__(self, run: Run, process: subprocess.Popen, log: Path):
        self.run, self.process, self.log = run, process, log
        self.known: dict[int, psutil.Process] = {process.pid: psutil.Process(process.pid)}

    def look(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in self.known[self.process.pid].children(recursive=True):
                self.known.setdefault(one.pid, one)

    def alive(self) -> list[psutil.Process]:
        self.process.poll()
        return [one for one in self.known.values() if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]

    def wait_for(self, condition: Callable[[], bool], pause: float = 0.05) -> None:
        deadline = time.monotonic() + LONGEST_SECONDS
        while not condition():
            self.look()
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"ended before its fault, see {self.log}:\n{self.log.read_text()[-2000:]}")
            time.sleep(pause)
        self.look()

    def launch_py(self) -> psutil.Process:
        return next(one for one in self.alive() if "deepspeed.launcher.launch" in one.cmdline())

    def rank(self, number: int) -> psutil.Process:
        return next(
            one for one in self.alive() if one.environ().get("RANK") == str(number) and "align" in one.cmdline()
        )

    def end(self) -> tuple[float, str]:
        """Wait until no process is left; seconds it took, and the launcher's exit code. What hangs is killed."""
        began, note = time.monotonic(), ""
        while self.alive() and time.monotonic() - began < LONGEST_SECONDS:
            self.look()
            time.sleep(0.1)
        for one in self.alive():
            note = " (hung)"
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        return time.monotonic() - began, f"{self.process.wait()}{note}"

    def kill_all(self) -> None:
        self.look()
        for one in self.alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self.process.wait()

    def sees(self) -> str:
        """The line that tells a person what happened: ours if there is one, else the last error."""
        lines = [line.strip() for line in re.split(r"[\r\n]", self.log.read_text(errors="replace")) if line.strip()]
        ours = [line for line in lines if line.startswith("align: ")]
        # A launcher that ends the other ranks makes them say so after the one that is lost was named.
        ours = [line for line in ours if line.startswith("align: rank ")] or ours
        errors = [line for line in lines if re.search(r"Error: |exits with return code|\[Rank \d\]", line)]
        found = (ours or errors or lines or ["nothing"])[-1]
        found = found.replace(str(self.run.folder.parent), "DIR").replace(f"({socket.gethostname()}, ", "(HOST, ")
        return found if len(found) <= SHOWN else found[:SHOWN] + " ..."


def go_on(run: Run, outcome: Outcome, expected: str) -> Outcome:
    """Type the same command again; fill in where it went on and whether the weights are those expected."""
    started = run.start()
    _, code = started.end()
    text = started.log.read_text(errors="replace")
    found = re.search(r"going on from step (\d+)", text)
    outcome.resumed = int(found.group(1)) if found else 0
    outcome.same = run.weights() == expected and code == "0"
    passed = [line for line in re.split(r"[\r\n]", text) if "passed over" in line]
    if passed and not outcome.sees:
        outcome.sees = passed[0].replace(str(run.folder.parent), "DIR")
    return outcome


HITS: dict[str, Callable[[Started], None]] = {
    "kill -9 of rank 0": lambda run: run.rank(0).kill(),
    "kill -9 of rank 1": lambda run: run.rank(1).kill(),
    "kill -9 of the `deepspeed` command": lambda run: run.process.kill(),
    "kill -9 of its launch.py": lambda run: run.launch_py().kill(),
    "SIGTERM to the process group": lambda run: os.killpg(run.process.pid, signal.SIGTERM),
    "SIGTERM to launch.py": lambda run: run.launch_py().terminate(),
    "SIGTERM to rank 1 alone": lambda run: run.rank(1).terminate(),
    "SIGUSR1 to rank 0 alone": lambda run: run.rank(0).send_signal(signal.SIGUSR1),
}


def hit(name: str, folder: Path, cache: Path, expected: str) -> Outcome:
    """A signal to some process once step HIT_AT is logged."""
    run = Run(folder / re.sub(r"\W+", "-", name), cache)
    started = run.start()
    started.wait_for(lambda: run.step() >= HIT_AT)
    HITS[name](started)
    seconds, code = started.end()
    outcome = Outcome(name, started.sees(), seconds, code, run.step())
    if run.weights() is not None:
        outcome.sees += " (the ranks went on to the end)"
        outcome.resumed, outcome.same = run.step(), run.weights() == expected
        return outcome
    return go_on(run, outcome, expected)


def shard(checkpoint: Path, rank: int) -> Path:
    return next(checkpoint.glob(f"global_step*/*zero_pp_rank_{rank}_*optim_states.pt"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated shard": lambda checkpoint: cut(shard(checkpoint, 1)),
    "missing shard": lambda checkpoint: shard(checkpoint, 1).unlink(),
    "one bit of a shard flipped": lambda checkpoint: flip(shard(checkpoint, 0)),
    "damaged manifest of the checkpoint": lambda checkpoint: cut(checkpoint / "sealed.json"),
}


def damage(folder: Path, cache: Path, expected: str, names: list[str]) -> Iterator[Outcome]:
    """A run is killed after its second checkpoint; the newest one of each copy is damaged."""
    base = Run(folder / "base", cache)
    started = base.start()
    newest = base.stage / "checkpoints" / f"checkpoint-{2 * SAVE_EVERY}"
    started.wait_for(lambda: len(list(newest.glob("digests-*.json"))) == 2)
    started.kill_all()
    for name in names:
        run = Run(folder / re.sub(r"\W+", "-", name), cache)
        shutil.copytree(base.folder / "run", run.folder / "run", dirs_exist_ok=True)
        DAMAGES[name](run.stage / "checkpoints" / newest.name)
        yield go_on(run, Outcome(name, done=2 * SAVE_EVERY, code="-"), expected)


def full_disk(folder: Path, cache: Path, expected: str, checkpoint_bytes: int) -> Outcome:
    """The disk has room for one checkpoint and a half."""
    name, place = "disk full while a checkpoint is written", folder / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    size = f"size={checkpoint_bytes * 3 // 2}"
    if subprocess.run([*mount, size, "tmpfs", str(place)], capture_output=True).returncode:
        return Outcome(name, sees="not run: a small disk cannot be mounted here (needs root)")
    try:
        run = Run(place, cache)
        started = run.start()
        began = time.monotonic()
        started.wait_for(lambda: run.step() >= 2 * SAVE_EVERY)
        began = time.monotonic()
        _, code = started.end()
        outcome = Outcome(name, started.sees(), time.monotonic() - began, code, run.step())
        subprocess.run([*mount, "remount,size=1g", "tmpfs", str(place)], check=True)
        return go_on(run, outcome, expected)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=False)


def in_saves(folder: Path, cache: Path, times: int) -> Outcome:
    """kill -9 of every process at random moments of saves, and on from there; one run is killed again and again."""
    run = Run(folder / "saves", cache, save_every=1, steps=1000)
    random.seed(7)
    worst, reached, unsealed, broken = 0, 0, 0, 0
    for _ in range(times):
        before = run.newest_sealed()
        started = run.start()
        checkpoints = run.stage / "checkpoints"
        wanted = before + random.randint(2, 4)
        started.wait_for((checkpoints / f"checkpoint-{wanted}").exists, pause=0.001)
        time.sleep(random.uniform(0, 0.25))
        started.kill_all()
        text = started.log.read_text(errors="replace")
        found = re.search(r"going on from step (\d+)", text)
        resumed = int(found.group(1)) if found else 0
        # Killed at `reached`, went on from `resumed`: with a save every step at most the step under way may be lost.
        if before:
            worst = max(worst, reached - resumed)
            broken += resumed < before
        reached = run.step()
        unsealed += not (checkpoints / f"checkpoint-{max(reached, wanted)}" / "sealed.json").exists()
    outcome = Outcome(f"kill -9 of everything in the middle of a save, {times} random moments", code="-9", done=reached)
    outcome.resumed, outcome.same = reached - worst, broken == 0
    outcome.sees = (
        f"next start: half-written ones passed over; {unsealed} of {times} kills left one; most steps lost with "
        f"save_every=1: {worst}; a sealed one was never lost" + ("" if not broken else f" ({broken} WERE)")
    )
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where runs are made; a temporary folder if left out")
    parser.add_argument("--saves", type=int, default=20, help="how often a run is killed in the middle of a save")
    parser.add_argument("--only", nargs="*", help="faults to run, by the beginning of their names")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="align-faults-"))
    cache = folder / "cache"

    def asked(name: str) -> bool:
        return not given.only or any(name.startswith(one) for one in given.only)

    whole = Run(folder / "whole", cache)
    if whole.weights() is None:
        whole.start().end()
    expected = whole.weights()
    assert expected is not None, f"the run that nothing happens to did not end, see {folder}/whole-1.log"
    print(
        f"{datetime.date.today()}, 2 CPU ranks, ZeRO-2, save_every={SAVE_EVERY}, hit after step {HIT_AT} of {STEPS}\n"
    )
    print("| fault | what is seen | all ended after | exit code | steps done | went on from | steps lost | weights |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in filter(asked, HITS):
        print(hit(name, folder, cache, expected).row(), flush=True)
    if names := list(filter(asked, DAMAGES)):
        for outcome in damage(folder, cache, expected, names):
            print(outcome.row(), flush=True)
    if asked("disk full"):
        size = int(os.environ.get("CHECKPOINT_BYTES", "0")) or _checkpoint_bytes(folder, cache)
        print(full_disk(folder, cache, expected, size).row(), flush=True)
    if asked("killed in saves") and given.saves:
        print(in_saves(folder, cache, given.saves).row(), flush=True)


def _checkpoint_bytes(folder: Path, cache: Path) -> int:
    """Bytes of one checkpoint of such a run."""
    run = Run(folder / "size", cache)
    started = run.start()
    checkpoint = run.stage / "checkpoints" / f"checkpoint-{SAVE_EVERY}"
    started.wait_for((checkpoint / "sealed.json").exists)
    started.kill_all()
    return sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
