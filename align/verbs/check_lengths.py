"""Lengths in tokens of the rows that training takes, and what its limit leaves out."""

from itertools import count
from typing import Any

import numpy as np

from align.data.encoded import answer_lengths, token_lengths
from align.data.fit import TOO_LONG
from align.data.prepare import Prepared
from align.data.report import RowReport

BINS = 40
MUCH_LOST = 0.05
"""Share of the answer tokens (of prompts: of the rows) lost to max_tokens from which it is a warning."""
ANSWERS = ("chosen", "rejected")


def lengths(prepared: Prepared) -> dict[str, dict[str, Any]]:
    """Column -> figures and a histogram, of each row that fits, held-out ones included.

    `row` is what max_tokens limits: a conversation, piece or prompt; of a pair, the prompt with its longer answer.
    """
    columns = [name for name in prepared.train.column_names if name.endswith("_ids")]
    found = {column.removesuffix("_ids"): _values(prepared, column) for column in columns}
    if "input" in found:
        found = {"row": found["input"]}
    elif "completion" in found:
        found["completion"], longest = _answers(prepared)
        found["row"] = found["prompt"] + longest
    elif "chosen" not in found:
        found = {"row": found["prompt"]}
    else:
        found["row"] = found["prompt"] + np.maximum(found["chosen"], found["rejected"])
    if not len(found["row"]):
        return {}
    # The two answers are drawn over each other, so they share their bins.
    answers = _bin_tokens(*(values for name, values in found.items() if name in ANSWERS))
    widths = {name: answers if name in ANSWERS else _bin_tokens(values) for name, values in found.items()}
    return {name: _figures(values, widths[name]) for name, values in found.items()}


def _answers(prepared: Prepared) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of every answer of prompts with several, and of each prompt's longest."""
    parts = [answer_lengths(part) for part in (prepared.train, prepared.held_out)]
    every, longest = zip(*parts, strict=True)
    return np.concatenate(every), np.concatenate(longest)


def _values(prepared: Prepared, column: str) -> np.ndarray:
    return np.concatenate([token_lengths(part, column) for part in (prepared.train, prepared.held_out)])


def _bin_tokens(*columns: np.ndarray) -> int:
    """A round width with which BINS bins hold all but the longest 1 %, which would squeeze the others."""
    top = max((np.percentile(values, 99, method="higher") for values in columns), default=0)
    smallest = (int(top) + 1) / BINS
    return next(width for power in count() for step in (1, 2, 5) if (width := step * 10**power) >= smallest)


def _figures(values: np.ndarray, width: int) -> dict[str, Any]:
    """`bins`: rows by tokens in steps of `bin_tokens` from 0; with `open_end` the last holds all longer rows."""
    middle, most, nearly_all = np.percentile(values, [50, 95, 99], method="higher").tolist()
    longest = int(values.max())
    figures = {"rows": len(values), "mean": round(float(values.mean()), 1), "p50": middle, "p95": most}
    return figures | {
        "p99": nearly_all,
        "max": longest,
        "bin_tokens": width,
        "bins": np.bincount(np.minimum(values // width, BINS)).tolist(),
        "open_end": longest // width >= BINS,
    }


def limit_cost(report: RowReport) -> dict[str, Any]:
    """What `max_tokens` leaves out: rows, and tokens that would have been trained on."""
    trained = report.tokens.get("trained", sum(report.tokens.get(side, 0) for side in (*ANSWERS, "completion")))
    rows, lost = report.dropped.get(TOO_LONG, 0), report.tokens_lost
    share_of_rows, share_of_tokens = rows / max(report.made, 1), lost / max(lost + trained, 1)
    # A prompt has no answer tokens to lose.
    much = (share_of_rows if report.slot == "prompts" else share_of_tokens) > MUCH_LOST
    return {
        "max_tokens": report.max_tokens,
        "rows": rows,
        "share_of_rows": share_of_rows,
        "tokens_lost": lost,
        "share_of_tokens": share_of_tokens,
        "level": "warn" if much else "info",
    }
