"""Whatever a row holds, a reader gives sound records made of the row's own texts, or refuses; it never breaks."""

import copy
import json
from collections.abc import Mapping

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align.config.errors import UserError
from align.config.schema import Ties
from align.data.converting import READ_AS
from align.data.formats import FORMATS, as_records, find_format
from align.data.quality import check_record
from align.data.records import Message, Ranking, RowRefused
from tests.data import test_formats, test_formats_ranked

EXAMPLES = [*test_formats.EXAMPLES, *test_formats_ranked.EXAMPLES]
CALL = '{"name": "find", "arguments": {"what": ["x", 1]}}'
TALK = [
    {"role": "user", "content": "ask"},
    {"role": "assistant", "content": [{"type": "tool_call", "value": CALL}, {"type": "thinking", "text": "hm"}]},
    {"role": "tool", "content": "found", "name": "find"},
    {"role": "assistant", "content": "told", "tool_calls": [{"id": "1", "function": json.loads(CALL)}]},
]
SHAREGPT = [
    {"from": "human", "value": "ask"},
    {"from": "function_call", "value": CALL},
    {"from": "observation", "value": "found"},
    {"from": "gpt", "value": "told"},
]
WITH_TOOLS = [
    ("messages", {"messages": TALK, "tools": [{"name": "find"}]}),
    ("sharegpt", {"conversations": SHAREGPT, "tools": '[{"name": "find"}]'}),
]
ROWS = {name: [row for found, row, *_ in [*EXAMPLES, *WITH_TOOLS] if found == name] for name in FORMATS}

TEXTS = [
    *("", " ", "\n", "x", "Yes.", "1", "2", "tie", "nan", "1e999", "-0", "user", "tool", "assistant", "gpt", "text"),
    *("\n\nHuman: a\n\nAssistant: b", "\n\nAssistant: b", "\n\nHuman:", "half \ud800", "\ufeff", "\x00", "{{name}}"),
    *(CALL, f"[{CALL}]", "[]", "{}", "null", "[1]", '{"name": "f", "arguments": "\\ud800"}', '{"a": NaN}', "[" * 9000),
    *("###The instruction to evaluate:", "###Response to evaluate: ###Score Rubrics:"),
]
NUMBERS = [0, 1, 2, 3, -1, 10**400, -(10**30), 0.0, 1.0, 0.5, 1e308, float("nan"), float("inf")]
TEXT = st.sampled_from(TEXTS) | st.text(st.characters(), max_size=5)
LEAVES = st.sampled_from([None, True, False, *NUMBERS]) | TEXT
KEYS = sorted({key for rows in ROWS.values() for row in rows for key in row} | {"role", "content", "text", "rank"})
JUNK = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYS, "type", "value"]), inner),
    max_leaves=6,
)


def places(value, path=()):
    """Paths to everything in a JSON value but the value itself."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@st.composite
def hostile(draw, name):
    """A good row of a format with up to three of its parts replaced, dropped or added to; or fields of junk."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.dictionaries(st.sampled_from(KEYS), JUNK, max_size=6))
    row = copy.deepcopy(draw(st.sampled_from(ROWS[name])))
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(row))
        if not found:
            break
        *outer, key = draw(st.sampled_from(found))
        inside = row
        for step in outer:
            inside = inside[step]
        action = draw(st.sampled_from(["replace", "replace", "drop", "add"]))
        if action == "replace":
            inside[key] = draw(TEXT | JUNK if isinstance(inside[key], str) else JUNK)
        elif action == "drop":
            del inside[key]
        elif isinstance(inside, dict):
            inside[draw(st.sampled_from(KEYS))] = draw(JUNK)
        else:
            inside.append(draw(JUNK | st.just(inside[key])))
    return row


def texts_in(value):
    """All texts in a row, those inside JSON texts too; of a whole number its digits, as a label is read."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from texts_in(inner)
            yield str(key)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_in(inner)
    elif type(value) is int:
        yield str(value)
    elif isinstance(value, str):
        yield value
        try:
            yield from texts_in(json.loads(value))
        except (ValueError, RecursionError, AttributeError):
            return


def made_of(text, leaves):
    """True if a text is a piece of a leaf, or leaves one after another with blanks between."""
    text = text.strip()
    if any(text in leaf for leaf in leaves):
        return True
    whole = {leaf.strip() for leaf in leaves} - {""}
    reached = {0}
    for start in range(len(text)):
        if start in reached:
            reached |= {start + len(leaf) for leaf in whole if text.startswith(leaf, start)}
            reached |= {start + 1} if text[start].isspace() else set()
    return len(text) in reached


def messages_in(record):
    for value in vars(record).values():
        if isinstance(value, Message):
            yield value
        elif isinstance(value, tuple):
            yield from (item for item in value if isinstance(item, Message))


def assert_of_the_row(record, row):
    leaves = list(texts_in(row))
    for message in messages_in(record):
        assert made_of(message.content, leaves), message
        assert made_of(message.reasoning, leaves), message
        assert all(call.name in leaves for call in message.tool_calls)
        json.dumps(message.as_dict(), ensure_ascii=False, allow_nan=False).encode()
    for tool in getattr(record, "tools", ()):
        assert json.loads(tool)["function"]["name"] in leaves


def checked(made):
    for record in made:
        try:
            if not isinstance(record, RowRefused):
                check_record(record)
                yield record
        except RowRefused as error:
            assert error.reason.isidentifier()
            assert len(error.detail) < 300


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_becomes_records_of_its_own_texts_or_is_refused(name):
    @settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(row=hostile(name), ties=st.sampled_from(Ties))
    def holds(row, ties):
        before = copy.deepcopy(row)
        for wanted, able in READ_AS.items():
            if FORMATS[name].record not in able:
                continue
            try:
                made = as_records(FORMATS[name], wanted, row, ties=ties)
            except RowRefused as error:
                assert error.reason.isidentifier()
                continue
            assert made
            for record in checked(made):
                assert wanted is None or type(record) in ((wanted,) if wanted is not Ranking else READ_AS[Ranking])
                assert_of_the_row(record, row)
        assert repr(row) == repr(before)

    holds()


@settings(max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_format_is_found_for_hostile_rows_or_refused_in_one_line(data):
    names = data.draw(st.lists(st.sampled_from(list(FORMATS)), min_size=1, max_size=3))
    rows = [data.draw(hostile(name)) for name in names]
    for wanted in READ_AS:
        try:
            assert find_format(rows, wanted, "data.x=y").name in FORMATS
        except UserError as error:
            assert str(error).startswith("data.x=y: ")


def test_a_deep_tree_is_read():
    tree = test_formats_ranked.turn("z", "assistant")
    for depth in range(2999, 0, -1):
        tree = test_formats_ranked.turn(f"{depth}", "prompter" if depth % 2 else "assistant", tree)
    with pytest.raises(RowRefused, match="nothing_to_compare"):
        as_records(FORMATS["oasst_tree"], None, tree, ties=Ties.keep)
