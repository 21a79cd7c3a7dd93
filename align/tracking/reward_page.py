"""How well a reward model judges held-out pairs, as one HTML page; made from `align.losses.calibration.summary`."""

from collections.abc import Callable, Sequence
from typing import Any

from align.tracking.page import Html, html, page, table

Row = dict[str, Any]

STYLE = """
.verdict { font-size: 1.25rem; font-weight: 600; margin: .25rem 0 0; }
svg .diagonal { stroke: var(--soft); stroke-dasharray: 4 3; }
"""

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 360, 48, 8, 28, 44

SIDES = {-1: "rejected is longer", 0: "equally long", 1: "chosen is longer"}


def reward_page(summary: dict[str, Any], title: str) -> str:
    """The page of a summary: accuracy first, then calibration, then accuracy by margin and by length."""
    figures, tables = summary["figures"], summary["tables"]
    parts = [
        f"<h1>{html(title)}</h1>",
        f'<p class="verdict">{html(_verdict(figures))}</p>',
        f'<p class="soft">{html(_pairs_line(figures))}</p>',
        "<h2>Calibration</h2>",
        f"<p>{html(_calibration_line(figures))}</p>",
        _reliability_figure(tables["reliability"]),
        "<h2>Accuracy by score margin</h2>",
        "<p>How far apart the model puts the two answers. A sound model is right more often where it is more sure.</p>",
        _accuracy_table("|chosen - rejected|", tables["by_score_margin"], lambda row: _range(row, "{:.2f}")),
        _label_margins(tables["by_label_margin"]),
        "<h2>Accuracy by length</h2>",
        f"<p>{html(_length_line(figures))}</p>",
        _accuracy_table("answers", tables["by_longer_side"], lambda row: SIDES[int(row["smallest"])]),
        "<p></p>",
        _accuracy_table(
            "chosen - rejected, tokens", tables["by_length_difference"], lambda row: _range(row, "{:,.0f}")
        ),
    ]
    return page(title, "\n".join(parts), STYLE)


def _verdict(figures: Row) -> str:
    low, high = figures["accuracy_low"], figures["accuracy_high"]
    return f"Accuracy {figures['accuracy']:.1%} (95% interval {low:.1%} to {high:.1%})"


def _pairs_line(figures: Row) -> str:
    line = f"{figures['pairs'] - figures['pairs_tied']:,} held-out pairs"
    if figures["pairs_tied"]:
        line += f"; {figures['pairs_tied']:,} ties beside them, which have no right answer"
    if figures["pairs_not_finite"]:
        line += f"; {figures['pairs_not_finite']:,} left out, with scores that are not finite"
    return f"{line}. The interval takes pairs as independent."


def _calibration_line(figures: Row) -> str:
    return (
        f"Expected calibration error {figures['ece']:.3f} (0 is calibrated; chance alone lifts it a little), "
        f"Brier score {figures['brier']:.3f} (0 is best, 0.25 is what always saying 50% gets)."
    )


def _length_line(figures: Row) -> str:
    correlations = [
        f"{name} {figures[key]:+.2f}"
        for name, key in (("Pearson", "length_pearson"), ("Spearman", "length_spearman"))
        if key in figures
    ]
    if not correlations:
        return "Scores or lengths do not vary, so they have no correlation."
    line = f"Correlation of score with length in tokens: {', '.join(correlations)}."
    if "model_takes_longer" in figures:
        model, labels = figures["model_takes_longer"], figures["labels_take_longer"]
        line += (
            f" Of two unequally long answers the model prefers the longer in {model:.1%}, the labels in {labels:.1%}."
        )
    return line


def _label_margins(rows: Sequence[Row]) -> str:
    if len(rows) < 2:
        return ""
    shown = _accuracy_table("margin of the label", rows, lambda row: _range(row, "{:.3g}"))
    return f"<h2>Accuracy by margin of the label</h2>\n<p>How much better people found the chosen answer.</p>\n{shown}"


def _accuracy_table(header: str, rows: Sequence[Row], name: Callable[[Row], str]) -> str:
    shown = [
        [name(row), row["count"], *(round(100 * row[key], 1) for key in ("accuracy", "low", "high"))] for row in rows
    ]
    return table([header, "pairs", "right, %", "from, %", "to, %"], shown)


def _range(row: Row, style: str) -> str:
    smallest, largest = (style.format(row[key]).replace("-", "\N{MINUS SIGN}") for key in ("smallest", "largest"))
    return smallest if smallest == largest else f"{smallest} to {largest}"


def _reliability_figure(bins: Sequence[Row]) -> Html:
    caption = (
        "Bars: how often the side that the model prefers is the chosen one, by how sure the model is of it "
        "(sigmoid of the scores' difference). A point stands at the mean confidence of its bin, its line is the 95% "
        "interval. Dashed: calibrated. Bars below it: too sure; above it: not sure enough. On top: pairs in the bin, "
        "ties among them as half right."
    )
    return Html(f"<figure>{reliability_plot(bins)}<figcaption>{html(caption)}</figcaption></figure>")


def reliability_plot(bins: Sequence[Row]) -> str:
    """Rows of `reliability_bins` as one SVG: confidence 0.5 to 1 across, share of right answers 0 to 1 up."""
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
        'aria-label="Reliability: share of right answers by confidence">',
        *(_level(share / 4) for share in range(5)),
        *(_tick(0.5 + tenth / 10) for tenth in range(6)),
        *(_bar(row) for row in bins),
        f'<line class="diagonal" x1="{_x(0.5)}" y1="{_y(0.5)}" x2="{_x(1)}" y2="{_y(1)}"/>',
        *(_point(row) for row in bins),
        f'<text x="{_x(0.75)}" y="{HEIGHT - 6}" text-anchor="middle">confidence of the model</text>',
    ]
    return "".join([*parts, "</svg>"])


def _x(confidence: float) -> float:
    return round(LEFT + (confidence - 0.5) * 2 * (WIDTH - LEFT - RIGHT), 1)


def _y(share: float) -> float:
    return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)


def _level(share: float) -> str:
    return (
        f'<line x1="{_x(0.5)}" x2="{_x(1)}" y1="{_y(share)}" y2="{_y(share)}"/>'
        f'<text x="{LEFT - 6}" y="{_y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>'
    )


def _tick(confidence: float) -> str:
    side = "end" if confidence == 1 else "middle"
    return f'<text x="{_x(confidence)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="{side}">{confidence:.0%}</text>'


def _bar(row: Row) -> str:
    left, right = _x(row["start"]) + 1, _x(row["end"]) - 1
    return (
        f'<path class="series-0" d="M{left:.1f} {_y(0)}V{_y(row["accuracy"])}H{right:.1f}V{_y(0)}Z"/>'
        f'<text x="{(left + right) / 2:.1f}" y="{TOP - 10}" text-anchor="middle">{row["count"]:,}</text>'
    )


def _point(row: Row) -> str:
    x = _x(row["confidence"])
    return (
        f'<line class="series-0" x1="{x}" x2="{x}" y1="{_y(row["low"])}" y2="{_y(row["high"])}"/>'
        f'<circle class="series-0" cx="{x}" cy="{_y(row["accuracy"])}" r="3.5"/>'
    )
