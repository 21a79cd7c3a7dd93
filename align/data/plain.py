"""The chat template for tokenizers that have none: roles as words, no new tokens."""

from pathlib import Path

from align.config.errors import UserError

PLAIN = "plain"

# Tokenizers whose BOS is their EOS (GPT-2, Pythia) never saw it at the start of a text as such.
PLAIN_TEMPLATE = """\
{%- if bos_token is defined and bos_token and bos_token != eos_token -%}{{ bos_token }}{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{ message.content | trim }}
{%- elif message.role == 'user' -%}
{{ '\\n\\nHuman: ' + message.content | trim }}
{%- elif message.role == 'assistant' -%}
{{ '\\n\\nAssistant:' }}{% generation %}{{ ' ' + message.content | trim + eos_token }}{% endgeneration %}
{%- else -%}
{{ raise_exception('unknown role: ' ~ message.role) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '\\n\\nAssistant:' }}{%- endif -%}
"""


def chat_template_text(choice: str | None) -> str | None:
    """The Jinja text of `model.chat_template`: null (the tokenizer's own), `plain`, or a .jinja file.

    Raises: UserError if the file is missing or empty.
    """
    if choice is None:
        return None
    if choice == PLAIN:
        return PLAIN_TEMPLATE
    path = Path(choice).expanduser()
    if not path.is_file():
        raise UserError(f"model.chat_template={choice}: no such file; give a .jinja file, or `{PLAIN}`")
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise UserError(f"model.chat_template={choice}: the file is empty")
    return text
