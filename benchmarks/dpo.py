"""DPO on real preference rows: TRL's DPOTrainer and ours, each in a process of its own, one after the other.

    python benchmarks/dpo.py [--quick] [--steps 6] [--pairs 8]

Both get the same 21.6M-parameter Llama (random weights, fixed seed), the same hh-rlhf rows in the same order, AdamW
with the same settings and as many pairs an optimizer step. `TRL default` keeps every default of DPOConfig but the
precision; `TRL at its best` computes the reference beforehand, groups batches by length and drops checkpointing. The
time is that of the training call and of the reference pass, whoever does it; the memory is the peak of the whole
process. Losses of every step must agree. Rows come from ALIGN_REAL_DATA (default ../shared/data).

The share is of the best matrix product this machine does, for the work that has to be done: one reference forward,
one forward and one backward over every prompt once, and output logits of completion tokens only. `other load` is what
other processes took of a core meanwhile: figures mean something where it is near zero.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contest import (
    MODEL,
    Contest,
    Contestant,
    backbone_flops,
    contest_parser,
    load_rows,
    run_contest,
    training_values,
)


def trl_seconds(folder: Path, contestant: Contestant, steps: int, pairs: int) -> tuple[float, list[float]]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = load_rows(folder, longest_first=contestant.best)
    texts = Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows])
    settings = training_values(folder, contestant, steps, pairs)
    if contestant.best:
        settings |= {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
        # The pass is part of the constructor; building without it tells how long the rest takes.
        started = time.perf_counter()
        DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder),
            args=DPOConfig(**{**settings, "precompute_ref_log_probs": False}),
            train_dataset=texts,
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        building = time.perf_counter() - started
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    started = time.perf_counter()
    trainer = DPOTrainer(model=model, args=DPOConfig(**settings), train_dataset=texts, processing_class=tokenizer)
    reference = time.perf_counter() - started - building if contestant.best else 0.0
    started = time.perf_counter()
    trainer.train()
    return reference + time.perf_counter() - started, [line["loss"] for line in trainer.state.log_history[:steps]]


def align_seconds(folder: Path, contestant: Contestant, steps: int, pairs: int) -> tuple[float, list[float]]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainingArguments

    from align.config.schema import Layout
    from align.data.forest import pair_tree
    from align.losses.pairwise import PairObjective
    from align.models.layout import prove_layout
    from align.trainers.pairs import PairTrainer
    from align.trainers.reference import add_reference_logps, longest_first, reference_engine, reference_logps

    rows = Dataset.from_list(load_rows(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    started = time.perf_counter()
    longest = [pair_tree(rows[i]) for i in longest_first(rows)[:2]]
    proven = prove_layout(model, longest, Layout.auto, pad_token_id=0, device=torch.device("cpu"))
    args = TrainingArguments(**training_values(folder, contestant, steps, pairs), remove_unused_columns=False)
    trainer = PairTrainer(model, args, PairObjective(), layout=proven.layout, pad_token_id=0, train_dataset=rows)
    logps = reference_logps(
        reference_engine(model, trainer.accelerator),
        rows,
        collator=trainer.data_collator,
        accelerator=trainer.accelerator,
        micro_batch_size=pairs,
    )
    trainer.train_dataset = add_reference_logps(rows, logps)
    trainer.train()
    return time.perf_counter() - started, [line["loss"] for line in trainer.state.log_history[:steps]]


def needed_flops(row: Mapping[str, Any]) -> float:
    """What DPO needs on a row: 4 forwards' worth, the prompt once."""
    completions = [len(row["chosen_ids"]), len(row["rejected_ids"])]
    logits = 2 * MODEL["hidden_size"] * MODEL["vocab_size"] * sum(completions)
    return 4.0 * (backbone_flops(len(row["prompt_ids"]), [n - 1 for n in completions]) + logits)


CONTEST = Contest(
    script=__file__,
    title="reference pass included",
    libraries={"trl": trl_seconds, "align": align_seconds},
    needed_flops=needed_flops,
    goal=3.5,
    lean=True,
)

if __name__ == "__main__":
    run_contest(CONTEST, contest_parser(__doc__).parse_args())
