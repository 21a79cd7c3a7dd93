"""Every method in every stage, sharded or not, with and without checkpointing and packing: works, or is refused.

docs/adapters.md has the table that this makes, with ALIGN_SLOW_TESTS=1 ALIGN_WRITE_TABLE=1.
"""

import os
from importlib.util import find_spec
from itertools import product

import pytest

from tests.adapters.cells import METHODS, STAGES, VIRTUAL, Cell, outcome
from tests.launching import REPO, slow

DOCS = REPO / "docs" / "adapters.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
COLUMNS = {
    "packed": ("none", False, True),
    "padded": ("none", False, False),
    "checkpointing": ("none", True, None),
    "zero2": ("zero2", False, None),
    "zero3": ("zero3", False, None),
}
"""Head of a column -> sharding, checkpointing, and whether rows are packed; None: where they can be."""
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
QUICK = (
    Cell("bottleneck", "dpo"),
    Cell("prompt", "reward"),
)
REFUSED = {
    Cell("prompt", "sft"): "in front of a row, not of each sequence packed into it",
    Cell("prefix", "sft", packed=False, checkpointing=True): "which checkpointing drops",
}


@pytest.mark.parametrize("cell", QUICK, ids=str)
def test_a_cell_works(cell, tmp_path):
    assert outcome(cell, tmp_path / "cell").startswith("works")


@pytest.mark.parametrize("cell", REFUSED, ids=str)
def test_a_cell_is_refused_in_one_line(cell, tmp_path):
    assert REFUSED[cell] in outcome(cell, tmp_path / "cell")


def cells() -> dict[tuple[str, str, str], Cell]:
    """Method, stage, column -> its cell; those without sharding first, because DeepSpeed stays once it is started."""
    return {
        (method, stage, head): Cell(method, stage, *how, method not in VIRTUAL if packed is None else packed)
        for head, (*how, packed) in COLUMNS.items()
        for method, stage in product(METHODS, STAGES)
    }


@slow
@needs_bitsandbytes
@pytest.mark.timeout(7200)
def test_the_table_of_the_docs_is_what_happens(tmp_path):
    found = {place: outcome(cell, tmp_path / str(number)) for number, (place, cell) in enumerate(cells().items())}
    table = as_markdown(found)
    if os.environ.get("ALIGN_WRITE_TABLE"):
        write(table)
    assert table in DOCS.read_text()


def write(table: str) -> None:
    """Put the table where the docs have it."""
    before, _, rest = DOCS.read_text().partition(BEGIN)
    DOCS.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}")


def as_markdown(found: dict[tuple[str, str, str], str]) -> str:
    """The table, and under it the refusals that its letters stand for."""
    refusals: list[str] = []
    head = ["method", "stage", *COLUMNS]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for method, stage in product(METHODS, STAGES):
        said = [found[method, stage, column] for column in COLUMNS]
        names = {f"peft={method}": "peft=METHOD", f"stages.{stage}": "stages.STAGE"}
        for name, word in names.items():
            said = [result.replace(name, word) for result in said]
        row = [shown(result, refusals) for result in said]
        lines.append("| " + " | ".join([method, stage, *row]) + " |")
    notes = [f"* **{letter(place)}** {refusal}" for place, refusal in enumerate(refusals)]
    return "\n".join([*lines, "", *notes])


def shown(result: str, refusals: list[str]) -> str:
    """A cell's words: what works, or the letter of its refusal."""
    if result.startswith("works"):
        return result.removeprefix("works, ") if "," in result else "works"
    if result not in refusals:
        refusals.append(result)
    return f"**{letter(refusals.index(result))}**"


def letter(place: int) -> str:
    """a, b, c ..., z, aa ..."""
    return chr(ord("a") + place) if place < 26 else "a" + chr(ord("a") + place - 26)


def test_the_docs_have_a_row_for_everything_that_can_be_asked_for():
    text = DOCS.read_text()
    for method, stage in product(METHODS, STAGES):
        assert f"| {method} | {stage} |" in text
