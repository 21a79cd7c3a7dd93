"""Two hosts on this machine (cluster/two_hosts.sh) and the ways to launch a run on both."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "cluster/two_hosts.sh"
DEEPSPEED, TORCHRUN = (str(Path(sys.executable).with_name(name)) for name in ("deepspeed", "torchrun"))
ADDRESS = "10.77.0.1"


@dataclass
class Run:
    """A launch in progress: one launcher by hostfile, one a host without ssh."""

    launchers: dict[str, subprocess.Popen]
    logs: dict[str, Path]
    started: float = field(default_factory=time.monotonic)

    def output(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.logs.values())

    def wait(self, seconds: float) -> dict[str, int]:
        """Host -> exit code of its launcher."""
        deadline = time.monotonic() + seconds
        for process in self.launchers.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired as error:
                raise AssertionError(f"still running after {seconds:.0f} s:\n{self.output()[-6000:]}") from error
        return {host: process.returncode for host, process in self.launchers.items()}


class Hosts:
    """`nodea` and `nodeb`, from `up` to `down`. All they need is in `folder`; runs share it as their disk."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, 29700
        self._environment = {**os.environ, "HOSTS_DIR": str(folder / "hosts")}

    def call(self, *words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [str(SCRIPT), *words], env=self._environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )

    def missing(self) -> str:
        """Why there can be no two hosts here; empty if there can."""
        done = self.call("check")
        return done.stdout.strip() or done.stderr.strip() if done.returncode else ""

    def up(self) -> None:
        self.call("down")
        done = self.call("up")
        assert done.returncode == 0, done.stderr

    def shell(self) -> dict[str, str]:
        """The variables of the person who launches; what other nodes get of them is for do=env to say."""
        return self._environment | {
            "PYTHONPATH": str(REPO), "ALIGN_CACHE": str(self.folder / "cache"), "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "wire0",
        }  # fmt: skip

    def by_hostfile(self, place: Path, *overrides: str) -> Run:
        """From nodea, over pdsh and ssh; nodeb gets its environment by do=env."""
        words = [sys.executable, "-m", "align", *overrides, "do=env"]
        subprocess.run(words, cwd=place, env=self.shell(), check=True, capture_output=True)
        return self._start(place, {"nodea": ["--launcher", "pdsh"]}, overrides)

    def without_ssh(self, place: Path, *overrides: str) -> Run:
        """The same command on each host, with its number."""
        ways = {
            host: ["--no_ssh", "--node_rank", str(rank), "--master_addr", ADDRESS]
            for rank, host in enumerate(("nodea", "nodeb"))
        }
        return self._start(place, ways, overrides)

    def by_torchrun(self, place: Path, *overrides: str) -> Run:
        """The same command on each host, with its number."""
        common = [TORCHRUN, "--nnodes", "2", "--nproc_per_node", "1", "--master_addr", ADDRESS]
        ways = {host: [*common, "--node_rank", str(rank)] for rank, host in enumerate(("nodea", "nodeb"))}
        return self._launch(place, ways, ["-m", "align", *overrides])

    def _start(self, place: Path, ways: dict[str, list[str]], overrides: tuple[str, ...]) -> Run:
        common = [DEEPSPEED, "--hostfile", str(self.folder / "hosts/hostfile")]
        run = ["--no_local_rank", "--module", "align", *overrides]
        return self._launch(place, {host: [*common, *words] for host, words in ways.items()}, run)

    def _launch(self, place: Path, ways: dict[str, list[str]], run: list[str]) -> Run:
        self.port += 1
        launchers, logs = {}, {}
        for host, words in ways.items():
            logs[host] = place / f"{host}-{self.port}.log"
            with open(logs[host], "w") as log:
                launchers[host] = subprocess.Popen(
                    [str(SCRIPT), "on", host, *words, "--master_port", str(self.port), *run],
                    cwd=place, env=self.shell(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                )  # fmt: skip
        return Run(launchers, logs)

    def ranks(self, host: str) -> list[int]:
        """Processes of training on a host, without the launchers around them."""
        tag = subprocess.run(["cksum"], input=str((self.folder / "hosts").resolve()), capture_output=True, text=True)
        name = f"align{tag.stdout.split()[0]}-{host}"
        found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
        return [int(pid) for pid in found if _is_rank(pid)]

    def gone_after(self, host: str, seconds: float) -> float:
        """Seconds until the ranks of a host have ended."""
        start = time.monotonic()
        while self.ranks(host):
            assert time.monotonic() - start < seconds, f"ranks on {host} live on after {seconds:.0f} s"
            time.sleep(0.1)
        return time.monotonic() - start


def _is_rank(pid: str) -> bool:
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return words[1:4] == [b"-u", b"-m", b"align"]
    return False
