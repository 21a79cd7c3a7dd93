"""Overlap is what sets of prompts and of 13-word tuples say."""

import random

from align.data.overlap import Overlap, words_of
from align.data.records import Demonstration, Message, Origin, PreferencePair, PromptRow, TextDocument

RUN = "one two three four five six seven eight nine ten eleven twelve thirteen"


def pair(prompt, chosen, rejected="no", system=""):
    turns = (Message("system", system),) if system else ()
    return PreferencePair(
        (*turns, Message("user", prompt)), Message("assistant", chosen), Message("assistant", rejected)
    )


def random_pairs(count, seed):
    """Pairs from a small vocabulary of phrases, so that runs of 13 words are often shared."""
    draw = random.Random(seed)
    phrases = [" ".join(f"v{draw.randrange(300)}" for _ in range(8)) for _ in range(60)]

    def text(most):
        return ", ".join(draw.choice(phrases) for _ in range(draw.randrange(1, most)))

    return [pair(text(3), text(4), text(4)) for _ in range(count)]


def grams_of(record):
    texts = [message.content for message in (*record.prompt, record.chosen, record.rejected)]
    runs = set()
    for text in texts:
        words = words_of(text)
        runs |= {tuple(words[i : i + 13]) for i in range(len(words) - 12)}
    return runs


def prompt_of(record):
    return tuple(words_of(" ".join(message.content for message in record.prompt)))


def run_overlap(references, train):
    overlap = Overlap(list(references))
    for name, records in references.items():
        for start in range(0, len(records), 7):
            overlap.add_reference(name, records[start : start + 7])
    for start in range(0, len(train), 11):
        batch = train[start : start + 11]
        overlap.scan([Origin("train", start + n) for n in range(len(batch))], batch)
    return {finding.name: finding for finding in overlap.results()}


def test_counts_are_those_of_plain_sets():
    train = random_pairs(300, seed=1)
    references = {
        "held-out": random_pairs(40, seed=1)[20:] + random_pairs(40, seed=2),
        "other": random_pairs(30, seed=3),
    }
    findings = run_overlap(references, train)
    for name, records in references.items():
        prompts, grams = {prompt_of(r) for r in records}, set().union(*map(grams_of, records))
        by_prompt = [n for n, r in enumerate(train) if prompt_of(r) in prompts]
        by_gram = [n for n, r in enumerate(train) if grams_of(r) & grams]
        same, shared = findings[f"overlap_prompts/{name}"], findings[f"overlap_grams/{name}"]
        assert (same.count, shared.count) == (len(by_prompt), len(by_gram))
        assert shared.rows == [f"train:{n}" for n in by_gram[:20]]
        seen_prompts, seen_grams = {prompt_of(r) for r in train}, set().union(*map(grams_of, train))
        hit = sum(prompt_of(r) in seen_prompts for r in records)
        assert f"({hit:,} of its {len(records):,}, " in same.text
        hit = sum(bool(grams_of(r) & seen_grams) for r in records)
        assert f"({hit:,} of its {len(records):,}, " in shared.text
    assert 0 < findings["overlap_grams/held-out"].count < 300
    assert findings["overlap_grams/other"].count == 0


def test_twelve_words_are_not_enough_and_thirteen_are():
    held_out = [pair("Q", f"So: {RUN}.")]
    twelve, thirteen = " ".join(RUN.split()[:12]), f"Well, {RUN.upper()}!"
    findings = run_overlap({"set": held_out}, [pair("A", twelve), pair("B", thirteen)])
    assert findings["overlap_grams/set"].rows == ["train:1"]


def test_a_run_does_not_go_across_turns_or_rows():
    words = RUN.split()
    train = [
        pair(" ".join(words[:7]), " ".join(words[7:])),
        pair("x", "y", " ".join(words[:6])),
        pair(" ".join(words[6:]), "z"),
    ]
    assert run_overlap({"set": [pair("Q", RUN)]}, train)["overlap_grams/set"].count == 0


def test_a_short_prompt_is_found_only_whole_whatever_its_case_and_punctuation():
    reference = [PromptRow((Message("user", "What is 2 + 2?"),))]
    train = [pair("what is 2+2", "4"), pair("What is 2 + 2? Say it.", "4")]
    findings = run_overlap({"arithmetic": reference}, train)
    assert findings["overlap_prompts/arithmetic"].rows == ["train:0"]
    assert findings["overlap_prompts/arithmetic"].level == "warn"


def test_a_shared_system_prompt_is_no_overlap():
    train = [pair("Who are you?", "A model", system=RUN)]
    findings = run_overlap({"set": [pair("Where are you?", "Here", system=RUN)]}, train)
    assert all(finding.count == 0 for finding in findings.values())


def test_answers_and_documents_count_too():
    reference = [Demonstration((Message("user", "Count"), Message("assistant", RUN)))]
    overlap = Overlap(["set"])
    overlap.add_reference("set", reference)
    overlap.scan([Origin("book", 1)], [TextDocument(f"zero {RUN} fourteen")])
    assert [finding.count for finding in overlap.results()] == [0, 1]


def test_prompts_without_words_match_nothing_and_an_empty_reference_is_taken():
    findings = run_overlap({"set": [pair("?!", "a")], "empty": []}, [pair("...", "b")])
    assert all(finding.count == 0 for finding in findings.values())
