"""What docs/security.md says: no foreign code, no pickles, nothing uploaded unless asked, no secret written down."""

import ast
import inspect
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from align import cli
from align.config.errors import UserError
from align.config.redaction import MASK, names_secret, redacted, redacted_text
from align.config.schema import LogConfig, ModelConfig, WandbMode
from align.config.store import compose_run
from align.models.load import check_model, load_config, load_model, not_loaded
from align.models.reward import load_reward_model
from align.stages.context import saved_config, stage_record
from align.tracking.progress import say
from align.tracking.wandb_run import WandbRun
from align.trainers.arguments import Machine, trainer_arguments
from tests.cli.own_files import command, pairs, save_model, write_rows
from tests.conftest import REPO

HF_TOKEN = "hf_" + "Ab1" * 11
OPENAI_KEY = "sk-proj-" + "Ab1_" * 8
WANDB_KEY = "0123456789abcdef" * 2 + "01234567"

SECRETS = {
    f"cannot read {HF_TOKEN}/rows.jsonl": HF_TOKEN,
    f"key_env={OPENAI_KEY}": OPENAI_KEY,
    f"WANDB_API_KEY={WANDB_KEY}": WANDB_KEY,
    f'{{"wandb_key": "{WANDB_KEY}"}}': WANDB_KEY,
    "AWS: AKIA0123456789ABCDEF here": "AKIA0123456789ABCDEF",
    "url=https://me:pass-word@host:80/v1": "pass-word",
    "git clone https://x-access-token:ghp_" + "a1" * 18 + "@host/repo": "ghp_" + "a1" * 18,
    "Authorization: Bearer abcdef123456": "abcdef123456",
    "https://host/v1?api_key=abc1&x=1": "abc1",
    "hfToken=qwertz": "qwertz",
    "password: hunter2": "hunter2",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----": "MIIE",
}
HARMLESS = (
    "stages.dpo.max_tokens=1024",
    "stages.ppo.length_penalty_per_token=0.5",
    "stages.constitutional.judge.key_env=MY_KEY",
    "settings are key=value",
    "unknown key: policy2",
    "eos_token=</s> pad_token='<pad>'",
    "num_key_value_heads: 4",
    "the largest token: 512 (abc)",
    "mask_token=[MASK2]",
    "monkey=banana",
    "runs/sk-learn-compatible-model-name/task-specific-finetuning-0123",
    "digest " + WANDB_KEY,
    "http://127.0.0.1:8000/v1/chat and see a@b.org",
    "rows.jsonl:812: 'rejected' is empty",
)


@pytest.mark.parametrize(("line", "secret"), SECRETS.items())
def test_a_secret_in_a_line_is_masked(line, secret):
    masked = redacted_text(line)
    assert secret not in masked and MASK in masked
    assert redacted_text(masked) == masked


@pytest.mark.parametrize("line", HARMLESS)
def test_what_is_no_secret_stays(line):
    assert redacted_text(line) == line


def test_in_a_config_a_name_is_enough(monkeypatch):
    given = {
        "log": {"api_key": "anything", "password": "x", "nested": {"hf_token": ["a", "b"]}, "entity": "me"},
        "secrets": {"first": "x"},
        "max_tokens": 7,
        "api_key": None,
        "length_penalty_per_token": 0.5,
        "key_env": "MY_KEY",
        "url": "https://a:b@host",
    }
    assert redacted(given) == {
        "log": {"api_key": MASK, "password": MASK, "nested": {"hf_token": [MASK, MASK]}, "entity": "me"},
        "secrets": {"first": MASK},
        "max_tokens": 7,
        "api_key": None,
        "length_penalty_per_token": 0.5,
        "key_env": "MY_KEY",
        "url": f"https://a:{MASK}@host",
    }


def test_no_setting_of_ours_is_taken_for_a_secret():
    from align.config.keys import keys

    named = [path for path in keys() if names_secret(path.rsplit(".", 1)[-1])]
    # Numbers, which are never masked.
    assert all(isinstance(_default(path), int | float) for path in named), named


def _default(path: str):
    from align.config.keys import keys

    key = keys()[path]
    return next(f.default for f in key.owner.__dataclass_fields__.values() if f.name == key.leaf)


def test_the_value_of_a_secret_variable_is_masked_wherever_it_stands(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "qwertz-123456")
    monkeypatch.setenv("MAX_TOKENS", "qwertz-654321")
    assert redacted_text("401 for qwertz-123456 and qwertz-654321") == "401 for *** and qwertz-654321"


def test_lines_of_progress_and_errors_are_masked(capsys):
    say(f"reading {HF_TOKEN}")
    assert cli.main(["+recipe=sft", f"data.demonstrations={HF_TOKEN}.jsonl"]) == 2
    errors = capsys.readouterr().err
    assert HF_TOKEN not in errors and errors.count(MASK) == 2


def test_a_key_given_for_the_name_of_a_variable_is_not_repeated(capsys, tmp_path):
    speaker = {"backend": "server", "url": "http://127.0.0.1:9", "model": "m", "key_env": OPENAI_KEY}
    settings = [f"stages.constitutional.judge.{key}={value}" for key, value in speaker.items()]
    assert cli.main(["+recipe=constitutional", *settings, f"run_dir={tmp_path}"]) == 2
    errors = capsys.readouterr().err
    assert OPENAI_KEY not in errors and "is to hold the server's key" in errors


def test_a_traceback_is_masked(tmp_path):
    file = tmp_path / "crash.py"
    file.write_text(
        f"from align import __main__ as door, cli\ncli.main = lambda _: 1 / len('{HF_TOKEN}'[99:])\ndoor.main()\n"
    )
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, str(file)], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
    assert HF_TOKEN not in done.stderr and MASK in done.stderr


def test_a_record_with_another_secret_is_the_same_record(tmp_path):
    """A key that was renewed must not refuse the run that goes on."""
    first, second = (compose_run(["+recipe=sft", f"data.demonstrations=hf_{c * 30}/a"]).config for c in "ab")
    assert stage_record(first, "sft", tmp_path) == stage_record(second, "sft", tmp_path)
    assert "hf_aaa" not in json.dumps(saved_config(first))


WATCH = """
import os, socket
def told(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        where = arguments[1] if event == "socket.connect" else arguments
        if isinstance(where, tuple) and not str(where[0]).startswith(("127.", "::1", "localhost", "0.0.0.0")):
            with open(os.environ["WATCH_FILE"], "a") as file:
                file.write(f"{event} {where}\\n")
import sys
sys.addaudithook(told)
"""


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """DPO as a user runs it, with secrets in the environment and in a path, wandb offline and no variable that switches
    anything off: (run folder, what was printed, connections to elsewhere)."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "hook").mkdir()
    (folder / "hook/sitecustomize.py").write_text(WATCH)
    (folder / HF_TOKEN).mkdir()
    rows = write_rows(folder / HF_TOKEN / "pairs.jsonl", pairs(30))
    model = save_model(folder / "model")
    off = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "WANDB_MODE", "WANDB_SILENT")
    env = {name: value for name, value in os.environ.items() if name not in off}
    env |= {
        "PYTHONPATH": f"{folder / 'hook'}:{REPO}",
        "WATCH_FILE": str(folder / "watched"),
        "WANDB_API_KEY": WANDB_KEY,
        "OPENAI_API_KEY": OPENAI_KEY,
        "HOME": str(folder),
    }
    arguments = command(model, rows, folder, "log=wandb", "log.mode=offline", "stages.dpo.save_every=1")
    words = [sys.executable, "-m", "align", *arguments]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    watched = folder / "watched"
    return folder / "run", done.stdout + done.stderr, watched.read_text() if watched.exists() else ""


@pytest.mark.timeout(300)
def test_nothing_leaves_the_machine_unless_asked(whole_run):
    _, _, connections = whole_run
    assert connections == ""


@pytest.mark.timeout(300)
def test_no_file_of_a_run_and_nothing_printed_has_a_secret(whole_run):
    run_dir, printed, _ = whole_run
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert {"config.yaml", "started.json", "manifest.json"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    for secret in (HF_TOKEN, WANDB_KEY, OPENAI_KEY):
        assert secret not in printed
        assert [str(path) for path in files if secret.encode() in path.read_bytes()] == []
    # The places where they would be, so that the test does not look past them.
    for name in ("config.yaml", "started.json", "manifest.json"):
        assert f"{MASK}/pairs.jsonl" in (run_dir / "dpo" / name).read_text()


def test_the_watch_of_connections_sees_one(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    code = "import socket\ntry: socket.create_connection(('192.0.2.1', 9), timeout=0.01)\nexcept OSError: pass"
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "WATCH_FILE": str(tmp_path / "watched")}
    subprocess.run([sys.executable, "-c", code], env=env, timeout=30, check=True)
    assert "192.0.2.1" in (tmp_path / "watched").read_text()


def test_libraries_are_told_to_keep_quiet():
    names = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_SAFETENSORS_CONVERSION", "VLLM_NO_USAGE_STATS")
    code = f"import os, align; print([os.environ[name] for name in {names}])"
    env = {name: value for name, value in os.environ.items() if name not in names} | {"PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "['1', '1', '1']\n"


def test_a_trainer_reports_and_pushes_nowhere(tmp_path):
    stage = compose_run(["+recipe=sft"]).config.stages.sft
    values = trainer_arguments(
        stage, Machine(1, False, False, None), tmp_path, log_every=1, evaluate=False, **_judged()
    )
    arguments = transformers.TrainingArguments(**values)
    assert arguments.report_to == [] and not arguments.push_to_hub and arguments.hub_token is None


def _judged() -> dict[str, bool]:
    names = inspect.signature(trainer_arguments).parameters
    return {name: False for name in ("fresh", "judge_first") if name in names}


class Harm:
    """A pickle that writes a file when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.fixture
def pickled(tmp_path) -> Path:
    """A model folder whose weights are a sound pickle, and nothing else."""
    folder = save_model(tmp_path / "model")
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_pickled_weights_are_refused_in_one_line(pickled, tmp_path, capsys):
    rows = write_rows(tmp_path / "pairs.jsonl", pairs(10))
    assert cli.main(command(pickled, rows, tmp_path)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "its weights are pickles (*.bin)" in line and "model.pickled_weights=true" in line
    for load in (load_model, load_reward_model):
        with pytest.raises(UserError, match="cannot be loaded"):
            load(str(pickled), ModelConfig(), torch.float32, seed=0)


def test_a_hub_model_without_safetensors_is_refused_with_the_way_out():
    """transformers' own words; the hub is not asked."""
    source = inspect.getsource(transformers.modeling_utils)
    words = "cannot be loaded with `safetensors`"
    assert words in source
    assert "model.pickled_weights=true" in str(not_loaded("a/b", "model", OSError(f"a/b ... and thus {words}.")))


def test_wandb_keeps_no_code_and_no_secret_of_the_command_line(tmp_path, monkeypatch):
    import wandb

    seen = {}

    class Run:
        url, config = None, {}

        def define_metric(self, *_, **__):
            pass

    def init(**options):
        seen.update(options, argv=list(sys.argv))
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(sys, "argv", ["align", f"data.prompts={HF_TOKEN}"])
    monkeypatch.delenv("WANDB_MODE", raising=False)
    log = LogConfig(wandb=True, mode=WandbMode.offline)
    WandbRun(log, "g", active=True, stage="sft", stage_dir=tmp_path)
    assert seen["settings"].disable_code is True and seen["argv"] == ["align", f"data.prompts={MASK}"]
    assert sys.argv[1].endswith(HF_TOKEN)


def test_pickled_weights_are_taken_when_asked_for(pickled):
    asked = ModelConfig(pickled_weights=True)
    check_model(str(pickled), where="model.path", pickled=True)
    assert load_model(str(pickled), asked, torch.float32, seed=0).num_parameters() > 0
    assert load_reward_model(str(pickled), asked, torch.float32, seed=0).num_parameters() > 0


def test_a_pickle_with_code_in_it_is_not_run_even_then(pickled, tmp_path):
    file = tmp_path / "harm"
    pickle.loads(pickle.dumps(Harm(file))).close()
    assert file.exists()  # it would harm
    file.unlink()
    torch.save({"lm_head.weight": Harm(file)}, pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickle.*more than tensors"):
        load_model(str(pickled), ModelConfig(pickled_weights=True), torch.float32, seed=0)
    assert not file.exists()


def test_code_of_a_model_runs_only_when_asked_for(tmp_path):
    folder, file = save_model(tmp_path / "model"), tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "strange.StrangeConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "strange.py").write_text(
        "from transformers import PretrainedConfig\n"
        f"open({str(file)!r}, 'w').close()\n"
        "class StrangeConfig(PretrainedConfig):\n    model_type = 'strange'\n"
    )
    with pytest.raises(UserError, match=r"brings code of its own.*model.trust_remote_code=true"):
        load_config(str(folder), ModelConfig())
    assert not file.exists()
    load_config(str(folder), ModelConfig(trust_remote_code=True))
    assert file.exists()


def _loads(source: str) -> list[ast.Call]:
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func) in ("torch.load", "pickle.load", "pickle.loads")]


@pytest.mark.parametrize("file", sorted((REPO / "align").rglob("*.py")), ids=lambda file: file.stem)
def test_our_own_files_are_read_without_running_code(file):
    for call in _loads(file.read_text()):
        kept = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert ast.unparse(call.func) == "torch.load" and kept.get("weights_only") == "True", ast.unparse(call)


def test_transformers_reads_checkpoints_without_running_code():
    """The Trainer's own part of a checkpoint. DeepSpeed's shards are pickles that it reads whole: see the docs."""
    calls = _loads(inspect.getsource(transformers.trainer))
    assert len(calls) > 5
    assert all("weights_only=True" in ast.unparse(call) for call in calls)
