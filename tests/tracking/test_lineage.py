"""From the last model back to rows and base, along digests."""

import json
from pathlib import Path

from align.artifacts import digest_model, digest_of_output
from align.tracking.lineage import lineage, tree_text
from align.tracking.run_folder import read_run
from tests.tracking.runs_made import (
    RUN_DIR,
    entry,
    hand_run,
    outputs,
    policy_digest,
    write_dpo,
    write_sft,
    write_stage,
)


def tree(run: Path) -> list[str]:
    return tree_text(lineage(read_run(run))).split("\n")


def test_a_policy_is_followed_back_to_rows_and_base_wherever_the_folder_lies_now(tmp_path):
    sft, dpo = policy_digest("sft")[:12], policy_digest("dpo")[:12]
    assert tree(hand_run(tmp_path / "moved")) == [
        f"dpo/policy  {dpo}  (dpo, 500 rows, 20 steps)",
        f"├─ policy: sft/policy  {sft}  (sft, 1,000 rows, 10 steps)",
        "│  ├─ policy: tiny-base  bbbbbbbbbbbb",
        "│  └─ data.demonstrations: rows.jsonl  dddddddddddd",
        "└─ data.preferences: pairs.jsonl  eeeeeeeeeeee",
    ]


def test_a_stage_that_was_made_anew_since_is_said_and_not_followed(tmp_path):
    run = hand_run(tmp_path / "run")
    path = run / "sft" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["outputs"] = outputs("another sft", "policy/model.safetensors")
    path.write_text(json.dumps(manifest))
    assert tree(run)[1] == f"├─ policy: sft/policy  {policy_digest('sft')[:12]}  ! sft was made anew since"
    assert not any("tiny-base" in line for line in tree(run))


def test_what_was_said_above_is_not_said_again(tmp_path):
    run = tmp_path / "run"
    write_sft(run)
    write_dpo(run)
    policy = entry("policy", f"{RUN_DIR}/dpo/policy", policy_digest("dpo"))
    reference = entry("reference", f"{RUN_DIR}/sft/policy", policy_digest("sft"))
    made = outputs("ppo", "policy/model.safetensors", "value/model.safetensors")
    write_stage(run / "ppo", "ppo", [policy, reference], outputs=made, steps=3, rows={"kept": 9})
    lines = tree(run)
    assert lines[0].startswith("ppo/policy") and lines[-1].startswith("└─ reference: sft/policy")
    assert lines[-1].endswith("(above)")
    assert sum("tiny-base" in line for line in lines) == 1


def test_a_model_of_another_run_is_followed_into_it_while_it_lies_there(tmp_path, monkeypatch):
    write_sft(tmp_path / "runs" / "hand")
    write_dpo(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert "│  ├─ policy: tiny-base  bbbbbbbbbbbb" in tree(Path("mine"))


def test_stages_come_in_the_order_in_which_one_takes_from_another_whatever_the_clock_said(tmp_path):
    run = tmp_path / "run"
    write_dpo(run)
    write_sft(run)
    assert [stage.name for stage in read_run(run).stages] == ["sft", "dpo"]


def test_a_card_beside_the_weights_makes_no_other_model(tmp_path):
    made = outputs("sft", "policy/config.json", "policy/README.md")
    assert digest_of_output(made, "policy") == digest_of_output(made[:1], "policy")
    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    bare = digest_model(folder)
    (folder / "README.md").write_text("facts")
    assert digest_model(folder) == bare
