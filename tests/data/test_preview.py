"""The preview shows what is learnt, no more and no less, and finds rows that would train wrongly."""

import json
import re
import sys

import datasets
import pytest

from align.config.errors import UserError
from align.config.schema import DataConfig, ModelConfig, OnBadRows
from align.config.store import compose_run
from align.data.bad_rows import BadRows
from align.data.prepare import Prepared, prepare_demonstrations, prepare_preferences, prepare_text
from align.data.preview import STOP, Sample, Segment, pick
from align.data.report import RowReport
from align.data.template import Template
from align.models.load import load_tokenizer
from align.verbs import preview as verb
from tests.data.chat_tokenizers import QWEN3, STYLES, gemma, qwen


@pytest.fixture(scope="module")
def template():
    return Template(load_tokenizer("tiny-base", ModelConfig(), None))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def made(slot, columns, *, max_tokens=64):
    """Rows made by hand, as if they had been prepared."""
    rows = datasets.Dataset.from_dict(columns)
    report = RowReport(slot, BadRows(None), max_tokens=max_tokens)
    return Prepared(rows, rows.select([]), report, [])


def between_marks(text):
    return re.findall(r"⟦(.*?)⟧", text.split("──", 1)[1], re.DOTALL)


def shown(prepared, template):
    return verb.preview("stage", prepared, template)


def test_the_text_between_marks_is_each_answer_and_its_stop_token_exactly(tmp_path, template):
    talk = [
        {"role": "user", "content": "What is the flask made of?"},
        {"role": "assistant", "content": "The flask is made of glass."},
        {"role": "user", "content": "How does the ham taste?"},
        {"role": "assistant", "content": "The ham tastes salty."},
    ]
    data = DataConfig(demonstrations=write(tmp_path / "rows.jsonl", [{"messages": talk}]))
    prepared = prepare_demonstrations(data, template, 64, None)
    text = verb.terminal_text(shown(prepared, template), colour=False)
    stop = template.chat.stop
    assert between_marks(text) == [f"The flask is made of glass.{stop}", f"The ham tastes salty.{stop}"]
    assert "What is the flask made of?" in text
    ids = prepared.train[0]["input_ids"]
    assert f"tokens: all {len(ids)}, trained {sum(label != -100 for label in prepared.train[0]['labels'])}" in text


@pytest.mark.parametrize("style", ["gemma", "mistral_words", "zephyr_words", "blank_border", "gpt2_plain", "qwen3"])
def test_a_pair_is_shown_as_prompt_chosen_and_rejected_with_borders(tmp_path, style):
    template, opening, stop = Template(STYLES[style].make()), STYLES[style].opening, STYLES[style].stop
    row = {"prompt": "And at night?", "chosen": "Black,\n\nwith stars.", "rejected": "It is blue today."}
    prepared = prepare_preferences(DataConfig(preferences=write(tmp_path / "p.jsonl", [row])), template, 64, None)
    text = verb.terminal_text(shown(prepared, template), colour=False)
    head, chosen, rejected = re.split(r"\n── (?:chosen|rejected) ──\n", text)
    assert "And at night?" in head and "⟦" not in head.split("──")[-1]
    assert chosen == f"⟦{opening}Black,\n\nwith stars.{stop}⟧"
    assert rejected == f"⟦{opening}It is blue today.{stop}⟧\n"


def test_colours_mark_the_same_text_and_no_marks_are_left(template):
    prepared = _trained(template, "How does the ham taste?", "The ham tastes salty.")
    plain = verb.terminal_text(shown(prepared, template), colour=False)
    coloured = verb.terminal_text(shown(prepared, template), colour=True)
    assert f"\x1b[32mThe ham tastes salty.\x1b[0m\x1b[1;7m{template.chat.stop}\x1b[0m" in coloured
    assert "⟦" in plain and "\x1b" not in plain
    assert "⟦" not in coloured


def test_colours_go_only_to_a_terminal_that_wants_them(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert not verb.use_colour()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert verb.use_colour()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not verb.use_colour()


def test_control_characters_of_the_data_do_not_reach_the_terminal():
    sample = Sample("first", "demonstrations", [Segment("a\x1b[31mred\r\u202e", "trained", (1,))])
    for colour in (False, True):
        text = verb.terminal_text(verb.Preview("sft", "demonstrations", [sample], [[]]), colour)
        assert "␛[31mred␍�" in text
        assert "\x1b[31m" not in text and "\r" not in text


def _trained(template, question, answer, **changed):
    """One demonstration as it is prepared, with columns of it changed."""
    from align.data.records import Demonstration, Message

    messages = (Message("user", question), Message("assistant", answer))
    [[(ids, labels)]] = template.encode_demonstrations([Demonstration(messages)])
    columns = {"input_ids": [ids], "labels": [labels]}
    return made("demonstrations", columns | {name: [change(ids, labels)] for name, change in changed.items()})


def _problems(prepared, template):
    return [problem for found in shown(prepared, template).problems for problem in found]


def test_a_sound_row_has_no_problem(template):
    assert _problems(_trained(template, "How does the ham taste?", "The ham tastes salty."), template) == []


def test_a_stop_token_that_is_not_trained_is_a_problem(template):
    prepared = _trained(
        template, "How does the ham taste?", "The ham tastes salty.", labels=lambda _, labels: [*labels[:-1], -100]
    )
    assert _problems(prepared, template) == ["trained text ends in 'The ham tastes salty.', not in a stop token"]


def test_a_row_without_a_trained_token_is_a_problem(template):
    prepared = _trained(
        template, "How does the ham taste?", "The ham tastes salty.", labels=lambda ids, _: [-100] * len(ids)
    )
    assert _problems(prepared, template) == ["no token is trained"]


def test_an_earlier_answer_without_its_stop_token_is_a_problem(template):
    stop = template.chat.stop_id
    ids = [5, 6, stop, 7, 8, stop]
    prepared = made("demonstrations", {"input_ids": [ids], "labels": [[-100, 6, -100, -100, 8, stop]]})
    [problem] = _problems(prepared, template)
    assert problem.endswith("not in a stop token")


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_completion_that_does_not_stop_is_a_problem_on_either_side(template, side):
    stop = template.chat.stop_id
    columns = {"prompt_ids": [[5, 6]], "chosen_ids": [[7, stop]], "rejected_ids": [[8, stop]]}
    assert _problems(made("preferences", columns), template) == []
    columns[f"{side}_ids"][0].pop()
    [problem] = _problems(made("preferences", columns), template)
    assert problem.startswith(f"{side} text ends in") and problem.endswith("not in a stop token")


def test_two_bos_tokens_are_a_problem():
    template = Template(gemma())
    bos, stop = template.tokenizer.bos_token_id, template.chat.stop_id
    columns = {"prompt_ids": [[bos, bos, 9]], "chosen_ids": [[7, stop]], "rejected_ids": [[8, stop]]}
    assert _problems(made("preferences", columns), template) == ["two BOS tokens follow each other"]
    columns["prompt_ids"] = [[bos, 9]]
    assert _problems(made("preferences", columns), template) == []


def test_a_piece_of_a_document_may_end_anywhere_but_must_teach_something(template):
    eos = template.tokenizer.eos_token_id
    columns = {"input_ids": [[5, 6, 7, 8], [9, eos]], "labels": [[5, 6, 7, 8], [9, eos]]}
    prepared = made("text", columns, max_tokens=4)
    assert _problems(prepared, template) == []
    columns["labels"] = [[-100] * 4, [9, eos]]
    assert set(_problems(made("text", columns, max_tokens=4), template)) == {"no token is trained"}


def test_the_first_longest_and_shortest_rows_are_shown_and_none_twice(template):
    rows = [[5] * length for length in (3, 9, 4, 2, 5, 4, 4, 4)]
    prepared = made("demonstrations", {"input_ids": rows, "labels": rows})
    labels = [sample.label for sample in pick(prepared, template.tokenizer, [])]
    joined = "; ".join(labels)
    assert "first" in labels[0] and labels[0].endswith("(row 1 of 8)")
    assert re.search(r"longest \(row 2 of 8\)", joined) and re.search(r"shortest \(row 4 of 8\)", joined)
    places = re.findall(r"row (\d+) of", joined)
    assert len(places) == len(set(places)) >= 3
    assert labels == [sample.label for sample in pick(prepared, template.tokenizer, [])]
    [only] = pick(made("demonstrations", {"input_ids": rows[:1], "labels": rows[:1]}), template.tokenizer, [])
    assert only.label == "first and longest and shortest (row 1 of 1)"


def test_a_pairs_length_is_that_of_its_longer_side(template):
    columns = {"prompt_ids": [[5], [5, 5]], "chosen_ids": [[6], [6]], "rejected_ids": [[7] * 5, [7]]}
    first, last = pick(made("preferences", columns), template.tokenizer, [])
    assert "longest" in first.label and "shortest" in last.label
    assert first.tokens == {"prompt": 1, "chosen": 1, "rejected": 5, "longer side": 6}


def test_a_document_that_was_cut_is_shown_as_such(tmp_path, template):
    texts = ["The ham tastes salty. " * 30, "The ham."]
    data = DataConfig(text=write(tmp_path / "text.jsonl", [{"text": text} for text in texts]), held_out_fraction=0.0)
    prepared = prepare_text(data, template, 16, None)
    samples = pick(prepared, template.tokenizer, {template.tokenizer.eos_token_id})
    [cut] = [sample for sample in samples if "cut" in sample.label]
    assert cut.tokens["all"] >= 15
    assert all(segment.role != STOP for segment in cut.segments)


def test_a_full_piece_that_ends_its_document_is_not_called_cut(template):
    eos = template.tokenizer.eos_token_id
    rows = [[5, 6, 7, eos], [5, 6, 7, 8], [9, eos]]
    labels = [sample.label for sample in pick(made("text", {"input_ids": rows, "labels": rows}, max_tokens=4),
                                              template.tokenizer, {eos})]  # fmt: skip
    assert [label for label in labels if "cut" in label] == [label for label in labels if "row 2 of 3" in label]
    whole = made("text", {"input_ids": rows[:1], "labels": rows[:1]}, max_tokens=4)
    assert "cut" not in pick(whole, template.tokenizer, {eos})[0].label


def test_a_row_that_was_too_long_is_shown_as_it_was_read(tmp_path, template):
    rows = [{"prompt": f"Q{n}?", "chosen": f"Yes {n}.", "rejected": "No."} for n in range(4)]
    rows[2]["chosen"] = "long " * 3000
    path = write(tmp_path / "p.jsonl", rows)
    data = DataConfig(preferences=path, on_bad_rows=OnBadRows.drop)
    view = shown(prepare_preferences(data, template, 64, None), template)
    left_out = view.samples[-1]
    assert left_out.label.startswith(f"left out as too long ({path}:3: ")
    assert left_out.segments[0].text.startswith('{\n  "prompt": "Q2?",\n  "chosen": "long long')
    assert re.search(r"… and 1\d,\d{3} more characters$", left_out.segments[0].text)
    assert view.problems[-1] == []
    assert "⟦" not in verb.terminal_text(view, colour=False).split("left out as too long")[1]


def test_the_page_escapes_what_comes_from_the_data_and_refers_to_nothing(template):
    sample = Sample(
        "first <script>alert(1)</script>", "demonstrations",
        [Segment("<script>alert('x')</script> & \"", "context", (1,)), Segment("</pre><b>", "trained", (2,))],
        {"all": 2, "trained": 1},
    )  # fmt: skip
    html = verb.html_page(verb.Preview("sft", "demonstrations", [sample], [["ends in '<i>'"]]))
    assert "<script" not in html and "</pre><b>" not in html and "<i>" not in html
    assert '<span class="trained">&lt;/pre&gt;&lt;b&gt;</span>' in html
    assert '<p class="bad">Problem: ends in &#x27;&lt;i&gt;&#x27;</p>' in html
    assert "http" not in html and "src=" not in html and "@import" not in html


def test_the_page_colours_every_role_and_says_what_it_means():
    template = Template(gemma())
    stop = template.chat.stop_id
    columns = {"prompt_ids": [[5, 6]], "chosen_ids": [[7, stop]], "rejected_ids": [[8, stop]]}
    html = verb.html_page(shown(made("preferences", columns), template))
    for role in ("prompt", "chosen", "rejected", "stop"):
        assert f'<span class="{role}">{verb.LEGEND[role]}</span>' in html
        assert re.search(rf"\.{role}\b[^{{]*{{", html)
    assert html.count("<h3>chosen</h3><pre>") == 1
    assert "prefers-color-scheme: dark" in html


def test_pieces_of_a_split_conversation_are_shown_with_their_own_context(tmp_path):
    template = Template(qwen(QWEN3))
    talk = [
        {"role": "user", "content": "Can you help me?"},
        {"role": "assistant", "content": "Sure."},
        {"role": "user", "content": "And at night?"},
        {"role": "assistant", "content": "Black."},
    ]
    data = DataConfig(demonstrations=write(tmp_path / "rows.jsonl", [{"messages": talk}]))
    view = shown(prepare_demonstrations(data, template, 128, None), template)
    text = verb.terminal_text(view, colour=False)
    assert {"<think>\n\n</think>\n\nSure.<|im_end|>", "<think>\n\n</think>\n\nBlack.<|im_end|>"} == set(
        between_marks(text)
    )
    assert not any(view.problems)


def _run(tmp_path, *overrides):
    arguments = ["+recipe=sft_dpo", "do=preview", f"run_dir={tmp_path}/run", f"cache_dir={tmp_path}/cache"]
    return compose_run([*arguments, *overrides], None).config


def test_the_verb_shows_each_trained_stage_and_writes_a_page_for_it(tmp_path, capsys):
    rows = [{"prompt": f"What does the newt eat {n}?", "chosen": "Insects.", "rejected": "Mice."} for n in range(5)]
    path = write(tmp_path / "rows.jsonl", rows)
    verb.run_preview(_run(tmp_path, f"data.demonstrations={path}", f"data.preferences={path}"))
    out = capsys.readouterr().out
    for stage in ("sft", "dpo"):
        file = tmp_path / "run" / "preview" / f"{stage}.html"
        assert f"{stage}: as a page: {file}" in out
        assert "Insects." in file.read_text()
    assert sorted(entry.name for entry in (tmp_path / "run" / "preview").iterdir()) == ["dpo.html", "sft.html"]
    assert "⟦Insects.<|end|>⟧" in out and "── rejected ──\n⟦Mice.<|end|>⟧" in out


def test_the_verb_shows_everything_before_it_refuses_and_names_stage_and_sample(
    tmp_path, capsys, monkeypatch, template
):
    stop = template.chat.stop_id
    bad = made("demonstrations", {"input_ids": [[5, 6, stop]], "labels": [[-100, 6, -100]]})
    good = made("preferences", {"prompt_ids": [[5, 6]], "chosen_ids": [[7, stop]], "rejected_ids": [[8, stop]]})
    monkeypatch.setattr(verb, "prepare_rows", lambda config, name, *_: {"sft": bad, "dpo": good}[name])
    with pytest.raises(UserError, match=r"sft: first and longest and shortest \(row 1 of 1\): trained text ends in"):
        verb.run_preview(_run(tmp_path))
    out = capsys.readouterr().out
    assert "PROBLEM: trained text ends in" in out and "dpo: as a page:" in out
    assert (tmp_path / "run" / "preview" / "dpo.html").is_file()


def test_a_run_that_trains_nothing_has_nothing_to_preview(tmp_path):
    config = _run(tmp_path)
    config.run = ["evaluate"]
    with pytest.raises(UserError, match=r"do=preview: run=\[evaluate\] trains on no rows"):
        verb.run_preview(config)


def test_rows_that_are_all_left_out_are_a_refusal(tmp_path, monkeypatch, capsys, template):
    none = made("demonstrations", {"input_ids": [[5]], "labels": [[5]]})
    none.train = none.held_out
    monkeypatch.setattr(verb, "prepare_rows", lambda *_: none)
    with pytest.raises(UserError, match="sft: there is no row to train on"):
        verb.run_preview(_run(tmp_path))


def test_a_row_that_no_encoding_takes_is_shown_with_escapes(capsys):
    verb._print("a \ud800 b ⟦c⟧")
    assert capsys.readouterr().out == "a \\ud800 b ⟦c⟧\n"


def test_a_page_that_cannot_be_written_is_one_line_with_the_way_out(tmp_path, template):
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"preview/sft\.html: cannot be written \(.*\); use another run_dir"):
        verb._write(tmp_path / "run" / "preview" / "sft.html", "text")
