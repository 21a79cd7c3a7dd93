"""The page of the data report: one file, everything escaped, sound as HTML, histograms true to their counts."""

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from align.tracking.page import Html, histogram, table
from align.verbs.check_page import check_page
from align.verbs.check_text import check_text, places

VOID = {"meta", "br"}


def slot(**more):
    figures = {"rows": 6, "mean": 20.5, "p50": 20, "p95": 40, "p99": 44, "max": 44, "bin_tokens": 10, "open_end": False}
    return {
        "stage": "dpo",
        "slot": "preferences",
        "model": "tiny-sft",
        "formats": {"/data/<b>pairs</b>.jsonl": "preference"},
        **dict.fromkeys(("read", "made"), 10),
        **{"kept": 5, "held_out": 1, "sampled_out": 0, "refusal": None, "bad_rows_file": "bad_rows.preferences.jsonl"},
        "left_out": [
            {"reason": "empty_completion", "count": 4, "rows": ["a.jsonl:3"], "detail": "'<x>' & co", "bad": True}
        ],
        "findings": [
            finding("ties", 0, "info"),
            finding("repeated_prompts", 2, "info"),
            finding("placeholders", 1_234, "warn"),
        ],
        "lengths": {name: figures | {"bins": [1, 2, 2, 0, 1]} for name in ("prompt", "chosen", "rejected", "row")},
        "limit": {
            **{"max_tokens": 45, "rows": 4, "share_of_rows": 0.4, "tokens_lost": 300, "share_of_tokens": 0.2},
            "level": "warn",
        },
        **more,
    }


def finding(name, count, level):
    return {"name": name, "count": count, "of": 10, "rows": ["d/a.jsonl:7"], "level": level, "text": f"{count} {name}"}


def report(*slots, level="warn", not_checked=()):
    verdict = {"level": level, "text": "Usable, 2 warnings"}
    return {
        **{"schema": 1, "align": "0.1.0", "recipe": "dpo<script>", "verdict": verdict},
        **{"slots": list(slots), "not_checked": list(not_checked)},
    }


class Balanced(HTMLParser):
    """Fails on a tag that is closed in the wrong place or never."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.links = [], [], []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(page):
    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    return parser


def test_the_page_is_whole_escaped_and_needs_no_network():
    page = check_page(report(slot()))
    parser = parsed(page)
    assert not parser.links and "url(" not in page and "<script" not in page and "<b>" not in page
    text = " ".join(parser.text)
    assert "'<x>' & co" in text and "/data/<b>pairs</b>.jsonl" in text and "1,234 placeholders".replace(",", "") in text
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page and "@media print" in page


def test_the_verdict_comes_first_and_warnings_before_the_rest():
    page = check_page(report(slot()))
    assert page.index("Usable, 2 warnings") < page.index("data.preferences")
    assert page.index("1234 placeholders") < page.index("2 repeated_prompts") < page.index("Looked for and not found")
    assert "<code>ties</code>" in page


def test_a_refusal_and_a_slot_that_is_not_there_are_said():
    waiting = {"stage": "sft", "slot": "demonstrations", "why": "<later>", "refusal": None}
    page = check_page(report(slot(refusal="too <many>"), level="bad", not_checked=[waiting]))
    parsed(page)
    assert "too &lt;many&gt;" in page and "&lt;later&gt;" in page


def test_a_slot_without_lengths_or_findings_still_makes_a_page():
    bare = slot(
        slot="prompts", held_out=0, model=None, lengths={}, limit=None, left_out=[], findings=[], bad_rows_file=None
    )
    parsed(check_page(report(bare)))
    assert "10 rows: 5 prompts, 0 left out" in check_text(report(bare))


def test_the_text_marks_warnings_and_aligns_the_lengths():
    lines = check_text(report(slot())).splitlines()
    assert lines[0] == "Usable, 2 warnings"
    assert any(line.startswith("  WARN 1234 placeholders (a.jsonl: 7") for line in lines)
    assert any(line.startswith("  WARN max_tokens=45 leaves out 4 rows (40.0%)") for line in lines)
    table_lines = [line for line in lines if line.split()[:1] in (["tokens"], ["chosen"], ["row"])]
    assert len({len(line) for line in table_lines}) == 1 and len(table_lines) == 3


@pytest.mark.parametrize(
    "rows, text",
    [
        (["d/a.jsonl:3", "d/a.jsonl:8", "b.json row 2"], "a.jsonl: 3, 8; b.json: 2"),
        (["d/a.jsonl:9 ~ 4 (0.93)"], "a.jsonl:9 ~ 4 (0.93)"),
        (["d/a.jsonl:9 ~ e/b.jsonl:4 (1.00)"], "a.jsonl:9 ~ b.jsonl:4 (1.00)"),
    ],
)
def test_places_name_a_file_once(rows, text):
    assert places(rows) == text


def heights(svg, place):
    """How high the steps of one series rise above its ground line."""
    path = re.search(rf'class="series-{place}" d="([^"]*)"', svg).group(1)
    ground = float(re.match(r"M\d+ ([\d.]+)", path).group(1))
    return [round(ground - float(step), 1) for step in re.findall(r"V([\d.]+)H", path)]


def test_a_histogram_has_a_step_for_every_bin_in_proportion():
    svg = histogram({"chosen": [4, 0, 2], "rejected": [1]}, 10, unit="tokens", limit=15)
    ElementTree.fromstring(svg)
    full, nothing, half = heights(svg, 0)
    assert nothing == 0 and full == pytest.approx(2 * half, abs=0.1) and full > 100
    assert heights(svg, 1) == [pytest.approx(full / 4, abs=0.1), 0, 0]
    assert "limit 15" in svg


def test_a_limit_beyond_the_scale_is_not_drawn():
    assert "limit" not in histogram({"a": [1, 2]}, 10, unit="tokens", limit=21)
    assert "limit" not in histogram({"a": [1, 2]}, 10, unit="tokens", limit=15, open_end=True)
    ElementTree.fromstring(histogram({"a": [0]}, 1, unit="tokens"))


def test_a_table_escapes_text_and_sets_numbers_to_the_right():
    text = table(["<name>", "rows"], [["a & b", 12_345], [Html("<code>c</code>"), 6]])
    assert "&lt;name&gt;" in text and "a &amp; b" in text and "<code>c</code>" in text
    assert '<th class="number">rows</th>' in text and '<td class="number">12,345</td>' in text
