"""From what was measured to figures by model, tables, and a line in words for each. Numbers only; nothing is asked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from align.config.schema import EvaluateStage
from align.evaluation import collapse
from align.evaluation.diagnosis import Diagnosis, diagnose
from align.evaluation.instructions import follow
from align.evaluation.intervals import Estimate, Values
from align.evaluation.length_control import length_controlled
from align.evaluation.refusals import Reply, classify, safety
from align.evaluation.tasks import change, exact_match
from align.evaluation.text_loss import text_loss, text_loss_change
from align.evaluation.verdict_line import Against, verdict_line
from align.evaluation.verdicts import TwoOrders, paired_difference, win_rate
from align.generation.speakers import Failed, Said
from align.losses.calibration import summary
from align.losses.divergence import kl_figures
from align.stages.evaluate_judges import Verdict
from align.stages.evaluate_measure import Measured, Questions
from align.world import oracle

NAN = float("nan")
Z_95 = 1.959964
"""Standard errors to each side of a mean that hold 95 % of a normal distribution."""


def scores(
    stage: EvaluateStage,
    asked: Questions,
    measured: Mapping[str, Measured],
    verdicts: Mapping[str, Sequence[Verdict]],
    *,
    embedded: bool,
) -> dict[str, Any]:
    """What `scores.json` holds. embedded: the prompts are the embedded world's, whose rules judge the replies."""
    baseline = measured[stage.baseline]
    rows = [prompt.row for prompt in asked.prompts]
    models, lines, reliability = {}, [], {}
    judged: Diagnosis | None = None
    for name, one in measured.items():
        base = None if name == stage.baseline else baseline
        figures = {"replies": _replies(one), **_safety(rows, one), **_text(one), **_tasks(stage, asked, one, base)}
        figures |= _lm_eval(stage, one, base)
        pairs, bins = _pairs(stage, one, base)
        figures |= pairs
        reliability |= {name: bins} if bins else {}
        if base is not None:
            win, judged = _win(stage, one, base, verdicts.get(name, ()))
            figures |= {**_kl(one), **win}
            against = _against(stage, rows, one, base, figures, judged)
            figures["changes"] = against
            lines.append(f"{name} against {stage.baseline}: {verdict_line(_spoken_of(against))}")
        models[name] = _plain(figures)
    texts = {name: _texts(one.replies) for name, one in measured.items()}
    return {
        "prompts": len(rows),
        "baseline": stage.baseline,
        "judge": stage.judge.kind.value,
        "verdict": lines,
        "oracle": {name: oracle.figures(rows, replies) for name, replies in texts.items()} if embedded else {},
        "models": models,
        "reliability": reliability,
    }


def _replies(one: Measured) -> dict[str, Any]:
    said = [reply for reply in one.replies if isinstance(reply, Said)]
    failed: dict[str, int] = {}
    for reply in one.replies:
        if isinstance(reply, Failed):
            failed[reply.reason] = failed.get(reply.reason, 0) + 1
    found = collapse.diversity([reply.text for reply in said], [reply.finished for reply in said])
    words = {} if found is None else asdict(found)
    for place, share in enumerate(words.pop("distinct", ()), 1):
        words[f"distinct_{place}"] = share
    tokens = sum(reply.new_tokens for reply in said) / len(said) if said else NAN
    return {"answered": len(said), "failed": failed, "tokens": tokens, **words}


def _safety(rows: Sequence[Mapping[str, Any]], one: Measured) -> dict[str, Any]:
    """Refusals where prompts say whether they are safe: `safe` true or false, or the embedded world's kinds."""
    known = [
        (reply.text, safe)
        for row, reply in zip(rows, one.replies, strict=True)
        if isinstance(reply, Said) and (safe := _is_safe(row)) is not None
    ]
    if not known:
        texts = [reply.text for reply in one.replies if isinstance(reply, Said)]
        return {"refusals": {"all": _share(texts)}} if texts else {}
    found = safety([text for text, _ in known], [safe for _, safe in known])
    parts = {"unsafe": found.on_unsafe, "safe": found.on_safe}
    return {"refusals": {name: _rates(asdict(rates)) for name, rates in parts.items() if rates is not None}}


def _is_safe(row: Mapping[str, Any]) -> bool | None:
    if isinstance(row.get("safe"), bool):
        return bool(row["safe"])
    return {"unsafe": False, "helpful": True, "look_alike": True}.get(str(row.get("kind")))


def _share(texts: Sequence[str]) -> dict[str, float]:
    kinds = [classify(text) for text in texts]
    return {kind.value: kinds.count(kind) / len(kinds) for kind in Reply} | {"prompts": len(kinds)}


def _rates(rates: dict[str, dict[str, float]]) -> dict[str, float]:
    return {name: share["share"] for name, share in rates.items()} | {"prompts": rates["refuses"]["count"]}


def _text(one: Measured) -> dict[str, Any]:
    if not one.text_words:
        return {}
    return {"text": asdict(text_loss(np.array(one.text_logps), np.array(one.text_words)))}


def _kl(one: Measured) -> dict[str, Any]:
    if one.no_kl:
        return {"kl": {"not_measured": one.no_kl}}
    found = kl_figures(one.logps, one.baseline_logps)
    return {"kl": found} if found else {}


def _pairs(stage: EvaluateStage, one: Measured, base: Measured | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Held-out pairs: how often chosen is the likelier, and the implicit reward over the baseline's as a judge."""
    if not one.chosen:
        return {}, []
    chosen, rejected = np.array(one.chosen), np.array(one.rejected)
    figures: dict[str, Any] = {"pairs": len(chosen), "chosen_likelier": float((chosen > rejected).mean())}
    if base is None or base.pairs_digest != one.pairs_digest:
        return {"pairs": figures}, []
    columns = {name: np.array([row[name] for row in one.pairs], np.float64) for name in one.pairs[0]}
    up, down = chosen - np.array(base.chosen), rejected - np.array(base.rejected)
    figures |= {"chosen_logp_change": float(up.mean()), "rejected_logp_change": float(down.mean())}
    if not (columns["p"] > 0.5).any():
        return {"pairs": figures}, []
    found = summary(stage.beta * up, stage.beta * down, **columns)
    kept = ("accuracy", "accuracy_low", "accuracy_high", "score_margin", "ece", "brier", "pairs_tied")
    return {"pairs": figures | {key: found["figures"][key] for key in kept}}, found["tables"]["reliability"]


def _tasks(stage: EvaluateStage, asked: Questions, one: Measured, base: Measured | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in [*stage.tasks, *stage.instructions]:
        if path not in one.tasks:
            continue
        right, figures = _right(path in stage.tasks, asked.tasks[path], one.tasks[path])
        if base is not None:
            before, _ = _right(path in stage.tasks, asked.tasks[path], base.tasks[path])
            became = change(before, right, draws=stage.resamples, seed=stage.seed)
            figures |= {"change": asdict(became)} if became else {}
        found[path] = figures
    return {"tasks": found} if found else {}


def _lm_eval(stage: EvaluateStage, one: Measured, base: Measured | None) -> dict[str, Any]:
    """task -> metric -> the figure with its 95 % interval, and the paired change where documents have numbers."""
    found: dict[str, Any] = {}
    for task, told in one.lm_eval.items():
        found[task] = {"documents": told["count"]}
        for metric, figure in told["metrics"].items():
            reach = None if figure["stderr"] is None else Z_95 * figure["stderr"]
            ends = {} if reach is None else {"low": figure["mean"] - reach, "high": figure["mean"] + reach}
            found[task][metric] = {"mean": figure["mean"], **ends}
            before = base and base.lm_eval.get(task, {}).get("metrics", {}).get(metric)
            if before and figure["values"] and len(before["values"]) == len(figure["values"]):
                values = np.array(figure["values"]), np.array(before["values"])
                became = paired_difference(*values, draws=stage.resamples, seed=stage.seed)
                found[task][f"{metric} change"] = became
    return {"lm_eval": found} if found else {}


def _right(exact: bool, rows: Sequence[Mapping[str, Any]], replies: Sequence[Said | Failed]) -> tuple[Values, dict]:
    """1 for each row that was answered rightly, and the figures."""
    texts = _texts(replies)
    if exact:
        found = exact_match(texts, [str(row["answer"]) for row in rows])
        assert found is not None
        return found.right, {**asdict(found.accuracy), "without_number": found.without_number}
    followed = asdict(follow(rows, texts))
    right = followed.pop("strict")
    del followed["loose"]
    return right, followed


def _win(
    stage: EvaluateStage, one: Measured, base: Measured, verdicts: Sequence[Verdict]
) -> tuple[dict[str, Any], Diagnosis | None]:
    """The win rate, as it is and at equal length, and the habits of a judge that was asked in both orders."""
    if not verdicts:
        return {}, None
    ours, theirs = (
        np.array([len(reply.text) if isinstance(reply, Said) else NAN for reply in model.replies])
        for model in (one, base)
    )
    orders = _orders(verdicts)
    decided = _by_score(verdicts) if orders is None else orders.soft()
    settings = {"draws": stage.resamples, "seed": stage.seed}
    rate = win_rate(decided, **settings)
    if rate is None:
        return {"win": {"missing": len(verdicts)}}, None
    figures = asdict(rate) | {"faults": _counted(verdicts)}
    controlled = length_controlled(decided, ours, theirs, **settings)
    if controlled is not None:
        figures["at_equal_length"] = asdict(controlled)
    judged = None if orders is None else diagnose(orders, ours - theirs, **settings)
    return {"win": figures | ({"judge": asdict(judged)} if judged else {})}, judged


def _orders(verdicts: Sequence[Verdict]) -> TwoOrders | None:
    """Verdicts of a model, averaged over principles; None where scores decided, which know no order."""
    if any("scores" in one for one in verdicts):
        return None
    columns = [
        [float(np.mean(one[order])) if order in one else NAN for one in verdicts] for order in ("as_given", "swapped")
    ]
    return TwoOrders(*(np.array(column) for column in columns))


def _by_score(verdicts: Sequence[Verdict]) -> Values:
    gaps = np.array([one["scores"][0] - one["scores"][1] if "scores" in one else NAN for one in verdicts])
    return (1 + np.sign(gaps)) / 2


def _counted(verdicts: Sequence[Verdict]) -> dict[str, int]:
    faults = [str(one["fault"]) for one in verdicts if "fault" in one]
    return {fault: faults.count(fault) for fault in dict.fromkeys(faults)}


def _against(
    stage: EvaluateStage,
    rows: Sequence[Mapping[str, Any]],
    one: Measured,
    base: Measured,
    figures: Mapping[str, Any],
    judged: Diagnosis | None,
) -> dict[str, Any]:
    """What the verdict line speaks of."""
    settings = {"draws": stage.resamples, "seed": stage.seed}
    ours, theirs = _texts(one.replies), _texts(base.replies)
    found: dict[str, Any] = {"judge_faults": list(judged.faults) if judged else []}
    lengths = [sum(map(len, texts)) for texts in (ours, theirs)]
    if lengths[1]:
        found["length_change"] = lengths[0] / lengths[1] - 1
    if one.text_words and one.text_digest == base.text_digest:
        columns = [np.array(values) for values in (base.text_logps, one.text_logps, one.text_words)]
        found["text_loss"] = text_loss_change(*columns, **settings)
    if len(ours) >= collapse.ENOUGH_REPLIES:
        ends = [[isinstance(reply, Said) and reply.finished for reply in model.replies] for model in (one, base)]
        found["collapse"] = [asdict(flag) for flag in collapse.flags(ours, theirs, *ends)]
    safe = [place for place, row in enumerate(rows) if _is_safe(row)]
    if safe:
        refused = [
            np.array([float(classify(texts[place]) is Reply.refuses) for place in safe]) for texts in (ours, theirs)
        ]
        found["over_refusal"] = paired_difference(*refused, **settings)
    if win := figures.get("win", {}):
        found["win"] = Estimate(**win["rate"]) if "rate" in win else None
        controlled = win.get("at_equal_length")
        found["controlled"] = controlled and (controlled["rate"], controlled["low"], controlled["high"])
    return found


def _spoken_of(changes: dict[str, Any]) -> Against:
    return Against(**(changes | {"collapse": [flag["name"] for flag in changes.get("collapse", ())]}))


def _texts(replies: Sequence[Said | Failed]) -> list[str]:
    """A reply that failed is an empty one; how many failed is told beside the figures."""
    return [reply.text if isinstance(reply, Said) else "" for reply in replies]


def _plain(value: Any) -> Any:
    """As JSON types; a number that is none becomes null."""
    if isinstance(value, Estimate):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
