"""The data report as one HTML page: the verdict, then each slot with its tables and histograms of lengths."""

from typing import Any

from align.tracking.page import Html, histogram, html, legend, page, table
from align.verbs.check_lengths import ANSWERS
from align.verbs.check_text import counts_line, limit_line, places, worth_saying

STYLE = """
.verdict { font-size: 1.25rem; font-weight: 600; margin: .25rem 0 0; }
td .rows { color: var(--soft); font-size: .875rem; overflow-wrap: anywhere; } td { max-width: 36rem; }
code.path { overflow-wrap: anywhere; }
"""
MARKS = {"warn": Html('<span class="warn">warning</span>'), "info": Html('<span class="soft">info</span>')}
NO_ROWS = Html('<p class="soft">None.</p>')


def check_page(report: dict[str, Any]) -> str:
    """The page of a report as `do=check` writes it in JSON."""
    verdict = report["verdict"]
    parts = [
        f"<h1>Data of {html(report['recipe'])}</h1>",
        f'<p class="verdict {verdict["level"]}">{html(verdict["text"])}</p>',
        *(slot_section(slot) for slot in report["slots"]),
        *(_not_checked(entry) for entry in report["not_checked"]),
        f'<p class="soft">align {html(report["align"])}</p>',
    ]
    return page(f"Data of {report['recipe']}", "\n".join(parts), STYLE)


def slot_section(slot: dict[str, Any]) -> str:
    """One slot: what it was read as, rows, findings, lengths."""
    formats = [[Html(f'<code class="path">{html(path)}</code>'), name] for path, name in slot["formats"].items()]
    refusal = f'<p class="bad">{html(slot["refusal"])}</p>' if slot["refusal"] else ""
    model = f", tokens of <code>{html(slot['model'])}</code>" if slot["model"] else ""
    return "\n".join(
        [
            _heading(slot),
            f"<p>{html(counts_line(slot))}{model}.</p>{refusal}",
            table(["source", "read as"], formats),
            "<h3>Left out</h3>",
            _left_out(slot),
            "<h3>Findings</h3>",
            _findings(slot),
            _lengths(slot),
        ]
    )


def _left_out(slot: dict[str, Any]) -> str:
    if not slot["left_out"]:
        return NO_ROWS
    rows = [
        [Html(f"<code>{html(r['reason'])}</code>"), r["count"], _with_rows(r["detail"], r["rows"], r["count"])]
        for r in slot["left_out"]
    ]
    note = f'<p class="soft">All of them, with their content: <code>{html(slot["bad_rows_file"])}</code></p>'
    return table(["reason", "rows", "an example, and where"], rows) + note


def _findings(slot: dict[str, Any]) -> str:
    found = worth_saying(slot)
    rows = [[MARKS[f["level"]], f["count"], _with_rows(f["text"], f["rows"], f["count"])] for f in found]
    others = [f"<code>{html(f['name'])}</code>" for f in slot["findings"] if f not in found]
    note = f'<p class="soft">Looked for and not found: {", ".join(others)}</p>' if others else ""
    return (table(["", "rows", "what was found"], rows) if rows else NO_ROWS) + note


def _with_rows(text: str, rows: list[str], count: int) -> Html:
    """A sentence, and under it where: the file once, then its lines."""
    if not rows:
        return Html(html(text))
    more = " …" if count > len(rows) else ""
    return Html(f'{html(text)}<br><span class="rows">{html(places(rows))}{more}</span>')


def _lengths(slot: dict[str, Any]) -> str:
    columns, limit = slot["lengths"], slot["limit"]
    if not columns:
        return ""
    names = ("p50", "p95", "p99", "max", "mean")
    rows = [[name, *(figures[key] for key in names)] for name, figures in columns.items()]
    warn = ' class="warn"' if limit["level"] == "warn" else ""
    charts = [
        _chart({name: columns[name]}, limit if name == "row" else None) for name in columns if name not in ANSWERS
    ]
    if ANSWERS[0] in columns:
        charts.append(_chart({name: columns[name] for name in ANSWERS}, None))
    cost = f"<p{warn}>{html(limit_line(slot))}.</p>"
    return f"<h3>Lengths in tokens</h3>{table(['', *names], rows)}{cost}{''.join(charts)}"


def _chart(columns: dict[str, dict[str, Any]], limit: dict[str, Any] | None) -> str:
    """One histogram; columns in one chart share their bins."""
    width = next(iter(columns.values()))["bin_tokens"]
    series = {name: figures["bins"] for name, figures in columns.items()}
    longest = max(figures["max"] for figures in columns.values())
    open_end = any(figures["open_end"] for figures in columns.values())
    most = limit["max_tokens"] if limit else None
    svg = histogram(series, width, unit="tokens", open_end=open_end, limit=most)
    end = f"; the last bin holds all up to {longest:,}" if open_end else ""
    end += f"; the limit is {most:,}" if most else ""
    caption = f"{legend(list(series))}: rows by tokens, {width:,} to a bin{end}"
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _not_checked(entry: dict[str, Any]) -> str:
    kind = "bad" if entry["refusal"] else "soft"
    return f'{_heading(entry)}<p class="{kind}">{html(entry["why"])}</p>'


def _heading(entry: dict[str, Any]) -> str:
    return f'<h2>data.{html(entry["slot"])} <span class="soft">({html(entry["stage"])})</span></h2>'
