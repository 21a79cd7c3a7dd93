"""Filters over replies that a model made: each has a name, applies or not, and can be explained. Imports no torch.

They are rules of thumb, measured on labelled rows (tests/data/reply_filters): a wrong rule costs more than none, so
each lets pass what it is not sure of. Where a reply has several faults, the first in FILTERS names it: marks of a
broken reply before those of a poor one.
"""

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from align.config.constitution import FIELDS, Scaffold
from align.data.reply_language import is_wrong_language
from align.data.reply_patterns import flips_role, leaks_scaffold, talks_about_itself


@dataclass(frozen=True)
class Judged:
    """A reply, and what it is judged against."""

    prompt: str
    """The last user turn."""
    initial: str
    """The reply that was to be improved; empty where there is none, and what compares with it then never applies."""
    reply: str
    finished: bool = True
    """Whether the model ended it; False: the limit of new tokens did."""
    conversation: str = ""
    """The text of the turns before the last user turn; empty where there are none."""


@dataclass(frozen=True)
class Limits:
    """The numbers in the filters. Counts are words; a Chinese or Japanese character counts as one."""

    shortest_share: float = 0.1
    """Of the initial reply's length. Good revisions often halve a reply, some answer a page in a line."""
    short_words: int = 8
    """A reply of as many words is not too short by shortest_share: a refusal with its reason fits in."""
    scant_share: float = 0.03
    """Below this a reply is too short however many words it has: it announces an answer, or is its first line."""
    comparable_words: int = 25
    """An initial reply with fewer may well be put in one word."""
    longest_share: float = 3.0
    """Of the initial reply's length, on top of long_words."""
    long_words: int = 120
    """Room to turn a bare "No." into a reason and an alternative."""
    near_copy_share: float = 0.1
    """Of the content words: a near copy has changed no more of them."""
    near_copy_edit_words: int = 5
    """Content words in one place: more of them added or taken out are a change of substance."""
    scaffold: Scaffold = field(default_factory=Scaffold)
    """The wording of the questions, none of which belongs in a reply."""


WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|(?:(?![\u3040-\u30ff\u3400-\u9fff])\w)+(?:['’]\w+)*")
NUMBER_OR_WORD = re.compile(r"-?\d+(?:[.,]\d+)*|\w+(?:['’]\w+)*")
FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
PLACEHOLDER = re.compile(
    r"[\[(<{]\s*(?:empty|blank|(?:no|your|insert|the)?\s*(?:response|reply|answer|output|text)(?: goes)?(?: here)?)"
    r"\s*[\])>}]",
    re.IGNORECASE,
)
EMPTY_TAGS = re.compile(r"<(\w{1,20})[^<>]{0,200}>\s{0,20}</\1>|<br ?/?>")
LIST_NUMBER = re.compile(r"^[ \t]*(?:step[ \t]*)?\d+[.):][ \t]*", re.MULTILINE | re.IGNORECASE)


def words(text: str) -> list[str]:
    """The words of a text, lower-cased."""
    return WORD.findall(text.casefold())


def plain(text: str) -> str:
    """A text without what makes no difference: case, white space, quotes around it, list marks, bold, typography."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"[‘’]", "'", re.sub(r"[“”«»]", '"', text))
    text = re.sub(r"^[ \t]*[-*•][ \t]+", "", text, flags=re.MULTILINE).replace("**", "")
    return " ".join(text.split()).strip('" ').rstrip(".!")


def is_empty(judged: Judged, limits: Limits) -> bool:
    """Nothing is said: no letter, digit or symbol is left without markup, or a placeholder stands for the reply."""
    if PLACEHOLDER.fullmatch(judged.reply.strip()):
        return True
    text = LIST_NUMBER.sub("", EMPTY_TAGS.sub("", re.sub(r"```\w*", "", judged.reply)) + "\n")
    if re.fullmatch(r"\s*\d+[.)]\s*", judged.reply):
        text = judged.reply
    return not any(char.isalnum() or (ord(char) > 127 and unicodedata.category(char)[0] == "S") for char in text)


def is_scaffold_leak(judged: Judged, limits: Limits) -> bool:
    """Labels, markers or whole lines of the questions, or of a chat template, stand in the reply."""
    return leaks_scaffold(judged.reply, judged.prompt, limits.scaffold, FIELDS)


def is_role_flip(judged: Judged, limits: Limits) -> bool:
    """The reply is the user's: it asks for the help that it should give, thanks for it, or goes on as the user."""
    return flips_role(judged.reply, judged.prompt)


def is_meta_talk(judged: Judged, limits: Limits) -> bool:
    """The reply talks about the reply, its critique or its revision instead of to the user."""
    return talks_about_itself(judged.reply, judged.prompt, bool(judged.conversation.strip()))


def is_unchanged(judged: Judged, limits: Limits) -> bool:
    """The reply is the initial one, but for case, spaces and typography."""
    return bool(judged.initial.strip()) and plain(judged.reply) == plain(judged.initial)


def is_near_copy(judged: Judged, limits: Limits) -> bool:
    """Only a few scattered words differ from the initial reply, none of which negates or counts."""
    if not judged.initial.strip():
        return False
    before, after = (NUMBER_OR_WORD.findall(text.casefold()) for text in (judged.initial, judged.reply))
    content = _content(before)
    allowed = limits.near_copy_share * content
    # A cheap bound first: the words that occur in one text alone, wherever they stand.
    for one, other in ((before, after), (after, before)):
        if _content(list((Counter(one) - Counter(other)).elements())) > allowed:
            return False
    counts = Counter(after)
    if sum(counts[word] for word in before) > COMPARISONS:
        return False
    changed = 0
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for kind, start, end, new_start, new_end in matcher.get_opcodes():
        out, put_in = before[start:end], after[new_start:new_end]
        if kind == "equal":
            continue
        if any(_turns_meaning(word) for word in (*out, *put_in)) or _opposite(out, put_in):
            return False
        largest = max(_content(out), _content(put_in))
        if largest > limits.near_copy_edit_words:
            return False
        changed += largest
    return changed <= allowed


def is_repetition(judged: Judged, limits: Limits) -> bool:
    """The reply is caught in a loop: of letters, of words, or of sentences. Repetition that was asked for is none."""
    if ASKS_FOR_REPETITION.search(judged.prompt):
        return False
    text = FENCED.sub(" ", judged.reply)
    if LETTER_LOOP.search(text.casefold()) or _word_loop(words(text)):
        return True
    return not IS_SUNG.search(judged.prompt) and _sentence_loop(text)


def is_cut_by_limit(judged: Judged, limits: Limits) -> bool:
    """The limit ended the reply; or its last words cannot be its end, whatever the backend says."""
    if not judged.finished:
        return True
    text = judged.reply.rstrip()
    if not text:
        return False
    if text.count("```") % 2:
        return True
    last = text.rsplit("\n", 1)[-1]
    if "://" in last.split()[-1]:
        return False
    if len(WORD.findall(last)) < SALUTATION_WORDS:
        return False
    opened = last.rfind("(")
    return bool(OPEN_END.search(last)) or (opened > last.rfind(")") and any(map(str.isalnum, last[opened:])))


def has_wrong_language(judged: Judged, limits: Limits) -> bool:
    """The reply is in a script or language that the conversation is not in, and that was not asked for."""
    return is_wrong_language(judged.reply, judged.prompt, judged.conversation)


def is_too_short(judged: Judged, limits: Limits) -> bool:
    """Next to the initial reply hardly anything is left."""
    initial, reply = len(words(judged.initial)), len(words(judged.reply))
    if initial < limits.comparable_words:
        return False
    return reply < limits.scant_share * initial or reply < min(limits.shortest_share * initial, limits.short_words)


def is_too_long(judged: Judged, limits: Limits) -> bool:
    """The reply has grown out of proportion to the initial one."""
    initial, reply = len(words(judged.initial)), len(words(judged.reply))
    return initial > 0 and reply > limits.longest_share * initial + limits.long_words


FILTERS: Mapping[str, Callable[[Judged, Limits], bool]] = {
    "empty": is_empty,
    "scaffold_leak": is_scaffold_leak,
    "role_flip": is_role_flip,
    "meta_talk": is_meta_talk,
    "unchanged": is_unchanged,
    "near_copy": is_near_copy,
    "repetition": is_repetition,
    "cut_by_limit": is_cut_by_limit,
    "wrong_language": has_wrong_language,
    "too_short": is_too_short,
    "too_long": is_too_long,
}
"""Name -> whether a reply has this fault, in the order in which they are asked."""


def first_fault(judged: Judged, limits: Limits | None = None) -> str | None:
    """The name of the first filter that applies, or None."""
    limits = limits or Limits()
    return next((name for name, applies in FILTERS.items() if applies(judged, limits)), None)


COMPARISONS = 1_000_000
"""Pairs of equal words, about half a second of difflib; only texts that repeat themselves without end have more."""
FUNCTION_WORDS = frozenset(
    "a an the this that these those it its he she they we you i me him her them us my your his our their one and or "
    "but so then also just very really quite some any of in on at to for from by with as is are was were be been "
    "being am do does did has have had will would can could may might should shall please here there if when while "
    "which who what sure certainly course yet too well again it's i'm you're that's i'll you'll".split()
)
PLEASANTRIES = frozenset("good luck hope helps happy glad enjoy welcome help careful".split())
NEGATIONS = frozenset(
    "no not never none nobody nothing nor neither without cannot yes less more except only unless stop avoid refuse "
    "two three four five six seven eight nine ten eleven twelve twenty hundred thousand million half double".split()
)
"""Words whose coming or going turns what is said; numbers are among them."""
PREFIXES = ("un", "in", "im", "il", "ir", "non", "dis")


def _content(listed: list[str]) -> int:
    return sum(word not in FUNCTION_WORDS and word not in PLEASANTRIES for word in listed)


def _turns_meaning(word: str) -> bool:
    return word in NEGATIONS or word[-1].isdigit() or word.endswith(("n't", "n’t"))


def _opposite(out: list[str], put_in: list[str]) -> bool:
    """Whether a word became its opposite by a prefix: safe, unsafe."""
    pairs = [(one, other) for one in out for other in put_in]
    return any(one == p + other or other == p + one for one, other in pairs for p in PREFIXES)


ASKS_FOR_REPETITION = re.compile(r"\b(?:times|repeat\w*|over and over|again and again)\b", re.IGNORECASE)
IS_SUNG = re.compile(r"\b(?:songs?|lyrics|poems?|refrain|chorus|chant|verses?|hymn)\b", re.IGNORECASE)
"""Whole lines come again in these."""
LETTER_LOOP = re.compile(r"([^\W\d_]{1,6}?)\1{11,}|([!?]{1,2})\2{11,}")
"""A dozen of the same few letters; digits are left out, since numbers may have many zeros."""
LOOP_UNIT_WORDS = 20
LOOP_WORDS = 12
"""Words that a loop spans at least; a song's "row, row, row" is shorter."""
LOOP_ONE_WORD = 8
LOOP_ROUNDS = 2.75
"""How often it comes round at least; the last round may be without its last words."""
SENTENCES_IN_A_ROW = 3
SENTENCE_WORDS = 2
REPEATED_SHARE = 0.4
"""Of a reply's words: so many are in sentences that were said before. A refrain in a poem stays below."""
REPEATED_WORDS = 12


def _word_loop(said: list[str]) -> bool:
    """Whether a unit of 1 to LOOP_UNIT_WORDS words follows itself for long enough."""
    if not any(map(str.isalpha, said)):
        return False
    for unit in range(1, LOOP_UNIT_WORDS + 1):
        looped = max(LOOP_ROUNDS * unit, LOOP_WORDS if unit > 1 else LOOP_ONE_WORD)
        run = unit
        for place in range(unit, len(said)):
            run = run + 1 if said[place] == said[place - unit] else unit
            # A loop needs a word: the cells of a table repeat.
            if run >= looped and any(map(str.isalpha, said[place - unit + 1 : place + 1])):
                return True
    return False


def _sentence_loop(text: str) -> bool:
    """Whether a sentence follows itself again and again, or most of the text is in sentences said before."""
    listed = [LIST_NUMBER.sub("", sentence) for sentence in re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n", text)]
    units = [
        tuple(unit)
        for sentence in listed
        if len(unit := [w for w in words(sentence) if not w.isdigit()]) >= SENTENCE_WORDS
    ]
    row, seen, repeated = 1, set(), 0
    for place, unit in enumerate(units):
        row = row + 1 if place and unit == units[place - 1] else 1
        if row >= SENTENCES_IN_A_ROW:
            return True
        repeated += len(unit) * (unit in seen)
        seen.add(unit)
    return repeated >= REPEATED_WORDS and repeated >= REPEATED_SHARE * sum(map(len, units))


SALUTATION_WORDS = 4
"""A last line with fewer words may end in a comma, as letters do, or be the one word that was asked for."""
OPEN_END = re.compile(
    r"(?:[,:]|\b(?:and|or|but|because|since|although|unless|until|if|while|the|a|an|my|your|their|our|its|such as|to"
    r"|which|who|whose|where|when|into|than|may|must|should|would))$"
)
"""Case counts: "vitamin A" is an end. Of, on and with are left out: "the one that is on" is a sentence."""
