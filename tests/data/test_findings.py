"""What stands out in records is found, counted and named by its rows; what does not is not."""

import gzip
import json
import time
from dataclasses import asdict

import pytest

from align.config.schema import DataConfig
from align.data.findings import LISTED_ROWS, Findings
from align.data.leftovers import opens_like_refusal
from align.data.quality import check_record
from align.data.records import (
    BadRow,
    Demonstration,
    Message,
    Origin,
    PreferencePair,
    PromptRow,
    Ranking,
    TextDocument,
    ToolCall,
    Unpaired,
)
from align.data.sources import parse_slot
from align.data.walk import walk

USER = (Message("user", "Which is the largest lake?"),)


def answer(text):
    return Message("assistant", text)


def pair(chosen="Lake Superior is.", rejected="It is Lake Huron.", prompt=USER, **more):
    return PreferencePair(prompt, answer(chosen), answer(rejected), **more)


def found(records, origins=None):
    """Name -> finding; the records are in lines 1, 2, ... unless `origins` says where."""
    findings = Findings()
    origins = origins or [Origin("file", n) for n in range(1, len(records) + 1)]
    for start in range(0, len(records), 3):
        findings.add(origins[start : start + 3], records[start : start + 3])
    return {finding.name: finding for finding in findings.results()}


def lines(finding):
    return [int(row.removeprefix("file:")) for row in finding.rows]


def test_the_further_copies_of_a_record_are_counted_not_the_first():
    others = [pair(chosen=f"It is number {n}.") for n in range(5)]
    copies = found([pair(), *others, pair(), pair()])["exact_duplicates"]
    assert (copies.count, lines(copies), copies.level) == (2, [7, 8], "warn")


@pytest.mark.parametrize(
    "other",
    [
        pair(chosen="Lake Superior is!"),
        pair(p=0.8),
        pair(prompt=(Message("system", ""), *USER)),
        pair(prompt=(Message("user", "Which is the largest lake? "),)),
        pair(tools=('{"name": "atlas"}',)),
        PreferencePair(USER, Message("assistant", "Lake Superior is.", (ToolCall("find", "{}"),)), pair().rejected),
        PreferencePair(USER, Message("assistant", "Lake Superior is.", reasoning="Hm."), pair().rejected),
    ],
)
def test_a_record_that_differs_anywhere_is_no_copy(other):
    assert found([pair(), other])["exact_duplicates"].count == 0


def test_the_border_between_two_turns_is_part_of_a_record():
    split = Demonstration((Message("user", "a"), answer("b"), Message("user", "c"), answer("d")))
    other = Demonstration((Message("user", "a"), answer("bc"), Message("user", ""), answer("d")))
    assert found([split, other])["exact_duplicates"].count == 0


def test_all_rows_that_share_a_prompt_are_counted():
    lone = pair(prompt=(Message("user", "And the deepest?"),))
    repeated = found([pair(), lone, pair(chosen="Superior.")])["repeated_prompts"]
    assert (repeated.count, lines(repeated), repeated.level) == (2, [1, 3], "info")


def test_the_records_of_one_row_do_not_repeat_its_prompt():
    origins = [Origin("trees", 1), Origin("trees", 1), Origin("trees", 2)]
    records = [pair(), pair(chosen="Superior."), pair(prompt=(Message("user", "And the deepest?"),))]
    assert found(records, origins)["repeated_prompts"].count == 0
    again = found([*records, pair(chosen="Huron.")], [*origins, Origin("trees", 3)])["repeated_prompts"]
    assert again.rows == ["trees:1", "trees:3"]


def test_opposite_labels_name_both_rows():
    swapped = pair(chosen=pair().rejected.content, rejected=pair().chosen.content)
    opposite = found([pair(), pair(chosen="Neither."), swapped])["opposite_labels"]
    assert (opposite.count, lines(opposite), opposite.level) == (2, [1, 3], "warn")


def test_a_tie_and_another_prompt_contradict_nothing():
    chosen, rejected = pair().rejected.content, pair().chosen.content
    tie, elsewhere = pair(chosen, rejected, p=0.5, tie=True), pair(chosen, rejected, (Message("user", "Else?"),))
    assert found([pair(), tie, elsewhere, pair()])["opposite_labels"].count == 0


def test_an_answer_called_good_and_bad_is_an_opposite_label():
    good, bad = (Unpaired(USER, answer("Superior."), desirable) for desirable in (True, False))
    findings = found([good, bad, Unpaired(USER, answer("Huron."), False)])
    assert lines(findings["opposite_labels"]) == [1, 2]
    assert findings["exact_duplicates"].count == 0


def test_length_bias_is_a_warning_in_either_direction_from_a_hundred_pairs():
    longer, shorter, equal = pair("four words are here", "two"), pair("two", "four words are here"), pair("abc", "xyz")
    assert found([longer] * 66 + [shorter] * 34)["chosen_longer"].level == "warn"
    assert found([longer] * 34 + [shorter] * 66)["chosen_longer"].level == "warn"
    assert found([longer] * 65 + [shorter] * 35)["chosen_longer"].level == "info"
    assert found([longer] * 99)["chosen_longer"].level == "info"
    balance = found([longer, shorter, equal, equal])["chosen_longer"]
    assert (balance.count, balance.of) == (1, 4)
    assert "longer in 25% of the pairs and as long in 50%" in balance.text
    assert "on average 7 characters against 7" in balance.text


def test_ties_and_soft_labels_are_counted_apart():
    findings = found([pair(p=0.5, tie=True), pair(p=0.75), pair()])
    assert lines(findings["ties"]) == [1]
    assert lines(findings["soft_labels"]) == [2]


def test_one_word_answers_of_either_side_count_a_row_once():
    findings = found([pair("Yes", "No"), pair("Yes, it is", " no\n"), pair("a b", "c d")])
    assert lines(findings["one_word_answers"]) == [1, 2]


@pytest.mark.parametrize("text", ["I\u2019m sorry, but no.", "I can't do that", " I cannot help", "As an AI model, I"])
def test_a_refusal_is_known_by_its_opening(text):
    assert opens_like_refusal(text)


@pytest.mark.parametrize("text", ["", "Canada has it.", "It said: I can't do that", "Sorry is a word."])
def test_other_openings_are_no_refusals(text):
    assert not opens_like_refusal(text)


def test_refusals_are_a_share_of_each_side():
    refusal = "I cannot answer that."
    finding = found([pair(chosen=refusal), pair(), pair(rejected=refusal), pair(chosen=refusal)])["refusals"]
    assert (finding.count, finding.of, lines(finding)) == (3, 8, [1, 4, 3])
    assert finding.text.startswith("50% of the chosen answers and 25% of the rejected answers")


@pytest.mark.parametrize(
    "text",
    [
        *(
            "<|im_start|>user",
            "a<\uff5cend\u2581of\u2581sentence\uff5c>",
            "text<|eot_id|>",
            "[INST] Do it [/INST]",
            "<<SYS>>be nice",
            "<start_of_turn>user",
            "a</s>",
        ),
        *("### Response:\nYes", "Well.\n\nHuman: And?", "Assistant: Yes", "one\n### Instruction:", "x\nAssistant: y"),
    ],
)
def test_template_markup_inside_a_turn_is_found(text):
    finding = found([pair(chosen=text)])["template_markup"]
    assert (finding.count, finding.level) == (1, "warn")


@pytest.mark.parametrize(
    "text", ["a | b <- c |> d", "the Human: a study", "[INSTANT]", "### Results", "x < s > y", "my Assistant: he"]
)
def test_ordinary_text_is_no_markup(text):
    assert found([pair(chosen=text)])["template_markup"].count == 0


@pytest.mark.parametrize("text", ["I am {{name}}.", "{{ user_name }}", "<PLACEHOLDER>", "[INSERT NAME HERE]"])
def test_placeholders_are_found(text):
    assert found([pair(chosen=text)])["placeholders"].count == 1


@pytest.mark.parametrize("text", ["{{1, 2}, {3}}", "f{{}}", "{name}", "[insertion]", "array[0]", "{{% raw %}}"])
def test_code_is_no_placeholder(text):
    assert found([pair(chosen=text)])["placeholders"].count == 0


def test_every_kind_of_record_is_taken():
    turns = (*USER, answer("Superior."))
    kinds = {
        "text": TextDocument("<|endoftext|> once"),
        "demonstration": Demonstration(turns),
        "prompt": PromptRow(USER, {"any": "row"}),
        "ranking": Ranking(USER, (answer("a b"), answer("c"), answer("d e")), (0, 1, 2)),
        "unpaired": Unpaired(USER, answer("Superior."), True),
    }
    for record in kinds.values():
        findings = found([record, record])
        assert findings["exact_duplicates"].rows == ["file:2"]
        json.dumps([asdict(finding) for finding in findings.values()])
    assert found([kinds["text"]])["template_markup"].count == 1
    assert "repeated_prompts" not in found([kinds["text"]])
    assert found([kinds["ranking"]])["one_word_answers"].count == 1
    assert "refusals" not in found([kinds["prompt"]])


def test_no_records_and_odd_characters_are_taken():
    assert found([])["exact_duplicates"].count == 0
    assert found([pair(chosen="\ud800 lone"), pair(chosen="\ud800 lone")])["exact_duplicates"].count == 1


def test_only_the_first_rows_are_named_and_all_are_counted():
    finding = found([pair(chosen=f"{{{{name}}}} {n}") for n in range(50)])["placeholders"]
    assert finding.count == 50
    assert lines(finding) == list(range(1, LISTED_ROWS + 1))


def read(path, slot, kind):
    records = []
    for source in parse_slot(str(path), slot, format="auto", split="train"):
        for batch in walk(source, kind, check_record, DataConfig())[1]:
            records += [(row.origin, one) for row in batch for one in row.records if not isinstance(one, BadRow)]
    return found([record for _, record in records], [origin for origin, _ in records])


def rows_of(finding):
    """0-based."""
    return [int(row.replace(" row ", ":").rsplit(":", 1)[1]) - 1 for row in finding.rows]


@pytest.mark.real_data
def test_what_is_known_of_hh_is_found(real_data):
    path = real_data / "hh_rlhf_harmless_test" / "test.jsonl.gz"
    findings = read(path, "preferences", PreferencePair)
    assert rows_of(findings["repeated_prompts"]) == [250, 1262, 1452, 1483]
    assert findings["exact_duplicates"].count == 0
    assert 0.42 < findings["chosen_longer"].count / findings["chosen_longer"].of < 0.45
    assert {29, 105, 140, 197, 207, 232} <= set(rows_of(findings["template_markup"]))
    assert findings["template_markup"].count == 39
    with gzip.open(path, "rt", encoding="utf-8") as file:
        short = [_has_short_answer(json.loads(line)) for line in file]
    named = rows_of(findings["one_word_answers"])
    assert len(named) == LISTED_ROWS and all(short[row] for row in named)


def _has_short_answer(row):
    return any(len(row[side].rsplit("\n\nAssistant:", 1)[1].split()) <= 1 for side in ("chosen", "rejected"))


@pytest.mark.real_data
def test_what_is_known_of_other_sets_is_found(real_data):
    identity = read(real_data / "llamafactory_demo" / "identity.json", "demonstrations", Demonstration)
    assert identity["placeholders"].count == 85
    english = read(real_data / "llamafactory_demo" / "dpo_en_demo.json", "preferences", PreferencePair)
    assert rows_of(english["repeated_prompts"]) == [13, 28, 84, 111, 117, 157, 186, 230, 248, 275]
    polite = real_data / "rasbt_instruction" / "instruction-data-with-preference.json"
    assert read(polite, "preferences", PreferencePair)["repeated_prompts"].count == 45


@pytest.mark.real_data
def test_a_row_costs_little_time_and_memory(real_data):
    path = real_data / "hh_rlhf_harmless_test" / "test.jsonl.gz"
    [source] = parse_slot(str(path), "preferences", format="auto", split="train")
    batches = walk(source, PreferencePair, check_record, DataConfig())[1]
    pairs = [(row.origin, one) for batch in batches for row in batch for one in row.records]
    sound = [(origin, one) for origin, one in pairs if not isinstance(one, BadRow)]
    findings, started = Findings(), time.process_time()
    findings.add(*map(list, zip(*sound, strict=True)))
    # About 10 microseconds where nothing else runs (2026-11); the bound allows for a slow and busy machine.
    assert (time.process_time() - started) / len(sound) < 60e-6
    kept = (findings.records, findings.prompts, findings.labelled, findings.places._file, findings.places._number)
    assert sum(column.itemsize * len(column) for column in kept) == 32 * len(sound)
