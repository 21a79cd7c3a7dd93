"""Whether a text is in a language, by its script and, where languages share one, by letters and words of their own.

For answers of some words to "answer in Hindi", not for telling dialects. Codes are ISO 639-1.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from align.data.reply_language import COMMON_WORDS, scripts

SCRIPT_SHARE = 0.5
"""Of the letters; names and terms of a text are often in another script."""


@dataclass(frozen=True)
class Marks:
    """What shows a language: its script, and what it alone has among those of that script."""

    script: str
    own: str = ""
    """Letters, or words between spaces; empty where no other listed language has the script."""


MARKS: Mapping[str, Marks] = {
    "ar": Marks("ARABIC", " في من على أن إلى هذا التي الذي عن كان ما لا هو هي ذلك مع و هذه"),
    "bg": Marks(
        "CYRILLIC",
        " и на да се за от са това който която със при както във не е че по също това аз тя той може много",
    ),
    "bn": Marks("BENGALI"),
    "de": Marks("LATIN", " " + COMMON_WORDS["de"]),
    "en": Marks("LATIN", " " + COMMON_WORDS["en"]),
    "es": Marks("LATIN", " " + COMMON_WORDS["es"]),
    "fa": Marks("ARABIC", " و در به از که این است را با آن برای می یک های هم تا بر شما او هستند"),
    "fi": Marks("LATIN", " ja on ei se että en hän mutta kun niin oli myös tai kuin jos minä sinä ovat olla joka"),
    "fr": Marks("LATIN", " " + COMMON_WORDS["fr"]),
    "gu": Marks("GUJARATI"),
    "hi": Marks("DEVANAGARI", " है के में की हैं और का से को पर यह कि एक भी नहीं था लिए ने इस तो हो ही जो"),
    "it": Marks("LATIN", " " + COMMON_WORDS["it"]),
    "kn": Marks("KANNADA"),
    "ko": Marks("HANGUL"),
    "mr": Marks("DEVANAGARI", " आहे आणि आहेत ते या मध्ये हे ती होते नाही एक च्या साठी असे तो त्या की म्हणून पण आपण"),
    "ne": Marks("DEVANAGARI", " छ र को मा यो हो पनि छन् भने लागि गर्न एक छैन थियो हरू तथा गर्ने भएको के हुन्छ"),
    "nl": Marks("LATIN", " " + COMMON_WORDS["nl"]),
    "pa": Marks("GURMUKHI"),
    "pl": Marks("LATIN", " " + COMMON_WORDS["pl"]),
    "pt": Marks("LATIN", " " + COMMON_WORDS["pt"]),
    "ru": Marks("CYRILLIC", " и в не на что с он как это но по к у из за от так же был для вы мы я бы его ы"),
    "sv": Marks("LATIN", " " + COMMON_WORDS["sv"]),
    "sw": Marks(
        "LATIN", " na ya wa kwa ni katika za la kuwa hii cha au kama hiyo yake watu pia lakini ambayo kila vya"
    ),
    "ta": Marks("TAMIL"),
    "te": Marks("TELUGU"),
    "th": Marks("THAI"),
    "tr": Marks("LATIN", " " + COMMON_WORDS["tr"]),
    "ur": Marks("ARABIC", " ہے کے میں کی اور کا سے کو پر یہ کہ ایک بھی نہیں ہیں لیے نے اس تو ہو"),
    "vi": Marks("LATIN", " và của là có cho một không được trong những với các này để người khi tôi bạn như đã"),
}
SHORT_WORDS = 4
"""A text of fewer words may have none of the commonest; then its script decides."""


def is_in_language(text: str, code: str) -> bool:
    """Whether a text is in the language; among those that share its script it has the most of this one's words.

    English is what models fall back to: where it has as many, the text is not taken for another language.
    Raises: KeyError for a language that is not in MARKS.
    """
    marks, letters = MARKS[code], scripts(text)
    if not letters or letters[marks.script] < SCRIPT_SHARE * letters.total():
        return False
    rivals = {name: other.own.split() for name, other in MARKS.items() if other.script == marks.script}
    if len(rivals) == 1:
        return True
    # Not \w+: it ends a word at each vowel sign of an Indic script.
    words = [word for word in re.split(r"[^\w\u0300-\u036f\u0900-\u0dff\u200c\u200d'’]+", text.casefold()) if word]
    hits = {name: sum(word in own for word in words) for name, own in rivals.items()}
    most = max(hits.values())
    if most == 0:
        return len(words) < SHORT_WORDS
    return hits[code] == most and (code == "en" or hits.get("en") != most)
