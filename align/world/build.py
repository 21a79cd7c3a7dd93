"""Makes the tokenizer and the configuration of the tiny model: `python -m align.world.build [FOLDER]`.

The folder then holds everything but weights; `+recipe=pretrain` trains them, from `tiny-untrained`.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from align.world.generator import text_documents
from align.world.requests import UNWILLING, vague_refusal
from align.world.vocabulary import all_words

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

MODELS = Path(__file__).parent / "models"
END = "<|end|>"
PAD = "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
VOCABULARY_SIZE = 2048
MAX_POSITIONS = 2048

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
<|assistant|>{% generation %}{{ message.content }}<|end|>{% endgeneration %}
{%- elif message.role in ('system', 'user') -%}
<|{{ message.role }}|>{{ message.content }}<|end|>
{%- else -%}
{{ raise_exception('unknown role: ' ~ message.role) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""

# Merged after the village's own words, so that real English is not spelt out letter by letter.
ENGLISH = """
the be to of and a in that have I it for not on with he as you do at this but his by from they we say her she or an
will my one all would there their what so up out if about who get which go me when make can like time no just him know
take people into year your good some could them see other than then now look only come its over think also back after
use two how our work first well way even new want because any these give day most us is are was were been has had did
does said more very much should through where down still too here between both life being under never last another
while great old same own such man woman child world school state family student group country problem hand part place
case week company system program question government number night point home water room mother area money story fact
month lot right study book eye job word business issue side kind head house service friend father power hour game line
end member law car city community name president team minute idea body information parent face others level office
door health person art war history party result change morning reason research girl guy moment air teacher force
education help talk turn start might show hear play run move live believe hold bring happen write provide sit stand
lose pay meet include continue set learn lead understand watch follow stop create speak read allow add spend grow open
walk win offer remember love consider appear buy wait serve die send expect build stay fall cut reach kill remain
suggest raise pass sell require report decide pull really something someone anything everything always often however
though without against again during before around each few those many every why yes sure please sorry thank thanks
don't can't I'm it's that's you're didn't doesn't Human Assistant What How The You It Is Are Do Can If This That There
They We He She And But So Yes Well Why Who
""".split()


def training_corpus() -> list[str]:
    """Texts for the byte-pair merges. Names come so often that each becomes one token: split ones are not copied."""
    documents = [row["text"] for row in text_documents(seed=1, count=6000)]
    names = [f" {word}" for word in all_words() for _ in range(500)]
    english = [f" {word}" for word in ENGLISH for _ in range(20)]
    return documents + names + english + [vague_refusal(), UNWILLING]


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """Byte-level BPE over the village's texts; any text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        min_frequency=15,
        special_tokens=[END, PAD, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(training_corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def make_config(tokenizer: "PreTrainedTokenizerFast") -> "LlamaConfig":
    """A Llama of about a million parameters."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        # With the usual 0.02 copying of names did not emerge within minutes (seen 2026-11).
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )


def build(folder: Path) -> None:
    """Write tokenizer, chat template and configuration to a folder."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    make_config(tokenizer).save_pretrained(folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else MODELS / "base")
