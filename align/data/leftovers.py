"""What should not be left in a text: template markup, unfilled placeholders; and how refusals open. Rules of thumb."""

import re

REFUSALS = (
    *("i'm sorry", "i am sorry", "sorry,", "i apologize", "i'm afraid", "i am afraid", "unfortunately, i"),
    *("i can't", "i cannot", "i can not", "i won't", "i will not", "i'm not able", "i am not able", "i'm unable"),
    *("i am unable", "i'm not going to", "i am not going to", "i don't feel comfortable", "i'm not comfortable"),
    *("i must decline", "as an ai", "no, i can't", "no, i cannot", "no, i won't"),
)
"""How refusals open. A rough rule: it sees the first words only, and English."""
OPENING = 40
"""Characters of an answer's opening, longer than every phrase above."""

MARKUP = re.compile(
    # DeepSeek's markers have the wide bar and the block of SentencePiece.
    r"<[|\uff5c][\w \u2581]{2,40}[|\uff5c]>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>"
    r"|^###\s*(?:Instruction|Response|Input|Human|Assistant)\s*:|^[ \t]*(?:Human|Assistant):",
    re.MULTILINE,
)
PLACEHOLDER = re.compile(
    r"\{\{\s*[A-Za-z_][\w .-]{0,40}\}\}|[<\[{]PLACEHOLDER\w*[>\]}]|\[(?:INSERT|Insert)\s[^\]\n]{1,60}\]"
)


def opens_like_refusal(answer: str) -> bool:
    """Whether an answer starts with one of the phrases of REFUSALS."""
    return answer[:OPENING].lstrip().lower().replace("\u2019", "'").startswith(REFUSALS)


def holds_markup(text: str) -> bool:
    """Whether a chat template's markers stand in the text of turns; each turn is to start on a line of its own."""
    return _may_hold_markup(text) and MARKUP.search(text) is not None


def holds_placeholder(text: str) -> bool:
    """Whether a name in double braces, or a word that asks to be replaced, stands in the text."""
    # Looking for a few literals first is ten times as fast as the pattern.
    may = "{{" in text or "PLACEHOLDER" in text or "[INS" in text or "[Ins" in text
    return may and PLACEHOLDER.search(text) is not None


def _may_hold_markup(text: str) -> bool:
    """False only where MARKUP finds nothing; ten times as fast."""
    if "<" in text and ("<|" in text or "<\uff5c" in text or "s>" in text or "S>>" in text or "_turn>" in text):
        return True
    return "man:" in text or "tant:" in text or "###" in text or "INST]" in text
