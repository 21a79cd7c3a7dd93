"""The reward stage: a plain model with a head, centred on demonstrations, judged on held-out rows."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from align import cli
from align.artifacts import damaged_outputs, read_manifest
from align.config.schema import DataConfig, Layout, ModelConfig
from align.data.forest import Tree, lay_out_scores
from align.data.prepare import answered_prompts
from align.data.template import Template
from align.models.reward import centred_scores, load_reward_model

STEPS = ("stages.reward.max_steps=3", "stages.reward.statistics_rows=40")


def run(folder: Path, *arguments: str) -> int:
    return cli.main(["+recipe=reward", f"run_dir={folder}/run", f"cache_dir={folder}/cache", *STEPS, *arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    assert run(folder) == 0
    return folder / "run" / "reward"


def demonstrations(folder: Path) -> list[Tree]:
    template = Template(AutoTokenizer.from_pretrained(folder))
    found = answered_prompts(DataConfig(demonstrations="tiny:demonstrations"), template, 1024, 40)
    return [Tree(prompt, (answer,)) for prompt, answer in found]


def test_any_tool_loads_the_model_and_reads_the_same_scores(trained):
    trees = demonstrations(trained / "reward_model")
    batch = lay_out_scores(trees, Layout.padded, 0)
    with torch.no_grad():
        ours = load_reward_model(str(trained / "reward_model"), ModelConfig(), torch.float32, seed=0).eval()
        centred = centred_scores(ours, batch)
        plain = AutoModelForSequenceClassification.from_pretrained(trained / "reward_model").eval()
        theirs = torch.cat([plain(torch.tensor([[*t.prompt, *t.completions[0]]])).logits[0] for t in trees])
    assert torch.allclose(centred + plain.config.reward_centre, theirs, atol=1e-5)


def test_the_mean_score_of_demonstrations_is_the_centre(trained):
    trees = demonstrations(trained / "reward_model")
    model = load_reward_model(str(trained / "reward_model"), ModelConfig(), torch.float32, seed=0).eval()
    with torch.no_grad():
        scores = centred_scores(model, lay_out_scores(trees, Layout.padded, 0))
    assert abs(scores.mean().item()) < 1e-5
    assert scores.std(correction=0).item() == pytest.approx(model.config.reward_std, rel=1e-4)


def test_the_manifest_vouches_for_model_scores_and_page(trained):
    manifest = read_manifest(trained)
    assert damaged_outputs(trained, manifest) == []
    kept = {Path(output["path"]).parts[0] for output in manifest.outputs}
    assert kept == {"reward_model", "scores.json", "reward_report.html"}
    scores = json.loads((trained / "scores.json").read_text())
    assert manifest.metrics["judged/accuracy"] == scores["figures"]["accuracy"] == manifest.metrics["after/accuracy"]
    assert "<svg" in (trained / "reward_report.html").read_text()


def test_a_sample_of_scores_stands_beside_the_weights_and_the_manifest_vouches_for_it(trained):
    folder = trained / "reward_model"
    rows = json.loads((folder / "score_sample.json").read_text())["rows"]
    assert len(rows) == 8
    # From the short end of the rows, each of other tokens.
    assert len({(*row["prompt_ids"], -1, *row["completion_ids"]) for row in rows}) == 8
    model = load_reward_model(str(folder), ModelConfig(), torch.float32, seed=0).eval()
    trees = [Tree(row["prompt_ids"], (row["completion_ids"],)) for row in rows]
    with torch.no_grad():
        scores = centred_scores(model, lay_out_scores(trees, Layout.padded, 0))
    assert scores.tolist() == pytest.approx([row["score"] for row in rows], abs=1e-5)
    manifest = read_manifest(trained)
    assert "reward_model/score_sample.json" in {output["path"] for output in manifest.outputs}


def test_the_sample_of_a_bf16_run_is_of_the_weights_as_they_were_rounded(tmp_path):
    assert run(tmp_path, "precision=bf16", "stages.reward.max_steps=1") == 0
    folder = tmp_path / "run" / "reward" / "reward_model"
    assert load_file(folder / "model.safetensors")["score.weight"].dtype == torch.bfloat16
    row = json.loads((folder / "score_sample.json").read_text())["rows"][0]
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        score = model(torch.tensor([row["prompt_ids"] + row["completion_ids"]])).logits.item()
    assert row["score"] == pytest.approx(score - model.config.reward_centre, abs=1e-5)


def test_the_same_command_again_skips_and_another_demonstration_set_is_refused(trained, capsys):
    folder = trained.parents[1]
    assert run(folder) == 0
    assert "reward: complete, skipped" in capsys.readouterr().err
    assert run(folder, "data.demonstrations=tiny:preferences") == 2
    assert "data.demonstrations was tiny:demonstrations, is tiny:preferences" in capsys.readouterr().err


def test_an_adapter_trains_the_head_and_is_merged_with_it(tmp_path, capsys):
    assert run(tmp_path, "peft=lora", "stages.reward.learning_rate=1e-2") == 0
    stage = tmp_path / "run" / "reward"
    adapter = load_file(stage / "adapter" / "adapter_model.safetensors")
    merged = load_file(stage / "reward_model" / "model.safetensors")
    [head] = [tensor for name, tensor in adapter.items() if name.endswith("score.weight")]
    assert torch.equal(head.float(), merged["score.weight"].float())
    fresh = load_reward_model("tiny-sft", ModelConfig(), torch.float32, seed=7)
    assert not torch.equal(fresh.score.weight, merged["score.weight"])
    assert "reward_centre" in json.loads((stage / "reward_model" / "config.json").read_text())
    assert run(tmp_path, "peft=lora", "peft.keep_adapter=true", f"run_dir={tmp_path}/kept") == 2
    assert "a reward model is saved whole" in capsys.readouterr().err


def test_rankings_and_pairs_are_learnt_together(tmp_path, capsys):
    rows = [
        {"prompt": f"Question {n}?", "completions": ["Yes.", "No.", "Perhaps."], "ranks": [0, 1, 1]} for n in range(30)
    ]
    pairs = [{"prompt": f"Who is {n}?", "chosen": "I know.", "rejected": "Who cares."} for n in range(30)]
    for name, content in (("ranked", rows), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    sources = f"data.preferences=[{tmp_path}/ranked.jsonl,{tmp_path}/pairs.jsonl]"
    assert run(tmp_path, sources, "stages.reward.batch_size=8", "stages.reward.label_smoothing=0.1") == 0
    said = capsys.readouterr().err
    assert "label_smoothing is for pairs; " in said
    manifest = read_manifest(tmp_path / "run" / "reward")
    assert manifest.rows["read"] == 60
    assert manifest.metrics["after/loss"] < manifest.metrics["before/loss"]


def test_check_and_preview_know_rankings(tmp_path, capsys):
    answers = {"completions": ["Yes.", "No.", "Perhaps."], "ranks": [2, 0, 1]}
    rows = [{"prompt": f"Question {n}?", **answers} for n in range(30)]
    (tmp_path / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(tmp_path, f"data.preferences={tmp_path}/ranked.jsonl", "do=preview") == 0
    shown = capsys.readouterr().out
    assert shown.index("── chosen ──\n⟦No.") < shown.index("── rejected ──\n⟦Perhaps.") < shown.index("⟦Yes.")
    assert run(tmp_path, f"data.preferences={tmp_path}/ranked.jsonl", "do=check") == 0
    assert "completion" in capsys.readouterr().out


def test_a_file_is_scored_row_by_row_and_judged_by_subset(trained, tmp_path, capsys):
    rows = [{"prompt": "Why?", "chosen": "So.", "rejected": "No.", "subset": "easy"}] * 2
    rows += [{"prompt": "Who?", "completions": ["I.", "You.", "He."], "ranks": [0, 1, 1], "subset": "hard"}]
    rows += [
        {"prompt": "When?", "completion": "Now."},
        {"prompt": "Where?"},
        {"prompt": "Long?", "completion": "a " * 99},
    ]
    kinds = [rows[:2], rows[2:3], rows[3:4] + rows[5:], rows[4:5] * 30]
    for number, kind in enumerate(kinds):
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kind))
    arguments = [f"stages.score.reward_model={trained}/reward_model", "stages.score.max_tokens=64"]
    files = ",".join(f"{tmp_path}/{number}.jsonl" for number in range(3))
    assert cli.main(["+recipe=score", *arguments, f"run_dir={tmp_path}/run", f"data.demonstrations=[{files}]"]) == 0
    said = capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run/score/scores.jsonl").read_text().splitlines()]
    assert [len(line["scores"]) for line in lines] == [2, 2, 3, 1]
    assert lines[0]["scores"] == pytest.approx(lines[1]["scores"], abs=1e-5)
    figures = json.loads((tmp_path / "run/score/scores.json").read_text())
    assert (figures["pairs"], figures["subsets"]["easy"]["pairs"], figures["subsets"]["hard"]["pairs"]) == (4, 2, 2)
    right = sum(line["scores"][0] > score for line in lines[:3] for score in line["scores"][1:])
    assert figures["accuracy"] == right / 4
    assert "score: 5 rows: 4 scored, 1 left out (too_long 1)" in said
    other = [f"run_dir={tmp_path}/other", f"data.demonstrations={tmp_path}/3.jsonl"]
    assert cli.main(["+recipe=score", *arguments, *other]) == 2
    assert "30 of 30 rows cannot be used (no_answer 30)" in capsys.readouterr().err


def test_a_causal_model_scores_nothing(tmp_path, capsys):
    arguments = [f"run_dir={tmp_path}/run", "stages.score.reward_model=tiny-sft"]
    assert cli.main(["+recipe=score", *arguments]) == 2
    assert "tiny-sft: not a reward model, it has no score head" in capsys.readouterr().err


def test_demonstrations_that_changed_since_are_inputs_that_changed(tmp_path, capsys):
    file = tmp_path / "shown.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Who is {n}?", "completion": "I."}) + "\n" for n in range(9)))
    assert run(tmp_path, f"data.demonstrations={file}", "data=tiny") == 0
    file.write_text(json.dumps({"prompt": "Who?", "completion": "You."}) + "\n")
    assert run(tmp_path, f"data.demonstrations={file}", "data=tiny") == 2
    assert f"made from other inputs: {file} changed since" in capsys.readouterr().err


def test_scores_of_the_data_are_learnt_and_the_model_is_a_plain_one_that_knows_their_unit(tmp_path, capsys):
    rows = [
        {"prompt": f"Question {n}?", "completion": ["Yes", "No", "Hm"][n % 3] + f" {n}.", "score": n % 3}
        for n in range(60)
    ]
    bare = [{"prompt": f"Who is {n}?", "chosen": "I.", "rejected": "You."} for n in range(9)]
    for name, content in (("rated", rows), ("bare", bare)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    sources = [f"data.preferences=[{tmp_path}/rated.jsonl,{tmp_path}/bare.jsonl]", "data.held_out_fraction=0.3"]
    assert run(tmp_path, *sources, "stages.reward.objective=ordinal", "stages.reward.learning_rate=1e-3") == 0
    assert "9 left out (no_score 9)" in capsys.readouterr().err
    stage = tmp_path / "run" / "reward"
    config = json.loads((stage / "reward_model" / "config.json").read_text())
    assert config["reward_ratings"]["levels"] == [0, 1, 2]
    assert not any("cuts" in name for name in load_file(stage / "reward_model" / "model.safetensors"))
    manifest = read_manifest(stage)
    assert damaged_outputs(stage, manifest) == []
    figures = json.loads((stage / "scores.json").read_text())["figures"]
    assert manifest.metrics["after/rating/rmse"] == pytest.approx(figures["rating_rmse"], rel=1e-4)
    assert figures["rated"] == manifest.rows["held_out"]
