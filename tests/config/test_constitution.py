"""Constitutions: what ships is sound, and each mistake in one's own is named with its line and what to do."""

import dataclasses
import re
import subprocess
import sys

import pytest
import yaml

from align.config import listing
from align.config.constitution import FIELDS, Constitution, Scaffold, Turn, load_constitution
from align.config.errors import UserError
from tests.conftest import REPO

SHIPPED = {"harmlessness": 16, "honesty_helpfulness": 8, "house_style": 6}
GOOD = """\
# A comment.
name: mine
version: 1.10
licence: CC0-1.0
description: A test.
principles:
  - id: kind
    critique: Is it kind?
    revision: Be kind.
    comparison: Which is kinder?
    weight: 2
    tags: [tone]
  - id: short
    critique: Is it short?
    revision: Be short.
    comparison: Which is shorter?
critique_examples:
  - principle: kind
    conversation:
      - {role: user, content: Hi}
    reply: Go away.
    critique: It is rude.
    revision: Hello.
  - principle: short
    conversation:
      - {role: user, content: Hi}
      - {role: assistant, content: Hello.}
      - {role: user, content: Bye}
    reply: Bye.
    critique: ""
judge_examples:
  - principle: kind
    conversation:
      - {role: user, content: Hi}
    first: Hello.
    second: Go away.
    better: first
judge:
  chain_of_thought: true
"""


def load(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return load_constitution(str(file))


def refusal(tmp_path, text):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    said = str(caught.value)
    assert "\n" not in said
    return said.replace(str(tmp_path / "mine.yaml"), "FILE")


def without(line, text=GOOD):
    assert text.count(line) >= 1
    return text.replace(line, "", 1)


def changed(old, new, text=GOOD):
    assert text.count(old) >= 1, old
    return text.replace(old, new, 1)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_constitution_is_complete(name):
    found = load_constitution(name)
    assert (found.name, found.licence, len(found.principles)) == (name, "Apache-2.0", SHIPPED[name])
    flawless = [example for example in found.critique_examples if not example.critique]
    assert 4 <= len(found.critique_examples) <= 6 and 1 <= len(flawless) < len(found.critique_examples)
    assert 2 <= len(found.judge_examples) <= 4
    assert len([example for example in found.judge_examples if example.better == "first"]) * 2 == len(
        found.judge_examples
    )
    assert sum(bool(principle.positive) for principle in found.principles) >= len(found.principles) / 2


@pytest.mark.parametrize("name", SHIPPED)
def test_no_text_of_a_shipped_constitution_occurs_twice(name):
    found = load_constitution(name)
    for text in ("critique", "revision", "comparison", "positive", "negative"):
        given = [getattr(principle, text) for principle in found.principles if getattr(principle, text)]
        assert len(set(given)) == len(given)
        openings = [tuple(part.split()[:6]) for part in given] if text == "critique" else []
        assert len(set(openings)) == len(openings)


@pytest.mark.parametrize("name", SHIPPED)
def test_questions_of_a_shipped_constitution_ask_and_requests_request(name):
    for principle in load_constitution(name).principles:
        assert principle.comparison.startswith("Which reply") and principle.comparison.endswith("?")
        assert principle.revision.startswith("Rewrite the ") and "?" not in principle.revision
        assert "?" in principle.critique or "Find" in principle.critique or "Check" in principle.critique


@pytest.mark.parametrize("name", SHIPPED)
def test_an_example_of_a_conversation_with_several_turns_ships(name):
    assert any(len(example.conversation) > 1 for example in load_constitution(name).critique_examples)


def test_names_are_those_of_the_files():
    assert set(SHIPPED) <= set(listing.options("constitution"))
    assert "constitution" not in listing.GROUPS, "these are no options of Hydra's: --help does not list them"


def test_every_key_is_read(tmp_path):
    found = load(tmp_path, GOOD)
    kind, short = found.principles
    assert (kind.id, kind.critique, kind.revision, kind.comparison) == (
        "kind",
        "Is it kind?",
        "Be kind.",
        "Which is kinder?",
    )
    assert (kind.weight, kind.tags, short.weight, short.tags, short.positive) == (2.0, ("tone",), 1.0, (), "")
    rude, good = found.critique_examples
    assert (rude.principle, rude.reply, rude.critique, rude.revision) == ("kind", "Go away.", "It is rude.", "Hello.")
    assert good.conversation == (Turn("user", "Hi"), Turn("assistant", "Hello."), Turn("user", "Bye"))
    assert (good.critique, good.revision) == ("", "")
    (judged,) = found.judge_examples
    assert (judged.first, judged.second, judged.better, judged.principle) == ("Hello.", "Go away.", "first", "kind")
    assert (found.judge.chain_of_thought, found.judge.clamp) == (True, (0.4, 0.6))
    assert (found.name, found.version, found.licence, found.description) == ("mine", "1.10", "CC0-1.0", "A test.")
    assert found.principle("short") is short and found.scaffold == Scaffold()


def test_the_judge_may_have_no_clamp_or_another(tmp_path):
    assert load(tmp_path, GOOD + "  clamp: null\n").judge.clamp is None
    assert load(tmp_path, GOOD + "  clamp: [0.3, 0.8]\n").judge.clamp == (0.3, 0.8)


def test_the_scaffold_is_taken_over_key_by_key(tmp_path):
    text = GOOD + "scaffold:\n  user: 'Asker:'\n  revision: '{{x}} {conversation} {reply} {critique} {request}'\n"
    scaffold = load(tmp_path, text).scaffold
    assert scaffold == dataclasses.replace(
        Scaffold(), user="Asker:", revision="{{x}} {conversation} {reply} {critique} {request}"
    )


def test_the_digest_is_of_the_content_alone(tmp_path):
    plain = load(tmp_path, GOOD).digest
    assert re.fullmatch("[0-9a-f]{64}", plain)
    reordered = yaml.safe_dump(yaml.load(GOOD, yaml.BaseLoader), sort_keys=True).replace("weight: '2'", "weight: 2.0")
    same = [
        GOOD.replace("# A comment.", "# Another."),
        reordered.replace("chain_of_thought: 'true'", "chain_of_thought: true"),
    ]
    same.append(GOOD + "  clamp: [0.4, 0.6]\n")
    assert {load(tmp_path, text).digest for text in same} == {plain}
    others = [
        changed("Be kind.", "Be kinder."),
        changed("weight: 2", "weight: 3"),
        changed("better: first", "better: second"),
        changed("Go away.", "Go."),
        changed("chain_of_thought: true", "chain_of_thought: false"),
        changed("tags: [tone]", "tags: [tune]"),
        changed("content: Bye", "content: So long"),
        GOOD + "scaffold: {user: 'Asker:'}\n",
    ]
    assert len({load(tmp_path, text).digest for text in others} | {plain}) == len(others) + 1


def test_a_constitution_may_be_made_in_code():
    made = Constitution("mine", "1", "CC0-1.0", "A test.", load_constitution("house_style").principles)
    assert made.digest != load_constitution("house_style").digest


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            changed("description: A test.", "descripton: A test."),
            "FILE:5: the file: descripton is not a key; did you mean description?",
        ),
        (changed("    weight: 2", "    wieght: 2"), "FILE:11: principle 1: wieght is not a key; did you mean weight?"),
        (changed("better: first", "winner: first"), "FILE:37: judge example 1: winner is not a key"),
        (changed("id: short", "id: kind"), "FILE:13: id kind is taken already, in line 7; give every principle"),
        (without("    revision: Be kind.\n"), "FILE:7: principle 'kind' has no revision; add revision"),
        (changed("Be kind.", '"  "'), "FILE:9: principle 'kind': revision is empty; write a text"),
        (changed(" Be kind.", ""), "FILE:9: principle 'kind': revision is empty; write a text"),
        (changed("Be kind.", "no"), "FILE:9: principle 'kind': revision (no) is not text; put it in quotes"),
        (changed("Be kind.", "[Be kind.]"), "FILE:9: principle 'kind': revision is not text; put it in quotes"),
        (
            changed("weight: 2", "weight: 0"),
            "FILE:11: principle 'kind': weight=0 is never drawn; write a number above 0",
        ),
        (changed("weight: 2", "weight: -1"), "FILE:11: principle 'kind': weight=-1 is never drawn"),
        (changed("weight: 2", "weight: much"), "FILE:11: principle 'kind': weight=much is not a finite number"),
        (changed("weight: 2", "weight: .inf"), "FILE:11: principle 'kind': weight=.inf is not a finite number"),
        (changed("weight: 2", "weight: .nan"), "FILE:11: principle 'kind': weight=.nan is not a finite number"),
        (changed("weight: 2", "weight: true"), "FILE:11: principle 'kind': weight=true is not a finite number"),
        (changed("weight: 2", 'weight: "2"'), "FILE:11: principle 'kind': weight=2 is not a finite number"),
        (changed("tags: [tone]", "tags: tone"), "FILE:12: principle 'kind': tags is not a list"),
        (changed("tags: [tone]", "tags: [tone, tone]"), "FILE:12: principle 'kind': a tag is empty or given twice"),
        (
            changed("tags: [tone]", "positive: Be kind."),
            "FILE:12: principle 'kind' has positive alone; contrast takes both",
        ),
        (changed("id: kind", "id: be kind"), "FILE:7: principle 1: id 'be kind' is not a name; use letters"),
        (changed("principle: short", "principle: shrot"), "FILE:24: there is no principle shrot; did you mean short?"),
        (changed("    first: Hello.", "    first: Go away."), "FILE:36: judge example 1: both replies are the same"),
        (changed("better: first", "better: both"), "FILE:37: judge example 1: better=both; write first or second"),
        (GOOD[: GOOD.index("principles:")] + "principles: []\n", "FILE:6: there is no principle; write one or more"),
        (GOOD[: GOOD.index("principles:")], "FILE:2: the file has no principles; add principles"),
        (
            changed('critique: ""', "critique: Rude.\n    revision: Goodbye."),
            "FILE:18: every critique example finds a flaw",
        ),
        (changed("    revision: Hello.\n", ""), "FILE:22: critique example 1 has a critique without its revision"),
        (
            changed('critique: ""', 'critique: ""\n    revision: Go.'),
            "FILE:31: critique example 2 has a revision where",
        ),
        (changed("revision: Hello.", "revision: Go away."), "FILE:23: critique example 1: the revision is the reply"),
        (changed("It is rude.", "'Flaw: it is rude.'"), "FILE:22: critique example 1 begins with 'Flaw:'; take it out"),
        (changed("It is rude.", "No flaw."), "FILE:22: critique example 1 begins with 'No flaw'; write critique: \"\""),
        (
            changed("role: user", "role: human"),
            "FILE:20: critique example 1, turn 1: role=human; write user or assistant",
        ),
        (changed("role: user", "role: assistant"), "FILE:20: critique example 1: the conversation does not go user"),
        (changed("- {role: user, content: Bye}", ""), "FILE:26: critique example 2: the conversation does not go user"),
        (changed("content: Hi", "text: Hi"), "FILE:20: critique example 1, turn 1: text is not a key"),
        (changed("version: 1.10", "name: yours"), "FILE:3: the file has name twice, first in line 2; keep one of them"),
        (changed("    weight: 2", "    critique: x"), "FILE:11: principle 1 has critique twice, first in line 8"),
        (changed("Is it kind?", "Look: is it kind?"), "FILE:8: is not YAML (mapping values are not allowed here)"),
        (changed("tags: [tone]", "tags: [tone"), "is not YAML ("),
        (changed("A test.", "A \x07 test."), "FILE:5: is not YAML (the character '\\x07' is not allowed)"),
        (GOOD + "---\nname: b\n", "FILE:40: is not YAML (expected a single document"),
        ("", "FILE:1: is empty"),
        ("# only a comment\n", "FILE:1: is empty"),
        ("- name: mine\n", "FILE:1: the file is not a mapping of keys"),
        (changed("principles:\n", "principles: {}\nx:\n"), "FILE:7: the file: x is not a key"),
        (
            changed("chain_of_thought: true", "chain_of_thought: 1"),
            "FILE:39: judge: chain_of_thought is neither true nor false",
        ),
        (GOOD + "  clamp: [0.6, 0.4]\n", "FILE:40: judge.clamp=[0.6, 0.4] leaves no room on both sides of 0.5"),
        (GOOD + "  clamp: [0.4]\n", "FILE:40: judge: clamp is not two values"),
        (GOOD + "  clamp: [a, b]\n", "FILE:40: judge: clamp=a is not a finite number"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_what_to_do(tmp_path, text, said):
    found = refusal(tmp_path, text)
    assert said in found and "; " in found


@pytest.mark.parametrize(
    ("scaffold", "said"),
    [
        ("{revison: x}", "scaffold: revison is not a key; did you mean revision?"),
        ("{verdict: ''}", "scaffold: verdict is empty"),
        (
            "{critique: '{conversation} {reply}'}",
            "scaffold.critique has no {request}; it needs {conversation} {reply} {request}",
        ),
        ("{critique: '{conversation} {reply} {request} {rely}'}", "scaffold.critique: {rely} is not a field"),
        ("{critique: '{conversation} {reply} {request} {}'}", "scaffold.critique: {} is not a field"),
        ("{critique: '{conversation} {reply!r} {request}'}", "scaffold.critique: {reply} is not a field"),
        ("{critique: '{conversation} {reply.x} {request}'}", "scaffold.critique: {reply.x} is not a field"),
        ("{critique: '{conversation} {reply} {request} {'}", "scaffold.critique: "),
        ("{flaw: 'Bad:'}", "scaffold.flaw is worded anew, but the default critique, which asks for it, is not"),
        ("{candidates: [X, Y]}", "scaffold.candidates is worded anew, but the default comparison"),
        ("{candidates: [A]}", "scaffold: candidates is not two values"),
        (
            "{candidates: [A, AB], comparison: '{conversation}{first}{second}{request}', verdict: x}",
            "one answer begins with the other",
        ),
        (
            "{flaw: No, no_flaw: No flaw, critique: '{conversation} {reply} {request}'}",
            "scaffold: flaw (No) is not text",
        ),
        (
            "{flaw: 'No', no_flaw: No flaw, critique: '{conversation} {reply} {request}'}",
            "one answer begins with the other",
        ),
    ],
)
def test_a_scaffold_that_would_lose_something_is_refused(tmp_path, scaffold, said):
    found = refusal(tmp_path, GOOD + f"scaffold: {scaffold}\n")
    assert said in found and found.startswith("FILE:40: ")


def test_the_default_questions_name_the_answers_they_ask_for_and_can_be_filled_in():
    scaffold = Scaffold()
    for name, fields in FIELDS.items():
        filled = getattr(scaffold, name).format(**{key: f"<{key}>" for key in fields})
        assert all(filled.count(f"<{key}>") == 1 for key in fields)
    assert scaffold.flaw in scaffold.critique and scaffold.no_flaw in scaffold.critique
    for question in (scaffold.comparison, scaffold.verdict):
        assert all(re.search(rf"\b{answer}\b", question) for answer in scaffold.candidates)


def test_a_name_that_is_not_there_is_refused_with_the_near_one(tmp_path):
    with pytest.raises(
        UserError, match="harmlesness: is no file and no constitution that ships; did you mean harmlessness"
    ):
        load_constitution("harmlesness")
    with pytest.raises(UserError, match="is a folder"):
        load_constitution(str(tmp_path))
    with pytest.raises(UserError, match="no constitution that ships"):
        load_constitution("")


def test_a_file_that_is_not_utf_8_is_refused_with_its_line(tmp_path):
    file = tmp_path / "latin.yaml"
    file.write_bytes("name: a\ndescription: sch\xf6n\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.yaml:2: is not UTF-8; save"):
        load_constitution(str(file))


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path):
    file = tmp_path / "dos.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_constitution(str(file)).digest == load(tmp_path, GOOD).digest


def test_reading_a_constitution_imports_no_torch():
    code = (
        "import sys\nfrom align.config.constitution import load_constitution\nfrom align.data import reply_filters\n"
        "load_constitution('house_style')\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0
