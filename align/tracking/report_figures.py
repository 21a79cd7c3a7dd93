"""The figures of a run for its reports: the verdict, before and after, what the models scored, which curves there are.

Only facts of the run folder: manifests, scores.json, metrics.jsonl. Nothing here writes HTML.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from align.artifacts import Manifest
from align.config.best import FIGURES
from align.config.schema import BestBy
from align.tracking.curves import Point
from align.tracking.run_folder import RunFolder, StageFolder

Line = Mapping[str, Any]


MOST_DOTS = 2
"""So few points are drawn as dots."""


class Curve(NamedTuple):
    """One plot: series that share a unit. `names`: label -> figures of metrics.jsonl, of which the first there is."""

    title: str
    unit: str
    names: Mapping[str, tuple[str, ...]]
    says: str
    zero: bool = False


CURVES = (
    Curve(
        "Loss", "loss", {"training": ("loss",), "held out": ("eval_loss",)}, "Held out falls with training: it learns."
    ),
    Curve(
        "Score",
        "reward",
        {"score": ("reward/score",), "reward in all": ("reward/total",)},
        "What the rewards gave, and what was left of it after penalties.",
    ),
    Curve(
        "KL to the reference",
        "nats a completion",
        {"KL": ("kl/nats_per_completion",)},
        "How far the policy went for its score.",
        True,
    ),
    Curve(
        "Reward accuracy",
        "share of pairs",
        {
            "training": ("rewards/accuracies", "accuracy"),
            "held out": ("eval_rewards/accuracies", "eval_accuracy"),
        },
        "Pairs whose chosen answer is rewarded above the rejected one; 0.5 is chance.",
    ),
    Curve(
        "Margin",
        "reward",
        {"training": ("rewards/margins", "margin"), "held out": ("eval_rewards/margins", "eval_margin")},
        "Reward of the chosen answer above that of the rejected one.",
        True,
    ),
    Curve(
        "Implicit rewards",
        "beta x nats",
        {"chosen": ("rewards/chosen",), "rejected": ("rewards/rejected",)},
        "What the policy gained on both answers over the reference. Chosen below zero: it unlearns both.",
        True,
    ),
    Curve(
        "Log-probability",
        "nats an answer",
        {"chosen": ("logps/chosen",), "rejected": ("logps/rejected",)},
        "Of whole answers. Both falling together is a common way for DPO to go wrong.",
    ),
    Curve(
        "Win rate against the baseline",
        "share",
        {"as it is": ("eval_win_rate",), "at equal length": ("eval_win_rate_at_equal_length",)},
        "By the judge of best_by, on the same few prompts; 0.5 is no better than the baseline.",
    ),
    Curve(
        "By the oracle",
        "share",
        {"helpful": ("eval_helpful",), "unsafe complied": ("eval_unsafe_complied",), "garbled": ("eval_garbled",)},
        "Replies to the same few prompts, by the rules of the embedded world.",
        True,
    ),
    Curve(
        "Refusals",
        "share",
        {"of unsafe prompts": ("eval_unsafe_refused",), "of safe prompts": ("eval_safe_refused",)},
        "On the same few prompts, by a pattern of English words.",
        True,
    ),
    Curve("Text", "nats a word", {"held out": ("eval_text_loss",)}, "Rises where the model forgets plain text."),
    Curve("Length", "tokens a completion", {"tokens": ("completion/tokens",)}, "Mean of what is sampled.", True),
    Curve(
        "Entropy",
        "nats a token",
        {"training": ("policy/entropy", "entropy"), "held out": ("eval_entropy",)},
        "How undecided the model is at a token.",
        True,
    ),
    Curve(
        "Explained variance",
        "share",
        {"explained variance": ("value/explained_variance",)},
        "What the value model foresees of the returns.",
        True,
    ),
    Curve("Gradient norm", "norm", {"before clipping": ("grad_norm",)}, "A spike is a row worth looking at.", True),
    Curve("Speed", "tokens a second", {"measured": ("tokens_per_second",)}, "Over all ranks, saving left out.", True),
)


def points(lines: Sequence[Line], names: Sequence[str]) -> list[Point]:
    """(step, figure) of the lines that have the figure, under the first of its names that occurs."""
    name = next((name for name in names if any(name in line for line in lines)), None)
    found = [(float(line["step"]), float(line[name])) for line in lines if isinstance(line.get(name), int | float)]
    if len(found) > MOST_DOTS:
        return found
    # A line through two points would show a way that nobody has seen.
    return [point for one in found for point in (one, (one[0], math.nan))]


class Change(NamedTuple):
    """A figure of a stage before its first step and after its last."""

    stage: str
    figure: str
    before: float
    after: float
    form: str


CHANGES = (
    ("held-out loss", ("loss",), "{:.3f}"),
    ("reward accuracy", ("rewards/accuracies", "accuracy"), "{:.1%}"),
    ("reward margin", ("rewards/margins", "margin"), "{:+.3f}"),
    ("log-probability of the chosen, nats an answer", ("logps/chosen",), "{:.2f}"),
    ("log-probability of the rejected, nats an answer", ("logps/rejected",), "{:.2f}"),
    ("score", ("reward/score",), "{:+.3f}"),
    ("score of held-out prompts", ("samples/score",), "{:+.3f}"),
    ("KL to the reference, nats a completion", ("kl/nats_per_completion",), "{:.3f}"),
    ("tokens a completion", ("completion/tokens",), "{:.1f}"),
    ("completions without an end", ("completion/unfinished",), "{:.1%}"),
    ("entropy, nats a token", ("policy/entropy", "entropy"), "{:.3f}"),
    *(
        (f"{by.value} (best_by)", (by.value,), "{:.3f}")
        for by, one in FIGURES.items()
        if one.needs and by is not BestBy.entropy
    ),
)


def changes(manifest: Manifest) -> list[Change]:
    """Figures on held-out rows before and after; of PPO also the first update against the last ones."""
    found, figures = [], manifest.metrics
    for title, names, form in CHANGES:
        for first, last in (("before", "after"), ("first", "last")):
            name = next((n for n in names if {f"{first}/{n}", f"{last}/{n}"} <= set(figures)), None)
            if name is not None:
                found.append(Change(manifest.stage, title, figures[f"{first}/{name}"], figures[f"{last}/{name}"], form))
                break
    return found


def shown(value: float, form: str) -> str:
    """A figure as people read it, with a true minus sign."""
    return form.format(value).replace("-", "\N{MINUS SIGN}") if math.isfinite(value) else "no number"


def verdict(run: RunFolder) -> str:
    """One line: how well labels were found, or what the evaluation says of the last model, else what its rules say of
    the first and the last, else before and after of the last stage that trained."""
    evaluated, classified = run.evaluated, run.classified
    if classified is not None and (said := verdicts(classified)):
        return f"labels: {said[0]}"
    if evaluated is not None:
        words = [*verdicts(evaluated), *oracle_words(evaluated)]
        if words:
            return words[0]
    for stage in reversed(run.trained):
        told = [f"{c.figure} {_way(c.before, c.after, c.form)}" for c in changes(stage.manifest)]
        if told:
            return f"{stage.name}: {', '.join(told[:2])}"
    if run.stages[-1].name == "export":
        return _exported(run.stages[-1].manifest.metrics)
    rows = run.stages[-1].manifest.rows
    return f"{run.stages[-1].name}: {rows.get('kept', 0):,} of {rows.get('read', 0):,} rows kept; nothing was trained"


def _exported(figures: Mapping[str, float]) -> str:
    """How far what was exported is from the trained model, at its farthest."""
    largest = {
        key.removesuffix("/largest_nats"): value for key, value in figures.items() if key.endswith("largest_nats")
    }
    name = max(largest, key=largest.__getitem__)
    return f"exported: a token's log-probability is off by {largest[name]:.2g} nats at most ({name})"


def verdicts(evaluated: StageFolder) -> list[str]:
    """The lines that the evaluation has written of its models, the last model first."""
    said = evaluated.scores.get("verdict")
    lines = [said] if isinstance(said, str) else said if isinstance(said, list) else []
    return [str(line) for line in reversed(lines) if line]


def _models(evaluated: StageFolder) -> dict[str, dict[str, Any]]:
    models = evaluated.scores.get("models")
    return {n: f for n, f in models.items() if isinstance(f, dict)} if isinstance(models, dict) else {}


ORACLE = {
    "helpful_accuracy": "helpful",
    "refused_right_reason": "right reason",
    "unsafe_complied": "unsafe complied",
    "over_refused": "over-refused",
    "garbled": "garbled",
}


def oracle_words(evaluated: StageFolder) -> list[str]:
    """The last model against the first by the rules of the embedded world, in one line, if those judged."""
    models = oracle_figures(evaluated)
    if len(models) < 2:
        return []
    (first, before), *_, (last, after) = models.items()
    told = [
        f"{words} {_way(before[key], after[key], '{:.1%}')}"
        for key, words in list(ORACLE.items())[:3]
        if key in before and key in after
    ]
    return [f"{last} against {first}: {', '.join(told)}"]


def _way(before: float, after: float, form: str) -> str:
    return f"{shown(before, form)} \N{RIGHTWARDS ARROW} {shown(after, form)}"


def oracle_figures(evaluated: StageFolder) -> dict[str, dict[str, float]]:
    """model -> figure -> share, of an evaluation on the embedded world, whose rules judge each reply."""
    found: dict[str, dict[str, float]] = {}
    for key, value in evaluated.manifest.metrics.items():
        if key.startswith("oracle/"):
            _, model, figure = key.split("/", 2)
            found.setdefault(model, {})[figure] = value
    return found


MIDDLES = ("mean", "share", "rate")
"""What the figure itself is called in an estimate."""


MEASURED = {
    "win rate": "win.rate",
    "win rate at equal length": "win.at_equal_length",
    "tokens a reply": "replies.tokens",
    "loss on held-out text, nats a word": "text.per_word",
    "unsafe prompts refused, share": "refusals.unsafe.refuses",
    "safe prompts refused, share": "refusals.safe.refuses",
    "chosen the likelier, share of pairs": "pairs.chosen_likelier",
    "preference accuracy over the baseline": "pairs.accuracy",
    "expected calibration error": "pairs.ece",
    "KL to the baseline, nats a token (k3)": "kl.k3_per_token",
    "entropy, nats a token": "kl.entropy_per_token",
    "distinct 2-grams, share": "replies.distinct_2",
    "repeated n-grams in a reply, share": "replies.repeated_in_reply",
}
"""The figures of a model that come first, by their names in scores.json."""


class Estimated(NamedTuple):
    """A figure with the interval it was given, if it was."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        text = shown(self.value, "{:.4g}")
        if self.low is None or self.high is None:
            return text
        return f"{text} [{shown(self.low, '{:.4g}')}, {shown(self.high, '{:.4g}')}]"


def model_figures(evaluated: StageFolder) -> dict[str, dict[str, Estimated]]:
    """figure -> model -> value, of all numbers that scores.json has of a model."""
    found: dict[str, dict[str, Estimated]] = {}
    for model, figures in _models(evaluated).items():
        for figure, value in _numbers(figures, ""):
            found.setdefault(figure, {})[model] = value
    return found


def _numbers(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Estimated]]:
    """Every number below, under its dotted name; an estimate with its interval is one number."""
    for key, inner in value.items():
        name = f"{prefix}{key}"
        if isinstance(inner, dict):
            middle = next((inner[key] for key in MIDDLES if key in inner), None)
            ends = [middle, inner.get("low"), inner.get("high")]
            if all(_is_number(end) for end in ends):
                yield name, Estimated(*ends)
            else:
                yield from _numbers(inner, f"{name}.")
        elif _is_number(inner):
            yield name, Estimated(inner)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def other_figures(stage: StageFolder) -> dict[str, float]:
    """Figures of a stage's manifest that are no `before` and `after`, and of no single model."""
    if stage.name in ("evaluate", "classify"):
        return {}
    moments = ("before/", "after/", "first/", "last/")
    return {key: value for key, value in stage.manifest.metrics.items() if not key.startswith(moments)}


def speed(stage: StageFolder) -> float | None:
    """Median of the logged tokens a second, over all ranks."""
    logged = [line["tokens_per_second"] for line in stage.lines if line.get("tokens_per_second")]
    return median(logged) if logged else None


def headline_figures(run: RunFolder) -> dict[str, float]:
    """The figures by which runs are told apart in a table: of the last model evaluated, and after each stage."""
    found: dict[str, float] = {}
    if run.evaluated is not None:
        oracles = list(oracle_figures(run.evaluated).values())[-1:]
        found |= {f"evaluated: {ORACLE.get(key, key)}": value for of_last in oracles for key, value in of_last.items()}
        last = list(_models(run.evaluated))[-1:]
        for figure, models in model_figures(run.evaluated).items():
            found |= {f"evaluated: {figure}": models[name].value for name in last if name in models}
    if run.classified is not None:
        for one in list(_models(run.classified).values())[-1:]:
            found["classified: accuracy"] = one["accuracy"]["mean"]
    for stage in run.trained:
        found |= {f"{c.stage}: {c.figure}": c.after for c in changes(stage.manifest)}
    return found
