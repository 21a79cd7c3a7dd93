"""What the constitutional stage made, as one HTML page: what was kept and why not, principles, judges, traces."""

from collections.abc import Mapping, Sequence
from typing import Any

from align.tracking.page import html, page, table

STYLE = """
.verdict { font-size: 1.25rem; font-weight: 600; margin: .25rem 0 .75rem; }
.trace { border-top: 1px solid var(--line); padding: .75rem 0 1.25rem; }
.trace h4 { margin: .5rem 0 .25rem; font-size: .875rem; color: var(--soft); }
@media screen { .trace pre { max-height: 18rem; overflow-y: auto; } } @media print { .trace { break-inside: avoid; } }
"""
BARS = 10


def constitutional_page(figures: Mapping[str, Any], traces: Sequence[Mapping[str, Any]], title: str, words: str) -> str:
    """The page of a stage. figures: of `align.constitutional.figures`; traces: lines of trace.jsonl to show."""
    parts = [f"<h1>{html(title)}</h1>", f'<p class="verdict">{html(_verdict(figures))}</p>']
    parts += [f'<p class="soft">{html(words)}</p>', *_kept(figures), *_left_out(figures), *_principles(figures)]
    parts += [*_judge(figures["pairs"]), *_spent(figures), *_traces(traces)]
    return page(title, "\n".join(parts), STYLE)


def _verdict(figures: Mapping[str, Any]) -> str:
    made, pairs = figures["demonstrations"], figures["pairs"]
    return (
        f"{made['made']:,} demonstrations of {figures['prompts']:,} prompts ({made['of_prompts']:.0%} of them), "
        f"{pairs['judged']:,} judged pairs"
    )


def _kept(figures: Mapping[str, Any]) -> list[str]:
    rounds, made, refusals, words = (figures[name] for name in ("rounds", "demonstrations", "refusals", "words"))
    rows = [
        ["critiques", f"{rounds['critiques']:,}"],
        ["of them found a flaw", _percent(rounds["flaws"], rounds["critiques"])],
        ["of them without either mark, counted as a flaw", _percent(rounds["without_verdict"], rounds["critiques"])],
        ["revisions accepted", _percent(rounds["accepted"], rounds["flaws"])],
        ["prompts whose first reply was kept as it was", f"{made['kept_as_they_were']:,}"],
        ["helpful rows mixed in", f"{made['helpful_mixed_in']:,}"],
        [
            "replies that open like a refusal, first and learnt",
            f"{refusals['initial']:.1%} \N{RIGHTWARDS ARROW} {refusals['targets']:.1%}",
        ],
        ["words of a reply, first and learnt", f"{words['initial']:.1f} \N{RIGHTWARDS ARROW} {words['targets']:.1f}"],
    ]
    return ["<h2>What was kept</h2>", table(["", ""], rows)]


def _left_out(figures: Mapping[str, Any]) -> list[str]:
    kinds = {
        "prompts": figures["left_out"],
        "revisions": figures["rounds"]["left_out"],
        "sampled replies": figures["replies_left_out"],
        "pairs": figures["pairs"]["failed"],
    }
    rows = [[kind, reason, count] for kind, reasons in kinds.items() for reason, count in reasons.items()]
    if not rows:
        return []
    note = '<p class="soft">Each is a line of bad_rows.jsonl, with its text.</p>'
    return ["<h2>What was left out</h2>", table(["what", "reason", "count"], rows), note]


def _principles(figures: Mapping[str, Any]) -> list[str]:
    if not figures["principles"]:
        return []
    rows = [
        [
            name, one["critiques"], f"{one['flaws']:.0%}", f"{one['accepted']:.0%}", one["judged"], f"{one['p']:.2f}",
            f"{one['from_the_others']:.2f}", f"{one['position_gap']:+.2f}",
        ]
        for name, one in figures["principles"].items()
    ]  # fmt: skip
    head = ["principle", "critiques", "flaws", "accepted", "judged", "mean p", "from the others", "position gap"]
    note = (
        "Accepted: of the revisions that its critiques asked for. Mean p: that the first reply of a pair is better. "
        "From the others: how far its p is from the mean of all principles. Position gap: how much more the first slot "
        "is liked, whatever stands in it."
    )
    return ["<h2>Principles</h2>", table(head, rows), f'<p class="soft">{html(note)}</p>']


def _judge(pairs: Mapping[str, Any]) -> list[str]:
    if not pairs["judged"]:
        return []
    rows = [
        ["mean probability of the chosen reply", f"{pairs['p_chosen']:.3f}"],
        ["undecided pairs (within 0.05 of 0.5)", f"{pairs['undecided']:.1%}"],
        ["disagreement between principles (standard deviation)", f"{pairs['disagreement']:.3f}"],
        ["position gap (0: fair, 1: always the first slot)", f"{pairs['position_gap']:+.3f}"],
        ["verdicts that the other order contradicts", f"{pairs['orders_contradict']:.1%}"],
    ]
    counts = [0] * BARS
    for p in pairs["p"]:
        counts[min(int(p * BARS), BARS - 1)] += 1
    spread = [[f"{n / BARS:.1f} to {(n + 1) / BARS:.1f}", count] for n, count in enumerate(counts)]
    return [
        "<h2>The judge</h2>",
        table(["", ""], rows),
        "<h3>Probability that the first reply of a pair is better</h3>",
        table(["p", "pairs"], spread),
    ]


def _spent(figures: Mapping[str, Any]) -> list[str]:
    rows = [
        [step, one["calls"], one["prompt_tokens"], one["new_tokens"], sum(one["failed"].values())]
        for step, one in figures["steps"].items()
    ]
    total = [sum(row[n] for row in rows) for n in range(1, 5)]
    parts = ["<h2>What it took</h2>"]
    parts.append(table(["step", "questions", "tokens read", "tokens written", "failed"], [*rows, ["all", *total]]))
    return parts + ([f"<p>Price: {figures['price']:,.2f}</p>"] if figures["price"] else [])


def _traces(traces: Sequence[Mapping[str, Any]]) -> list[str]:
    if not traces:
        return []
    return [f"<h2>{len(traces)} traces, drawn at random</h2>", *map(_trace, traces)]


def _trace(trace: Mapping[str, Any]) -> str:
    *_, last = trace["conversation"]
    parts = ["<h4>prompt</h4>", _text(last["content"])]
    first = next((one["text"] for one in trace["answers"] if one["step"] == "initial"), None)
    if first is not None:
        parts += ["<h4>first reply</h4>", _text(first)]
    for number, one in enumerate(trace["rounds"], start=1):
        found = "critique" if one["flaw"] else "no flaw"
        heading = f"round {number}, {one['principle']}: {found}"
        parts += [f"<h4>{html(heading)}</h4>", _text(one["critique"])]
        if one["revision"] is not None:
            outcome = f"left out: {one['left_out']}" if one["left_out"] else "accepted"
            p = f", p={one['verdict']['p']:.2f}" if one["verdict"] else ""
            parts += [f"<h4>{html(f'revision, {outcome}{p}')}</h4>", _text(one["revision"])]
    for pair in trace["pairs"]:
        p = f"p={pair['verdict']['p']:.2f}" if pair["verdict"] else f"left out: {pair['left_out']}"
        parts += [f"<h4>{html(f'pair, {p}')}</h4>", _text(pair["first"]), _text(pair["second"])]
    if trace["left_out"]:
        parts.append(f"<p>{html('left out: ' + trace['left_out'])}</p>")
    return f'<div class="trace">{"".join(parts)}</div>'


def _text(text: str) -> str:
    # A newline at the start of <pre> is no part of it, so one is put there.
    return f'<pre dir="auto">\n{html(text)}</pre>'


def _percent(part: float, whole: float) -> str:
    return f"{part:,} ({part / whole:.0%})" if whole else "none"
