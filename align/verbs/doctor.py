"""`do=doctor`: whether this machine, or every machine of a launch, can run this run. Trains nothing.

Every question is a probe with a deadline, so the doctor never hangs. Under a launcher each rank asks its own machine,
and rank 0 gathers, compares, and prints. See docs/doctor.md.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import align
from align import artifacts
from align.config.redaction import redacted
from align.config.schema import RunConfig
from align.distributed import runtime
from align.distributed.probes import Meeting, Silent, Watched, meet
from align.distributed.runtime import launched_local_rank, launched_world_size
from align.trainers.quiet import quiet_libraries
from align.verbs import doctor_devices, doctor_disk, doctor_inputs, doctor_ranks, environment
from align.verbs.doctor_lines import FAIL, OK, WARN, Line, over_ranks, table, worst

SCHEMA = 1
FOLDER, JSON_NAME = "doctor", "doctor.json"
PROBE_SECONDS = 30.0
ARRIVAL_SECONDS = 60.0
"""Until a rank that has not come is called silent; `deepspeed.timeout_seconds` if that is less."""
FAILED = 1

Probes = dict[str, Callable[[], Line]]


def run_doctor(config: RunConfig, check: doctor_inputs.Check, now: Callable[[], float] = time.time) -> int:
    """Ask, print the table, write <run_dir>/doctor/doctor.json; the exit code: 0, or 1 where a line is `fail`.

    check: `chain.check_chain`. now: this machine's clock.
    """
    quiet_libraries()
    began = time.monotonic()
    launch = environment.launch()
    alone = launched_world_size() == 1 or launch.level == FAIL
    doctor = _Doctor(config, check, now, began)
    code = doctor.alone(launch) if alone else doctor.among_ranks(launch)
    if not doctor.hanging:
        runtime.stop()
    else:
        # What hangs in a system call or a collective would keep the interpreter from ending.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


class _Doctor:
    """One run of the doctor on one rank."""

    def __init__(self, config: RunConfig, check: doctor_inputs.Check, now: Callable[[], float], began: float) -> None:
        self.config, self.check, self.now, self.began = config, check, now, began
        self.run_dir = Path(config.run_dir)
        self.hanging = False
        self.hosts = {0: doctor_ranks.host()}

    def alone(self, launch: Line) -> int:
        """One process, without a launcher or with one whose variables do not hold."""
        probes = self.machine_probes() | self.rank_probes() | self.run_probes()
        return self.conclude([launch, *self.answers(probes)], ranks=1)

    def among_ranks(self, launch: Line) -> int:
        """One rank of several. Rank 0 concludes, the others follow."""
        rank, arrival = int(os.environ["RANK"]), min(ARRIVAL_SECONDS, self.config.deepspeed.timeout_seconds)
        try:
            meeting = meet(arrival)
            meeting.tell(f"here/{rank}", doctor_ranks.host())
            return self.lead(meeting, launch, arrival) if rank == 0 else self.follow(meeting, arrival)
        except (Silent, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            if rank == 0:
                return self.conclude([launch, _no_meeting(reason)], ranks=launched_world_size())
            # Rank 0 speaks for all, so its silence is the one thing that another rank has to say.
            print(f"align: rank {rank} ({doctor_ranks.host()}): rank 0 is silent: {reason}", file=sys.stderr)
            return FAILED

    def lead(self, meeting: Meeting, launch: Line, arrival: float) -> int:
        """Rank 0: hear all ranks, compare, sum, conclude."""
        self.hosts |= meeting.hear_all("here", arrival)
        present = sorted(self.hosts)
        missing = [rank for rank in range(meeting.world_size) if rank not in self.hosts]
        own = self.answers(self.machine_probes() | self.rank_probes() | self.run_probes())
        reports = {0: {"lines": [asdict(line) for line in own], "facts": self.facts()}}
        waited = PROBE_SECONDS + doctor_ranks.STEP_SECONDS
        reports |= meeting.hear_all("report", waited, [rank for rank in present if rank != 0])
        missing += [rank for rank in present if rank not in reports]
        lines = over_ranks(
            {rank: [Line(**line) for line in said["lines"]] for rank, said in reports.items()}, self.hosts
        )
        lines = [launch, *lines]
        facts = {rank: said["facts"] for rank, said in sorted(reports.items())}
        meeting.tell("go", not missing)
        if missing:
            waited = arrival if len(present) < meeting.world_size else waited
            lines.append(doctor_ranks.silent_line(sorted(missing), self.hosts, waited, meeting.world_size))
        else:
            lines.append(Line("ranks", OK, _places(self.hosts)))
        if all("error" not in fact for fact in facts.values()):
            for compare in (doctor_ranks.same_packages, doctor_ranks.same_config, doctor_ranks.same_data):
                lines.append(compare(facts, self.hosts))
        if not missing:
            lines += self.between_ranks(meeting)
        code = self.conclude(lines, ranks=meeting.world_size)
        meeting.tell("verdict", code)
        # The store goes with this process; the others must have read the verdict.
        meeting.hear_all("bye", 5.0, [rank for rank in present if rank != 0])
        return code

    def between_ranks(self, meeting: Meeting) -> list[Line]:
        """Clocks, run folder and the sum, which need every rank at once."""
        seconds = min(doctor_ranks.SUM_SECONDS, self.config.deepspeed.timeout_seconds)
        lines = [doctor_ranks.clocks(meeting, self.hosts, self.now)]
        lines.append(doctor_ranks.shared_folder(meeting, self.run_dir, self.hosts))
        outcome, hanging = doctor_ranks.all_reduce(meeting, seconds)
        self.hanging |= hanging
        return [*lines, doctor_ranks.all_reduce_line(meeting, outcome, self.hosts, seconds)]

    def follow(self, meeting: Meeting, arrival: float) -> int:
        """Any other rank: report, take part, take over the verdict."""
        probes = self.rank_probes() | (self.machine_probes() if launched_local_rank() == 0 else {})
        lines = [asdict(replace(line, details=None)) for line in self.answers(probes)]
        meeting.tell(f"report/{meeting.rank}", {"lines": lines, "facts": self.facts()})
        patience = arrival + 2 * PROBE_SECONDS + doctor_ranks.STEP_SECONDS
        if meeting.hear("go", patience):
            doctor_ranks.answer_rank_0(meeting, self.run_dir, self.now)
            seconds = min(doctor_ranks.SUM_SECONDS, self.config.deepspeed.timeout_seconds)
            _, hanging = doctor_ranks.all_reduce(meeting, seconds)
            self.hanging |= hanging
        code = meeting.hear("verdict", patience)
        meeting.tell(f"bye/{meeting.rank}", True)
        return code

    def machine_probes(self) -> Probes:
        """Asked once a machine."""
        config, ranks, local = self.config, launched_world_size(), environment.local_ranks()
        return {
            "devices": lambda: doctor_devices.devices(local),
            "driver": doctor_devices.driver,
            "interconnect": lambda: doctor_devices.interconnect(ranks),
            "compiler": lambda: environment.compiler(config.deepspeed, ranks),
            "shared memory": lambda: environment.shared_memory(local),
            "limits": lambda: environment.limits(ranks),
            "checkpoint": lambda: doctor_disk.checkpoint(self.run_dir),
            "cache": lambda: doctor_disk.cache(config),
            "clock": lambda: doctor_disk.file_clock(self.run_dir, self.now),
            "hub": lambda: doctor_inputs.hub(config),
        }

    def rank_probes(self) -> Probes:
        """Asked by every rank: each has its own Python."""
        return {"packages": lambda: environment.packages(environment.installed())}

    def run_probes(self) -> Probes:
        """Asked once a run, by rank 0."""
        return {
            "disk": lambda: doctor_disk.disk(self.config, self.run_dir),
            "inputs": lambda: doctor_inputs.inputs(self.config, self.run_dir, self.check),
            "wandb": lambda: doctor_inputs.wandb(self.config),
        }

    def answers(self, probes: Probes) -> list[Line]:
        """All probes at once, each with its deadline."""
        watched = {name: Watched(probe) for name, probe in probes.items()}
        return [self.answer(name, one) for name, one in watched.items()]

    def answer(self, name: str, watched: Watched) -> Line:
        """The line of one probe; one that hangs or breaks is a line too."""
        try:
            return watched.result(PROBE_SECONDS)
        except Silent as error:
            self.hanging = True
            return Line(
                name, FAIL, str(error), "whatever this asks hangs: a file system, a driver or a network; mend that"
            )
        # A probe that breaks must not hide the others' answers.
        except Exception as error:
            said = str(error).strip().split("\n")[0]
            return Line(
                name,
                WARN,
                f"cannot be found out: {type(error).__name__}: {said}",
                "see the line's part of docs/doctor.md",
            )

    def facts(self) -> dict[str, Any]:
        """What rank 0 compares: versions, code, config and data. {error} if it cannot be gathered."""
        watched = Watched(lambda: doctor_inputs.shared_facts(self.config))
        try:
            shared = watched.result(PROBE_SECONDS)
        # Missing inputs have a line of their own.
        except Exception as error:
            self.hanging |= not watched.is_over
            shared = {"error": str(error).split("\n")[0]}
        return {"versions": environment.installed() | {"align's code": code_digest()[:12]}, **shared}

    def conclude(self, lines: list[Line], *, ranks: int) -> int:
        """Print the table and write the report; the exit code."""
        verdict = worst(lines)
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
            return FAILED if verdict == FAIL else 0
        print(table(lines))
        count = {level: sum(line.level == level for line in lines) for level in (OK, WARN, FAIL)}
        said = ", ".join(f"{number} {level}" for level, number in count.items())
        print(f"\n{verdict}: {said} ({time.monotonic() - self.began:.1f} s)")
        report = {
            "schema": SCHEMA,
            "align": align.__version__,
            "recipe": self.config.name,
            "run_dir": str(self.run_dir),
            "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "ranks": ranks,
            "hosts": {str(rank): host for rank, host in sorted(self.hosts.items())},
            "verdict": verdict,
            "lines": [asdict(line) for line in lines],
        }
        print(self.write(redacted(report)))
        return FAILED if verdict == FAIL else 0

    def write(self, report: dict[str, Any]) -> str:
        """Where the report is, or why it is not."""
        file = self.run_dir / FOLDER / JSON_NAME

        def save() -> None:
            file.parent.mkdir(parents=True, exist_ok=True)
            artifacts.write_json(file, report)

        watched = Watched(save)
        try:
            watched.result(PROBE_SECONDS)
        except (OSError, Silent) as error:
            self.hanging |= not watched.is_over
            return f"{file} cannot be written: {error}; the report follows\n{json.dumps(report)}"
        return str(file)


def _no_meeting(reason: str) -> Line:
    todo = "MASTER_ADDR is to be an address of the machine of rank 0, MASTER_PORT a free port there"
    return Line("ranks", FAIL, reason, todo)


def _places(hosts: dict[int, str]) -> str:
    """`4 ranks on nodea (0, 1), nodeb (2, 3)`."""
    by_host: dict[str, list[str]] = {}
    for rank, name in sorted(hosts.items()):
        by_host.setdefault(name, []).append(str(rank))
    return f"{len(hosts)} ranks on " + ", ".join(f"{name} ({', '.join(ranks)})" for name, ranks in by_host.items())


def code_digest() -> str:
    """Digest of this library's files: a version number says nothing of a checkout that was edited."""
    folder = Path(align.__file__).resolve().parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
