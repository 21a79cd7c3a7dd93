"""The table that ends a run, from made-up manifests."""

from pathlib import Path

from align.artifacts import Manifest
from align.config.schema import PeftMethod, RunConfig, WandbMode
from align.tracking.summary import summary

RUN_DIR = Path("runs/sft_dpo")
FIGURES = ("helpful_accuracy", "unsafe_complied", "refused_right_reason", "over_refused", "garbled")


def trained(stage: str, **changes) -> Manifest:
    rows = {"read": 2400, "kept": 2286, "held_out": 114, "dropped": {}}
    metrics = {"before/loss": 1.6969, "after/loss": 0.1442}
    if stage == "dpo":
        metrics |= {"before/rewards/accuracies": 0.5, "after/rewards/accuracies": 0.9125}
    given = {"rows": rows, "metrics": metrics, "steps": 120} | changes
    return Manifest(stage=stage, config={}, config_digest="", inputs=[], **given)


def evaluated() -> Manifest:
    metrics = {f"oracle/{model}/{name}": 0.1 * at for model in ("base", "dpo") for at, name in enumerate(FIGURES)}
    rows = {"read": 900, "kept": 192, "dropped": {}}
    return Manifest(stage="evaluate", config={}, config_digest="", inputs=[], rows=rows, metrics=metrics)


def config(**changes) -> RunConfig:
    chosen = RunConfig(name="sft_dpo", run=["sft", "dpo", "evaluate"], run_dir=str(RUN_DIR))
    chosen.data.preferences = "tiny:preferences"
    for name, value in changes.items():
        setattr(chosen, name, value)
    return chosen


def lines(manifests: list[Manifest], chosen: RunConfig | None = None) -> list[str]:
    return summary(chosen or config(), RUN_DIR, manifests).splitlines()


def test_each_trained_stage_has_a_row_with_what_went_in_and_how_it_went():
    text = lines([trained("sft"), trained("dpo")])
    sft, dpo = (next(line.split() for line in text if line.startswith(f"  {stage} ")) for stage in ("sft", "dpo"))
    assert sft == ["sft", "2,400", "2,286", "114", "0", "120", "1.697", "->", "0.144", "-"]
    assert dpo[-6:] == ["1.697", "->", "0.144", "50.0%", "->", "91.2%"]


def test_columns_end_where_their_headings_end():
    text = lines([trained("sft"), trained("dpo")])
    heading = next(at for at, line in enumerate(text) if "rows read" in line)
    for title, value in (("rows read", "2,400"), ("held out", "114"), ("steps", "120"), ("held-out loss", "0.144")):
        end = text[heading].index(title) + len(title)
        assert text[heading + 2][:end].endswith(value)


def test_nothing_is_wider_than_eighty_eight_columns():
    dropped = {
        "read": 1_234_567,
        "kept": 1_160_000,
        "held_out": 61_000,
        "dropped": {"too_long": 13_000, "duplicate": 567},
    }
    text = lines([trained("sft", rows=dropped), trained("dpo", rows=dropped), evaluated()])
    assert max(len(line) for line in text if not line.startswith("next")) <= 88


def test_dropped_rows_are_counted_by_reason_with_the_file_that_lists_them():
    rows = {"read": 100, "kept": 90, "held_out": 5, "dropped": {"too_long": 4, "empty_completion": 1}}
    text = lines([trained("dpo", rows=rows)])
    assert "  dpo dropped 4 too_long, 1 empty_completion: see runs/sft_dpo/dpo/bad_rows.jsonl" in text
    assert not any("dropped" in line and "sft dropped" in line for line in text)


def test_without_pairs_there_is_no_column_of_reward_accuracy():
    assert not any("reward accuracy" in line for line in lines([trained("sft")]))
    assert any("reward accuracy" in line for line in lines([trained("sft"), trained("dpo")]))


def test_a_stage_without_held_out_rows_shows_no_figures():
    row = next(line for line in lines([trained("sft", metrics={})]) if line.startswith("  sft "))
    assert row.split() == ["sft", "2,400", "2,286", "114", "0", "120", "-"]


def test_the_oracle_has_a_row_a_model_under_the_names_of_its_figures():
    text = lines([evaluated()])
    heading = next(line for line in text if line.startswith("  model"))
    assert heading.split("  ")[1:] == [
        "model", "helpful", "unsafe complied", "right reason", "over-refused", "garbled",
    ]  # fmt: skip
    row = next(line for line in text if line.startswith("  dpo"))
    assert row.split() == ["dpo", "0.0%", "10.0%", "20.0%", "30.0%", "40.0%"]
    assert any("192 held-out prompts" in line for line in text)


def test_it_ends_with_where_the_model_is_and_the_command_to_type_next():
    text = lines([trained("sft"), trained("dpo"), evaluated()])
    assert "model    runs/sft_dpo/dpo/policy" in text
    assert "samples  runs/sft_dpo/evaluate/samples.jsonl" in text
    assert text[-1].startswith("next     python -m align +recipe=sft_dpo model.path=<your model>")


def test_after_sft_comes_dpo_from_its_policy_on_the_same_data():
    assert lines([trained("sft")])[-1] == "next     python -m align +recipe=dpo model.path=runs/sft_dpo/sft/policy"
    own = config()
    own.data.preferences, own.data.format = "my pairs.jsonl", "hh_rlhf"
    expected = "model.path=runs/sft_dpo/sft/policy 'data.preferences=my pairs.jsonl' data.format=hh_rlhf"
    assert lines([trained("sft")], own)[-1] == f"next     python -m align +recipe=dpo {expected}"


def test_after_an_adapter_that_stays_one_comes_its_export_for_no_stage_trains_on_from_it():
    own, model = config(), "model.path=runs/sft_dpo/sft/policy"
    own.peft.method = PeftMethod.prefix
    expected = f"next     python -m align +recipe=export {model} stages.export.forms=[adapter]"
    assert lines([trained("sft")], own)[-1] == expected
    own.peft.method, own.peft.keep_adapter = PeftMethod.lora, True
    assert lines([trained("sft")], own)[-1] == f"next     python -m align +recipe=export {model}"


def test_a_model_of_ones_own_is_not_told_to_bring_a_model():
    own = config()
    own.model.path = "models/mine"
    assert "<your model>" not in lines([trained("dpo")], own)[-1]


def test_an_adapter_and_an_offline_wandb_run_are_pointed_to(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    chosen = config()
    chosen.peft.method = PeftMethod.lora
    chosen.log.wandb, chosen.log.mode = True, WandbMode.offline
    text = lines([trained("dpo")], chosen)
    assert "adapter  runs/sft_dpo/dpo/adapter" in text
    assert "wandb    wandb sync runs/sft_dpo/wandb/offline-run-*" in text
    assert not any(line.startswith(("adapter", "wandb")) for line in lines([trained("dpo")]))


def reinforced(**changes) -> Manifest:
    first = {"reward/score": -2.344, "kl/nats_per_completion": 0.0, "completion/tokens": 14.9}
    last = {"reward/score": 2.769, "kl/nats_per_completion": 1.47, "completion/tokens": 17.9}
    both = {"completion/unfinished": 0.0, "policy/entropy": 0.11}
    metrics = {f"first/{k}": v for k, v in (first | both).items()} | {f"last/{k}": v for k, v in (last | both).items()}
    given = {"metrics": metrics, "outputs": [{"path": "ppo_report.html"}]} | changes
    return trained("ppo", **given)


def test_ppo_says_what_became_of_its_completions_and_where_its_page_is():
    text = lines([trained("sft"), reinforced()], config(name="rlhf"))
    heading = next(at for at, line in enumerate(text) if "KL to the reference" in line)
    row = "ppo -2.34 -> +2.77 0.00 -> 1.47 nats 14.9 -> 17.9 0.0% -> 0.0% 0.110 -> 0.110"
    assert " ".join(text[heading + 2].split()) == row
    assert max(map(len, text[:-1])) <= 88
    assert "report   runs/sft_dpo/ppo/ppo_report.html" in text
    assert "+recipe=rlhf model.path=<your model>" in text[-1]


def test_ppo_counts_updates_as_its_settings_do():
    text = lines([trained("sft"), reinforced(steps=320, metrics=reinforced().metrics | {"updates": 20.0})])
    row = next(line for line in text if line.startswith("  ppo "))
    assert "20 updates" in row and "320" not in row
    assert "120" in next(line for line in text if line.startswith("  sft ")).split()
    assert max(map(len, text[:-1])) <= 88


def test_a_guard_that_stopped_ppo_is_named_only_then():
    stopped = reinforced(metrics=reinforced().metrics | {"stopped_by_guard": 1.0})
    assert any("stopped by a guard" in line for line in lines([stopped]))
    assert not any("stopped by a guard" in line for line in lines([reinforced()]))


def test_a_reward_model_is_followed_by_ppo_and_its_page_is_named_only_if_there_is_one():
    with_page = lines([trained("reward", outputs=[{"path": "reward_report.html"}])])
    model = "runs/sft_dpo/reward/reward_model"
    assert with_page[-1] == f"next     python -m align +recipe=ppo stages.ppo.rewards.preference.model={model}"
    assert "report   runs/sft_dpo/reward/reward_report.html" in with_page
    assert not any(line.startswith("report") for line in lines([trained("reward")]))
    own = config()
    own.model.path = "models/mine"
    following = lines([trained("reward")], own)[-1]
    assert following.endswith(f"{model} model.path=models/mine data.prompts=<your prompts.jsonl>")


def constitutional() -> Manifest:
    metrics = {
        "demonstrations/made": 829.0, "rounds/flaws": 302.0, "rounds/accepted": 180.0, "pairs/judged": 178.0,
        "pairs/position_gap": 0.0248, "refusals/initial": 0.0676, "refusals/targets": 0.275,
    }  # fmt: skip
    rows = {"read": 2400, "kept": 900, "held_out": 122, "dropped": {}}
    outputs = [{"path": "constitutional_report.html"}]
    return trained("constitutional", metrics=metrics, rows=rows, outputs=outputs, steps=0)


def test_constitutional_data_says_what_was_made_and_what_it_can_be_trained_with():
    text = lines([constitutional()], config(name="constitutional"))
    heading = next(at for at, line in enumerate(text) if "revised" in line)
    assert text[heading + 2].split()[1:] == ["900", "829", "302", "180", "178", "+0.02", "6.8%", "->", "27.5%"]
    assert max(map(len, text[:-1])) <= 88
    assert "data     runs/sft_dpo/constitutional" in text
    assert "report   runs/sft_dpo/constitutional/constitutional_report.html" in text
    made = "data.demonstrations=runs/sft_dpo/constitutional/demonstrations.jsonl"
    assert text[-1].startswith("next     python -m align +recipe=sft_dpo model.path=tiny-base ") and made in text[-1]
