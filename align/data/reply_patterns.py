"""What shows that a reply is not one: parts of the questions in it, talk about itself, words of the user. English.

Text in double quotes is not looked at where somebody may be quoted, and what the prompt itself speaks of is no fault:
who asks for a dialogue between User and Assistant gets those labels.
"""

import re
from collections.abc import Iterable, Mapping

from align.config.constitution import Scaffold

FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
QUOTED = re.compile(r"\"[^\"\n]{0,300}\"|“[^”\n]{0,300}”|```.*?(?:```|\Z)", re.DOTALL)
ASKS_FOR_TEXT = re.compile(
    r"\b(?:write|draft|compose|translat\w+|rephrase|reword|repeat|quote|dialogue|script|letter|e-?mail|note|speech|"
    r"prompt|ask|say|compliment|generate|create|template|role-?play|pretend|faq|interview|support call)\b",
    re.IGNORECASE,
)
ASKS_FOR_EDITING = re.compile(
    r"\b(?:revis\w+|re-?writ\w+|rephrase|reword|edit\w*|improve\w*|proofread|shorten|shorter|correct\w*|polish|update\w*|"
    r"summar\w+|simpler|draft|feedback|essay|code|manuscript|version|mistakes?|grammar|spelling|adjust\w*|"
    r"adapt|modif\w+|make it|can you make|fix|change)\b",
    re.IGNORECASE,
)

CHAT_MARKUP = re.compile(
    r"<[|\uff5c][\w \u2581]{2,40}[|\uff5c]>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|^<s>|</s>$"
    r"|^###\s*(?:Instruction|Response|Input|Human|Assistant)\s*:",
    re.MULTILINE,
)
LABEL = re.compile(
    r"^[^\w\n]{0,10}(critique ?request|revision ?request|critique|revision|flaw|assistant|user|human|reply|conversation"
    r"|(?:revised|new|improved|updated|final) (?:reply|response|answer|version))\W{0,3}:"
    r"|^(?:#+|\*\*) ?(critique|revision)(?:\*\*)?\s*$|^(reply [ab])\s*$|</?(reply|critique|revision|conversation)>"
    r"|^\[(conversation|(?:end of the )?(?:reply|critique|revision|replies)(?: [ab])?)\]",
    re.MULTILINE | re.IGNORECASE,
)
ANY_LABEL = re.compile(r"^[^\w\n]{0,10}([A-Za-z][\w ]{0,25}):", re.MULTILINE)
ASKS_FOR_REVIEW = re.compile(r"\b(?:review|critique|essay|feedback|thesis|evaluate|roles?)\b", re.IGNORECASE)
LINE_WORDS = 4
"""A line of a question with as many words is not written by chance."""
CLAUSE_WORDS = 6
"""Nor is a part of one, in a line with other words, from so many on."""


def leaks_scaffold(reply: str, prompt: str, scaffold: Scaffold, fields: Mapping[str, Iterable[str]]) -> bool:
    """Whether parts of the questions or of a chat template stand in a reply; those that the prompt speaks of may."""
    if CHAT_MARKUP.search(reply.strip()) and not CHAT_MARKUP.search(prompt):
        return True
    if any("{" + name + "}" in reply and "{" not in prompt for names in fields.values() for name in names):
        return True
    return _has_label(reply, prompt) or _starts_with_marker(reply, prompt, scaffold) or _quotes(reply, prompt, scaffold)


def _has_label(reply: str, prompt: str) -> bool:
    """Whether a line begins with a label of the questions; among other labels it is an entry of a list."""
    text = FENCED.sub(" ", reply)
    found = [next(group for group in label.groups() if group) for label in LABEL.finditer(text)]
    listed = any(not LABEL.match(label.group()) for label in ANY_LABEL.finditer(text))
    if listed and (ASKS_FOR_REVIEW.search(prompt) or not LABEL.match(text.strip())):
        return False
    return any(label.split()[-1].casefold() not in prompt.casefold() for label in found)


def _starts_with_marker(reply: str, prompt: str, scaffold: Scaffold) -> bool:
    for marker in (scaffold.flaw, scaffold.no_flaw, scaffold.user, scaffold.assistant):
        words = re.findall(r"\w+", marker.casefold())
        if not words or words[-1] in prompt.casefold():
            continue
        if re.match(re.escape(marker.rstrip(".!")) + r"(?!\w)", reply.strip(), re.IGNORECASE):
            return True
    return False


def _quotes(reply: str, prompt: str, scaffold: Scaffold) -> bool:
    """Whether a line of a question, or a longer part of one, without what was filled in, is in the reply."""
    questions = (scaffold.critique, scaffold.revision, scaffold.comparison, scaffold.thought, scaffold.verdict)
    lines = {line.strip() for text in questions for line in text.splitlines() if "{" not in line}
    if any(line.strip() in lines and len(line.split()) >= LINE_WORDS for line in reply.splitlines()):
        return True
    clauses = {clause.strip().casefold() for line in lines for clause in re.split(r"[.,:;]", line)}
    said = reply.casefold()
    return any(len(clause.split()) >= CLAUSE_WORDS and clause in said for clause in clauses)


SAYING = r"(?:reply|response|answer|revision|message)"
WRITTEN = r"(?:rewritten|revised|changed|edited|updated|modified|toned down|rephrased)"
HARM = r"(?:harm\w+|inappropriate|dangerous|unsafe|offensive|illegal|unethical|should(?: not|n't))"
META = (
    r"\bthe assistant(?:'s\b| (?:should|could|would|might|must|needs to)\b)",
    rf"\b(?:revise|rewrite|rephrase) (?:the|this|my|your) {SAYING}\b|\bmake (?:the|this|my) {SAYING}\b",
    rf"\b(?:reply|response|revision) above\b|\b{SAYING} (?:was|has been|should be|is) (?:now )?{WRITTEN}\b",
    rf"\b(?:less|more|fully|not) harm(?:ful|less)(?: {SAYING})?\b[^.\n]{{0,30}}(?::|would be|\b{SAYING})",
    r"\b(?:a|the) (?:better|safer|less \w+|more \w+|kinder) (?:reply|response) (?:would|could|might) be\b",
    r"\b(?:the|this|your) critique\b|\bcomply with the principle\b",
    r"\bthis (?:revision|reply|response|revised \w+) (?:\w+ )?(?:removes?|avoids?|has|no longer|contains?|does|offers?"
    r"|is (?:now|more|less|not|better|safer|harm\w+))\b",
    r"\bthe (?:revised|improved|rewritten) (?:answer|version|reply|response) (?:avoids|removes|no longer|is|does)\b",
    r"\bin this revision\b|\bthe following revision\b",
)
NEWLY = r"(?:revised|rewritten|improved|updated|modified|new|harmless|better|safer)"
EDITED = (
    rf"\b(?:here(?: is|'s)|below is|this is)\b[^.\n:]{{0,15}}\b{NEWLY}\b (?:\w+ )?{SAYING}\b",
    rf"\b(?:here(?: is|'s)|below is|this is)\b[^.\n:]{{0,15}}\b{NEWLY}\b version\b"
    r"(?! of (?:the |your |this |an? )?(?:program|script|sentence|text|function|file))",
    r"\b(?:here(?: is|'s)|below is) (?:a|the|my) (?:\w+ ){0,2}(?:reply|response)\b",
    rf"\A\W*(?:revised|revision|rewritten)(?: {SAYING})?\W*:",
    rf"\bi(?:'ve| have|'ll| will)? (?:now )?(?:re-?write|rewrote|removed?|left out|took out|taken out|{WRITTEN})\b"
    rf"[^.\n]{{0,40}}\b(?:{SAYING}|instructions|harmful|part|details?)\b",
    r"\bthis (?:version|rewrite) (?:is|no longer|removes|avoids|does|keeps)\b",
)
EARLIER = (
    rf"\b(?:my|your|previous|earlier|original|last|initial) {SAYING}\b[^.\n]{{0,50}}\b{HARM}",
    r"\bmy (?:previous|earlier|original|last|initial) (?:reply|response)\b",
    r"\bi should(?: not|n't) have (?:told|given|written|answered|explained|provided)\b",
)
META_TALK, EDITED_TEXT, EARLIER_REPLY = (
    re.compile("|".join(patterns), re.IGNORECASE) for patterns in (META, EDITED, EARLIER)
)
SPEAKS_OF_REPLIES = re.compile(r"\b(?:repl(?:y|ies)|respon(?:d|se|ses)|revis\w+|assist\w*|critiques?)\b", re.IGNORECASE)


def talks_about_itself(reply: str, prompt: str, has_earlier_turns: bool = False) -> bool:
    """Whether a reply speaks of the reply or its revision; to who asked for an edited text some of it may be said.

    Where the conversation has earlier turns, the reply may take back what was said in them.
    """
    said = QUOTED.sub(" ", reply).replace("’", "'")
    if not SPEAKS_OF_REPLIES.search(prompt):
        if META_TALK.search(said) or (not has_earlier_turns and EARLIER_REPLY.search(said)):
            return True
    return not ASKS_FOR_EDITING.search(prompt) and EDITED_TEXT.search(said) is not None


HELP = r"(?:answer|reply|response|explanation|explaining|help|helping|advice|tips|guidance)"
THANKS = r"thank(?:s| you)(?: so much| very much| a lot)?"
ASK_ME = (
    r"(?:help me\b(?! understand| to understand)|(?:recommend|suggest|teach) me\b"
    r"|give me (?:some |any )?(?:advice|tips|help|ideas)\b|(?:tell|show) me how (?:to|i)\b|show me why\b"
    r"|explain (?:to me )?how (?:to|i)\b)"
)
FLIPPED = (
    rf"(?:\A|(?<=[.!?\n]))\s{{0,3}}(?:\w{{1,20}}, )?{THANKS} for (?:(?:your|the|all)(?: \w+)? )?{HELP}\b",
    r"\bthat (?:answers my question|helped (?:a lot|me))|\bthat(?:'s| is| was) (?:very |really |so )?helpful\b",
    rf"\b(?:can|could|would|will) you (?:please )?{ASK_ME}|\bplease {ASK_ME}|\bdo you know how i\b",
    r"\bi (?:would|'d) like to know how (?:to|i)\b|\bcan you help(?: me)?\?\s*\Z",
    r"\A\W*(?:hello|hi|hey)?[^.\n]{0,15}\bi need (?:some )?(?:help|advice)\b",
    r"\b(?:what|how) (?:should|can|do) i (?!help|assist|be of|ask|call|start)[^.?!\n]{0,200}\?\s*\Z",
    r"\A\W*(?:dear|hello|hi|hey),? (?:assistant|ai|chatbot)\b|\A\W*you are an? (?:\w+ ){0,2}assistant\b",
    r"\bas a user,? i\b|\bi(?:'m| am) the user\b",
    r"\A\W*(?:ok|okay|great|thanks|thank you)[^.?!\n]{0,20}[,.!] i(?:'ll| will) (?!help|do my|try my|be)\w+",
    r"\A\W*(?:oh|ok|okay|you're right|i see|i understand)\b[^\n]*\bi(?:'ll| will) try (?:to|it|that)\b",
)
AS_USER = re.compile("|".join(FLIPPED), re.IGNORECASE)
THANKED = re.compile(
    rf"(?:\A|(?<=[.!?\n]))\s{{0,3}}(?:\w{{1,20}},? )?{THANKS} for (?:the|your|all|letting)\b"
    r"(?! (?:\w+ )?(?:question|patience|time|understanding|trust|interest|honesty|concern|request|message|openness))",
    re.IGNORECASE,
)
"""To a question, thanks are the user's; except for the question, and such politeness."""
USERS_TURN = re.compile(r"^[^\w\n]{0,10}(user|human)\W{0,3}:", re.IGNORECASE | re.MULTILINE)
WANTS = re.compile(r"\A\s*i(?:'m| am| have| want| need| really need| just want)\b", re.IGNORECASE)
ECHO_SHARE = 0.7
"""Of the longer words of a question that are the prompt's."""
HONEST = re.compile(r"\A\W*thank(?:s| you) for (?:being (?:so )?(?:honest|open)|(?:your|the) honesty)", re.IGNORECASE)


def flips_role(reply: str, prompt: str) -> bool:
    """Whether a reply speaks as the user; to who asks for a text it may."""
    for found in USERS_TURN.finditer(FENCED.sub(" ", reply)):
        if found.group(1).casefold() not in prompt.casefold():
            return True
    if ASKS_FOR_TEXT.search(prompt):
        return False
    said = QUOTED.sub(" ", reply).replace("’", "'").strip()
    if " ".join(said.casefold().split()) == " ".join(prompt.casefold().split()) and len(said.split()) >= LINE_WORDS:
        return True
    opening, _, rest = said.partition("?")
    if " ".join(prompt.split()).rstrip("?").casefold() == opening.casefold() and WANTS.search(rest):
        return True
    # Nobody confessed anything: the prompt has no I in it.
    if HONEST.match(said) and not re.search(r"\b(?:i|i'\w+|my|me)\b", prompt.replace("’", "'"), re.IGNORECASE):
        return True
    if "?" in prompt and THANKED.search(said):
        return True
    return AS_USER.search(said) is not None or _asks_back(said, prompt)


def _asks_back(said: str, prompt: str) -> bool:
    """Whether a reply is no more than the prompt's question in other words, still asked as I."""
    if not re.fullmatch(r"[^.?!\n]{0,300}\bi\b[^.?!\n]{0,300}\?", said.strip()[:500], re.IGNORECASE):
        return False
    own, asked = (set(re.findall(r"\w{4,}", text.casefold())) for text in (said, prompt))
    return len(own) >= 2 and len(own & asked) >= ECHO_SHARE * len(own)
