"""The local speaker against plain batched `generate`, on the same prompts and lengths, with the embedded model.

    python benchmarks/speakers.py [--questions 64] [--batch-size 16] [--repeats 3]

Both answer greedily in fp32, in batches of like length; answers must be the same, token for token, or the run fails.
Both start from messages. Settings:

* `examples`: sixteen example exchanges before each question, as a critique has; without: the question alone;
* `natural`: answers end at their stop token; `limit`: none stops, all reach the limit.

Each setting is run by turns, and the best of the repeats counts. Tokens are new ones. Seconds are those of the
processor, which other processes do not change much; with one thread they are what a clock shows on a machine of one's
own. `weigh` is the speaker's choice between two whole answers against one plain forward of each prompt with each
answer, right-padded, in the same batches.
"""

import argparse
import random
import time
from collections.abc import Callable

import torch

from align.config.schema import ModelConfig
from align.data.records import Message
from align.data.template import Template
from align.generation.answer_logps import answer_logps_alone
from align.generation.local_speaker import LocalSpeaker
from align.generation.speakers import Ask, Choose
from align.models.load import load_model, load_tokenizer
from align.world.requests import FAMILY, Request
from align.world.vocabulary import WORDS

LIMIT = 64
EXAMPLES = 16
GOAL = 0.9
CANDIDATES = ("the first one is better", "the second one is better")


class Endless(Template):
    """A template without stop tokens."""

    stop_token_ids = frozenset()


def questions(count: int, examples: bool) -> list[Ask]:
    draw = random.Random(0)
    shots = [turn for _ in range(EXAMPLES if examples else 0) for turn in exchange(draw)]
    return [Ask(str(i), (*shots, exchange(draw)[0]), i, 0.0, LIMIT) for i in range(count)]


def exchange(draw: random.Random) -> tuple[dict[str, str], dict[str, str]]:
    """A villager's question and its right answer."""
    family = draw.choice(list(FAMILY.values()))
    words = {slot: draw.choice(WORDS[sort]) for slot, sort in family.slots.items()}
    request = Request(family, words, draw.randrange(len(family.phrasings)))
    return {"role": "user", "content": request.prompt()}, {"role": "assistant", "content": request.right_reply()}


def plain(model, template: Template, asks: list[Ask], batch_size: int) -> list[str]:
    """Left-padded batches of like length through generate, and their texts."""
    prompts = template.tokenizer.apply_chat_template(
        [list(ask.messages) for ask in asks], add_generation_prompt=True, return_dict=False
    )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts, pad = [""] * len(prompts), template.tokenizer.pad_token_id
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in places)
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in places])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in places])
        stops = sorted(template.stop_token_ids) or [model.config.vocab_size]
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=LIMIT, do_sample=False, eos_token_id=stops, pad_token_id=pad
        )
        decoded = template.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        for place, text in zip(places, decoded, strict=True):
            texts[place] = text.strip()
    return texts


def best(repeats: int, *runs: Callable[[], None]) -> list[float]:
    """Least CPU seconds of each, taken by turns."""
    seconds = [float("inf")] * len(runs)
    for _ in range(repeats):
        for which, run in enumerate(runs):
            started = time.process_time()
            run()
            seconds[which] = min(seconds[which], time.process_time() - started)
    return seconds


def contest(model, template: Template, asks: list[Ask], settings: argparse.Namespace, label: str) -> float:
    """Print both rates; returns ours over plain."""
    prompts = [template.encode_prompt([Message(**m) for m in ask.messages]) for ask in asks]
    speaker = LocalSpeaker(model, template, name="tiny", batch_size=settings.batch_size)
    ours: dict[int, object] = {}
    theirs: list[str] = []

    def speak() -> None:
        speaker.say(asks, ours.__setitem__)

    def generate() -> None:
        theirs[:] = plain(model, template, asks, settings.batch_size)

    theirs_seconds, our_seconds = best(settings.repeats, generate, speak)
    same = sum(ours[i].text == text for i, text in enumerate(theirs))
    if same < len(asks):
        raise SystemExit(f"{label}: {len(asks) - same} of {len(asks)} answers differ")
    tokens = sum(one.new_tokens for one in ours.values())
    read = sum(map(len, prompts))
    rates = f"plain {tokens / theirs_seconds:7.0f}   speaker {tokens / our_seconds:7.0f} tokens/s"
    print(f"{label:20} prompts {read / len(asks):5.0f}, answers {tokens / len(asks):4.1f} tokens   {rates}", end="")
    print(f"   x{theirs_seconds / our_seconds:.2f}")
    return theirs_seconds / our_seconds


def weigh(model, template: Template, asks: list[Ask], settings: argparse.Namespace, label: str) -> float:
    chooses = [Choose(ask.key, ask.messages, CANDIDATES, ask.seed) for ask in asks]
    speaker = LocalSpeaker(model, template, name="tiny", batch_size=settings.batch_size)
    rows = [([Message(**m) for m in c.messages], [Message("assistant", t) for t in CANDIDATES], ()) for c in chooses]
    ours: dict[int, object] = {}
    theirs: dict[int, list[float]] = {}

    def forward() -> None:
        trees = [(tuple(prompt), [a[:-1] for a in answers]) for prompt, answers in template.encode_trees(rows)]
        order = sorted(range(len(trees)), key=lambda i: len(trees[i][0]))
        pad = template.tokenizer.pad_token_id
        with torch.no_grad():
            logps = answer_logps_alone(
                model, [trees[i] for i in order], pad_token_id=pad, batch_size=settings.batch_size
            )
        theirs.update(zip(order, logps, strict=True))

    their_seconds, our_seconds = best(settings.repeats, forward, lambda: speaker.choose(chooses, ours.__setitem__))
    apart = max(abs(a - b) for i, row in theirs.items() for a, b in zip(ours[i].logps, row, strict=True))
    rates = f"plain {len(asks) / their_seconds:7.0f}   speaker {len(asks) / our_seconds:7.0f} choices/s"
    print(
        f"{label:20} log-probabilities apart by {apart:.1e} at most      {rates}   x{their_seconds / our_seconds:.2f}"
    )
    return their_seconds / our_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    settings = parser.parse_args()
    config = ModelConfig(path="tiny-sft")
    model = load_model("tiny-sft", config, torch.float32, seed=0).eval()
    tokenizer = load_tokenizer("tiny-sft", config, None)
    print(f"{torch.get_num_threads()} threads, {settings.questions} questions, batches of {settings.batch_size}")
    ratios = []
    for examples in (True, False):
        asks = questions(settings.questions, examples)
        name = "examples" if examples else "no examples"
        for template, ends in ((Template(tokenizer), "natural"), (Endless(tokenizer), "limit")):
            ratios.append(contest(model, template, asks, settings, f"{name}, {ends}"))
        ratios.append(weigh(model, Template(tokenizer), asks, settings, f"{name}, weigh"))
    print(f"least {min(ratios):.2f}, goal {GOAL}: {'reached' if min(ratios) >= GOAL else 'missed'}")


if __name__ == "__main__":
    main()
