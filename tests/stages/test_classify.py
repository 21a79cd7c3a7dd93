"""+recipe=classify: label words as completions, judged on rows SFT has not seen, beside the base with examples."""

import json
from pathlib import Path

import pytest

from align import cli
from align.artifacts import read_json
from align.config.schema import ClassifyStage, ModelConfig
from align.config.store import compose_run
from align.data.prepare import prepare_demonstrations
from align.data.records import Demonstration, Message
from align.data.template import Template
from align.evaluation.classification import classified
from align.models.load import load_tokenizer
from align.stages.classify import labelled, shots
from tests.launching import slow
from tests.stages.runs import COLOURS, THINGS


def write_rows(folder: Path, extra: str = "") -> Path:
    """80 rows: a plain rule tells the two labels apart."""
    file = folder / "rows.jsonl"
    with open(file, "w", encoding="utf-8") as out:
        for thing in THINGS:
            for at in range(10):
                hot = at % 2
                text = f"The {thing} of villager {at} is {'red' if hot else COLOURS[3]}."
                out.write(json.dumps({"text": text, "label": "hot" if hot else "cold"}) + "\n")
        out.write(extra)
    return file


def classify(folder: Path, *settings: str) -> int:
    own = [f"run_dir={folder}/run", f"cache_dir={folder}/cache", "precision=fp32", "data.held_out_fraction=0.3"]
    return cli.main(["+recipe=classify", f"data.demonstrations={folder}/rows.jsonl", *own, *settings])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("classify")
    write_rows(folder)
    short = ("stages.sft.max_steps=40", "stages.sft.batch_size=1", "stages.sft.max_tokens=256")
    rest = ("stages.sft.learning_rate=2e-3", "stages.classify.few_shot=2", "stages.classify.resamples=200")
    assert classify(folder, *short, *rest) == 0
    return folder / "run"


def test_a_rule_is_learnt_and_the_base_with_examples_stands_beside(run_dir):
    scores = read_json(run_dir / "classify/scores.json")
    assert scores["labels"] == ["cold", "hot"] and list(scores["models"]) == ["base", "base few-shot", "sft"]
    assert scores["models"]["sft"]["accuracy"]["mean"] > 0.9
    assert scores["models"]["sft"]["macro_f1"] > scores["models"]["base few-shot"]["macro_f1"]
    assert scores["verdict"][0].startswith("sft against base few-shot: accuracy ")
    assert scores["models"]["sft"]["accuracy_change"]["low"] > 0


def test_figures_are_those_of_the_predictions(run_dir):
    scores = read_json(run_dir / "classify/scores.json")
    lines = [json.loads(line) for line in (run_dir / "classify/predictions.jsonl").read_text().splitlines()]
    assert len(lines) == scores["rows"] > 10
    for name, one in scores["models"].items():
        guessed = [line["guessed"][name] for line in lines]
        found = classified(scores["labels"], [line["label"] for line in lines], guessed, draws=200)
        assert (found.confusion, found.macro_f1) == (one["confusion"], pytest.approx(one["macro_f1"]))
        assert sum(map(sum, one["confusion"])) == scores["rows"]


def test_the_judged_rows_are_those_that_sft_held_out(run_dir):
    judged = [json.loads(line)["text"] for line in (run_dir / "classify/predictions.jsonl").read_text().splitlines()]
    config = compose_run(["+recipe=classify", f"data.demonstrations={run_dir.parent}/rows.jsonl"]).config
    config.data.held_out_fraction = 0.3
    template = Template(load_tokenizer("tiny-base", ModelConfig(), None))
    held_out = prepare_demonstrations(config.data, template, 512, None).held_out
    texts = {template.tokenizer.decode(row["input_ids"]) for row in held_out}
    assert len(texts) == len(judged)
    assert all(any(text in whole for whole in texts) for text in judged)


def test_the_page_shows_accuracy_and_a_confusion_table_of_each_model(run_dir):
    page = (run_dir / "report.html").read_text()
    assert "sft against base few-shot: accuracy" in page and "macro-F1" in page
    assert page.count("true label down, given label across") == 3


def rows_of(*pairs: tuple[str, str]) -> list[Demonstration]:
    return [Demonstration((Message("user", text), Message("assistant", label))) for text, label in pairs]


def test_examples_are_as_many_of_each_label_and_none_is_held_out():
    rows = rows_of(*((f"text {i}", "a" if i % 5 else "b") for i in range(60)))
    found = labelled(ClassifyStage(models={"base": "x"}), rows, 0.3)
    turns = shots(found, 3)
    assert [turn.content for turn in turns[1::2]] == ["a", "b"] * 3
    asked = {turn.content for turn in turns[::2]}
    assert len(asked) == 6 and not asked & {row.messages[0].content for row in found.held_out}


@pytest.mark.parametrize(
    ("extra", "settings", "said"),
    [
        ("", ("stages.classify.baseline=nobody",), "stages.classify.baseline=nobody is none of stages.classify.models"),
        ("", ("stages.classify.labels=[hot,hot]",), "a label is there twice"),
        ("", ("stages.classify.labels=[hot]",), "the only label is hot; there is nothing to tell"),
        ("", ("stages.classify.few_shot=99",), "stages.classify.few_shot=99: only "),
        ("", ("data.held_out_fraction=0",), "no row is held out to be labelled; raise data.held_out_fraction"),
        ('{"text": "Odd.", "label": "hotter"}\n', (), "the label 'hot' is the beginning of 'hotter'"),
        (
            "".join(f'{{"text": "T{i}", "label": "L{i}x"}}\n' for i in range(300)),
            (),
            "different answers in 380 rows are no",
        ),
        ("", ("stages.classify.max_row=3",), "did you mean stages.classify.max_rows=3?"),
    ],
)
def test_what_cannot_be_judged_is_one_line(tmp_path, capsys, extra, settings, said):
    write_rows(tmp_path, extra)
    assert classify(tmp_path, "run=[classify]", "stages.classify.models={sft: tiny-sft}", *settings) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@slow
@pytest.mark.timeout(600)
def test_the_embedded_labels_are_learnt_far_beyond_the_base_with_examples(tmp_path):
    assert cli.main(["+recipe=classify", f"run_dir={tmp_path}/run", f"cache_dir={tmp_path}/cache"]) == 0
    models = read_json(tmp_path / "run/classify/scores.json")["models"]
    assert models["sft"]["accuracy"]["low"] > 0.8 > models["base few-shot"]["accuracy"]["high"]
