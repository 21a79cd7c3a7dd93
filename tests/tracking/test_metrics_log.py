"""metrics.jsonl: one whole object a logged step, also after an interruption."""

import json
import math

from align.tracking.local import MetricsLog, read_metrics


def written(tmp_path, *lines) -> MetricsLog:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step, metrics in lines:
        log.write(step, metrics)
    return log


def test_a_line_is_the_step_and_every_metric_under_its_own_name(tmp_path):
    log = written(tmp_path, (3, {"loss": 0.5, "rewards/chosen": -0.25}))
    assert log.path.read_text() == '{"step": 3, "loss": 0.5, "rewards/chosen": -0.25}\n'


def test_numbers_survive_without_rounding(tmp_path):
    log = written(tmp_path, (1, {"loss": 0.1 + 0.2}))
    assert read_metrics(log.path)[0]["loss"] == 0.1 + 0.2


def test_a_torn_last_line_is_left_out_and_gone_after_a_resume(tmp_path):
    log = written(tmp_path, (1, {"loss": 0.5}), (2, {"loss": 0.4}))
    whole = log.path.read_text()
    for cut in range(1, len('{"step": 2, "loss": 0.4}')):
        log.path.write_text(whole[: -1 - cut])
        assert [line["step"] for line in read_metrics(log.path)] == [1]
    log.keep([{"step": 1}, {"step": 2}])
    log.write(2, {"loss": 0.4})
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2]


def test_a_resume_forgets_what_its_checkpoint_does_not_know(tmp_path):
    lines = [
        (0, {"eval_loss": 1.0}),
        (1, {"loss": 0.9}),
        (2, {"loss": 0.8}),
        (2, {"eval_loss": 0.7}),
        (3, {"loss": 0.6}),
    ]
    log = written(tmp_path, *lines)
    log.keep([{"step": 0, "eval_loss": 1.0}, {"step": 1, "loss": 0.9}, {"step": 2, "loss": 0.8}])
    kept = [(line["step"], "eval_loss" in line) for line in read_metrics(log.path)]
    assert kept == [(0, True), (1, False), (2, False)]


def test_a_stage_that_starts_again_starts_an_empty_file(tmp_path):
    log = written(tmp_path, (1, {"loss": 0.5}))
    log.keep([])
    assert log.path.read_text() == ""


def test_a_file_that_is_not_there_has_no_lines(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_figure_that_is_no_number_is_null_in_the_file_and_nan_to_its_readers(tmp_path):
    metrics = {"loss": math.nan, "rewards": [1.0, math.inf], "parts": {"a": -math.inf, "b": 0.5}}
    log = written(tmp_path, (3, metrics))
    wanted = '{"step": 3, "loss": null, "rewards": [1.0, null], "parts": {"a": null, "b": 0.5}}\n'
    assert log.path.read_text() == wanted
    [line] = read_metrics(log.path)
    assert line["step"] == 3 and math.isnan(line["loss"])
    log.keep([{"step": 3, "loss": math.nan}])
    assert log.path.read_text() == wanted
