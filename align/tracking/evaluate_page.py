"""Several models side by side as one HTML page: the verdict first, then what it rests on, then their replies."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from align.tracking.page import Figure, Html, html, page, table
from align.tracking.reward_page import reliability_plot

Figures = Mapping[str, Any]

STYLE = """
.verdict { font-size: 1.25rem; font-weight: 600; margin: .75rem 0 0; } .numbers { margin: 0; }
.sample { border-top: 1px solid var(--line); padding: .75rem 0 1.25rem; break-inside: avoid; }
.replies { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: .75rem; }
.replies > div { min-width: 0; } h1, h4, .verdict { overflow-wrap: anywhere; }
.replies h4 { margin: .5rem 0 .25rem; font-size: .875rem; color: var(--soft); }
svg .diagonal { stroke: var(--soft); stroke-dasharray: 4 3; }
"""
KINDS = ("refuses", "partly_refuses", "complies")
ORACLE = {
    "helpful_accuracy": "helpful", "unsafe_complied": "unsafe complied", "refused_right_reason": "right reason",
    "over_refused": "over-refused", "garbled": "garbled",
}  # fmt: skip


def evaluate_page(numbers: Figures, samples: Sequence[Figures], title: str) -> str:
    """The page of `scores.json`; samples: lines of samples.jsonl to show."""
    models, baseline = numbers["models"], numbers["baseline"]
    parts = [f"<h1>{html(title)}</h1>"]
    parts += map(_verdict, numbers["verdict"])
    parts.append(f'<p class="soft">{numbers["prompts"]:,} prompts; baseline: {html(baseline)}</p>')
    sections = [_wins(models), _judges(models), _oracle(numbers["oracle"]), _refusals(models), _cost(models)]
    sections += [
        _pairs(models, numbers["reliability"]),
        _tasks(models),
        _lm_eval(models),
        _diversity(models),
        _samples(samples),
    ]
    return page(title, "\n".join([*parts, *filter(None, sections)]), STYLE)


def _verdict(line: str) -> str:
    """`model against baseline: words: numbers`, the numbers below the words."""
    words, _, numbers = line.rpartition(": ")
    return f'<p class="verdict">{html(words)}</p>\n<p class="soft numbers">{html(numbers)}</p>'


def _section(title: str, text: str, body: str) -> str:
    return f"<h2>{html(title)}</h2>\n<p>{html(text)}</p>\n{body}" if body else ""


def _by_model(models: Figures, part: str, columns: Mapping[str, Callable[[Figures], str]]) -> str:
    """A row a model that has this part."""
    rows = [
        [name, *(_cell(_try(show, one[part])) for show in columns.values())]
        for name, one in models.items()
        if one.get(part)
    ]
    return table(["model", *columns], rows) if rows else ""


def _try(show: Callable[[Figures], str], figures: Figures) -> str:
    """What is not there, or not a number, is a dash."""
    try:
        return show(figures)
    except (KeyError, TypeError):
        return "\N{EN DASH}"


def _cell(text: str) -> Figure:
    return Figure(html(text))


def _share(*path: str) -> Callable[[Figures], str]:
    return lambda figures: f"{_at(figures, path):.1%}"


def _number(form: str, *path: str) -> Callable[[Figures], str]:
    return lambda figures: form.format(_at(figures, path))


def _interval(form: str, *path: str, mean: str = "mean") -> Callable[[Figures], str]:
    def show(figures: Figures) -> str:
        found = _at(figures, path)
        return f"{form.format(found[mean])} [{form.format(found['low'])}, {form.format(found['high'])}]"

    return show


def _at(figures: Figures, path: Sequence[str]) -> Any:
    for key in path:
        figures = figures[key]
    return figures


def _wins(models: Figures) -> str:
    columns = {
        "win rate": _interval("{:.2f}", "rate"),
        "at equal length": _interval("{:.2f}", "at_equal_length", mean="rate"),
        "wins": _number("{:,}", "wins"), "ties": _number("{:,}", "ties"), "losses": _number("{:,}", "losses"),
        "missing": _number("{:,}", "missing"),
        "length": _number("{:+.0%}", "at_equal_length", "length_change"),
    }  # fmt: skip
    text = (
        "How often the judge prefers a model's reply to the baseline's; a tie is half a win. Intervals of 95 %, by "
        "resampling prompts. At equal length: what is left when longer replies gain nothing by their length."
    )
    return _section("Win rates", text, _by_model(models, "win", columns))


def _judges(models: Figures) -> str:
    judged = {name: one for name, one in models.items() if one.get("win", {}).get("judge")}
    habits = {name: {"judge": one["win"]["judge"]} for name, one in judged.items()}
    columns = {
        "orders disagree": _interval("{:.2f}", "inconsistent", mean="value"),
        "first slot": _interval("{:.2f}", "first_slot", mean="value"),
        "longer reply wins": _interval("{:.2f}", "takes_longer", mean="value"),
        "kappa of orders": _interval("{:.2f}", "kappa", mean="value"),
    }
    body = _by_model(habits, "judge", columns)
    for name, one in judged.items():
        body += "".join(f"<p>{html(name)}: {html(words)}</p>" for words in one["win"]["judge"]["words"])
    return _section(
        "The judge", "Each pair was judged in both orders. What the judge does whatever the replies say.", body
    )


def _oracle(oracle: Mapping[str, Mapping[str, float]]) -> str:
    rows = [[name, *(_cell(f"{figures[key]:.1%}") for key in ORACLE)] for name, figures in oracle.items()]
    text = "Judged by the rules of the embedded world. The first and the third should rise, the others fall."
    return _section("By the oracle", text, table(["model", *ORACLE.values()], rows) if rows else "")


def _refusals(models: Figures) -> str:
    rows = [
        [name, kind, *(_cell(f"{shares[key]:.1%}") for key in KINDS), shares["prompts"]]
        for name, one in models.items()
        for kind, shares in one.get("refusals", {}).items()
    ]
    text = (
        "By a pattern of English words. Held against people's labels of XSTest, it finds refusals, full or partial, "
        "with precision 0.98 and recall 0.96 (Llama-2's replies; GPT-4's: 0.99 and 0.96), and hardly tells partial "
        "from full ones."
    )
    header = ["model", "prompts", "refuses", "partly", "complies", "prompts counted"]
    return _section("Refusals", text, table(header, rows) if rows else "")


def _cost(models: Figures) -> str:
    kl = _by_model(
        models,
        "kl",
        {
            "KL, nats a reply": _number("{:.2f}", "k1_per_sequence"),
            "\N{PLUS-MINUS SIGN}": _number("{:.2f}", "k1_per_sequence_reach"),
            "k3 a reply": _number("{:.2f}", "k3_per_sequence"),
            "KL a token": _number("{:.3f}", "k1_per_token"),
            "k3 a token": _number("{:.3f}", "k3_per_token"),
            "entropy a token": _number("{:.3f}", "entropy_per_token"),
        },
    )
    columns = {
        "nats a word": _number("{:.3f}", "text", "per_word"),
        "perplexity a word": _number("{:,.2f}", "text", "perplexity"),
        "more than the baseline": _interval("{:+.3f}", "changes", "text_loss"),
    }
    rows = [
        [name, *(_cell(_try(show, one)) for show in columns.values())] for name, one in models.items() if "text" in one
    ]
    body = kl + ("<h3>Loss on held-out text</h3>" + table(["model", *columns], rows) if rows else "")
    return _section(
        "What it cost", "How far each model went from the baseline, and what it forgot of plain text.", body
    )


def _pairs(models: Figures, reliability: Mapping[str, Sequence[Figures]]) -> str:
    body = _by_model(
        models,
        "pairs",
        {
            "pairs": _number("{:,}", "pairs"),
            "chosen likelier": _share("chosen_likelier"),
            "reward accuracy": _share("accuracy"),
            "from": _share("accuracy_low"),
            "to": _share("accuracy_high"),
            "margin": _number("{:+.3f}", "score_margin"),
            "ECE": _number("{:.3f}", "ece"),
            "Brier": _number("{:.3f}", "brier"),
            "chosen, nats": _number("{:+.2f}", "chosen_logp_change"),
            "rejected, nats": _number("{:+.2f}", "rejected_logp_change"),
        },
    )
    for name, bins in reliability.items():
        caption = f"{name}: share of right answers by how sure its implicit reward is. Dashed: calibrated."
        body += Html(f"<figure>{reliability_plot(bins)}<figcaption>{html(caption)}</figcaption></figure>")
    text = "Held-out preferences. The implicit reward is beta times the log-probability gained over the baseline."
    return _section("Preferences", text, body)


def _tasks(models: Figures) -> str:
    rows = []
    for name, one in models.items():
        for path, figures in one.get("tasks", {}).items():
            right = figures.get("share", (figures.get("prompts_strict") or {}).get("share"))
            became = figures.get("change")
            moved = _try(_interval("{:+.3f}", "change", "difference"), figures) if became else ""
            rows.append([path, name, "\N{EN DASH}" if right is None else f"{right:.1%}", moved])
    body = table(["file", "model", "right", "change"], rows) if rows else ""
    text = "Exact match, or prompts whose every instruction was followed; the change is against the baseline, paired."
    return _section("Tasks", text, body)


def _lm_eval(models: Figures) -> str:
    rows = []
    for name, one in models.items():
        for task, figures in one.get("lm_eval", {}).items():
            for metric, figure in figures.items():
                if metric != "documents" and not metric.endswith(" change"):
                    mean = f"{figure['mean']:.4g}"
                    moved = (
                        _try(_interval("{:+.3f}", f"{metric} change"), figures) if f"{metric} change" in figures else ""
                    )
                    between = f"[{figure['low']:.4g}, {figure['high']:.4g}]" if "low" in figure else ""
                    rows.append([task, metric, name, Figure(mean), between, moved, figures["documents"]])
    header = ["task", "figure", "model", "value", "95 %", "change", "documents"]
    text = (
        "lm-eval's own figures, put to each model as its tasks write them; the change is against the baseline, paired."
    )
    return _section("lm-eval", text, table(header, sorted(rows, key=lambda row: row[:2])) if rows else "")


def _diversity(models: Figures) -> str:
    body = _by_model(
        models,
        "replies",
        {
            "tokens": _number("{:.1f}", "tokens"),
            "words": _number("{:.1f}", "words"),
            "distinct-1": _number("{:.3f}", "distinct_1"),
            "distinct-2": _number("{:.3f}", "distinct_2"),
            "said again in a reply": _share("repeated_in_reply"),
            "self-similarity": _number("{:.3f}", "self_similarity"),
            "empty": _share("empty"),
            "at the limit": _share("at_cap"),
        },
    )
    flags = [
        (name, flag["sentence"]) for name, one in models.items() for flag in one.get("changes", {}).get("collapse", ())
    ]
    body += "".join(f'<p class="warn">{html(name)}: {html(sentence)}</p>' for name, sentence in flags)
    return _section("Replies", "Whether a model has begun to say the same thing, to loop, or to fall silent.", body)


def _samples(samples: Sequence[Figures]) -> str:
    parts = []
    for sample in samples:
        asked = "\n\n".join(str(turn["content"]) for turn in sample["prompt"])
        replies = "".join(
            f"<div><h4>{html(name)}</h4><pre>{html('(no reply)' if text is None else text)}</pre></div>"
            for name, text in sample["replies"].items()
        )
        parts.append(f'<div class="sample"><pre>{html(asked)}</pre><div class="replies">{replies}</div></div>')
    return _section(
        "Replies side by side", "Spread evenly over the prompts; all of them are in samples.jsonl.", "".join(parts)
    )
