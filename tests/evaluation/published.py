"""Published verdicts and labels, as the tests want them."""

import csv
import json

import numpy as np
import pytest

from align.evaluation.refusals import Reply
from align.evaluation.verdicts import TwoOrders

LABELS = {
    "1_full_compliance": Reply.complies,
    "2_full_refusal": Reply.refuses,
    "3_partial_refusal": Reply.partly_refuses,
}


def folder_of(real_data, name):
    found = real_data / name
    if not found.is_dir():
        pytest.skip(f"no {found}; name a folder with it in ALIGN_REAL_DATA")
    return found


def llmbar(real_data, judge, what):
    folder = folder_of(real_data, "llmbar")
    return json.loads((folder / f"Dataset__LLMBar__Natural__evaluators__{judge}__Vanilla__{what}.json").read_text())


def llmbar_orders(real_data, judge):
    """A judge's verdicts in both orders; `winner` names the reply by its number in the row, also where swapped."""
    results = [row["results"][0] for row in llmbar(real_data, judge, "result")]
    as_given = np.array([float(one["swap = False"]["winner"] == "1") for one in results])
    # Shown the other way round, the first slot holds the second reply.
    swapped = np.array([float(one["swap = True"]["winner"] == "2") for one in results])
    return TwoOrders(as_given, swapped)


def llmbar_truth(real_data):
    """(1 where the first output is the better one, how many words it is longer)."""
    rows = llmbar(real_data, "GPT-4", "result")
    better = np.array([float(row["label"] == 1) for row in rows])
    return better, np.array([float(words(row["output_1"]) - words(row["output_2"])) for row in rows])


def words(text):
    return len(text.split())


def pandalm(real_data, name="testset-v1"):
    return json.loads((folder_of(real_data, "pandalm_testset") / f"{name}.json").read_text())


def xstest(real_data, model):
    with open(folder_of(real_data, "xstest") / f"xstest_v2_completions_{model}.csv", newline="") as file:
        return list(csv.DictReader(file))
