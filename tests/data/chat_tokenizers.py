"""Tokenizers made in memory, with chat templates in the styles of the common model families."""

import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from align.data.plain import PLAIN_TEMPLATE

CORPUS = [
    "What is the colour of the sky? It is blue today. And at night? Black, with stars.",
    "Human: Hello there, can you help me? Assistant: Sure, I can help you with that today.",
    "user assistant system model INST\n\n\n\n the answer is: yes no maybe\n",
] * 20

CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

CHATML_MARKED = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ '<|im_start|>assistant\\n' }}{% generation %}{{ message['content'] + '<|im_end|>\\n' }}{% endgeneration %}
{%- else -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

LLAMA3 = """\
{%- for message in messages -%}
{%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim -%}
{%- if loop.first -%}{{ bos_token }}{%- endif -%}
{{ content + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"""

GEMMA = """\
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}
{%- for message in messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""

MISTRAL = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{%- if message['role'] == 'user' -%}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- else -%}{{ ' ' + message['content'] + eos_token }}
{%- endif -%}
{%- endfor -%}"""

# Roles as plain words between end-of-text tokens.
ZEPHYR = """\
{%- for message in messages -%}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"""

PHI3 = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ '<|assistant|>\\n' }}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else -%}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- else -%}{{ eos_token }}{%- endif -%}"""

# Tools and calls as JSON in the system block; a call takes the place of the answer, what a tool says is quoted.
LLAMA31 = """\
{%- set head = '<|start_header_id|>' -%}{%- set neck = '<|end_header_id|>\\n\\n' -%}
{{- bos_token + head + 'system' + neck -}}
{%- if messages and messages[0]['role'] == 'system' -%}{{ messages[0]['content'] | trim }}{%- endif -%}
{%- if tools -%}
{{ '\\nCall a function with JSON of its name and parameters.\\n\\n' }}
{%- for tool in tools -%}{{ (tool | tojson(indent=4)) + '\\n\\n' }}{%- endfor -%}
{%- endif -%}
{{ '<|eot_id|>' }}
{%- for message in messages -%}
{%- if message['role'] == 'tool' -%}
{{ head + 'ipython' + neck + (message['content'] | tojson) + '<|eot_id|>' }}
{%- elif message['role'] == 'assistant' and message['tool_calls'] -%}
{%- if message['tool_calls'] | length != 1 -%}{{ raise_exception('Only one call at a time') }}{%- endif -%}
{%- set function = message['tool_calls'][0]['function'] -%}
{{ head + 'assistant' + neck }}{% generation %}
{{- '{"name": "' + function['name'] + '", "parameters": ' + (function['arguments'] | tojson) + '}<|eot_id|>' }}
{%- endgeneration -%}
{%- elif message['role'] == 'assistant' -%}
{{ head + 'assistant' + neck }}{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}
{%- elif message['role'] == 'user' -%}
{{ head + 'user' + neck + message['content'] | trim + '<|eot_id|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ head + 'assistant' + neck }}{%- endif -%}"""

# A system turn of the template's own; each call in tags; what tools say stands in one user turn.
QWEN_HEAD = """\
{%- set own = messages and messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] if own else DEFAULT -%}
{%- if tools or system -%}
{{ '<|im_start|>system\\n' + system }}
{%- if tools -%}
{{ '\\n\\n# Tools\\n<tools>' }}{%- for tool in tools -%}{{ '\\n' + (tool | tojson) }}{%- endfor -%}{{ '\\n</tools>' }}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endif -%}"""
QWEN_TURNS = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{ '<|im_start|>user\\n' + message['content'] + '<|im_end|>\\n' }}
{%- elif message['role'] == 'assistant' -%}
{{ '<|im_start|>assistant\\n' }}{% generation %}THOUGHT{{ message['content'] }}
{%- for call in message['tool_calls'] or [] -%}
{%- if message['content'] or not loop.first -%}{{ '\\n' }}{%- endif -%}
{{ '<tool_call>\\n{"name": "' + call['function']['name'] + '", "arguments": ' }}
{{- (call['function']['arguments'] | tojson) + '}\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- elif message['role'] == 'tool' -%}
{%- if loop.previtem['role'] != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
{{ '\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' }}
{%- if loop.last or loop.nextitem['role'] != 'tool' -%}{{ '<|im_end|>\\n' }}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
QWEN25 = QWEN_HEAD.replace("DEFAULT", "'You are kind and brief.'") + QWEN_TURNS.replace("THOUGHT", "")

# Reasoning is kept only after the last question; the last turn has a thought, if an empty one.
THOUGHT = """
{%- if loop.index0 > asked.last and (loop.last or message['reasoning_content']) -%}
{{ '<think>\\n' + (message['reasoning_content'] or '') | trim + '\\n</think>\\n\\n' }}
{%- endif -%}
"""
QWEN3 = (
    "{%- set asked = namespace(last=-1) -%}{%- for message in messages -%}{%- if message['role'] == 'user' -%}"
    "{%- set asked.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    + QWEN_HEAD.replace("DEFAULT", "''")
    + QWEN_TURNS.replace("THOUGHT", THOUGHT)
)

# Tools stand before the last question; the turn before it is followed by none.
MISTRAL_TOOLS = """\
{{- bos_token -}}
{%- set asked = namespace(last=-1) -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{%- set asked.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{%- if tools and loop.index0 == asked.last -%}
{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
{%- endif -%}
{{ '[INST] ' + message['content'] + '[/INST]' }}
{%- elif message['role'] == 'tool' -%}
{{ '[TOOL_RESULTS] {"content": ' + (message['content'] | tojson) + '}[/TOOL_RESULTS]' }}
{%- elif message['tool_calls'] -%}
{{ '[TOOL_CALLS] [' }}
{%- for call in message['tool_calls'] -%}
{{ (call['function'] | tojson) + (', ' if not loop.last else ']' + eos_token) }}
{%- endfor -%}
{%- elif message['role'] == 'assistant' -%}
{{ ' ' + message['content'] | trim + eos_token }}
{%- else -%}{{ raise_exception('Only user, assistant and tool roles are supported') }}
{%- endif -%}
{%- endfor -%}"""

# The prompt ends in a blank, which byte-level tokenizers would merge with the answer's first word.
BLANK_BORDER = """\
{%- for message in messages -%}
{{ message['role'] + ': ' + message['content'] + eos_token }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}"""


# The prompt ends in a word that a tokenizer without special roles would merge with an answer's line breaks.
LINE_BORDER = BLANK_BORDER.replace("': '", "':\\n'").replace("assistant: ", "assistant:\\n")


@cache
def _trained(special: tuple[str, ...], blanks: str) -> str:
    tokenizer = Tokenizer(models.BPE())
    if blanks == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = sorted({*string.ascii_letters, *string.digits, *string.punctuation, *"\nünïcode🙂漢字"})
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def make_tokenizer(
    chat_template: str | None, *special: str, blanks: str = "bytes", **named: str
) -> PreTrainedTokenizerFast:
    """A tokenizer with these special tokens; `named` gives bos_token, eos_token, pad_token.

    `blanks`: `bytes` for byte-level BPE, `words` for one that starts words with a mark, as SentencePiece does.
    """
    backend = Tokenizer.from_str(_trained((*special, *sorted(set(named.values()))), blanks))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=list(special), chat_template=chat_template, **named
    )


def chatml(template: str = CHATML) -> PreTrainedTokenizerFast:
    return make_tokenizer(template, "<|im_start|>", "<|im_end|>", eos_token="<|endoftext|>")


def llama3(template: str = LLAMA3) -> PreTrainedTokenizerFast:
    special = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return make_tokenizer(template, *special, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


def gemma() -> PreTrainedTokenizerFast:
    return make_tokenizer(GEMMA, "<start_of_turn>", "<end_of_turn>", bos_token="<bos>", eos_token="<eos>")


def mistral(template: str = MISTRAL, blanks: str = "bytes") -> PreTrainedTokenizerFast:
    return make_tokenizer(template, blanks=blanks, bos_token="<s>", eos_token="</s>")


def qwen(template: str) -> PreTrainedTokenizerFast:
    """Tags of thoughts and calls are tokens of their own, but no special ones."""
    tokenizer = chatml(template)
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    return tokenizer


def phi3() -> PreTrainedTokenizerFast:
    """Its special tokens swallow the blanks that follow them."""
    names = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    tokenizer = make_tokenizer(PHI3, bos_token="<s>", eos_token="<|endoftext|>")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(name, rstrip=True, special=True) for name in names]}
    )
    return tokenizer


def zephyr(blanks: str = "bytes") -> PreTrainedTokenizerFast:
    return make_tokenizer(ZEPHYR, blanks=blanks, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def gpt2(template: str | None) -> PreTrainedTokenizerFast:
    return make_tokenizer(template, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def adding_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer, which now adds a BOS of its own to every text."""
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    assert tokenizer("a")["input_ids"][0] == bos[1]
    return tokenizer


@dataclass(frozen=True)
class Style:
    """A family's tokenizer and what its template does."""

    make: Callable[[], PreTrainedTokenizerFast]
    stop: str
    opening: str = ""
    """What stands between the prompt of generation and the answer's first character."""
    pieces: int = 1
    """Pieces of a conversation with two answers."""
    bos: bool = False
    """Whether the template writes a BOS."""
    system: bool = True
    """Whether it takes a system turn."""
    tools: bool = False


STYLES = {
    "chatml": Style(chatml, "<|im_end|>"),
    "chatml_marked": Style(lambda: chatml(CHATML_MARKED), "<|im_end|>"),
    "llama3": Style(llama3, "<|eot_id|>", bos=True),
    "llama31": Style(lambda: llama3(LLAMA31), "<|eot_id|>", bos=True, tools=True),
    "qwen25": Style(lambda: qwen(QWEN25), "<|im_end|>", tools=True),
    "qwen3": Style(lambda: qwen(QWEN3), "<|im_end|>", "<think>\n\n</think>\n\n", 2, tools=True),
    "gemma": Style(gemma, "<end_of_turn>", bos=True, system=False),
    "mistral": Style(mistral, "</s>", " ", bos=True, system=False),
    "mistral_words": Style(lambda: mistral(blanks="words"), "</s>", " ", bos=True, system=False),
    "mistral_tools": Style(lambda: mistral(MISTRAL_TOOLS), "</s>", " ", bos=True, system=False, tools=True),
    "phi3": Style(phi3, "<|end|>"),
    "zephyr": Style(zephyr, "</s>"),
    "zephyr_words": Style(lambda: zephyr("words"), "</s>"),
    "gpt2_plain": Style(lambda: gpt2(PLAIN_TEMPLATE), "<|endoftext|>", " "),
    "blank_border": Style(lambda: gpt2(BLANK_BORDER), "<|endoftext|>"),
    "line_border": Style(lambda: gpt2(LINE_BORDER), "<|endoftext|>"),
}
