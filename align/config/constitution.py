"""A constitution: principles, examples and the wording of the questions, read from YAML into types. Imports no torch.

Every refusal names the line: `mine.yaml:12: principle 'kind' has no critique; add critique`.
"""

import dataclasses
import hashlib
import json
import re
import string
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from align.config import listing
from align.config.errors import UserError
from align.config.refusals import near
from align.config.yaml_table import NULL, Table, read_table

GROUP = "constitution"
ROLES = ("user", "assistant")
SIDES = ("first", "second")
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

CRITIQUE = """\
Here is a conversation, and the reply that the assistant gave to its last message.

[conversation]
{conversation}

[reply]
{reply}

[end of the reply]

{request}

If the reply needs no change in this respect, answer with exactly these words: No flaw
Otherwise begin with "Flaw:" and say in one to three sentences what is wrong and where. Do not write a new reply."""

REVISION = """\
Here is a conversation, the reply that the assistant gave to its last message, and a critique of that reply.

[conversation]
{conversation}

[reply]
{reply}

[critique]
{critique}

[end of the critique]

{request}

Keep what is right and useful in the reply. Answer with the text of the new reply alone, addressed to the user: \
nothing before it, nothing after it, and no mention of the critique or of the change."""

TWO_REPLIES = """\
Here is a conversation, and two replies that the assistant could give to its last message.

[conversation]
{conversation}

[reply A]
{first}

[reply B]
{second}

[end of the replies]

{request}

"""
COMPARISON = TWO_REPLIES + "Answer with the letter of that reply alone: A or B."
THOUGHT = TWO_REPLIES + (
    "Think it through before you choose: in a few sentences, say how each reply does in this respect and alone in this "
    "respect. Do not name your choice yet."
)
VERDICT = "So which reply is it? Answer with its letter alone: A or B."


@dataclass(frozen=True)
class Turn:
    """One turn of an example's conversation; role is `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True)
class Principle:
    """One thing asked of a reply, worded for each of the three questions."""

    id: str
    critique: str
    """Asks what is wrong with a reply in this respect."""
    revision: str
    """Asks for a reply without that."""
    comparison: str
    """Asks which of two replies is better in this respect."""
    weight: float = 1.0
    """How often it is drawn, relative to the others."""
    tags: tuple[str, ...] = ()
    positive: str = ""
    """System prompt under which a reply should keep the principle; empty: not used for contrast."""
    negative: str = ""
    """System prompt under which a reply should break it; given with `positive` or not at all."""


@dataclass(frozen=True)
class CritiqueExample:
    """A worked critique and revision. An empty critique is a reply without a flaw; it then has no revision.

    `critique` is what follows scaffold.flaw in the answer, without those words.
    """

    conversation: tuple[Turn, ...]
    reply: str
    principle: str
    critique: str = ""
    revision: str = ""


@dataclass(frozen=True)
class JudgeExample:
    """A worked comparison; `better` is `first` or `second`."""

    conversation: tuple[Turn, ...]
    first: str
    second: str
    principle: str
    better: str


@dataclass(frozen=True)
class Scaffold:
    """The wording around the principles. Names in single braces are filled in; FIELDS says which each text has."""

    user: str = "User:"
    """Label before a user turn of a transcript."""
    assistant: str = "Assistant:"
    critique: str = CRITIQUE
    flaw: str = "Flaw:"
    """How an answer to the critique question begins that finds something; the critique follows."""
    no_flaw: str = "No flaw"
    """How an answer begins that finds nothing."""
    revision: str = REVISION
    comparison: str = COMPARISON
    candidates: tuple[str, str] = ("A", "B")
    """The whole answers that mean: the first reply, the second. One token each in most tokenizers."""
    thought: str = THOUGHT
    """The comparison question of a chain of thought."""
    verdict: str = VERDICT
    """What is asked after the thought."""


FIELDS = {
    "critique": {"conversation", "reply", "request"},
    "revision": {"conversation", "reply", "critique", "request"},
    "comparison": {"conversation", "first", "second", "request"},
    "thought": {"conversation", "first", "second", "request"},
}
"""What each question is filled in with: all of these, nothing else."""
ASKED_IN = {
    "flaw": ("critique",),
    "no_flaw": ("critique",),
    "candidates": ("comparison", "verdict"),
}
"""An answer's wording -> the default questions that name it, and so have to be worded anew with it."""


@dataclass(frozen=True)
class JudgeRules:
    """How comparisons are judged."""

    chain_of_thought: bool = False
    clamp: tuple[float, float] | None = (0.4, 0.6)
    """Bounds of a probability judged after a chain of thought, which makes judges too sure; null for none.
    Source: Bai et al. 2022, arXiv:2212.08073, section 4.1."""


@dataclass(frozen=True)
class Constitution:
    """What replies are judged by."""

    name: str
    version: str
    licence: str
    description: str
    principles: tuple[Principle, ...]
    critique_examples: tuple[CritiqueExample, ...] = ()
    judge_examples: tuple[JudgeExample, ...] = ()
    scaffold: Scaffold = field(default_factory=Scaffold)
    judge: JudgeRules = field(default_factory=JudgeRules)

    @cached_property
    def digest(self) -> str:
        """sha256 of the content, defaults filled in: comments, layout and the order of keys do not count."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    def principle(self, id: str) -> Principle:
        """The principle of this id. Raises: KeyError if there is none."""
        for principle in self.principles:
            if principle.id == id:
                return principle
        raise KeyError(id)


def load_constitution(name_or_path: str) -> Constitution:
    """A shipped constitution by its name, or one in a YAML file.

    Raises: UserError `FILE:LINE: what is wrong; what to do` for the first thing that is wrong in it.
    """
    return _constitution(read_table(_find(name_or_path)))


def _find(name_or_path: str) -> Path:
    shipped = listing.options(GROUP)
    if name_or_path in shipped:
        return listing.conf_dir() / GROUP / f"{name_or_path}.yaml"
    path = Path(name_or_path).expanduser()
    if not name_or_path or not path.is_file():
        found = "is a folder" if name_or_path and path.is_dir() else "is no file and no constitution that ships"
        raise UserError(f"constitution={name_or_path}: {found}{near(name_or_path, list(shipped))}; give FILE.yaml")
    return path


def _constitution(table: Table) -> Constitution:
    table.only(Constitution)
    principles = table.tables("principles", _principle, "principle", required=True)
    if not principles:
        raise table.fault(table.values["principles"], "there is no principle", "write one or more")
    _refuse_repeated_ids(table, principles)
    critiques = table.tables("critique_examples", _critique_example, "critique example")
    judged = table.tables("judge_examples", _judge_example, "judge example")
    ids = [principle.id for principle in principles]
    _refuse_unknown_principles(table, "critique_examples", critiques, ids)
    _refuse_unknown_principles(table, "judge_examples", judged, ids)
    if critiques and all(example.critique for example in critiques):
        found = "every critique example finds a flaw, which teaches to find one everywhere"
        raise table.fault(table.values["critique_examples"], found, 'add one of a good reply, with critique: ""')
    scaffold = _scaffold(table)
    _refuse_marked_critiques(table, critiques, scaffold)
    return Constitution(
        name=table.text("name"),
        version=table.text("version"),
        licence=table.text("licence"),
        description=table.text("description"),
        principles=principles,
        critique_examples=critiques,
        judge_examples=judged,
        scaffold=scaffold,
        judge=_judge(table),
    )


def _principle(table: Table) -> Principle:
    table.only(Principle)
    id = table.text("id")
    if not ID.fullmatch(id):
        raise table.fault(table.values["id"], f"{table.title}: id {id!r} is not a name", "use letters, digits, _ . -")
    table.title = f"principle {id!r}"
    weight = table.number("weight", 1.0)
    if weight <= 0:
        found = f"{table.title}: weight={weight:g} is never drawn"
        raise table.fault(table.values["weight"], found, "write a number above 0, or take the principle out")
    texts = {name: table.text(name) for name in ("critique", "revision", "comparison")}
    contrast = {name: table.text(name, "", may_be_empty=True) for name in ("positive", "negative")}
    if bool(contrast["positive"]) != bool(contrast["negative"]):
        given = "positive" if contrast["positive"] else "negative"
        raise table.fault(table.values[given], f"{table.title} has {given} alone", "contrast takes both; add the other")
    return Principle(id=id, weight=weight, tags=_tags(table), **texts, **contrast)


def _tags(table: Table) -> tuple[str, ...]:
    tags = table.texts("tags") if "tags" in table.values else ()
    if not all(tags) or len(set(tags)) < len(tags):
        raise table.fault(table.values["tags"], f"{table.title}: a tag is empty or given twice", "take it out")
    return tags


def _refuse_repeated_ids(table: Table, principles: tuple[Principle, ...]) -> None:
    lines: dict[str, int] = {}
    for principle, node in zip(principles, table.values["principles"].value, strict=True):
        place = Table(table.file, node, "").values["id"]
        if principle.id in lines:
            found = f"id {principle.id} is taken already, in line {lines[principle.id]}"
            raise table.fault(place, found, "give every principle an id of its own")
        lines[principle.id] = place.start_mark.line + 1


def _refuse_unknown_principles(table: Table, key: str, examples: tuple[Any, ...], ids: list[str]) -> None:
    for number, example in enumerate(examples):
        if example.principle not in ids:
            place = Table(table.file, table.values[key].value[number], "").values["principle"]
            found = f"there is no principle {example.principle}{near(example.principle, ids)}"
            raise table.fault(place, found, "name one that there is")


def _refuse_marked_critiques(table: Table, examples: tuple[CritiqueExample, ...], scaffold: Scaffold) -> None:
    """Refuse critiques that bring along the words that are put before them."""
    for number, example in enumerate(examples):
        for marker in (scaffold.no_flaw, scaffold.flaw):
            if example.critique.casefold().startswith(marker.casefold()):
                place = Table(table.file, table.values["critique_examples"].value[number], "").values["critique"]
                to_do = 'write critique: ""' if marker == scaffold.no_flaw else "take it out: it is put there for you"
                raise table.fault(place, f"critique example {number + 1} begins with {marker!r}", to_do)


def _critique_example(table: Table) -> CritiqueExample:
    table.only(CritiqueExample)
    critique = table.text("critique", may_be_empty=True)
    revision = table.text("revision", "", may_be_empty=True)
    if bool(critique) != bool(revision):
        found = "a critique without its revision" if critique else "a revision where the critique finds no flaw"
        place = table.values["critique" if critique else "revision"]
        raise table.fault(place, f"{table.title} has {found}", "give both, or neither for a reply without a flaw")
    if revision and revision == table.text("reply"):
        raise table.fault(
            table.values["revision"], f"{table.title}: the revision is the reply", "change it, or drop both"
        )
    return CritiqueExample(_conversation(table), table.text("reply"), table.text("principle"), critique, revision)


def _judge_example(table: Table) -> JudgeExample:
    table.only(JudgeExample)
    better, first, second = (table.text(name) for name in ("better", "first", "second"))
    if better not in SIDES:
        raise table.fault(table.values["better"], f"{table.title}: better={better}", "write first or second")
    if first == second:
        raise table.fault(table.values["second"], f"{table.title}: both replies are the same", "change one of them")
    return JudgeExample(_conversation(table), first, second, table.text("principle"), better)


def _conversation(table: Table) -> tuple[Turn, ...]:
    """Turns of user and assistant by turns, from a user's to a user's."""
    turns = table.tables("conversation", _turn, f"{table.title}, turn", required=True)
    node = table.values["conversation"]
    if [turn.role for turn in turns] != [ROLES[n % 2] for n in range(len(turns))] or len(turns) % 2 == 0:
        found = f"{table.title}: the conversation does not go user, assistant, ..., user"
        raise table.fault(node, found, "begin and end with a turn of role user")
    return turns


def _turn(table: Table) -> Turn:
    table.only(Turn)
    role = table.text("role")
    if role not in ROLES:
        raise table.fault(table.values["role"], f"{table.title}: role={role}", "write user or assistant")
    return Turn(role, table.text("content"))


def _scaffold(outer: Table) -> Scaffold:
    if "scaffold" not in outer.values:
        return Scaffold()
    table = outer.inner("scaffold")
    table.only(Scaffold)
    given: dict[str, Any] = {name: table.text(name) for name in table.values if name != "candidates"}
    for name in FIELDS.keys() & given.keys():
        _check_fields(table, name, given[name])
    if "candidates" in table.values:
        given["candidates"] = _pair(table, "candidates", table.texts("candidates"))
    for name, questions in ASKED_IN.items():
        if name in given and (stale := [question for question in questions if question not in given]):
            found = f"scaffold.{name} is worded anew, but the default {stale[0]}, which asks for it, is not"
            raise table.fault(table.values[name], found, f"give scaffold.{stale[0]} as well")
    scaffold = Scaffold(**given)
    _refuse_prefix(table, "no_flaw", scaffold.flaw, scaffold.no_flaw)
    _refuse_prefix(table, "candidates", *scaffold.candidates)
    return scaffold


def _check_fields(table: Table, name: str, text: str) -> None:
    """Refuse a question that would lose what it is asked about, or that `str.format` cannot fill in."""
    wanted, node = FIELDS[name], table.values[name]
    shown = " ".join(f"{{{key}}}" for key in sorted(wanted))
    try:
        parts = [part for part in string.Formatter().parse(text) if part[1] is not None]
    except ValueError as error:
        raise table.fault(
            node, f"scaffold.{name}: {error}", f"write {{{{ }}}} for a brace; fields are {shown}"
        ) from error
    for _, key, form, conversion in parts:
        if key not in wanted or form or conversion:
            raise table.fault(node, f"scaffold.{name}: {{{key}}} is not a field", f"fields are {shown}")
    if missing := sorted(wanted - {part[1] for part in parts}):
        raise table.fault(node, f"scaffold.{name} has no {{{missing[0]}}}", f"it needs {shown}")


def _refuse_prefix(table: Table, name: str, one: str, other: str) -> None:
    """Two answers of which one begins with the other cannot be told apart."""
    one, other = one.casefold(), other.casefold()
    if one.startswith(other) or other.startswith(one):
        node = table.values.get(name, table.node)
        raise table.fault(node, f"scaffold.{name}: one answer begins with the other", "word them differently")


def _pair(table: Table, name: str, values: tuple[Any, ...]) -> tuple[Any, Any]:
    if len(values) != 2 or "" in values:
        raise table.fault(table.values[name], f"{table.title}: {name} is not two values", "write [ONE, OTHER]")
    return values[0], values[1]


def _judge(outer: Table) -> JudgeRules:
    if "judge" not in outer.values:
        return JudgeRules()
    table = outer.inner("judge")
    table.only(JudgeRules)
    rules = JudgeRules(chain_of_thought=table.flag("chain_of_thought", False))
    if "clamp" not in table.values:
        return rules
    if table.values["clamp"].tag == NULL:
        return dataclasses.replace(rules, clamp=None)
    low, high = _pair(table, "clamp", table.numbers("clamp"))
    if not 0 <= low < 0.5 < high <= 1:
        found = f"judge.clamp=[{low:g}, {high:g}] leaves no room on both sides of 0.5"
        raise table.fault(table.values["clamp"], found, "write two bounds such as [0.4, 0.6], or null for none")
    return dataclasses.replace(rules, clamp=(low, high))
