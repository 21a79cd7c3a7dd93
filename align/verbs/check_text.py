"""The data report for a terminal: at most some forty lines a slot."""

import re
from typing import Any

SHOWN_ROWS = 3
ALWAYS_SAID = ("chosen_longer", "near_duplicates")
"""Findings that say something where nothing was found too."""
ORIGIN = re.compile(r"(.*?)(?::| row )(\d+)")
FOLDERS = re.compile(r"\S*/(?!$)")


def check_text(report: dict[str, Any]) -> str:
    """The whole report as lines, the verdict first."""
    parts = [[report["verdict"]["text"]]]
    parts += [slot_lines(slot) for slot in report["slots"]]
    parts += [[f"data.{entry['slot']} ({entry['stage']}): {entry['why']}"] for entry in report["not_checked"]]
    return "\n\n".join("\n".join(lines) for lines in parts)


def slot_lines(slot: dict[str, Any]) -> list[str]:
    """One slot: rows, what was left out and why, findings, lengths, and what the limit costs."""
    lines = [f"data.{slot['slot']} ({slot['stage']})"]
    lines += [f"  {path} read as {name}" for path, name in slot["formats"].items()]
    lines.append(f"  {counts_line(slot)}")
    reasons = [
        (f"{reason['count']:,}", reason["reason"], _first(reason["rows"], reason["count"]), f"({reason['detail']})")
        for reason in slot["left_out"]
    ]
    lines += _aligned(reasons, "><<<")
    lines += [f"  {_mark(finding)} {finding['text']}{_at(finding)}" for finding in worth_saying(slot)]
    if compared := no_overlap(slot):
        lines.append(f"       no overlap with {', '.join(compared)}: no common prompt, no 13 words in a row")
    if slot["lengths"]:
        head = ("tokens", "p50", "p95", "p99", "max", "mean")
        lines += _aligned([head, *(length_row(name, figures) for name, figures in slot["lengths"].items())], "<>>>>>")
    if slot["limit"]:
        lines.append(f"  {_mark(slot['limit'])} {limit_line(slot)}")
    return lines


def counts_line(slot: dict[str, Any]) -> str:
    """Rows read, kept, held out and left out, in one line."""
    left_out = sum(reason["count"] for reason in slot["left_out"])
    made = "" if slot["made"] == slot["read"] else f" that make {slot['made']:,}"
    use = "prompts" if slot["slot"] == "prompts" else "to train on"
    held_out = "" if slot["slot"] == "prompts" and not slot["held_out"] else f", {slot['held_out']:,} held out"
    weight = f", {slot['sampled_out']:,} left out by weight" if slot["sampled_out"] else ""
    return f"{slot['read']:,} rows{made}: {slot['kept']:,} {use}{held_out}, {left_out:,} left out{weight}"


def worth_saying(slot: dict[str, Any]) -> list[dict[str, Any]]:
    """The findings that found something, warnings first."""
    found = [f for f in slot["findings"] if f["count"] or f["name"] in ALWAYS_SAID]
    return sorted(found, key=lambda finding: finding["level"] != "warn")


def no_overlap(slot: dict[str, Any]) -> list[str]:
    """The sets that were compared with the rows, and of which nothing was found in them."""
    counts: dict[str, int] = {}
    for finding in slot["findings"]:
        kind, _, name = finding["name"].partition("/")
        if kind.startswith("overlap_"):
            counts[name] = counts.get(name, 0) + finding["count"]
    return [name for name, count in counts.items() if not count]


def length_row(name: str, figures: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table of lengths."""
    return (name, *(f"{figures[key]:,}" for key in ("p50", "p95", "p99", "max")), f"{figures['mean']:,.0f}")


def limit_line(slot: dict[str, Any]) -> str:
    """What max_tokens costs, in one line."""
    limit = slot["limit"]
    if slot["slot"] == "text":
        return f"max_tokens={limit['max_tokens']:,}: longer documents are cut into pieces, nothing is left out"
    if slot["slot"] == "prompts":
        return (
            f"max_tokens - max_new_tokens = {limit['max_tokens']:,} leaves room for a completion; it leaves out "
            f"{limit['rows']:,} longer prompts ({limit['share_of_rows']:.1%})"
        )
    return (
        f"max_tokens={limit['max_tokens']:,} leaves out {limit['rows']:,} rows ({limit['share_of_rows']:.1%}) and "
        f"{limit['tokens_lost']:,} answer tokens ({limit['share_of_tokens']:.1%})"
    )


def _mark(entry: dict[str, Any]) -> str:
    return "WARN" if entry["level"] == "warn" else "    "


def _at(finding: dict[str, Any]) -> str:
    if finding["level"] != "warn" or not finding["rows"]:
        return ""
    return f" ({_first(finding['rows'], finding['count'])})"


def _first(rows: list[str], count: int) -> str:
    return places(rows[:SHOWN_ROWS]) + (", ..." if count > SHOWN_ROWS else "")


def places(rows: list[str]) -> str:
    """Origins with their file named once, without its folders: `pairs.jsonl: 3, 8, 12`."""
    by_file: dict[str, list[str]] = {}
    for row in rows:
        found = ORIGIN.fullmatch(row)
        file, number = found.groups() if found else ("", FOLDERS.sub("", row))
        by_file.setdefault(FOLDERS.sub("", file), []).append(number)
    return "; ".join(f"{file}{': ' if file else ''}{', '.join(numbers)}" for file, numbers in by_file.items())


def _aligned(table: list[tuple[str, ...]], sides: str) -> list[str]:
    """Cells under each other, each column to its side: `<` or `>`."""
    if not table:
        return []
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ("  ".join(map(format, row, map("{}{}".format, sides, widths))) for row in table)
    return [f"    {line}".rstrip() for line in lines]
