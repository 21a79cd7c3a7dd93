"""How much of the work on real rows is for nothing: padding, prompts computed twice, ranks that wait, room not filled.

    python benchmarks/packing.py [PAIRS.jsonl.gz] [--batch-size 32] [--micro-batch-size 4]

Trains nothing. The tokenizer is a byte-level BPE made from the file itself; the default file is hh-rlhf harmless in
ALIGN_REAL_DATA (default ../shared/data). Shares of pairs are means over five epochs:

    empty      of the tokens computed: padding
    repeated   of the tokens computed: prompts, when chosen and rejected each have their own
    waiting    of the time, if every micro-batch takes as long as the largest of its optimizer step
    wasted     all three together
    largest    tokens of the largest micro-batch: what memory must hold

Of packed rows (TRL's best fit decreasing, of the chosen answers) the share of room that no token fills.
"""

import argparse
import gzip
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from trl import pack_dataset

from align.config.schema import DataConfig, OnBadRows
from align.data.balance import micro_batch_tokens, stratified_order, wasted_share
from align.data.plain import PLAIN_TEMPLATE
from align.data.prepare import prepare_demonstrations, prepare_preferences
from align.data.template import Template
from align.trainers.order import tree_tokens

ROOT = Path(__file__).resolve().parent.parent
ROWS = Path(os.environ.get("ALIGN_REAL_DATA", ROOT.parent / "shared" / "data")) / "hh_rlhf_harmless_test/test.jsonl.gz"
EPOCHS = 5
MAX_TOKENS = 1024
PACKED_ROWS = (512, 1024)
"""Tokens of a packed row."""


@dataclass(frozen=True)
class Lengths:
    """Of every pair, (rows,): tokens of its tree, of its two whole sequences, and of the longer one."""

    tree: np.ndarray
    sequences: np.ndarray
    longer: np.ndarray


@dataclass(frozen=True)
class Split:
    """Pairs a step and a micro-batch."""

    batch_size: int
    micro_batch_size: int


def texts(path: Path) -> Iterator[str]:
    """Every string of a JSON-lines file."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for line in lines:
            yield from (value for value in json.loads(line).values() if isinstance(value, str))


def template_for(path: Path) -> Template:
    """A tokenizer of 8,192 tokens made from the rows, and roles as words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(path), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", chat_template=PLAIN_TEMPLATE)
    return Template(fast)


def pair_lengths(path: Path, template: Template) -> Lengths:
    data = DataConfig(preferences=str(path), on_bad_rows=OnBadRows.drop)
    rows = prepare_preferences(data, template, MAX_TOKENS, None).train
    tree = tree_tokens(rows)
    prompt, chosen, rejected = (
        np.array([len(ids) for ids in rows[f"{part}_ids"]]) for part in ("prompt", "chosen", "rejected")
    )
    return Lengths(tree, tree + prompt, prompt + np.maximum(chosen, rejected))


def padded_areas(lengths: Lengths, order: np.ndarray, micro_batch_size: int) -> np.ndarray:
    """Tokens, padding included, of every micro-batch of an order, chosen and rejected in rows of their own."""
    starts = np.arange(0, len(order), micro_batch_size)
    widths = np.maximum.reduceat(lengths.longer[order], starts)
    return 2 * widths * np.diff(np.append(starts, len(order)))


def shares(lengths: Lengths, order: np.ndarray, split: Split, padded: bool) -> list[float]:
    """The columns of one epoch, as the module's docstring lists them."""
    needed, whole = lengths.tree.sum(), lengths.sequences.sum()
    if not padded:
        waiting = wasted_share(lengths.tree, order, split.micro_batch_size, split.batch_size)
        largest = micro_batch_tokens(lengths.tree, order, split.micro_batch_size).max()
        return [0.0, 0.0, waiting, waiting, largest]
    areas = padded_areas(lengths, order, split.micro_batch_size)
    computed = areas.sum()
    waiting = wasted_share(areas, np.arange(len(areas)), 1, split.batch_size // split.micro_batch_size)
    wasted = 1 - needed / computed * (1 - waiting)
    return [1 - whole / computed, (whole - needed) / computed, waiting, wasted, areas.max()]


def pair_table(lengths: Lengths, split: Split) -> Iterator[str]:
    def shuffled(epoch: int) -> np.ndarray:
        return np.random.default_rng(epoch).permutation(len(lengths.tree))

    def stratified(epoch: int) -> np.ndarray:
        return stratified_order(
            lengths.tree,
            micro_batch_size=split.micro_batch_size,
            batch_size=split.batch_size,
            seed=0,
            epoch=epoch,
        )

    lines: list[tuple[str, Callable[[int], np.ndarray], bool]] = [
        ("padded, shuffled", shuffled, True),
        ("forest, shuffled", shuffled, False),
        ("forest, stratified", stratified, False),
    ]
    yield f"{len(lengths.tree)} pairs in steps of {split.batch_size}, micro-batches of {split.micro_batch_size}"
    yield f"{'':20}{'empty':>9}{'repeated':>10}{'waiting':>9}{'wasted':>9}{'largest':>9}"
    for name, order, padded in lines:
        epochs = np.array([shares(lengths, order(epoch), split, padded) for epoch in range(EPOCHS)])
        empty, repeated, waiting, wasted, _ = epochs.mean(0)
        yield f"{name:20}{empty:9.1%}{repeated:10.1%}{waiting:9.1%}{wasted:9.1%}{epochs[:, -1].max():9.0f}"


def packed_table(path: Path, template: Template) -> Iterator[str]:
    data = DataConfig(demonstrations=str(path), on_bad_rows=OnBadRows.drop)
    yield f"{'packed rows of':20}{'rows':>9}{'packed':>10}{'empty':>9}"
    for max_tokens in PACKED_ROWS:
        rows = prepare_demonstrations(data, template, max_tokens, None).train
        packed = pack_dataset(rows.select_columns(["input_ids", "labels"]), max_tokens, "bfd")
        filled = sum(map(len, packed["input_ids"]))
        assert filled == sum(map(len, rows["input_ids"])), "packing must not cut rows"
        yield f"{max_tokens:6} tokens{'':7}{len(rows):9}{len(packed):10}{1 - filled / len(packed) / max_tokens:9.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, default=ROWS, help="preferences, .jsonl or .jsonl.gz")
    parser.add_argument("--batch-size", type=int, default=32, help="pairs an optimizer step")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="pairs a forward of one rank")
    options = parser.parse_args()
    if not options.path.is_file():
        raise SystemExit(f"{options.path} is missing; name a file, or set ALIGN_REAL_DATA")
    template = template_for(options.path)
    lengths = pair_lengths(options.path, template)
    print("\n".join(pair_table(lengths, Split(options.batch_size, options.micro_batch_size))))
    print()
    print("\n".join(packed_table(options.path, template)))


if __name__ == "__main__":
    main()
