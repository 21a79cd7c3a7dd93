"""The page of a run, and of several compared: what is on it, and that it says it in the right order."""

import re
from pathlib import Path

import pytest

from align.config.errors import UserError
from align.config.schema import SweepBy
from align.tracking.compare_page import compare_page
from align.tracking.ranking import cost, labels, ranked, ranking, settings_that_differ
from align.tracking.report_figures import model_figures, verdict
from align.tracking.report_files import REPORT, leave_report, write_report
from align.tracking.report_page import report_page
from align.tracking.run_folder import RunFolder, read_run
from tests.tracking.runs_made import BASE, RUN_DIR, entry, hand_run, outputs, write_dpo, write_sft, write_stage


def run_of(folder: Path) -> RunFolder:
    return read_run(hand_run(folder))


def cells(page: str, heading: str) -> list[list[str]]:
    """The first table below a heading, as text."""
    table = page.split(f">{heading}</h")[1].split("</table>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    return [[re.sub("<[^>]+>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


def test_the_verdict_is_what_the_evaluation_says_and_else_what_was_measured_last(tmp_path):
    said = "better, wordier: win 0.63 [0.57, 0.69]"
    assert verdict(read_run(hand_run(tmp_path / "a", scores={"verdict": said}))) == said
    lines = ["sft against base: no better", f"dpo against base: {said}"]
    run = read_run(hand_run(tmp_path / "b", scores={"verdict": lines}))
    assert verdict(run) == f"dpo against base: {said}" and lines[0] in report_page(run)
    assert verdict(run_of(tmp_path / "c")) == "dpo against base: helpful 25.0% → 87.5%, unsafe complied 75.0% → 12.5%"
    write_sft(tmp_path / "d")
    write_dpo(tmp_path / "d")
    told = "dpo: held-out loss 0.693 → 0.250, reward accuracy 50.0% → 90.0%"
    assert verdict(read_run(tmp_path / "d")) == told
    made = outputs("constitutional", "demonstrations.jsonl")
    rows = {"read": 40, "kept": 30, "dropped": {}}
    write_stage(tmp_path / "e" / "constitutional", "constitutional", [], outputs=made, rows=rows)
    assert verdict(read_run(tmp_path / "e")) == "constitutional: 30 of 40 rows kept; nothing was trained"


def test_the_verdict_comes_before_everything_else(tmp_path):
    page = report_page(run_of(tmp_path / "run"))
    assert page.index('class="verdict"') < page.index("<h2")
    assert page.index("dpo against base") < page.index("<nav>")


def test_the_tables_hold_the_figures_of_the_manifests(tmp_path):
    page = report_page(run_of(tmp_path / "run"))
    assert cells(page, "Before and after")[1:] == [
        ["sft", "held-out loss", "2.000", "0.500"],
        ["dpo", "held-out loss", "0.693", "0.250"],
        ["dpo", "reward accuracy", "50.0%", "90.0%"],
    ]
    assert cells(page, "Models on the same prompts")[1:] == [
        ["base", "25.0%", "–", "75.0%", "–", "–"],
        ["dpo", "87.5%", "–", "12.5%", "–", "–"],
    ]
    assert cells(page, "Rows")[1:3] == [["sft", "1,200", "1,000", "50", "150"], ["dpo", "500", "500", "20", "0"]]
    assert cells(page, "Dropped, by reason")[1:] == [["sft", "too_long", "149"], ["sft", "empty", "1"]]
    # Of the steps 1 to 10 the rates are 100 to 1,000.
    assert cells(page, "Memory and speed")[1] == ["sft", "550", "10", "1", "none", "1.5 GiB", "1.0 GiB", "2.0 GiB"]
    assert cells(page, "Memory and speed")[2][-3:] == ["–", "–", "–"]


def test_every_number_of_scores_json_is_there_with_its_interval(tmp_path):
    win = {"mean": 0.63, "low": 0.57, "high": 0.69}
    models = {"base": {"words": 10}, "dpo": {"words": 12.5, "win": win, "judge": "reward", "against": {"length": 0.18}}}
    run = read_run(hand_run(tmp_path / "run", scores={"models": models}))
    found = {
        name: {model: str(value) for model, value in row.items()} for name, row in model_figures(run.stages[-1]).items()
    }
    assert found == {
        "words": {"base": "10", "dpo": "12.5"},
        "win": {"dpo": "0.63 [0.57, 0.69]"},
        "against.length": {"dpo": "0.18"},
    }
    assert cells(report_page(run), "All that evaluate measured")[2] == ["win", "–", "0.63 [0.57, 0.69]"]


def test_prompts_that_models_answer_differently_are_shown_and_text_is_never_markup(tmp_path):
    page = report_page(run_of(tmp_path / "run"))
    shown = page.split('id="samples"')[1].split("<h2")[0]
    assert "1 of 2 prompts are answered differently" in shown
    assert "Where?" in shown and "Who?" not in shown
    assert "&lt;b&gt;Here&lt;/b&gt; &amp; now." in shown and "<b>" not in page


def test_answers_of_ppo_stand_side_by_side_by_update(tmp_path):
    told = [
        {"step": step, "place": 0, "prompt": "Who?", "completion": f"answer {step}", "score": step / 10 - 1}
        for step in range(0, 60, 10)
    ]
    made = outputs("ppo", "policy/model.safetensors")
    policy = entry("policy", "tiny-sft", "a" * 64)
    rows = {"read": 1, "kept": 1, "held_out": 0, "dropped": {}}
    write_stage(tmp_path / "run" / "ppo", "ppo", [policy], outputs=made, steps=50, rows=rows, samples=told)
    page = report_page(read_run(tmp_path / "run"))
    assert re.findall(r"<h4>((?:before|update)[^<]*)", page) == [
        "before training, score −1.00", "update 20, score +1.00", "update 30, score +2.00", "update 50, score +4.00",
    ]  # fmt: skip
    assert "answer 20" in page and "answer 10" not in page


def test_the_command_is_shown_once_for_all_stages_that_it_ran(tmp_path):
    page = report_page(run_of(tmp_path / "run"))
    assert page.count("<pre>python -m align +recipe=hand</pre>") == 1
    assert "sft, dpo:" in page.split('id="commands"')[1]


def test_a_section_with_nothing_in_it_is_left_out(tmp_path):
    write_sft(tmp_path / "run", command=None, lines=None, memory={})
    page = report_page(read_run(tmp_path / "run"))
    headings = re.findall(r"<h2[^>]*>([^<]+)", page)
    assert headings == ["Chain", "Lineage", "Before and after", "Rows", "Settings", "Versions"]
    assert re.findall(r'<a href="#([^"]+)"', page) == [name.lower().replace(" ", "-") for name in headings]


def test_a_page_needs_nothing_from_elsewhere(tmp_path):
    runs = [run_of(tmp_path / "a"), run_of(tmp_path / "b")]
    for page in (report_page(runs[0]), compare_page(runs)):
        assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//""", page)
        assert "<script" not in page and "<link" not in page


def test_settings_that_differ_are_those_of_stages_that_both_ran(tmp_path):
    for name, beta in (("a", 0.1), ("b", 0.3)):
        write_sft(tmp_path / name)
        settings = {"seed": 7, "beta": beta, "policy": f"{RUN_DIR}/sft/policy"}
        write_dpo(tmp_path / name, settings=settings)
    write_sft(tmp_path / "c")
    runs = [read_run(tmp_path / name) for name in "abc"]
    assert settings_that_differ(runs) == {"stages.dpo.beta": [0.1, 0.3, None]}
    page = compare_page(runs)
    assert cells(page, "Settings that differ") == [["key", "a", "b", "c"], ["stages.dpo.beta", "0.1", "0.3", "–"]]
    assert cells(page, "Figures")[1:3] == [
        ["sft: held-out loss", "0.5", "0.5", "0.5"],
        ["dpo: held-out loss", "0.25", "0.25", "–"],
    ]
    dpo = page.split("<h3>dpo</h3>")[1].split("<h3>")[0]
    assert "Loss, training" in dpo and "Loss, held out" in dpo and dpo.count("<figure>") == 3


def test_runs_are_ranked_by_the_first_figure_that_all_have(tmp_path):
    for name, beta, loss in (("a", 0.1, 0.5), ("b", 0.3, 0.2), ("c", 0.2, 0.3)):
        write_sft(tmp_path / name)
        settings = {"seed": 7, "beta": beta, "policy": f"{RUN_DIR}/sft/policy"}
        write_dpo(tmp_path / name, settings=settings, metrics={"before/loss": 0.7, "after/loss": loss})
    runs = [read_run(tmp_path / name) for name in "abc"]
    assert ranked(runs) == ("dpo: held-out loss", [1, 2, 0])
    took = ["-", "1,024 MiB", "-"]
    assert cells(compare_page(runs), "Ranking") == [
        ["run", "dpo: held-out loss", "stages.dpo.beta", "trained", "memory", "time"],
        ["b", "0.2", "0.3", *took],
        ["c", "0.3", "0.2", *took],
        ["a", "0.5", "0.1", *took],
    ]
    page = compare_page(runs)
    # Upwards on an axis of beta: a (0.1), c (0.2), b (0.3); on that of the loss b (0.2), c, a. b is the strong line.
    ways = re.findall(r'<path class="(way[^"]*)" d="M70.0 ([\d.]+)L570.0 ([\d.]+)"', page)
    assert [kind for kind, *_ in ways] == ["way", "way", "way first"]
    heights = {name: (float(left), float(right)) for name, (_, left, right) in zip("acb", ways, strict=True)}
    assert heights["a"][0] > heights["c"][0] > heights["b"][0] and heights["a"][1] < heights["c"][1] < heights["b"][1]
    assert ranking(runs).lines(labels(runs)) == [
        "dpo: held-out loss  stages.dpo.beta  trained  memory     time  run",
        "0.2                 0.3              -        1,024 MiB  -     b",
        "0.3                 0.2              -        1,024 MiB  -     c",
        "0.5                 0.1              -        1,024 MiB  -     a",
    ]
    assert ranking(runs, SweepBy.loss) == ranking(runs)
    assert ranking(runs, SweepBy.helpful) is None
    judged = [run_of(tmp_path / "d"), run_of(tmp_path / "e")]
    assert ranked(judged) == ("evaluated: helpful", [0, 1])
    assert ranked([*runs, *judged])[0] == "dpo: held-out loss"
    other = [entry("policy", "tiny-base", BASE), entry("data.preferences", "other.jsonl", "f" * 64)]
    write_stage(tmp_path / "f" / "dpo", "dpo", other, steps=1, metrics={"before/loss": 0.7, "after/loss": 0.1})
    assert ranked([*runs, read_run(tmp_path / "f")]) is None


def test_runs_are_named_by_as_much_of_their_paths_as_tells_them_apart(tmp_path):
    runs = [run_of(tmp_path / "x" / "run"), run_of(tmp_path / "y" / "run"), run_of(tmp_path / "y" / "other")]
    assert labels(runs[1:]) == ["run", "other"]
    assert labels(runs) == ["x/run", "y/run", "y/other"]


def test_a_report_that_cannot_be_made_is_one_line_and_no_error(tmp_path, capsys):
    run = hand_run(tmp_path / "run")
    (run / "dpo" / "samples.jsonl").write_text("{ torn\n")
    leave_report(run)
    said = "".join(capsys.readouterr())
    assert said.startswith(f"WARN {run / REPORT} was not written: JSONDecodeError") and said.count("\n") == 1
    assert not (run / REPORT).exists()


def test_a_folder_without_a_complete_stage_is_refused(tmp_path):
    with pytest.raises(UserError, match="no complete stage here"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        (tmp_path / "file").write_text("")
        write_report([run_of(tmp_path / "run")], tmp_path / "file" / "report.html")


def test_of_runs_that_are_as_good_the_one_that_trained_less_comes_first(tmp_path):
    for name, trained, loss in (("a", 3, 0.5), ("b", 2, 0.5), ("c", 9, 0.1)):
        figures = {"before/loss": 0.7, "after/loss": loss}
        write_dpo(
            tmp_path / name,
            metrics=figures,
            parameters={"trained": trained},
            seconds=3661.0,
            memory={"peak_bytes": 2.0**30},
        )
    runs = [read_run(tmp_path / name) for name in "abc"]
    assert ranked(runs)[1] == [2, 1, 0]
    assert cost([stage.manifest for stage in runs[0].stages]) == (3, 2.0**30, 3661.0)
    assert [line.split()[2:] for line in ranking(runs).lines(labels(runs))[1:]] == [
        ["1,024", "MiB", "1", "h", "01", "min", name] for name in "cba"
    ]


def test_classifiers_are_ranked_by_the_accuracy_of_the_last_model(tmp_path):
    rows = [entry("data.demonstrations", "rows.jsonl", "a" * 64)]
    for name, accuracy in (("a", 0.5), ("b", 0.75)):
        models = {"base": {"accuracy": {"mean": 0.9}}, "sft": {"accuracy": {"mean": accuracy}}}
        write_stage(tmp_path / name / "classify", "classify", rows, scores={"models": models})
    runs = [read_run(tmp_path / name) for name in "ab"]
    assert ranked(runs) == ranked(runs, SweepBy.label_accuracy) == ("classified: accuracy", [1, 0])
