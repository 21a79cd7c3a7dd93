"""Near duplicates are the ones that exact Jaccard similarity says, but for the noise of an estimate."""

import random

import pytest

from align.config.schema import DataConfig
from align.data.near_duplicates import NearDuplicates, shingles, text_of
from align.data.quality import check_record
from align.data.records import BadRow, Message, Origin, PreferencePair, TextDocument
from align.data.sources import parse_slot
from align.data.walk import walk

THRESHOLD = 0.8


def texts_with_edits(groups, seed=3):
    """Originals, each followed at some distance by copies with a growing number of changed words."""
    draw = random.Random(seed)
    texts = []
    for _ in range(groups):
        words = [f"w{draw.randrange(4000)}" for _ in range(draw.randrange(40, 160))]
        texts.append(" ".join(words))
        for changes in (1, 2, 4, 8):
            edited = list(words)
            for place in draw.sample(range(len(words)), changes):
                edited[place] = f"new{draw.randrange(10**6)}"
            texts.append(" ".join(edited))
    draw.shuffle(texts)
    return texts


def exact_similarity(a, b):
    first, second = shingles(a.split()), shingles(b.split())
    return len(first & second) / len(first | second)


def found_rows(texts, tmp_path, threshold=THRESHOLD):
    near = NearDuplicates(threshold, tmp_path)
    near.add([Origin("file", n) for n in range(len(texts))], [TextDocument(text) for text in texts])
    return near.results()


def best_earlier(texts, index):
    return max((exact_similarity(texts[index], texts[i]) for i in range(index)), default=0.0)


def test_recall_and_precision_against_exact_jaccard_similarity(tmp_path, monkeypatch):
    monkeypatch.setattr("align.data.near_duplicates.LISTED_ROWS", 1000)
    texts = texts_with_edits(60)
    finding = found_rows(texts, tmp_path)
    found = {int(row.split(" ~ ")[0].removeprefix("file:")) for row in finding.rows}
    truth = {index: best_earlier(texts, index) for index in range(len(texts))}
    # 0.1 is three standard errors of the estimate at the threshold.
    surely = {index for index, similarity in truth.items() if similarity >= THRESHOLD + 0.1}
    never = {index for index, similarity in truth.items() if similarity < THRESHOLD - 0.1}
    assert len(surely) > 30 and len(never) > 100
    assert len(surely - found) <= 0.02 * len(surely)
    assert not never & found
    assert finding.count == len(found) and finding.of == len(texts)
    named = [exact_similarity(texts[a], texts[b]) for a, b in map(parse_pair, finding.rows)]
    said = [float(row.rsplit("(", 1)[1].rstrip(")")) for row in finding.rows]
    assert max(abs(a - b) for a, b in zip(named, said, strict=True)) < 0.15


def parse_pair(row):
    later, earlier = row.split(" (")[0].split(" ~ ")
    return int(later.removeprefix("file:")), int(earlier)


def test_an_exact_copy_is_not_a_near_duplicate(tmp_path):
    text = "the quick brown fox jumps over the lazy dog and then sleeps for a very long while in the sun"
    finding = found_rows([text, text, text + " today"], tmp_path, 0.7)
    assert finding.count == 1
    assert finding.rows[0].startswith("file:2 ~ 0 (0.9")


def test_records_of_one_row_are_not_near_duplicates_of_each_other(tmp_path):
    prompt = (Message("user", " ".join(f"word{n}" for n in range(200))),)
    answers = [Message("assistant", text) for text in ("yes", "no", "maybe")]
    pairs = [PreferencePair(prompt, answers[0], answers[1]), PreferencePair(prompt, answers[0], answers[2])]
    near = NearDuplicates(THRESHOLD, tmp_path)
    near.add([Origin("trees", 1), Origin("trees", 1)], pairs)
    near.add([Origin("trees", 2)], [PreferencePair(prompt, answers[1], answers[2])])
    finding = near.results()
    assert finding.count == 1 and finding.rows[0].startswith("trees:2 ~ 1 (")


@pytest.mark.parametrize("texts", [[], ["   "], ["one"], ["short one", "short one here"]])
def test_no_rows_and_short_rows_are_taken(texts, tmp_path):
    assert found_rows(texts, tmp_path).count == 0


def test_case_and_blanks_do_not_hide_a_near_duplicate(tmp_path):
    words = [f"Word{n}" for n in range(60)]
    finding = found_rows([" ".join(words), "\n".join(words).upper() + " end"], tmp_path, 0.9)
    assert finding.count == 1


def test_the_scratch_file_is_gone_afterwards(tmp_path):
    found_rows(["a b c d e f"], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.real_data
def test_planted_edits_of_hh_rows_are_found_and_nothing_else(real_data, tmp_path):
    path = str(real_data / "hh_rlhf_harmless_test" / "test.jsonl.gz")
    [source] = parse_slot(path, "preferences", format="auto", split="train")
    walked = next(walk(source, PreferencePair, check_record, DataConfig())[1])
    texts = [text_of(record) for row in walked for record in row.records if not isinstance(record, BadRow)][:800]
    plain = found_rows(texts, tmp_path).count
    draw = random.Random(5)
    edited = {}
    for number in draw.sample(range(len(texts)), 200):
        words = texts[number].split()
        words[draw.randrange(len(words))] = "planted"
        if exact_similarity(" ".join(words).casefold(), texts[number].casefold()) >= THRESHOLD + 0.1:
            edited[number] = " ".join(words)
    finding = found_rows(texts + list(edited.values()), tmp_path)
    assert len(edited) > 100
    assert finding.count - plain >= 0.98 * len(edited)
    assert finding.count - plain <= len(edited)
