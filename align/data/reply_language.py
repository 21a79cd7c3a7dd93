"""Whether a reply is in a language that the conversation is not in: by script, and by the commonest words."""

import re
import unicodedata
from collections import Counter

COMMON_WORDS = {
    "en": "the of and to is was that it for on are with as his they be at this have from or had by but what all "
    "were when your can there use an each which she do how their if will up about out many then them "
    "these so some her would make you we my not does me a i in no us just want could should think where "
    "who why get thing more here don't i'm it's has been than into only other any may also through after "
    "most such because while doesn't cannot",
    "de": "der die das und ist nicht ein eine einen zu den dem des mit auf für von sich es auch als wie im aus "
    "er sie wir ihr ich du mir mich dich dir kann hat sind war wird oder aber wenn weil dass bei nach um "
    "noch nur sehr über kein ihn ihm doch ob am besten einfach hier mein meine dein deine sein seine ihre "
    "ihren keine dann dies diese dieser man kannst darf darfst haben hast bist bin gibt mehr immer schon "
    "vor durch zum zur vom beim etwas alle",
    "fr": "je veux merci le la les des et est un une que qui dans pour pas ne ce sur plus par il elle nous vous "
    "tu au avec sont mais son sa ses du cette comme être fait quand pourquoi peux aux ou où ça leur c'est "
    "d'une qu'il si mon ton ma ta mes tes notre votre lui on même aussi bien très peu peut faut faire "
    "sans sous entre puis alors donc encore comment jamais toujours rien tout tous toute",
    "es": "a puedo quiero tengo gracias el la los las de que y en un una por con no se para es lo su al como "
    "más pero sus le ya o este sí porque esta cuando muy sin sobre también me hay puedes está tal qué del "
    "tu son te mi si ser tiene tienes hacer puede pueden desde hasta entre donde quién eso esa ese estas "
    "estos nos otro otra todo todos nada nunca siempre mejor ahora",
    "it": "a ti vi posso voglio grazie volentieri il lo la i gli le di che e è un una per non in con si da come "
    "anche ma se più questo del della dei delle alla sono ha nel perché quando molto ci cosa al dal dalla "
    "tuo tua suo sua mio mia puoi può hai ho ne lui lei loro noi voi essere fare fatto ancora sempre mai "
    "tutto tutti dove quale quello quella allora poi prima senza tra",
    "pt": "o a os as de que e é em um uma para com não se por mais como mas do da dos das ao ele ela seu sua "
    "quando muito nos já eu também isso pelo pela porque fica está você na no te meu minha pode posso ser "
    "ter tem fazer feito até entre onde quem isto esse essa este esta todo todos nada nunca sempre melhor "
    "agora então depois sem",
    "nl": "de het een en van is dat niet in op te zijn voor met die aan er om ook als maar bij uit dan nog naar "
    "hij ze wij je jij ik mijn wordt waarin omdat kan heeft over geen wat deze doet vraag gewoon beste u "
    "hun ons onze wel veel meer moet mag kunt kun zou zal zich dus toch al door tot tegen zonder onder "
    "hem haar hen",
    "pl": "i w na z do się nie że to jest jak o co ale po czy za od dla przez być może możesz jego jej ich są "
    "był była tak już tylko lub albo gdy żeby bardzo",
    "sv": "och att det som en på är av för med den till inte om ett han hon jag du vi de har kan ska var från "
    "men så när där eller också mycket din min",
    "tr": "ve bir bu için ile de da ne mi çok daha gibi ama var yok ben sen o biz siz en kadar sonra olarak "
    "olan değil nasıl",
}
"""Some of the commonest words of languages in Latin script; several belong to more than one."""
LISTED = {language: frozenset(words.split()) for language, words in COMMON_WORDS.items()}
OWN = {
    language: listed.difference(*(other for name, other in LISTED.items() if name != language))
    for language, listed in LISTED.items()
}
"""Those that no other language has."""
SURE_HITS = 4
"""Common words that a reply has at least of the language that it is taken to be in."""
CLEAR_HITS = 2
"""Of a reply of a few words, none of which is among the commonest of the prompt's language."""
SURE_SHARE = 0.15
"""Of its words; running text has twice that, a table of names in which an "e" occurs has not."""
PROMPT_HITS = 3
"""Of a prompt, which is shorter."""
FEW_HITS = 2
"""So many common words of the reply's language in the prompt: perhaps the prompt is in it, around a quotation."""
LEAD = 1.5
"""How many times as many as of any other language."""

NAMES = re.compile(
    r"\b(?:english|german|french|spanish|italian|portuguese|dutch|russian|chinese|mandarin|japanese|korean|arabic|hindi|"
    r"bengali|greek|latin|hebrew|turkish|polish|swedish|thai|vietnamese|ukrainian|deutsch|englisch|französisch|spanisch|"
    r"anglais|français|allemand|espagnol|inglés|francés|alemán|español|inglese|italiano|tedesco|português|inglês|"
    r"nederlands|engels|language|sprache|langue|idioma|lingua|taal|translat\w*|übersetz\w*|tradui\w*|traduc\w*|traduz\w*)\b"
    r"|перевед|перевод|английск|翻译|翻譯|翻訳|英語|英语|英文|日本語|中文|한국어|영어",
    re.IGNORECASE,
)
"""A prompt that names a language may want any."""
LEFT_OUT = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]{0,300}`|\"[^\"\n]{0,300}\"|“[^”\n]{0,300}”|«[^»\n]{0,300}»|https?://\S+", re.DOTALL
)
"""Code, quotations and addresses are in what language they are in."""

FOREIGN_SHARE = 0.3
"""Of the letters: so many in a script that the conversation does not use are no mere names."""
LATIN_SHARE = 0.85
"""Latin letters stand for terms in texts of every script."""
FOREIGN_LETTERS = 5
CHARACTER_WEIGHT = 2
"""A Chinese character says as much as two letters or more."""
ALONE = 10
"""A Japanese text has kana among so many characters."""


def is_wrong_language(reply: str, prompt: str, conversation: str = "") -> bool:
    """Whether a reply is in a script or language that the conversation is not in. False wherever that is uncertain."""
    if NAMES.search(prompt):
        return False
    asked, said = scripts(f"{conversation}\n{prompt}"), scripts(LEFT_OUT.sub(" ", reply))
    if not asked or not said:
        return False
    return _foreign_script(asked, said) or _foreign_words(reply, prompt, conversation)


def scripts(text: str) -> Counter[str]:
    """Script -> how many letters, by the first word of their Unicode names."""
    found: Counter[str] = Counter()
    for char, count in Counter(text).items():
        if char.isalpha():
            script = unicodedata.name(char, "UNKNOWN").split()[0]
            script = {"HIRAGANA": "KANA", "KATAKANA": "KANA", "KATAKANA-HIRAGANA": "KANA"}.get(script, script)
            found[script] += count * (CHARACTER_WEIGHT if script in ("CJK", "HANGUL") else 1)
    return found


def _foreign_script(asked: Counter[str], said: Counter[str]) -> bool:
    total = said.total()
    for script, letters in said.items():
        share = LATIN_SHARE if script == "LATIN" else FOREIGN_SHARE
        if script not in asked and letters >= FOREIGN_LETTERS and letters / total >= share:
            # Characters alone may well answer a question in kana: a name, a number.
            if script != "CJK" or "KANA" not in asked:
                return True
    return asked["KANA"] > 0 and said["KANA"] == 0 and said["CJK"] >= ALONE * CHARACTER_WEIGHT


def _foreign_words(reply: str, prompt: str, conversation: str) -> bool:
    """Whether the commonest words of a reply are another language's than the prompt's, which has none of those."""
    said = LEFT_OUT.sub(" ", reply)
    asked = _language(prompt, PROMPT_HITS) or _language(conversation, SURE_HITS)
    if asked is None:
        return False
    none_of_it = not OWN[asked] & set(_words(said))
    spoken = _language(said, CLEAR_HITS if none_of_it else SURE_HITS)
    if spoken is None or spoken == asked:
        return False
    own = LISTED[spoken] - LISTED[asked]
    return len(own & set(_words(prompt))) < FEW_HITS


def _language(text: str, hits: float) -> str | None:
    """The language with so many hits, and clearly more than any other; None where there is none."""
    counted = Counter(_words(text))
    hits = max(hits, SURE_SHARE * counted.total())
    found = {name: sum(counted[word] for word in listed) for name, listed in LISTED.items()}
    (best, most), (_, second) = sorted(found.items(), key=lambda item: -item[1])[:2]
    return best if most >= hits and most >= LEAD * second else None


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text.casefold().replace("’", "'"))
