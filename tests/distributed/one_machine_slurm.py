"""Slurm with two nodes, both this machine: munged, slurmctld and two slurmd, with all their files in one folder."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

from tests.launching import free_port

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
NODES = ("n1", "n2")
CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmctldPort={port}
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def tool(name: str) -> str | None:
    """Where a program is; those of Slurm's daemons are not on everyone's PATH."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def missing() -> str:
    """Why there can be no Slurm here; empty if there can."""
    if os.geteuid() != 0:
        return "slurmctld and slurmd need root"
    absent = [name for name in TOOLS if tool(name) is None]
    return f"{', '.join(absent)} not installed" if absent else ""


class Slurm:
    """From `up` to `down`; `folder` holds its configuration, state and logs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "MASTER_ADDR": "127.0.0.1"}

    def up(self) -> None:
        folder, host = self.folder, socket.gethostname().split(".")[0]
        (folder / "state").mkdir(parents=True)
        for node in NODES:
            (folder / f"spool-{node}").mkdir()
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=2 RealMemory=4000 "
            "Gres=gpu:1"
            for node in NODES
        )
        (folder / "slurm.conf").write_text(CONF.format(host=host, folder=folder, port=free_port(), nodes=nodes))
        (folder / "gres.conf").write_text(f"NodeName={','.join(NODES)} Name=gpu File=/dev/null\n")
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        munge = {"key-file": key, "socket": folder / "munge.socket", "log-file": folder / "munge.log"}
        munge |= {"pid-file": folder / "munge.pid", "seed-file": folder / "munge.seed"}
        self._run("munged", "--force", *(f"--{name}={path}" for name, path in munge.items()))
        self._run("slurmctld", "-f", str(folder / "slurm.conf"))
        for node in NODES:
            self._run("slurmd", "-f", str(folder / "slurm.conf"), "-N", node)
        self._wait_for_nodes()

    def _run(self, name: str, *words: str) -> str:
        program = tool(name)
        assert program is not None
        done = subprocess.run([program, *words], env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{name} {' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def _wait_for_nodes(self) -> None:
        deadline = time.monotonic() + 60
        while self._run("scontrol", "show", "node").count("State=IDLE ") < len(NODES):
            assert time.monotonic() < deadline, self._run("scontrol", "show", "node")
            time.sleep(0.2)

    def submit(self, place: Path, script: Path, *words: str, options: tuple[str, ...] = (), **variables: str) -> str:
        """The id of a job that runs `script words` in `place`."""
        done = subprocess.run(
            [str(tool("sbatch")), "--parsable", *options, str(script), *words],
            cwd=place, env=self.environment | variables, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self._run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def signal(self, name: str, number: str, *options: str) -> None:
        self._run("scancel", f"--signal={name}", *options, number)

    def start_soon(self, number: str) -> None:
        """A job that was queued again waits two minutes else; at once, its nodes may still refuse its credential."""
        self._run("scontrol", "update", f"jobid={number}", "StartTime=now+5seconds")

    def wait(self, number: str, states: tuple[str, ...], seconds: float) -> dict[str, str]:
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, job
            time.sleep(0.2)
        return job

    def down(self) -> None:
        subprocess.run([str(tool("scontrol")), "shutdown"], env=self.environment, capture_output=True)
        with_pid = self.folder / "munge.pid"
        if with_pid.is_file():
            os.kill(int(with_pid.read_text()), 15)
