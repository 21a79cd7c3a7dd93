"""How a PPO run went, as one HTML page: before and after, alarms, curves, and answers to the same prompts."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

from align.tracking import curves
from align.tracking.page import html, page, table

Row = Mapping[str, Any]

STYLE = (
    curves.STYLE
    + """
.verdict { font-size: 1.25rem; font-weight: 600; margin: .25rem 0 .75rem; }
.alarms { padding-left: 1.2rem; } .alarms li { margin: .25rem 0; overflow-wrap: anywhere; }
.curves, .pair { display: grid; gap: 0 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); }
.curves figure { margin: 0 0 1.5rem; } .curves h3 { margin-top: .5rem; } .curves figure > svg { width: 100%; }
.curves .key { color: var(--ink); } .sample h4 { margin: .5rem 0 .25rem; font-size: .875rem; color: var(--soft); }
.sample { border-top: 1px solid var(--line); padding: .75rem 0 1.25rem; }
@media screen { .sample pre { max-height: 24rem; overflow-y: auto; } }
@media print { figure, .sample { break-inside: avoid; } h3, h4 { break-after: avoid; }
  .curves, .pair { grid-template-columns: 1fr 1fr; } }
"""
)

SCORE, KL = "reward/score", "kl/nats_per_completion"
# Means of so many updates stand for the beginning and the end: one update is noisy, and the first ones change fast.
MOST_END_UPDATES = 5

BEFORE_AFTER = {
    "score": SCORE,
    "reward in all": "reward/total",
    "KL to the reference, nats a completion": KL,
    "KL to the reference, nats a token": "kl/nats_per_token",
    "tokens a completion": "completion/tokens",
    "completions without a stop token, %": "completion/unfinished",
    "entropy, nats a token": "policy/entropy",
}


class Figure(NamedTuple):
    """One plot of figures that share a unit, and what to make of it."""

    title: str
    unit: str
    names: Mapping[str, str]
    says: str
    include: Sequence[float] = (0.0,)


FIGURES = (
    Figure(
        "Score and reward",
        "reward",
        {"score": SCORE, "reward in all": "reward/total"},
        "Score: what the rewards gave, weighted. In all: after scaling, clipping and penalties for length and a "
        "missing stop. Healthy: both rise, quickly at first, then level off.",
        (),
    ),
    Figure(
        "KL per completion",
        "nats",
        {"KL": KL},
        "How far the policy is from the reference over a whole completion. Healthy: a steady rise that levels off; a "
        "steep one late is a reward being gamed.",
    ),
    Figure(
        "KL per token",
        "nats a token",
        {"KL": "kl/nats_per_token"},
        "The same without length. Healthy: well below 1, where the reference finds each token e times less likely than "
        "the policy does.",
    ),
    Figure(
        "Length",
        "tokens a completion",
        {"tokens": "completion/tokens"},
        "Mean length of what is sampled. Healthy: it settles; growth along with the score may be a reward that is paid "
        "for length.",
    ),
    Figure(
        "Unfinished completions",
        "share",
        {"unfinished": "completion/unfinished"},
        "Completions that reached max_new_tokens without a stop token. Healthy: few, and falling.",
    ),
    Figure(
        "Entropy",
        "nats a token",
        {"entropy": "policy/entropy"},
        "How undecided the policy is at a token. Healthy: a slow fall; near zero it samples the same completion again "
        "and again, and learns no more.",
    ),
    Figure(
        "Clipped tokens",
        "share",
        {"clipped": "policy/clipped"},
        "Tokens whose ratio to the rollout's policy was outside the clip. Healthy: up to a fifth; none at all means "
        "steps are small, more means too large.",
    ),
    Figure(
        "KL of an update",
        "nats a token",
        {"approximate KL": "policy/approx_kl"},
        "How far one update moves the policy from the one that sampled. Healthy: about 0.01, without spikes.",
    ),
    Figure(
        "Largest ratio",
        "ratio",
        {"largest ratio": "policy/ratio_max"},
        "The token whose probability grew most within an update. Healthy: below 5, but for the spike "
        "of a rare token now and then; many spikes mean that steps are too large.",
        (1.0,),
    ),
    Figure(
        "Explained variance",
        "share",
        {"explained variance": "value/explained_variance"},
        "How much of the variance of returns the value model foresees. Healthy: rises towards 1; below 0 it is worse "
        "than a constant.",
    ),
    Figure(
        "Value loss",
        "loss",
        {"value loss": "value/loss"},
        "Half the squared error of the values. Healthy: falls, then follows the spread of the rewards.",
    ),
    Figure(
        "Ratio before the first step",
        "mean |ratio \N{MINUS SIGN} 1|",
        {"distance from 1": "policy/ratio_first"},
        "The policy against itself, before it changed. Healthy: rounding alone, below 0.001 (0.05 in bf16).",
    ),
    Figure(
        "Sampler against trainer",
        "nats a token",
        {"mismatch": "rollout/mismatch_kl"},
        "KL between the log-probabilities of the sampler and the trainer's, for the same weights. Healthy: near 0.",
    ),
)


# A weight that stays the same is in the config.
WEIGHT_OF_KL = Figure(
    "Weight of the KL penalty",
    "kl_coefficient",
    {"weight": "kl/coefficient"},
    "What the adaptive controller made of it. Healthy: it settles where KL is at its target; a steady rise means the "
    "target cannot be held.",
)


def ppo_page(lines: Sequence[Row], samples: Sequence[Row], title: str, alarms: Sequence[Row]) -> str:
    """The page of a stage.

    lines: of metrics.jsonl, any order of names; those without a score are left out. samples: {step, prompt, completion,
    score}, the same prompts at several steps; a prompt is text or messages, a score may be None. alarms: {step, guard,
    text}, as `align.trainers.guards` gives them.
    """
    updates = [line for line in lines if SCORE in line]
    parts = [f"<h1>{html(title)}</h1>", *_verdict(updates, samples), *_alarms(alarms)]
    if updates:
        parts += ["<h2>Curves</h2>", f'<p class="soft">{html(_curves_line(len(updates), alarms))}</p>']
        parts += ['<div class="curves">', *_figures(updates, samples, alarms), "</div>"]
    return page(title, "\n".join([*parts, *_samples(samples)]), STYLE)


def _verdict(updates: Sequence[Row], samples: Sequence[Row]) -> list[str]:
    if not updates:
        return ['<p class="verdict">No update was logged.</p>']
    several = min(MOST_END_UPDATES, max(len(updates) // 2, 1))
    ends = {name: _ends(updates, name, several) for name in BEFORE_AFTER.values()}
    rows = [[label, *_shown(label, ends[name])] for label, name in BEFORE_AFTER.items() if None not in ends[name]]
    one = "the first and the last update" if several == 1 else f"the first {several} and the last {several} updates"
    return [
        f'<p class="verdict">{html(_headline(ends, len(updates)))}</p>',
        table(["", "before", "after"], rows),
        f'<p class="soft">Means of {one}. {html(_held_out(samples))}</p>',
    ]


def _ends(updates: Sequence[Row], name: str, several: int) -> tuple[float | None, float | None]:
    """Means of a figure over the first and the last updates; None where it was never a finite number there."""
    both = (
        [line[name] for line in part if _finite(line.get(name))] for part in (updates[:several], updates[-several:])
    )
    before, after = (mean(values) if values else None for values in both)
    return before, after


def _headline(ends: Mapping[str, tuple[float | None, float | None]], updates: int) -> str:
    before, after = ends[SCORE]
    if before is None or after is None:
        return f"{updates:,} updates without a score that is a number"
    if updates == 1:
        return f"Score {_number(after)} in the only update"
    words = f"Score from {_number(before)} to {_number(after)} in {updates:,} updates"
    if ends[KL][1] is not None:
        words += f", {_number(ends[KL][1])} nats a completion from the reference"
    before, after = ends["completion/tokens"]
    if before and after is not None:
        words += f", completions {_change(after / before - 1)}"
    return words


def _change(share: float) -> str:
    if abs(share) < 0.01:
        return "as long as before"
    return f"{abs(share):.0%} {'longer' if share > 0 else 'shorter'}"


def _held_out(samples: Sequence[Row]) -> str:
    """Scores of the held-out prompts, the only ones that are the same before and after."""
    scores = _held_out_scores(samples)
    if len(scores) < 2:
        return ""
    (_, before), (_, after) = scores[0], scores[-1]
    return f"On the held-out prompts below the mean score went from {_number(before)} to {_number(after)}."


def _held_out_scores(samples: Sequence[Row]) -> list[tuple[int, float]]:
    """The mean score at each step at which there is one."""
    by_step: dict[int, list[float]] = {}
    for sample in samples:
        if _finite(sample.get("score")):
            by_step.setdefault(sample["step"], []).append(sample["score"])
    return [(step, mean(scores)) for step, scores in sorted(by_step.items())]


def _alarms(alarms: Sequence[Row]) -> list[str]:
    if not alarms:
        return ['<p class="good">No guard raised an alarm.</p>']
    count = "1 alarm" if len(alarms) == 1 else f"{len(alarms):,} alarms"
    items = [f"<li><code>{html(alarm['guard'])}</code> {html(alarm['text'])}</li>" for alarm in alarms]
    return [f'<h2 class="warn">{count}</h2>', '<ul class="alarms">', *items, "</ul>"]


def _curves_line(updates: int, alarms: Sequence[Row]) -> str:
    faint, strong = curves.drawn_as(updates)
    words = ""
    if strong > faint:
        one = "one update" if faint == 1 else f"the mean of {faint:,} updates"
        words = f"Faint: {one} a point. Strong: the mean of {strong:,} around it. "
    if alarms:
        words += "Dashed uprights: an alarm. "
    return f"{words}All figures are those of metrics.jsonl."


def _figures(updates: Sequence[Row], samples: Sequence[Row], alarms: Sequence[Row]) -> list[str]:
    """Every figure that has a point; the frontier comes second."""
    plots = [_figure(figure, updates, alarms) for figure in FIGURES]
    plots.insert(1, _frontier(updates))
    if len({line.get("kl/coefficient") for line in updates}) > 1:
        plots.append(_figure(WEIGHT_OF_KL, updates, alarms))
    return [plot for plot in (*plots, _held_out_curve(samples)) if plot]


def _figure(figure: Figure, updates: Sequence[Row], alarms: Sequence[Row]) -> str:
    series = {label: _points(updates, "step", name) for label, name in figure.names.items()}
    # An alarm's text names the figures it is about.
    marks = [alarm["step"] for alarm in alarms if any(name in alarm["text"] for name in figure.names.values())]
    plot = curves.line_plot(series, x_label="update", y_label=figure.unit, include=figure.include, marks=marks)
    names = f'<span class="key">{curves.key(list(series))}</span><br>' if len(series) > 1 else ""
    return _with_caption(figure.title, plot, f"{names}{html(figure.says)}")


def _frontier(updates: Sequence[Row]) -> str:
    plot = curves.path_plot(
        _points(updates, KL, SCORE), x_label="KL, nats a completion", y_label="score", ends=("first", "last")
    )
    says = (
        "What the score costs in distance from the reference. Healthy: up and to the right, flatter with time; to the "
        "right without rising is distance for nothing."
    )
    return _with_caption("Score against KL", plot, html(says))


def _held_out_curve(samples: Sequence[Row]) -> str:
    points = [(float(step), score) for step, score in _held_out_scores(samples)]
    plot = curves.line_plot({"score": points}, x_label="update", y_label="mean score")
    says = (
        "The prompts below, answered greedily. Healthy: rises with the score above; where only that one rises, the "
        "policy learns its training prompts and no more."
    )
    return _with_caption("Score of held-out prompts", plot, html(says))


def _with_caption(title: str, plot: str, caption: str) -> str:
    return f"<figure><h3>{html(title)}</h3>{plot}<figcaption>{caption}</figcaption></figure>" if plot else ""


def _points(updates: Sequence[Row], x: str, y: str) -> list[curves.Point]:
    return [(_or_gap(line.get(x)), _or_gap(line.get(y))) for line in updates]


def _samples(samples: Sequence[Row]) -> list[str]:
    """The same prompts, answered first and last."""
    if not samples:
        return []
    parts = ["<h2>The same prompts, first and last</h2>"]
    shown: dict[tuple[str, int], dict[int, Row]] = {}
    steps = _first_and_last(samples)
    for step in steps:
        met: dict[str, int] = {}
        for sample in (s for s in samples if s["step"] == step):
            prompt = _prompt(sample["prompt"])
            met[prompt] = met.get(prompt, 0) + 1
            shown.setdefault((prompt, met[prompt]), {})[step] = sample
    return parts + [_sample(prompt, answers, steps) for (prompt, _), answers in shown.items()]


def _sample(prompt: str, answers: Mapping[int, Row], steps: Sequence[int]) -> str:
    sides = [_answer(step, answers[step]) for step in steps if step in answers]
    return f'<div class="sample"><h4>prompt</h4>{_text(prompt)}<div class="pair">{"".join(sides)}</div></div>'


def _answer(step: int, sample: Row) -> str:
    score = sample.get("score")
    scored = f"score {_number(score)}" if _finite(score) else "not scored"
    when = "before the first update" if step == 0 else f"after update {step:,}"
    return f"<div><h4>{html(f'{when}: {scored}')}</h4>{_text(sample['completion'])}</div>"


def _text(text: str) -> str:
    # A newline at the start of <pre> is no part of it, so one is put there.
    return f'<pre dir="auto">\n{html(text)}</pre>'


def _prompt(prompt: str | Sequence[Row]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _first_and_last(samples: Sequence[Row]) -> list[int]:
    steps = sorted({sample["step"] for sample in samples})
    return [steps[0], steps[-1]] if len(steps) > 1 else steps


def _shown(label: str, ends: Sequence[float]) -> list[float]:
    """Three digits of a figure; shares in percent."""
    times = 100 if label.endswith("%") else 1
    return [float(f"{value * times:.3g}") for value in ends]


def _number(value: float) -> str:
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}").replace("-", "\N{MINUS SIGN}")


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _or_gap(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
