"""lm-eval's tasks as figures of a model, by its name of a task or by a YAML file of your own.

https://github.com/EleutherAI/lm-evaluation-harness. It puts prompts as its tasks write them, without a chat template,
and reads its data sets from the hub or, where `HF_HUB_OFFLINE=1` or a task says so, from this machine.
"""

import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.config.errors import UserError

WHERE = "stages.evaluate.lm_eval"
YAML = (".yaml", ".yml")
BOOTSTRAPS = 1000
"""For the standard errors that have no formula, such as that of a perplexity."""


def harness() -> ModuleType:
    """The module. Raises: UserError where it is not installed."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # of its bars there are several a task
    try:
        import lm_eval.tasks
    except ImportError as error:
        raise UserError(f"{WHERE}: lm-eval cannot be imported ({error}); pip install 'lm-eval>=0.4.13,<0.5'") from error
    for name in ("lm_eval", "lm_eval.evaluator"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return lm_eval


def is_file(task: str) -> bool:
    """Whether a task is named by its YAML file."""
    return Path(task).suffix in YAML


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises: UserError for a task that is not there, and without lm-eval."""
    names = [task for task in tasks if not is_file(task)]
    for task in tasks:
        if is_file(task) and not Path(task).is_file():
            raise UserError(f"{WHERE}: {task}: no such file")
    module = harness()
    known = module.tasks.TaskManager().all_tasks if names else []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"{WHERE}: lm-eval has no task {name}; {meant}`lm-eval ls tasks` lists them")


def version() -> str:
    """Of lm-eval, which decides its figures."""
    return metadata.version("lm-eval")


def task_figures(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, *, batch_size: int
) -> dict[str, Any]:
    """Task (of a group each of its tasks too) -> `count` and `metrics`: name -> `mean`, `stderr` (None where lm-eval
    has none) and `values` of each document, where the figure is their mean.

    Raises: UserError with lm-eval's own words if it cannot do the task, such as without its data set.
    """
    module = harness()
    from lm_eval.models.huggingface import HFLM

    manager = module.tasks.TaskManager(include_defaults=not is_file(task))
    training = model.training
    model.eval()
    try:
        found = module.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=[task],
            task_manager=manager,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=True,
        )
    # Tasks are YAML files with code of their own and data from anywhere: each may fail in its own way.
    except Exception as error:
        words = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{WHERE}: {task}: lm-eval says: {words}") from error
    finally:
        model.train(training)
    assert found is not None, "lm-eval gives its results to the first rank of a machine alone"
    samples = found.get("samples", {})
    return {name: _task(figures, samples.get(name, [])) for name, figures in found["results"].items()}


def _task(figures: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of names such as `acc,none` and `acc_stderr,none`; what follows the comma is how replies were filtered."""
    metrics: dict[str, Any] = {}
    for key, value in figures.items():
        metric, comma, how = key.partition(",")
        if not comma or metric.endswith("_stderr") or not _is_number(value):
            continue
        error = figures.get(f"{metric}_stderr,{how}")
        metrics[metric if how == "none" else f"{metric} ({how})"] = {
            "mean": float(value),
            "stderr": float(error) if _is_number(error) else None,
            "values": _values(samples, metric, how, float(value)),
        }
    return {"count": int(figures.get("sample_len") or len(samples)), "metrics": metrics}


def _values(samples: Sequence[Mapping[str, Any]], metric: str, how: str, mean: float) -> list[float]:
    """A number a document in order, or none where the figure is not their mean."""
    of_documents = {
        one["doc_id"]: float(one[metric])
        for one in samples
        if one.get("filter", how) == how and _is_number(one.get(metric))
    }
    values = [of_documents[place] for place in sorted(of_documents)]
    return values if values and abs(sum(values) / len(values) - mean) < 1e-6 else []


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and value == value
