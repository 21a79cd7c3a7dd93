"""lm-eval's tasks in the evaluate stage: with lm-eval itself where it is installed, else with a stand-in for it."""

import importlib.util
import json
import sys
import types
from functools import cache

import numpy as np
import pytest
import torch

from align.config.errors import UserError
from align.config.schema import ModelConfig
from align.generation import harness
from align.models.load import load_model, load_tokenizer
from tests.stages.test_evaluate import evaluated, numbers, stage

INSTALLED = importlib.util.find_spec("lm_eval") is not None
FEW = {"max_prompts": 1, "kl_prompts": 0, "max_pairs": 0, "max_texts": 0, "max_new_tokens": 4}
QUESTIONS = [
    {"question": f"Where is {name}?", "choices": [" at the mill", " in the wood", " by the well"], "right": n % 3}
    for n, name in enumerate(("Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus"))
]
TASK = """\
task: village
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: right
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def write_task(folder):
    rows = folder / "questions.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    task = folder / "village.yaml"
    task.write_text(TASK.format(file=rows))
    return task


@cache
def right_answers(name: str) -> list[float]:
    """Which questions a model gets right, by the sums of log-probabilities of plain forwards."""
    tokenizer = load_tokenizer(name, ModelConfig(), None)
    model = load_model(name, ModelConfig(), torch.float32, seed=0).eval()
    found = []
    for row in QUESTIONS:
        sums = []
        for choice in row["choices"]:
            start = tokenizer(row["question"], add_special_tokens=False)["input_ids"]
            whole = tokenizer(row["question"] + choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                rows = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            sums.append(sum(rows[at - 1, whole[at]].item() for at in range(len(start), len(whole))))
        found.append(float(int(np.argmax(sums)) == row["right"]))
    return found


def check(told: dict, task: str = "village") -> None:
    """The figures of both models and their change are those of plain forwards."""
    right = {name: right_answers(f"tiny-{name}") for name in ("base", "sft")}
    for name, values in right.items():
        figure = told["models"][name]["lm_eval"][task]
        assert figure["documents"] == len(QUESTIONS)
        assert figure["acc"]["mean"] == pytest.approx(np.mean(values))
        reach = 1.959964 * np.std(values, ddof=1) / np.sqrt(len(values))
        assert figure["acc"]["high"] - figure["acc"]["mean"] == pytest.approx(reach, abs=1e-6)
    change = told["models"]["sft"]["lm_eval"][task]["acc change"]
    assert change["mean"] == pytest.approx(np.mean(right["sft"]) - np.mean(right["base"]))
    assert "acc change" not in told["models"]["base"]["lm_eval"][task]


@pytest.mark.skipif(not INSTALLED, reason="needs lm-eval (pip install 'align-train[lm-eval]')")
def test_a_task_of_ones_own_gives_what_plain_forwards_give(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    task = write_task(tmp_path)
    folder = evaluated(tmp_path / "run", stage(lm_eval=[str(task)], **FEW))
    check(numbers(folder))
    page = (folder / "evaluate_report.html").read_text()
    assert "village" in page and "lm-eval" in page
    with pytest.raises(UserError, match=r"lm-eval has no task helaswag; did you mean hellaswag\?"):
        harness.check_tasks(["helaswag"])


@pytest.fixture
def stand_in(monkeypatch):
    """A module with what is used of lm-eval 0.4.13, whose model answers by plain forwards; calls are counted."""
    asked = []

    class HFLM:
        def __init__(self, pretrained, tokenizer, batch_size):
            assert not pretrained.training and batch_size == 8
            self.name = "sft" if pretrained.config.name_or_path.endswith("sft") else "base"

    class TaskManager:
        all_tasks = ["village", "hellaswag"]

        def __init__(self, include_defaults=True):
            self.include_defaults = include_defaults

    def simple_evaluate(*, model, tasks, task_manager, bootstrap_iters, log_samples):
        asked.append((model.name, *tasks))
        if tasks == ["hellaswag"]:
            raise ConnectionError("Couldn't reach 'Rowan/hellaswag' on the Hub\n(offline)")
        assert task_manager.include_defaults is False and log_samples
        right = right_answers(f"tiny-{model.name}")
        error = np.std(right, ddof=1) / np.sqrt(len(right))
        samples = [{"doc_id": n, "filter": "none", "acc": value} for n, value in enumerate(right)]
        told = {"name": "village", "alias": "village", "sample_len": len(right), "acc,none": float(np.mean(right))}
        told |= {"acc_stderr,none": float(error), "f1,none": 0.5, "f1_stderr,none": "N/A"}
        return {"results": {"village": told}, "samples": {"village": samples[::-1]}}

    modules = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.tasks", "lm_eval.models")}
    modules["lm_eval.models.huggingface"] = types.ModuleType("lm_eval.models.huggingface")
    modules["lm_eval"].tasks, modules["lm_eval"].simple_evaluate = modules["lm_eval.tasks"], simple_evaluate
    modules["lm_eval.tasks"].TaskManager, modules["lm_eval.models.huggingface"].HFLM = TaskManager, HFLM
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(harness, "version", lambda: "0.4.13")
    return asked


def test_its_figures_are_told_before_and_after_with_a_paired_change_and_kept(tmp_path, stand_in):
    task = write_task(tmp_path)
    folder = evaluated(tmp_path / "run", stage(lm_eval=[str(task)], **FEW))
    check(numbers(folder))
    assert numbers(folder)["models"]["sft"]["lm_eval"]["village"]["f1"] == {"mean": 0.5}
    assert len(stand_in) == 2
    evaluated(folder.parent, stage(lm_eval=[str(task)], **FEW))
    assert len(stand_in) == 2, "what is known was asked again"
    task.write_text(task.read_text() + "num_fewshot: 0\n")
    evaluated(folder.parent, stage(lm_eval=[str(task)], **FEW))
    assert len(stand_in) == 4, "another task under the same name was not asked"


def test_what_it_cannot_do_is_one_line(tmp_path, stand_in):
    with pytest.raises(UserError, match=r"lm_eval: hellaswag: lm-eval says: Couldn't reach .* \(offline\)$") as refusal:
        evaluated(tmp_path / "run", stage(lm_eval=["hellaswag"], **FEW))
    assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match=r"lm-eval has no task helaswag; did you mean hellaswag\?"):
        evaluated(tmp_path / "run", stage(lm_eval=["helaswag"], **FEW))
    with pytest.raises(UserError, match=r"mine\.yaml: no such file"):
        evaluated(tmp_path / "run", stage(lm_eval=["mine.yaml"], **FEW))


def test_without_it_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"stages\.evaluate\.lm_eval: .*pip install 'lm-eval>=0\.4\.13,<0\.5'"):
        evaluated(tmp_path / "run", stage(lm_eval=["hellaswag"], **FEW))
