"""The report in a real browser: on a telephone, in the dark, on paper, and without a network."""

import pytest

from align.tracking.compare_page import compare_page
from align.tracking.evaluate_page import evaluate_page
from align.tracking.report_page import report_page
from align.tracking.run_folder import read_run
from tests.tracking.browser import CHROMIUM, WHY_NOT, Browser
from tests.tracking.runs_made import entry, hand_run, write_stage

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
NUMBERS = {
    "prompts": 9, "baseline": "base", "verdict": ["dpo against base: better: win 0.63 [0.57, 0.69]"], "reliability": {},
    "oracle": {}, "models": {
        "dpo": {
            "win": {"rate": {"mean": 0.63, "low": 0.57, "high": 0.69}, "wins": 5, "ties": 1, "losses": 3, "missing": 0},
            "text": {"per_word": 1.5, "perplexity": 4.5}, "changes": {},
            "lm_eval": {"a_task_with_a_long_name": {"documents": 9, "acc": {"mean": 0.5, "low": 0.2, "high": 0.8}}},
        }
    },
}  # fmt: skip
LONG = "a_very_long_name_without_a_place_to_break_it_" * 4


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name in ("one", "two"):
        run = hand_run(folder / name)
        told = [{"prompt": LONG, "replies": {"base": LONG, "dpo": f"{LONG} {LONG}"}}]
        inputs = [entry("policy", f"/data/{LONG}/{LONG}", "c" * 64)]
        metrics = {f"judged/{LONG}": 0.5}
        write_stage(run / "score", "score", inputs, rows={"read": 1, "kept": 1}, metrics=metrics, samples=told)
    runs = [read_run(folder / name) for name in ("one", "two")]
    (folder / "report.html").write_text(report_page(runs[0]))
    (folder / "compared.html").write_text(compare_page(runs))
    told = [{"prompt": [{"role": "user", "content": LONG}], "replies": {"base": LONG, "dpo": LONG}}]
    (folder / "evaluated.html").write_text(evaluate_page(NUMBERS, told, LONG))
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("name", ["report.html", "compared.html", "evaluated.html"])
@pytest.mark.parametrize("width", [360, 1100])
def test_a_page_never_scrolls_sideways_says_nothing_and_asks_for_nothing(pages, browser, name, width):
    browser.open(pages / name, width=width)
    assert browser.value("window.innerWidth") == width
    assert browser.value(OVERFLOW) == 0
    assert browser.complaints() == []
    assert browser.requested() == [(pages / name).as_uri()]


def test_the_browser_sees_what_a_bad_page_does(tmp_path, browser):
    bad = '<meta name="viewport" content="width=device-width"><div style="width: 900px">wide</div>'
    (tmp_path / "bad.html").write_text(f"{bad}<script>console.log('said')</script><img src='missing.png'>")
    browser.open(tmp_path / "bad.html", width=360)
    assert browser.value(OVERFLOW) > 500
    assert any("said" in line for line in browser.complaints())
    assert len(browser.requested()) == 2


def test_a_plot_is_wide_enough_to_be_read_on_a_telephone(pages, browser):
    browser.open(pages / "report.html", width=360)
    assert browser.value("document.querySelector('figure svg').getBoundingClientRect().width") > 300


def brightness(browser: Browser, what: str) -> int:
    """Sum of red, green and blue of a colour of the page."""
    colour = browser.value(f"getComputedStyle(document.body).{what}")
    return sum(map(int, colour[colour.index("(") + 1 : -1].split(",")[:3]))


def test_dark_is_dark_and_light_is_light(pages, browser):
    browser.open(pages / "report.html", width=1100, dark=True)
    assert brightness(browser, "backgroundColor") < 150 and brightness(browser, "color") > 600
    browser.open(pages / "report.html", width=1100)
    assert brightness(browser, "backgroundColor") == 765 and brightness(browser, "color") < 150


def test_paper_is_light_whatever_the_screen_and_takes_the_whole_page(pages, browser, tmp_path):
    browser.open(pages / "report.html", width=1100, dark=True)
    browser.print(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes()[:5] == b"%PDF-"
    browser.ask(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    assert brightness(browser, "color") < 150
    assert browser.value("getComputedStyle(document.querySelector('nav')).display") == "none"
    browser.ask("Emulation.setEmulatedMedia", media="")
