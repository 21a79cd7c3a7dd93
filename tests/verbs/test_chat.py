"""do=chat: by a script on the standard input, and what a terminal shows."""

import io
import json
import shutil
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from align import cli
from align.config.errors import UserError
from align.config.schema import DataConfig, ModelConfig
from align.constitutional.drawing import seed_of
from align.data.prepare import prepare_prompts
from align.data.template import Template
from align.generation.batching import Rules
from align.generation.rollout import sample
from align.generation.streaming import Stream, _Pieces
from align.models.load import load_model, load_tokenizer, resolve_model
from align.verbs import chat
from align.verbs.chat_columns import side_by_side, wrapped

ASK = "Where does the owl live?"
MODEL = ModelConfig(path="tiny-sft")


@pytest.fixture
def talk(monkeypatch, capsys, tmp_path):
    """Runs a script; returns (exit code, lines of the standard output, lines of the standard error)."""

    def script(*lines, settings=("model=tiny_sft",)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = cli.main(["+recipe=chat", f"run_dir={tmp_path}/run", *settings])
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err.splitlines()

    return script


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny-sft", MODEL, torch.float32, seed=0), Template(load_tokenizer("tiny-sft", MODEL, None))


def prompt_ids(template, text):
    chat = [{"role": "user", "content": text}]
    return template.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_pieces_are_the_answer_that_a_rollout_of_that_seed_gives(tiny, temperature):
    model, template = tiny
    ids, stops = prompt_ids(template, ASK), frozenset(template.stop_token_ids)
    rules = Rules(stops, 1, 24, temperature)
    decode = lambda ids: template.tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
    pieces = list(Stream(model, ids, rules, decode, seed=11))
    [whole] = sample(
        model, [ids], per_prompt=1, seeds=[11], stop_token_ids=sorted(stops), pad_token_id=1, max_new_tokens=24,
        temperature=temperature, batch_size=1, progress=None,
    )  # fmt: skip
    assert len(pieces) > 2 and "".join(pieces) == decode(whole.ids)


def test_a_character_is_held_back_until_its_last_byte(tiny):
    _, template = tiny
    text = "héé 😀!"
    ids = template.tokenizer(text)["input_ids"]
    queue = []
    pieces = _Pieces(SimpleNamespace(put=queue.append), template.tokenizer.decode)
    pieces.put(torch.tensor([[1, 2]]))
    for token in ids:
        pieces.put(torch.tensor([token]))
    pieces.end()
    assert "".join(queue) == text and "\N{REPLACEMENT CHARACTER}" not in "".join(queue) and len(queue) > 3


def test_an_answer_can_be_stopped(tiny):
    model, template = tiny
    stream = Stream(
        model, prompt_ids(template, ASK), Rules(frozenset(), 1, 1500, 0.0), lambda ids: "x" * len(ids), seed=0
    )
    next(iter(stream))
    before = time.monotonic()
    stream.stop()
    assert time.monotonic() - before < 2.0 and len(stream.text) < 1000


def test_an_error_of_the_model_is_raised_where_the_pieces_are_read(tiny):
    model, _ = tiny
    with pytest.raises(UserError, match="broken"):
        list(Stream(model, [5, 6], Rules(frozenset(), 1, 4, 0.0), broken, seed=0))


def broken(ids):
    raise UserError("broken")


def test_a_script_is_answered_line_by_line(talk):
    code, out, err = talk(ASK, "", "What does the owl eat?")
    assert code == 0
    assert out[::2] == [f"you: {ASK}", "you: What does the owl eat?"]
    assert all(line.startswith("tiny-sft: The ") for line in out[1::2])
    assert err == ["tiny-sft is tiny-sft; /help lists commands"]
    assert talk(ASK)[1] == out[:2], "greedy: the same each time"


def test_earlier_turns_are_part_of_the_question_until_reset(talk, tiny):
    model, template = tiny
    _, out, _ = talk(ASK, ASK, "/reset", ASK)
    answers = [line for line in out if line.startswith("tiny-sft: ")]
    assert answers[0] == answers[2] and "  the conversation is forgotten" in out
    turns = [{"role": "user", "content": ASK}, {"role": "assistant", "content": answers[0].removeprefix("tiny-sft: ")}]
    ids = template.tokenizer.apply_chat_template([*turns, turns[0]], add_generation_prompt=True)["input_ids"]
    rules = Rules(frozenset(template.stop_token_ids), 1, 64, 0.0)
    decode = lambda ids: template.tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
    assert answers[1] == "tiny-sft: " + "".join(Stream(model, ids, rules, decode, seed=0)).strip()


def test_the_base_answers_beside_from_the_last_message_on(talk):
    code, out, _ = talk(ASK, "/base", ASK, "/base", ASK, settings=("model=tiny_sft", "chat.base=tiny-critic"))
    assert code == 0
    speakers = [line.split(":")[0] for line in out if not line.startswith("  ")]
    beside = ["tiny-sft", "base"]
    assert speakers == ["you", "tiny-sft", "you", *beside, "you", *beside, "you", "you", "tiny-sft"]
    assert "  base is tiny-critic" in out and "  the base answers no more" in out


def test_saved_prompts_are_a_file_that_data_prompts_reads(talk, tmp_path):
    file = tmp_path / "deep/prompts.jsonl"
    _, out, _ = talk("/system Be kind.", ASK, f"/save {file}", "/system", "And why?", f"/save {file}")
    assert out.count(f"  1 prompt added to {file}") == 2
    first, second = (json.loads(line)["prompt"] for line in file.read_text().splitlines())
    assert first == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": ASK}]
    assert [turn["role"] for turn in second] == ["user", "assistant", "user"]
    rows = prepare_prompts(DataConfig(prompts=str(file))).rows
    assert [row.messages[-1].content for row in rows] == [ASK, "And why?"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["/bass"], "align: /bass is no command; did you mean /base?"),
        (["/xyz"], "align: /xyz is no command; there is /base, /system, "),
        (["/save"], "align: /save needs a file: /save prompts.jsonl"),
        (["/save x.jsonl"], "align: there is nothing to save since the last time"),
        (["Say <|end|>"], "align: tiny-sft cannot be asked that: a user turn contains '<|end|>'"),
        (["word " * 2000], " tokens and chat.max_new_tokens=256 exceed the 2048 of tiny-sft; /reset starts anew"),
        (["/base"], "align: /base: nothing says what this model was trained from; start again with chat.base=MODEL"),
    ],
)
def test_what_a_script_gets_wrong_ends_it_in_one_line(talk, lines, said):
    code, _, err = talk(*lines)
    assert code == 2 and said in err[-1] and len(err) == 2


def test_settings_are_checked_like_any_others(talk):
    assert "chat.base=nowhere: no such folder" in talk("/base", settings=("chat.base=nowhere",))[2][-1]
    assert "chat.model=nowhere: no such folder" in talk("hello", settings=("chat.model=nowhere",))[2][-1]
    assert "chat.seed would have no effect: chat.temperature=0" in talk(settings=("chat.seed=1",))[2][-1]
    assert "only do=chat reads it" in talk(settings=("do=recipes", "chat.temperature=1"))[2][-1]


def test_the_model_is_that_of_the_last_stage_and_the_base_what_the_chain_started_from(
    talk, tmp_path, monkeypatch, capsys
):
    shutil.copytree(resolve_model("tiny-sft"), tmp_path / "run/sft/policy")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{ASK}\n/base\n"))
    assert cli.main(["+recipe=sft_dpo", f"run_dir={tmp_path}/run", "do=chat", "chat.max_new_tokens=8"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"sft is {tmp_path}/run/sft/policy;")
    assert "  base is tiny-base" in said.out
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert cli.main(["+recipe=sft_dpo", f"run_dir={tmp_path}/run", "do=chat", "chat.model=dpo"]) == 2
    assert "chat.model=dpo: that stage has left no model" in capsys.readouterr().err


def test_columns_grow_line_by_line_and_lose_nothing():
    left, right = ["one two three ", "four five", "\nsix"], ["a " * 30, "bb"]
    lines = list(side_by_side(["left", "right"], [left, right], 43))
    assert lines[0] == f"{'left':<20} | right"
    cells = [(line[:20].strip(), line[22:].strip()) for line in lines[2:]]
    assert " ".join(cell for cell, _ in cells).split() == "".join(left).split()
    assert " ".join(cell for _, cell in cells).split() == "".join(right).split()
    assert all(len(line) <= 43 for line in lines)


def test_a_line_is_shown_only_when_nothing_can_change_it():
    seen = []

    def slow():
        for piece in ("alpha be", "ta gamma delta epsilon", " zeta"):
            seen.append(("piece", piece))
            yield piece

    for line in side_by_side(["x"], [slow()], 12):
        seen.append(("line", line))
    lines = [value for kind, value in seen if kind == "line"][2:]
    assert lines == wrapped("alpha beta gamma delta epsilon zeta", 12)
    assert seen.index(("line", "alpha beta")) > seen.index(("piece", "ta gamma delta epsilon"))
    assert seen.index(("line", "alpha beta")) < seen.index(("piece", " zeta"))


def test_a_mistake_at_a_terminal_ends_nothing(monkeypatch, capsys):
    typed = iter(["/bass", ASK, "/quit", "never"])
    monkeypatch.setattr(chat.sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda prompt="": next(typed))
    assert cli.main(["+recipe=chat", "model=tiny_sft"]) == 0
    out = capsys.readouterr().out
    assert "/bass is no command; did you mean /base?" in out and "tiny-sft: The " in out
    assert next(typed) == "never"


def test_each_turn_draws_by_numbers_of_its_own():
    assert seed_of(7, "chat", 1) != seed_of(7, "chat", 2)
