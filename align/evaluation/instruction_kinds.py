"""Instructions that a program can check, by the names and settings of IFEval's files: (settings, reply) -> kept or not.

Written from the descriptions of Zhou et al. 2023, arXiv:2311.07911, table 1, and from the settings and prompts of the
files. Words of frequency and existence are looked for anywhere in the text, as the published figures do: "sneakers"
has the keyword "sneaker". Words that are forbidden are looked for as whole words.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from align.data.reply_language import is_wrong_language
from align.evaluation.languages import is_in_language

Settings = Mapping[str, Any]
Check = Callable[[Settings, str], bool]

ENGLISH = "Please answer this question in the same words that I would use, as you would with any of your friends."
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
ABBREVIATION = re.compile(
    r"\b(?:mr|mrs|ms|dr|prof|st|sr|jr|vs|etc|inc|ltd|co|corp|fig|approx|e\.g|i\.e|u\.s|u\.k|p\.s|a\.m|p\.m)\.$"
    r"|\b[A-Z]\.$|\A\d+\.$",
    re.IGNORECASE,
)


def compares(count: int, settings: Settings, relation: str, limit: str) -> bool:
    """`at least` or `less than`. Raises: ValueError for any other relation."""
    if settings[relation] == "at least":
        return count >= settings[limit]
    if settings[relation] == "less than":
        return count < settings[limit]
    raise ValueError(f"{relation} {settings[relation]!r} is neither 'at least' nor 'less than'")


def sentence_count(text: str) -> int:
    """Pieces that end in a full stop, a question or exclamation mark, or a line break, and hold a letter or digit."""
    count, held = 0, ""
    for piece in re.split(r"(?<=[.!?])[\"'”’)*]*\s+|\n+", text):
        held = f"{held} {piece}".strip()
        if ABBREVIATION.search(held):
            continue
        count += any(map(str.isalnum, held))
        held = ""
    return count + any(map(str.isalnum, held))


def number_words(settings: Settings, reply: str) -> bool:
    return compares(len(re.findall(r"\w+", reply)), settings, "relation", "num_words")


def number_sentences(settings: Settings, reply: str) -> bool:
    return compares(sentence_count(reply), settings, "relation", "num_sentences")


def number_paragraphs(settings: Settings, reply: str) -> bool:
    """Paragraphs with the divider *** between them, none of them empty."""
    return _parts(re.split(r"\s?\*\*\*\s?", reply)) == settings["num_paragraphs"]


def nth_paragraph_first_word(settings: Settings, reply: str) -> bool:
    """Paragraphs with an empty line between them; the nth begins with a word, whatever its case and quotes."""
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", reply) if part.strip()]
    if len(paragraphs) != settings["num_paragraphs"] or not 0 < settings["nth_paragraph"] <= len(paragraphs):
        return False
    first = re.search(r"[\w'-]+", paragraphs[settings["nth_paragraph"] - 1])
    return first is not None and first.group().strip("'").lower() == settings["first_word"].lower()


def keyword_existence(settings: Settings, reply: str) -> bool:
    return all(word.lower() in reply.lower() for word in settings["keywords"])


def keyword_frequency(settings: Settings, reply: str) -> bool:
    return compares(reply.lower().count(settings["keyword"].strip().lower()), settings, "relation", "frequency")


def forbidden_words(settings: Settings, reply: str) -> bool:
    return not any(re.search(rf"\b{re.escape(w)}\b", reply, re.IGNORECASE) for w in settings["forbidden_words"])


def letter_frequency(settings: Settings, reply: str) -> bool:
    return compares(reply.lower().count(settings["letter"].lower()), settings, "let_relation", "let_frequency")


def response_language(settings: Settings, reply: str) -> bool:
    return is_in_language(reply, settings["language"])


def number_placeholders(settings: Settings, reply: str) -> bool:
    return len(re.findall(r"\[.*?\]", reply)) >= settings["num_placeholders"]


def postscript(settings: Settings, reply: str) -> bool:
    """The marker, with or without spaces and its last full stop, and something after it."""
    letters = [re.escape(letter) for letter in settings["postscript_marker"].replace(" ", "").rstrip(".").split(".")]
    return re.search(r"(?<!\w)" + r"\.\s?".join(letters) + r"\b\.?:?\s*\S", reply, re.IGNORECASE) is not None


def number_bullets(settings: Settings, reply: str) -> bool:
    """Exactly so many lines that begin with `* ` or `- `; **bold** and a divider begin none."""
    return len(re.findall(r"^\s*(?:\*(?!\*)|-(?!-))\s*\S", reply, re.MULTILINE)) == settings["num_bullets"]


def constrained_response(settings: Settings, reply: str) -> bool:
    return any(option in reply for option in OPTIONS)


def number_highlights(settings: Settings, reply: str) -> bool:
    """*One* or **two** asterisks around something on one line."""
    double = re.findall(r"\*\*[^\n*]*\S[^\n*]*\*\*", reply)
    single = re.findall(r"\*[^\n*]*\S[^\n*]*\*", re.sub(r"\*\*[^\n*]*\*\*", " ", reply))
    return len(double) + len(single) >= settings["num_highlights"]


def multiple_sections(settings: Settings, reply: str) -> bool:
    return len(re.findall(rf"{re.escape(settings['section_spliter'])}\s?\d+", reply)) >= settings["num_sections"]


def json_format(settings: Settings, reply: str) -> bool:
    """All of it JSON; a code fence around it may be there."""
    text = re.sub(r"\A```(?:json)?|```\Z", "", reply.strip(), flags=re.IGNORECASE)
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def has_title(settings: Settings, reply: str) -> bool:
    return any(title.strip() for title in re.findall(r"<<([^\n<>]+)>>", reply))


def two_responses(settings: Settings, reply: str) -> bool:
    """Two different answers with ****** between them; the divider may also stand at either end."""
    parts = [part.strip() for part in reply.split("******")]
    return _parts(parts) == 2 and len({part for part in parts if part}) == 2


def repeat_prompt(settings: Settings, reply: str) -> bool:
    return reply.strip().lower().startswith(settings["prompt_to_repeat"].strip().lower())


def end_phrase(settings: Settings, reply: str) -> bool:
    return reply.strip().strip('"').lower().endswith(settings["end_phrase"].strip().lower())


def all_capitals(settings: Settings, reply: str) -> bool:
    return reply.isupper() and not is_wrong_language(reply.lower(), ENGLISH)


def all_lowercase(settings: Settings, reply: str) -> bool:
    return reply.islower() and not is_wrong_language(reply, ENGLISH)


def capital_words(settings: Settings, reply: str) -> bool:
    words = re.findall(r"\w+(?:['’-]\w+)*", reply)
    return compares(sum(map(str.isupper, words)), settings, "capital_relation", "capital_frequency")


def no_comma(settings: Settings, reply: str) -> bool:
    return "," not in reply


def quotation(settings: Settings, reply: str) -> bool:
    text = reply.strip()
    return len(text) > 2 and text[0] == text[-1] == '"'


def _parts(parts: list[str]) -> int:
    """How many parts there are; an empty one at either end is none, an empty one between others spoils the count."""
    inner = parts[1 if not parts[0].strip() else 0 : -1 if len(parts) > 1 and not parts[-1].strip() else None]
    return len(inner) if all(part.strip() for part in inner) else -1


KINDS: Mapping[str, Check] = {
    "keywords:existence": keyword_existence,
    "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullets,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlights,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": has_title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_phrase,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_words,
    "change_case:english_capital": all_capitals,
    "change_case:english_lowercase": all_lowercase,
    "punctuation:no_comma": no_comma,
}
"""Name in the files, without a prefix for the language -> check."""
