"""log=wandb: one run a stage, resumed by the id in the run folder, silent unless asked for."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align.config.errors import UserError
from align.config.schema import LogConfig, WandbMode
from align.tracking.members import Member
from align.tracking.wandb_run import WandbRun, check_wandb, wandb_mode
from tests.tracking.wandb_file import read_runs

CONFIG = {"name": "sft_dpo", "model": {"path": "tiny-base"}, "peft": {"method": "lora"}, "stages": {"sft": {"seed": 7}}}
INPUTS = [{"name": "data.preferences", "path": "pairs.jsonl", "digest": "0123abcd"}]
OFFLINE = LogConfig(wandb=True, project="village", mode=WandbMode.offline)
REPO = Path(__file__).resolve().parents[2]


def opened(run_dir: Path, *, log: LogConfig = OFFLINE, active: bool = True, stage: str = "sft") -> WandbRun:
    (run_dir / stage).mkdir(exist_ok=True, parents=True)
    return WandbRun(log, "sft_dpo", active=active, stage=stage, stage_dir=run_dir / stage)


@pytest.fixture
def mode_from_config(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)


def test_a_run_has_project_group_job_type_tags_config_and_input_digests(tmp_path, mode_from_config):
    run = opened(tmp_path)
    run.describe(CONFIG, INPUTS)
    run.write(1, {"loss": 0.5, "rewards/chosen": 0.25})
    run.finish({"before/loss": 0.75, "after/loss": 0.5})
    (seen,) = read_runs(tmp_path)
    assert (seen["project"], seen["group"], seen["job_type"]) == ("village", "sft_dpo", "sft")
    assert seen["tags"] == ["tiny-base", "lora"]
    assert seen["config"]["stages"] == {"sft": {"seed": 7}}
    assert seen["config"]["inputs"] == INPUTS
    assert seen["axis"]["*"] == "train/global_step"
    assert [(row["train/global_step"], row["loss"], row["rewards/chosen"]) for row in seen["rows"]] == [(1, 0.5, 0.25)]
    assert (seen["summary"]["before/loss"], seen["summary"]["after/loss"]) == (0.75, 0.5)
    assert seen["exit_code"] == 0


def test_members_of_a_sweep_make_a_group_of_their_own(tmp_path, mode_from_config):
    Member("c0ffee42", "peft.r=4", tmp_path).write()
    opened(tmp_path).finish({})
    (seen,) = read_runs(tmp_path)
    assert (seen["group"], seen["name"], seen["job_type"]) == ("sft_dpo sweep c0ffee", "peft.r=4/sft", "sft")


def test_an_interrupted_stage_goes_on_in_the_run_it_had_and_another_stage_has_its_own(tmp_path, mode_from_config):
    interrupted = opened(tmp_path)
    interrupted.write(3, {"loss": 0.5})
    interrupted.finish({})
    # wandb names its folders by the second, and no stage is interrupted and resumed within one.
    (tmp_path / "wandb").rename(tmp_path / "earlier")
    run = opened(tmp_path)
    run.write(4, {"loss": 0.4})
    run.finish({})
    opened(tmp_path, stage="dpo").finish({})
    (first,) = read_runs(tmp_path / "earlier")
    second, other = sorted(read_runs(tmp_path / "wandb"), key=lambda seen: seen["job_type"], reverse=True)
    assert first["id"] == second["id"] == (tmp_path / "sft/wandb_id").read_text().strip()
    assert [row["train/global_step"] for row in first["rows"] + second["rows"]] == [3, 4]
    assert other["id"] != first["id"]


def test_wandbs_own_files_lie_beside_the_stages_not_in_them(tmp_path, mode_from_config):
    opened(tmp_path).finish({})
    assert [path.name for path in (tmp_path / "sft").iterdir()] == ["wandb_id"]
    assert {path.name for path in tmp_path.iterdir()} == {"sft", "wandb"}


def test_only_an_active_rank_opens_a_run(tmp_path, mode_from_config):
    run = opened(tmp_path, active=False)
    run.describe(CONFIG, INPUTS)
    run.write(1, {"loss": 0.5})
    run.finish({})
    assert list(tmp_path.rglob("*")) == [tmp_path / "sft"]


def test_wandb_mode_of_the_environment_wins_and_disabled_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    opened(tmp_path).finish({})
    assert list(tmp_path.rglob("*")) == [tmp_path / "sft"]
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert wandb_mode(LogConfig(wandb=True, mode=WandbMode.online)) == "offline"
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(UserError, match="WANDB_MODE=ofline: must be online, offline or disabled"):
        wandb_mode(OFFLINE)
    assert wandb_mode(LogConfig(wandb=False)) == "disabled"


def test_a_project_name_that_wandb_refuses_is_one_line(tmp_path, mode_from_config):
    with pytest.raises(UserError, match=r"^log=wandb: Invalid project name 'a/b'[^\n]*log=local$"):
        opened(tmp_path, log=LogConfig(wandb=True, project="a/b", mode=WandbMode.offline))


def outcome(tmp_path: Path, code: str, **environment: str) -> tuple[str, float]:
    """What a fresh process prints, and the seconds it took: wandb reads keys and servers once a process."""
    lost = ("WANDB_MODE", "WANDB_API_KEY")
    kept = {name: value for name, value in os.environ.items() if name not in lost}
    private = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "PYTHONPATH": str(REPO)}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, **private, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout + done.stderr, time.monotonic() - began


ONLINE = """
from pathlib import Path
from align.config.errors import UserError
from align.config.schema import LogConfig
from align.tracking.wandb_run import WandbRun, check_wandb
try:
    check_wandb(LogConfig(wandb=True))
except UserError as error:
    print("refused:", error)
import wandb
wandb.login = lambda **_: True
try:
    WandbRun(LogConfig(wandb=True), "g", active=True, stage="sft", stage_dir=Path("."))
except UserError as error:
    print("refused:", error)
"""


def test_without_a_key_online_is_refused_before_anything_runs(tmp_path):
    output, _ = outcome(tmp_path, ONLINE)
    first, second = output.splitlines()
    assert first.startswith("refused: log=wandb: no API key for wandb on this machine; run `wandb login`")
    assert second.startswith("refused: log=wandb: ")


def test_without_a_key_no_question_is_asked_on_a_terminal(monkeypatch, mode_from_config, tmp_path):
    import wandb

    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(wandb.errors.term, "can_use_terminput", lambda: True)
    monkeypatch.setattr(wandb.errors.term, "terminput", lambda *_, **__: pytest.fail("it asked"))
    with pytest.raises(UserError, match="no API key"):
        check_wandb(LogConfig(wandb=True))


def test_a_server_that_cannot_be_reached_is_one_line_within_seconds(tmp_path):
    key = "0123456789" * 4
    where = {
        "WANDB_API_KEY": key,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_INIT_TIMEOUT": "1",
        "WANDB_HTTP_TIMEOUT": "1",
    }
    output, seconds = outcome(tmp_path, ONLINE, **where)
    lines = output.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("refused: log=wandb: ") for line in lines), output
    assert all(line.endswith("or use log.mode=offline, or log=local") for line in lines), output
    assert seconds < 30
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
