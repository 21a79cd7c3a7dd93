"""Artifacts by digest join the stages in the lineage graph; nothing but digests is sent unless asked for."""

import wandb

from align.artifacts import digest_value, read_manifest
from align.config.schema import LogConfig, WandbMode
from align.tracking import wandb_run
from align.tracking.wandb_artifacts import kind_of, log_config, name_of, use_inputs
from align.tracking.wandb_run import WandbRun
from tests.tracking.runs_made import entry, hand_run, policy_digest
from tests.tracking.wandb_file import read_runs

CONFIG = {
    "name": "hand",
    "model": {"path": "tiny-base"},
    "peft": {"method": "none"},
    "hub": {"token": "hf_" + "a1B2" * 9},
}


def left(run_dir, monkeypatch, *, stage="sft", upload=False):
    """What an offline run of a finished stage has written."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    log = LogConfig(wandb=True, project="village", mode=WandbMode.offline, upload_models=upload)
    manifest = read_manifest(run_dir / stage)
    run = WandbRun(log, "hand", active=True, stage=stage, stage_dir=run_dir / stage)
    run.describe(CONFIG, manifest.inputs)
    run.alert("ppo: kl", "update 7: kl/nats_per_token 1.3")
    run.leave(manifest)
    run.finish(manifest.metrics)
    (seen,) = read_runs(run_dir)
    return seen


def test_a_model_is_logged_by_its_digest_alone_with_what_made_it(tmp_path, monkeypatch):
    run = hand_run(tmp_path / "run")
    (run / "sft" / "policy").mkdir()
    (run / "sft" / "policy" / "model.safetensors").write_text("weights")
    seen = left(run, monkeypatch)
    model = next(one for one in seen["artifacts"] if one["type"] == "model")
    assert model["name"] == f"model-{policy_digest('sft')[:12]}"
    assert model["files"] == ["digest.json"] and sorted(model["aliases"]) == ["latest", "sft"]
    assert model["metadata"]["digest"] == policy_digest("sft") and model["metadata"]["rows"]["kept"] == 1000
    assert seen["alerts"] == [("ppo: kl", "update 7: kl/nats_per_token 1.3", "WARN")]
    assert seen["summary"]["after/loss"] == 0.5


def test_weights_are_sent_only_when_asked_for(tmp_path, monkeypatch):
    run = hand_run(tmp_path / "run")
    (run / "sft" / "policy").mkdir()
    (run / "sft" / "policy" / "model.safetensors").write_text("weights")
    model = next(one for one in left(run, monkeypatch, upload=True)["artifacts"] if one["type"] == "model")
    assert sorted(model["files"]) == ["digest.json", "model.safetensors"]


def test_the_config_is_an_artifact_without_secrets(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(wandb_run, "log_config", lambda *words: given.append(words[2]) or log_config(*words))
    seen = left(hand_run(tmp_path / "run"), monkeypatch)
    (config,) = [one for one in seen["artifacts"] if one["type"] == "config"]
    assert config["files"] == ["config.json"] and config["name"] == f"config-{digest_value(given[0])[:12]}"
    assert given == [CONFIG | {"hub": {"token": "***"}}]


def test_replies_of_an_evaluation_are_a_table(tmp_path, monkeypatch):
    seen = left(hand_run(tmp_path / "run"), monkeypatch, stage="evaluate")
    (row,) = [row for row in seen["rows"] if "replies/step_00000.nrows" in row]
    assert (row["replies/step_00000.nrows"], row["replies/step_00000.ncols"]) == (2, 3)


class Server:
    """An online run on a server that has some artifacts already."""

    def __init__(self, known):
        self.known, self.used = known, []

    def use_artifact(self, what, type):
        if isinstance(what, str) and what.removesuffix(":latest") not in self.known:
            raise wandb.errors.CommError(f"no artifact {what}")
        self.used.append((what if isinstance(what, str) else what.name, type, isinstance(what, str)))


def test_what_one_stage_logs_the_next_one_uses_under_the_same_name(tmp_path, monkeypatch):
    run = hand_run(tmp_path / "run")
    logged = {one["name"] for one in left(run, monkeypatch)["artifacts"]}
    server = Server(logged)
    use_inputs(wandb, server, read_manifest(run / "dpo").inputs)
    assert server.used == [
        (f"model-{policy_digest('sft')[:12]}:latest", "model", True),
        ("dataset-eeeeeeeeeeee", "dataset", False),
    ]


def test_a_model_that_is_taken_in_twice_is_one_artifact(tmp_path):
    server = Server(set())
    use_inputs(wandb, server, [entry(name, "tiny-critic", "5" * 64) for name in ("generator", "critic", "judge")])
    assert server.used == [("model-555555555555", "model", False)]


def test_a_server_that_refuses_costs_the_graph_and_not_the_run(capsys):
    class Refusing:
        def use_artifact(self, what, type):
            raise wandb.errors.CommError("permission denied\nand more")

    use_inputs(wandb, Refusing(), [entry("policy", "a", "1" * 64), entry("data.text", "b", "2" * 64)])
    said = "".join(capsys.readouterr())
    assert said == "wandb: WARN inputs are not in the lineage graph: permission denied\n"


def test_kinds_and_names():
    assert kind_of(entry("data.prompts", "tiny:prompts", "1")) == "dataset"
    assert kind_of(entry("preference", "my.rewards:short", "1")) == "code"
    assert kind_of(entry("preference", "runs/x/reward/reward_model", "1")) == "model"
    assert name_of("model", "hub:org/name@main") == "model-hub-org-name-main"
