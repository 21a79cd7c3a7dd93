"""`do=doctor` with one fault at a time: each makes its own line warn or fail, and no other.

Lines that are not ok on the machine of the test itself (a small /dev/shm, say) are taken off.
"""

import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from safetensors import safe_open

from align import cli
from align.chain import check_chain
from align.config.schema import DeepSpeedConfig, ZeroChoice
from align.config.store import compose_run
from align.models.load import EMBEDDED
from align.verbs import doctor, doctor_devices, doctor_disk, doctor_inputs, environment
from align.verbs.doctor_lines import FAIL, OK, WARN, Line, over_ranks, table
from tests.conftest import REPO
from tests.launching import slow
from tests.verbs.doctor_launch import FAULTS

SFT = "+recipe=sft"
HOSTS = {0: "nodea", 1: "nodea", 2: "nodeb"}


def faults(run_dir: Path) -> dict[str, str]:
    """Line -> level, of the lines of a report that are not ok."""
    report = json.loads((run_dir / "doctor/doctor.json").read_text())
    assert report["verdict"] == max([OK, *(line["level"] for line in report["lines"])], key=(OK, WARN, FAIL).index)
    return {line["name"]: line["level"] for line in report["lines"] if line["level"] != OK}


def line_of(run_dir: Path, name: str) -> str:
    """What a report says in one line, and what to do."""
    report = json.loads((run_dir / "doctor/doctor.json").read_text())
    return next(f"{line['found']} -> {line['todo']}" for line in report["lines"] if line["name"] == name)


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> dict[str, str]:
    """What is not ok on this machine without any fault of ours."""
    folder = tmp_path_factory.mktemp("usual")
    doctor.run_doctor(compose_run([SFT, f"run_dir={folder}"]).config, check_chain)
    return faults(folder)


@pytest.fixture
def ask(tmp_path, usual):
    """Run the doctor in this process: the exit code and the faults that are not the machine's own."""

    def run(*overrides: str, now=time.time, run_dir: Path | None = None) -> tuple[int, dict[str, str]]:
        folder = run_dir or tmp_path / "run"
        config = compose_run([SFT, f"run_dir={folder}", *overrides]).config
        code = doctor.run_doctor(config, check_chain, now)
        return code, {name: level for name, level in faults(folder).items() if usual.get(name) != level}

    return run


def test_a_sound_machine_has_no_faults_and_everything_is_removed(ask, tmp_path, capsys):
    code, found = ask()
    assert found == {}
    printed = capsys.readouterr().out
    assert printed.count(str(tmp_path / "run/doctor/doctor.json")) == 1
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["doctor"]
    assert code in (0, 1)  # 1 only where this machine has a fault of its own
    report = json.loads((tmp_path / "run/doctor/doctor.json").read_text())
    versions = next(line["details"] for line in report["lines"] if line["name"] == "packages")
    assert versions["torch"] == metadata.version("torch") and versions["wandb"] == metadata.version("wandb")


@pytest.mark.parametrize(("zero", "level", "code"), [("none", WARN, 0), ("zero2", FAIL, 1)])
def test_no_compiler_on_path(zero, level, code, ask, tmp_path, monkeypatch, usual):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask(f"deepspeed={zero}") == (max(code, FAIL in usual.values()), {"compiler": level})
    assert "ninja and c++ not found" in line_of(tmp_path / "run", "compiler")


def test_a_lock_that_a_killed_build_left(ask, tmp_path, monkeypatch):
    lock = tmp_path / "extensions/py311_cpu/deepspeed_shm_comm/lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    assert ask()[1] == {}  # a build may be running
    os.utime(lock, (time.time() - 3600,) * 2)
    assert ask() == (1, {"compiler": FAIL})
    assert f"rm {lock}" in line_of(tmp_path / "run", "compiler")


@pytest.fixture
def disk(tmp_path):
    """A function that mounts a small file system."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("a small disk cannot be mounted (needs root)")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_too_full_for_the_checkpoints(ask, disk):
    folder = disk("size=3m")
    assert ask(run_dir=folder / "run") == (1, {"disk": FAIL})
    assert "free, the run needs about" in line_of(folder / "run", "disk")


def test_room_for_the_need_and_little_more_is_a_warning(ask, monkeypatch, tmp_path):
    config = compose_run([SFT]).config
    needed = doctor_disk.needed_bytes(config, tmp_path)
    usage = doctor_disk.shutil.disk_usage("/")
    monkeypatch.setattr(doctor_disk.shutil, "disk_usage", lambda _: usage._replace(free=int(needed * 1.1)))
    monkeypatch.setattr(environment, "SHARED_MEMORY", tmp_path / "none")
    monkeypatch.setattr(doctor_disk, "CACHE_BYTES", 0)
    assert ask()[1] == {"disk": WARN}


def test_the_need_is_checkpoints_and_models_at_their_most(tmp_path):
    """Two complete checkpoints and one in the making, 12 bytes a parameter, and 4 of the model at the end."""
    config = compose_run(["+recipe=sft_dpo", "run=[sft,dpo]", "deepspeed=none", "precision=fp32"]).config
    with safe_open(EMBEDDED["tiny-base"] / "model.safetensors", framework="pt") as tensors:
        parameters = sum(tensors.get_tensor(key).numel() for key in tensors.keys())
    keep = config.stages.sft.keep_checkpoints
    one = parameters * (4 + 12 * (keep + 1))
    assert doctor_disk.needed_bytes(config, tmp_path) == parameters * 4 + one


def test_a_read_only_run_folder(ask, disk, tmp_path, capsys, usual):
    if os.geteuid() == 0:
        folder = disk("ro,size=100m")
    else:
        folder = tmp_path / "closed"
        folder.mkdir(mode=0o500)
    code = doctor.run_doctor(compose_run([SFT, f"run_dir={folder / 'run'}"]).config, check_chain)
    printed = capsys.readouterr().out
    report = json.loads(printed[printed.index('{"schema"') :])  # it goes where it can be read
    found = {
        line["name"]: line["level"] for line in report["lines"] if line["level"] not in (OK, usual.get(line["name"]))
    }
    assert code == 1 and found == {"checkpoint": FAIL}


def test_a_disk_that_returns_something_else(ask, monkeypatch, tmp_path):
    load = doctor_disk.load_file
    monkeypatch.setattr(doctor_disk, "load_file", lambda file: {k: v + 1 for k, v in load(file).items()})
    assert ask() == (1, {"checkpoint": FAIL})
    assert "what was read is not what was written" in line_of(tmp_path / "run", "checkpoint")


def test_a_clock_minutes_off(ask, tmp_path):
    assert ask(now=lambda: time.time() - 300)[1] == {"clock": WARN}
    assert "300.0 s from the clock of" in line_of(tmp_path / "run", "clock")


def test_a_cache_that_takes_no_files(ask, tmp_path):
    (tmp_path / "file").write_text("")
    assert ask(f"cache_dir={tmp_path / 'file' / 'cache'}") == (1, {"cache": FAIL})


def test_data_that_is_not_there(ask, tmp_path):
    assert ask("data.demonstrations=missing.jsonl") == (1, {"inputs": FAIL})
    assert "data.demonstrations=missing.jsonl" in line_of(tmp_path / "run", "inputs")


def test_a_model_of_the_hub_that_is_not_cached_where_there_is_no_network(ask, tmp_path):
    assert ask("model.path=nobody/nothing") == (1, {"hub": FAIL})
    said = line_of(tmp_path / "run", "hub")
    assert "nobody/nothing: not in the cache" in said and "hf download nobody/nothing" in said


def test_the_hub_in_words(monkeypatch):
    """What the hub's client raises, as a level and a way on; nothing here asks the hub."""

    class Api:
        error: Exception | None = None

        def auth_check(self, *_, **__):
            if self.error is not None:
                raise self.error

        def repo_info(self, *_, **__):
            return None

    monkeypatch.setattr(doctor_inputs, "HfApi", Api)
    assert doctor_inputs._hub_answer("model", "a/b", None, offline=False)[0] == OK
    Api.error = ConnectionError("no route")
    level, found, todo = doctor_inputs._hub_answer("model", "a/b", None, offline=False)
    assert level == FAIL and "cannot be reached" in found and "hf download a/b" in todo
    monkeypatch.setattr(doctor_inputs, "_is_cached", lambda *_: True)
    assert doctor_inputs._hub_answer("model", "a/b", None, offline=False)[0] == WARN
    assert doctor_inputs._hub_answer("model", "a/b", None, offline=True)[0] == OK


def test_wandb_without_a_key(tmp_path, usual):
    lost = ("WANDB_MODE", "WANDB_API_KEY")
    env = {name: value for name, value in os.environ.items() if name not in lost}
    env |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-m", "align", SFT, "do=doctor", "log=wandb"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    own = {name: level for name, level in faults(tmp_path / "runs/sft").items() if usual.get(name) != level}
    # Of a fresh home, nothing is built; that is no fault.
    assert done.returncode == 1 and own == {"wandb": FAIL}, done.stdout + done.stderr
    assert "wandb login" in line_of(tmp_path / "runs/sft", "wandb")


def test_a_package_that_is_missing_older_or_newer(ask, monkeypatch, tmp_path):
    versions = environment.installed()
    monkeypatch.setattr(environment, "installed", lambda: versions | {"peft": "missing"})
    assert ask() == (1, {"packages": FAIL})
    assert "pip install 'peft" in line_of(tmp_path / "run", "packages")
    monkeypatch.setattr(environment, "installed", lambda: versions | {"trl": "1.2.0"})
    assert ask() == (1, {"packages": FAIL})
    monkeypatch.setattr(environment, "installed", lambda: versions | {"trl": "1.99.0"})
    assert ask()[1] == {"packages": WARN}


def test_the_ranges_are_those_of_the_checkout_or_of_the_installed_package(monkeypatch, tmp_path):
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    needed, python = environment.requirements()
    assert needed == [Requirement(line) for line in project["dependencies"]] and python == project["requires-python"]
    monkeypatch.setattr(environment, "PYPROJECT", tmp_path / "none.toml")
    installed, python = environment.requirements()
    assert {"torch", "transformers", "trl", "deepspeed"} <= {one.name for one in installed} and "3.10" in python
    assert environment.packages(environment.installed()).level == OK  # extras such as vllm are not asked for


def test_a_probe_that_hangs_is_a_line_and_the_command_ends(tmp_path):
    code = (
        "import sys, time\n"
        "from align import cli\n"
        "from align.verbs import doctor, doctor_disk\n"
        "doctor.PROBE_SECONDS = 2.0\n"
        "doctor_disk.cache = lambda config: time.sleep(100)\n"
        f"sys.exit(cli.main(['{SFT}', 'do=doctor']))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1, done.stderr
    assert faults(tmp_path / "runs/sft")["cache"] == FAIL
    assert "no answer for 2 s" in line_of(tmp_path / "runs/sft", "cache")


def test_a_probe_that_breaks_hides_no_other(ask, monkeypatch):
    monkeypatch.setattr(doctor_disk, "cache", lambda config: 1 / 0)
    assert ask()[1] == {"cache": WARN}


def test_ranks_without_an_address_and_slurm_without_ranks(ask, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert ask() == (1, {"launch": FAIL})
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    for name, value in {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert ask() == (1, {"launch": FAIL})


def test_an_interface_that_gloo_would_not_find(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "veth")
    line = doctor_devices._gloo(2)
    assert line.level == FAIL and "lo" in line.todo


def test_a_driver_that_torch_cannot_use(monkeypatch):
    answers = {"-L": "GPU 0: H100\nGPU 1: H100\n"}
    monkeypatch.setattr(doctor_devices, "program", lambda *words: answers.get(words[1], "535.1, 0\n535.1, [N/A]\n"))
    monkeypatch.setattr(doctor_devices.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor_devices.torch.cuda, "device_count", lambda: 0)
    assert doctor_devices.devices(2).level == FAIL and "2 GPUs" in doctor_devices.devices(2).found
    assert doctor_devices.driver().level == FAIL
    monkeypatch.setattr(doctor_devices.torch.cuda, "is_available", lambda: True)
    assert doctor_devices.driver().level == OK
    monkeypatch.setattr(doctor_devices, "program", lambda *words: "535.1, 0\n535.1, 3\n")
    assert doctor_devices.driver().level == FAIL and "on GPU 1" in doctor_devices.driver().found


def test_links_between_gpus_are_read_from_the_matrix():
    topology = (
        "\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\n"
        "GPU0\t X \tNV18\tSYS\tPIX\t0-31\n"
        "GPU1\tNV18\t X \tPHB\tSYS\t0-31\n"
        "GPU2\tSYS\tPHB\t X \tNODE\t32-63\n"
        "NIC0\tPIX\tSYS\tNODE\t X \t\n"
    )
    assert doctor_devices.gpu_links(topology) == ["NV18", "SYS", "PHB"]


def test_the_limit_of_open_files_grows_with_the_ranks(monkeypatch):
    monkeypatch.setattr(environment.resource, "getrlimit", lambda _: (1024, 1024))
    assert "open files" in environment.limits(1000).found and environment.limits(1000).level == WARN
    monkeypatch.setattr(environment.resource, "getrlimit", lambda _: (environment.resource.RLIM_INFINITY,) * 2)
    assert environment.limits(1000).level == OK


def test_a_compiler_is_wanted_only_where_deepspeed_meets_gloo(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    auto, none = DeepSpeedConfig(), DeepSpeedConfig(mode=ZeroChoice.none)
    assert [environment.compiler(auto, ranks).level for ranks in (1, 2)] == [WARN, FAIL]
    assert environment.compiler(none, 2).level == WARN
    monkeypatch.setattr(environment.torch.cuda, "is_available", lambda: True)
    assert environment.compiler(auto, 2).level == WARN


def test_lines_of_many_ranks_become_one_that_names_those_at_fault():
    by_rank = {
        0: [Line("cache", OK, "fine")],
        1: [Line("cache", OK, "fine")],
        2: [Line("cache", FAIL, "closed", "mend")],
    }
    assert over_ranks(by_rank, HOSTS) == [Line("cache", FAIL, "rank 2 (nodeb): closed", "mend")]
    everywhere = {rank: [Line("cache", WARN, "full")] for rank in range(3)}
    assert over_ranks(everywhere, HOSTS)[0].found == "all asked: full"


def test_the_table_says_what_to_do_and_no_secret():
    text = table([Line("hub", FAIL, "token hf_" + "a1" * 16, "log in"), Line("cache", OK, "fine", "nothing")])
    assert text.splitlines() == ["fail  hub    token ***", "           → log in", "ok    cache  fine"]


def test_the_exit_code_reaches_the_shell(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([SFT, "do=doctor", "data.demonstrations=missing.jsonl"]) == 1
    assert "fail  inputs" in capsys.readouterr().out


@pytest.fixture(scope="module")
def launches(tmp_path_factory) -> Path:
    """Launches of doctor_launch.py, each with the fault of its name; those that only slow tests read if they run."""
    folder = tmp_path_factory.mktemp("launches")
    wanted = FAULTS if os.environ.get("ALIGN_SLOW_TESTS") else ("none", "without_rank_0")
    command = [sys.executable, str(REPO / "tests/verbs/doctor_launch.py"), str(folder), *wanted]
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return folder


LAUNCHED = {
    "none": ({}, 0, ""),
    "version": ({"same packages": FAIL}, 1, "datasketch 2.77.0, rank 0 has"),
    "config": ({"same config": FAIL}, 1, "stages.sft.learning_rate is 0.123, on rank 0"),
    "data": ({"same data": FAIL}, 1, "rows.jsonl differs"),
    "folder": ({"run folder": FAIL}, 1, "does not see what rank 0 writes"),
    "clock": ({"clocks": WARN}, 0, "is +300.0 s off"),
    "absent": ({"ranks": FAIL}, 1, "silent for 2 s: rank 1"),
    "silent": ({"all-reduce": FAIL}, 1, "silent for 2 s: rank 1"),
}


@slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "expected"), LAUNCHED.items(), ids=LAUNCHED.keys())
def test_two_ranks_with_a_fault(name, expected, launches, usual):
    lines, code, words = expected
    place = launches / name
    run_dir = place / "machine0/runs/sft" if name == "folder" else place / ("runs" if name == "data" else "runs/sft")
    found = {
        line: level for line, level in faults(run_dir).items() if usual.get(line) != level and line != "shared memory"
    }
    assert found == lines
    for line in lines:
        assert words in line_of(run_dir, line) and (line == "clocks" or "rank 1 (" in line_of(run_dir, line))
    assert int((place / "rank0.code").read_text()) == max(code, FAIL in usual.values())
    if name not in ("absent", "silent"):
        assert int((place / "rank1.code").read_text()) == max(code, FAIL in usual.values())
        assert (place / "rank1.txt").read_text() == ""  # rank 0 speaks for all


def test_rank_1_names_a_rank_0_that_never_comes(launches):
    place = launches / "without_rank_0"
    assert int((place / "rank1.code").read_text()) == 1
    # transformers says on its own account when wandb is offline.
    lines = [line for line in (place / "rank1.txt").read_text().splitlines() if not line.startswith("[INFO]")]
    assert len(lines) == 1 and "rank 0 is silent: 127.0.0.1:" in lines[0]


def test_the_bandwidth_of_the_sum_is_measured(launches):
    report = json.loads((launches / "none/runs/sft/doctor/doctor.json").read_text())
    details = next(line["details"] for line in report["lines"] if line["name"] == "all-reduce")
    assert details["bus_bytes_per_second"] == pytest.approx(details["bytes"] / details["seconds"], rel=0.5)
    assert report["ranks"] == 2 and len(report["hosts"]) == 2
