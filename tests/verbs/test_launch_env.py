"""do=env writes what other nodes need and no secret, and every value gets there through DeepSpeed's own launcher."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from align import cli

SECRETS = {"WANDB_API_KEY": "0123456789abcdef", "HF_TOKEN": "hf_" + "a1" * 15, "OPENAI_API_KEY": "x1y2z3w4"}
AWKWARD = {
    "HF_HOME": "/a place/with 'both' \"quotes\" and \\ and a tail\\",
    "NCCL_DEBUG_FILE": "/logs/%h.%n.%u.100%.%%h.txt",
    "ALIGN_REAL_DATA": "$HOME `id` !! ; # ~ * (x) = ü",
    "NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1",
    "PYTHONPATH": "/one path:/two",
    "CUDA_HOME": "",
}
FAKE_PDSH = """#!/bin/bash
# pdsh -S -f N -w HOSTS COMMAND...: the command as the first host's shell would get it, in a new environment.
shift 5
command="$*" escaped=$'\\1'
command=${command//%%/$escaped} command=${command//%n/0} command=${command//%h/HOST} command=${command//%u/USER}
exec env -i PATH="$PATH" HOME="$HOME" sh -c "${command//$escaped/%}"
"""


@pytest.fixture(autouse=True)
def bare_shell(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name not in ("PATH", "HOME", "ALIGN_CACHE"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def written(*overrides: str) -> list[str]:
    assert cli.main(["+recipe=sft_dpo", "do=env", *overrides]) == 0
    return [line.partition("=")[0] for line in Path(".deepspeed_env").read_text().splitlines()]


def test_what_a_run_reads_is_written_and_the_rest_is_not(monkeypatch, capsys):
    for name in ("NCCL_DEBUG", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "EDITOR", "RANDOM_THING", "WANDB_MODE"):
        monkeypatch.setenv(name, "1")
    names = written()
    assert set(names) >= {"NCCL_DEBUG", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "WANDB_MODE", "ALIGN_CACHE"}
    assert not set(names) & {"EDITOR", "RANDOM_THING", "PATH", "HOME"}
    assert "written   NCCL_DEBUG" in capsys.readouterr().out


def test_a_secret_is_left_out_with_the_reason_unless_it_is_named(monkeypatch, capsys):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HTTPS_PROXY", "http://me:password1@proxy:3128")
    assert not set(written()) & {*SECRETS, "HTTPS_PROXY"}
    said = capsys.readouterr().out
    assert "launch.env=[HF_TOKEN]" in said
    assert Path(".deepspeed_env").stat().st_mode & 0o777 == 0o644
    assert set(written("launch.env=[WANDB_API_KEY]")) & set(SECRETS) == {"WANDB_API_KEY"}
    said += capsys.readouterr().out
    assert Path(".deepspeed_env").stat().st_mode & 0o777 == 0o600
    assert "WANDB_API_KEY: secret" in said
    assert not any(value in said for value in SECRETS.values())
    assert not set(written()) & set(SECRETS), "what is no longer named goes again"


def test_what_differs_from_rank_to_rank_is_never_written(monkeypatch, capsys):
    for name in ("RANK", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "0")
    assert not set(written()) & {"RANK", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES", "TORCHELASTIC_RUN_ID"}
    assert cli.main(["+recipe=sft_dpo", "do=env", "launch.env=[RANK]"]) == 2
    assert "launch.env: RANK is set by the launcher" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "reason"),
    [("launch.env=[NO_SUCH]", "NO_SUCH is not set"), ("launch.env=[LINES]", "LINES cannot be written")],
)
def test_a_name_that_cannot_be_sent_is_refused(override, reason, monkeypatch, capsys):
    monkeypatch.setenv("LINES", "a\nb")
    assert cli.main(["+recipe=sft_dpo", "do=env", override]) == 2
    assert reason in capsys.readouterr().err
    assert not Path(".deepspeed_env").exists()


def test_a_value_that_the_file_cannot_hold_is_left_out_with_the_reason(monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", "/ends/with/space ")
    monkeypatch.setenv("NCCL_DEBUG", "a\nb")
    assert not set(written()) & {"HF_HOME", "NCCL_DEBUG"}
    said = capsys.readouterr().out
    assert "begins or ends with a space" in said and "several lines" in said


def test_a_file_of_someone_else_is_not_overwritten(capsys):
    Path(".deepspeed_env").write_text("MY_OWN=1\nNCCL_DEBUG=INFO\n")
    assert cli.main(["+recipe=sft_dpo", "do=env"]) == 2
    assert "'MY_OWN', which would be lost" in capsys.readouterr().err
    assert Path(".deepspeed_env").read_text().startswith("MY_OWN")


def test_the_key_is_refused_where_nothing_reads_it(capsys):
    assert cli.main(["+recipe=sft_dpo", "launch.env=[HOME]", "do=check"]) == 2
    assert "only do=env reads it" in capsys.readouterr().err


def test_every_value_arrives_through_deepspeeds_launcher(monkeypatch, tmp_path):
    for name, value in AWKWARD.items():
        monkeypatch.setenv(name, value)
    assert set(written()) >= set(AWKWARD)
    pdsh = tmp_path / "bin/pdsh"
    pdsh.parent.mkdir()
    pdsh.write_text(FAKE_PDSH)
    pdsh.chmod(0o755)
    (tmp_path / "hostfile").write_text("first slots=1\n")
    (tmp_path / "dump.py").write_text("import json, os\njson.dump(dict(os.environ), open('seen.json', 'w'))\n")
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "hostfile", "--force_multi"]
    subprocess.run(
        [*launcher, "--no_ssh_check", "--master_addr", "127.0.0.1", "--no_local_rank", "dump.py"],
        env={"PATH": f"{pdsh.parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "DS_ACCELERATOR": "cpu"},
        check=True,
        capture_output=True,
        timeout=100,
    )
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert {name: seen.get(name) for name in AWKWARD} == AWKWARD
