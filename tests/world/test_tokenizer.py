"""The tiny model's tokenizer, as made by `python -m align.world.build` and as shipped."""

import json

import pytest
from transformers import AutoTokenizer

from align.world.build import CHAT_TEMPLATE, END, MODELS, make_config, make_tokenizer
from align.world.generator import demonstrations
from align.world.vocabulary import all_words

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Where is the owl?"},
    {"role": "assistant", "content": "In the forest."},
    {"role": "user", "content": "And the hen?"},
    {"role": "assistant", "content": "In the barn."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_every_name_is_one_token(tokenizer):
    assert [word for word in all_words() if len(tokenizer.encode(f" {word}")) != 1] == []


@pytest.mark.parametrize(
    "text",
    [
        "Human: what's the capital of Peru?\n\nAssistant: Lima.",
        "naïve café — «ça va»? 你好, мир! 🦉🏽\u200d♂️ \u0000\t  two  spaces \r\n",
        " leading and trailing ",
        "def f(x):\n    return {'a': [1, 2.5e-3]}  # <b>",
    ],
)
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_only_assistant_tokens_and_their_stop_token_are_masked_in(tokenizer):
    encoded = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    kept = [token for token, keep in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if keep]
    assert tokenizer.decode(kept) == f"In the forest.{END}In the barn.{END}"


def test_the_generation_prompt_is_a_prefix_of_the_whole_chat(tokenizer):
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    opening = tokenizer.apply_chat_template(CHAT[:-1], tokenize=False, add_generation_prompt=True)
    assert whole == f"{opening}In the barn.{END}"


def test_an_unknown_role_is_refused(tokenizer):
    with pytest.raises(Exception, match="unknown role: wizard"):
        tokenizer.apply_chat_template([{"role": "wizard", "content": "Abracadabra."}], tokenize=False)


@pytest.mark.parametrize("model", ["base", "sft"])
def test_the_shipped_folders_have_this_tokenizer_template_and_config(tokenizer, model):
    shipped = AutoTokenizer.from_pretrained(MODELS / model)
    assert json.loads(shipped._tokenizer.to_str())["model"] == json.loads(tokenizer._tokenizer.to_str())["model"]
    assert shipped.chat_template == CHAT_TEMPLATE == (MODELS / model / "chat_template.jinja").read_text()
    assert (shipped.eos_token, shipped.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
    config, made = json.loads((MODELS / model / "config.json").read_text()), make_config(tokenizer).to_dict()
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "initializer_range")
    assert {key: config[key] for key in keys} == {key: made[key] for key in keys}


def test_demonstrations_fit_in_64_tokens(tokenizer):
    lengths = [
        len(tokenizer.apply_chat_template(row["messages"], tokenize=True)["input_ids"])
        for row in demonstrations(2, 300)
    ]
    assert max(lengths) <= 64
