"""Byte-level BPE tokenizers made in memory, with chat templates in the styles of the common model families."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

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

# The prompt ends in a blank, which byte-level tokenizers would merge with the answer's first word.
BLANK_BORDER = """\
{%- for message in messages -%}
{{ message['role'] + ': ' + message['content'] + eos_token }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}"""


@cache
def _trained(special: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def make_tokenizer(chat_template: str | None, *special: str, **named: str) -> PreTrainedTokenizerFast:
    """A tokenizer with these special tokens; `named` gives bos_token, eos_token."""
    backend = Tokenizer.from_str(_trained((*special, *sorted(set(named.values())))))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=list(special), chat_template=chat_template, **named
    )
    return tokenizer


def chatml(template: str = CHATML) -> PreTrainedTokenizerFast:
    return make_tokenizer(template, "<|im_start|>", "<|im_end|>", eos_token="<|endoftext|>")


def llama3() -> PreTrainedTokenizerFast:
    special = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return make_tokenizer(LLAMA3, *special, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


def gemma() -> PreTrainedTokenizerFast:
    return make_tokenizer(GEMMA, "<start_of_turn>", "<end_of_turn>", bos_token="<bos>", eos_token="<eos>")


def mistral() -> PreTrainedTokenizerFast:
    return make_tokenizer(MISTRAL, bos_token="<s>", eos_token="</s>")


def gpt2(template: str | None) -> PreTrainedTokenizerFast:
    return make_tokenizer(template, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
