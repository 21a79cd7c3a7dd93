"""The card beside the weights: facts, and no folder of this machine."""

import dataclasses
from pathlib import Path

import yaml

from align.artifacts import read_manifest
from align.tracking.model_card import licence_of, model_card, write_model_cards
from tests.tracking.runs_made import BASE, PAIRS, RUN_DIR, entry, hand_run, write_dpo, write_sft

HUB = "village/none-of-this-name"


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def card_of(run: Path, stage: str = "dpo", folder: str = "policy") -> str:
    return model_card(read_manifest(run / stage), folder, Path(RUN_DIR))


def test_a_card_has_data_by_digest_figures_settings_and_versions(tmp_path):
    card = card_of(hand_run(tmp_path / "run"))
    assert "# dpo/policy\n" in card and "direct preference optimization" in card
    assert "* starts from: `<run_dir>/sft/policy`\n" in card
    assert f"| data.preferences | `pairs.jsonl` | `{PAIRS}` |" in card
    assert "500 rows read, 500 trained on, 20 held out; dropped: none." in card
    assert "| held-out loss | 0.693 | 0.250 |" in card and "| reward accuracy | 50.0% | 90.0% |" in card
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])["stages"]["dpo"]["beta"] == 0.1
    assert "| torch | " in card


def test_what_was_dropped_is_counted_by_reason(tmp_path):
    write_sft(tmp_path / "run")
    assert "50 held out; dropped: 149 too_long, 1 empty." in card_of(tmp_path / "run", "sft")


def test_the_base_of_a_chain_is_the_model_that_its_first_stage_started_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hand_run(Path(RUN_DIR))
    assert "* base of the chain: `tiny-base`\n" in card_of(Path(RUN_DIR))


def test_the_licence_is_what_the_card_of_the_base_says_and_else_unknown(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for text, said in (
        ("---\nlicense: apache-2.0\n---\n# Base\n", "apache-2.0"),
        ("---\ntags: [x]\n---\n", "unknown"),
        ("---\n: : :\n- {\n---\n", "unknown"),
        ("no metadata", "unknown"),
    ):
        (base / "README.md").write_text(text)
        assert licence_of(str(base)) == said
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    write_sft(tmp_path / "run")
    manifest = read_manifest(tmp_path / "run" / "sft")
    manifest.inputs = [entry("policy", str(base), BASE)]
    card = model_card(manifest, "policy", tmp_path / "run")
    assert metadata(card) == {"license": "mit", "tags": ["align", "sft"]}
    assert licence_of(HUB) == "unknown"


def test_a_hub_id_is_named_as_the_base_model(tmp_path):
    write_sft(tmp_path / "run")
    manifest = read_manifest(tmp_path / "run" / "sft")
    manifest.inputs = [entry("policy", HUB, f"hub:{HUB}")]
    assert metadata(model_card(manifest, "policy", tmp_path))["base_model"] == HUB


def test_no_folder_of_this_machine_and_no_secret_is_in_a_card(tmp_path):
    key = "hf_" + "a1B2" * 9
    write_dpo(tmp_path / "run")
    manifest = read_manifest(tmp_path / "run" / "dpo")
    manifest.inputs = [entry("data.preferences", str(tmp_path / "secret place" / "pairs.jsonl"), PAIRS)]
    manifest.config["data"] = {"preferences": str(tmp_path / "secret place" / "pairs.jsonl"), "note": key}
    card = model_card(manifest, "policy", tmp_path / "run")
    assert str(tmp_path) not in card and "secret place" not in card and key not in card
    assert "preferences: pairs.jsonl" in card


def test_each_folder_of_weights_gets_its_own(tmp_path):
    write_sft(tmp_path / "run")
    manifest = dataclasses.replace(read_manifest(tmp_path / "run" / "sft"), stage="ppo")
    for name in ("policy", "value", "checkpoints"):
        (tmp_path / name).mkdir()
    write_model_cards(tmp_path, manifest, tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/README.md")) == [
        "policy/README.md",
        "value/README.md",
    ]
    assert "# ppo/value\n\nA value model" in (tmp_path / "value" / "README.md").read_text()
