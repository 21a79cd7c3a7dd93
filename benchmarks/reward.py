"""Reward models on real preference rows: TRL's RewardTrainer and ours, each in a process of its own.

    python benchmarks/reward.py [--quick] [--steps 6] [--pairs 8]
    python benchmarks/reward.py --accuracy 3 [--steps 32] [--pairs 8]

Both get the same 21.6M-parameter Llama (random weights, fixed seed) under the same score head, the same hh-rlhf token
ids in the same order, AdamW with the same settings and as many pairs an optimizer step. `TRL default` keeps every
default of RewardConfig but the precision; `TRL at its best` groups batches by length and drops checkpointing. The time
is that of the training call, and of our search for a layout; the memory is the peak of the whole process. Losses of
every step must agree.

The share is of the best matrix product this machine does, for the work that has to be done: one forward and one
backward over every prompt once and over its two completions. `other load` is what other processes took of a core
meanwhile: figures mean something where it is near zero.

`--accuracy SEEDS` trains both libraries from the same start, in fp32, once for each seed (weights, head and order of
the rows), and compares the accuracy that each library reports on the same held-out pairs.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contest import (
    Contest,
    Contestant,
    backbone_flops,
    contest_parser,
    contestant_named,
    load_rows,
    prepare,
    require_rows,
    run_apart,
    run_contest,
    save_model,
    training_values,
    write_result,
)

Rows = Sequence[Mapping[str, Any]]

HELD_OUT = 256
"""Pairs; a multiple of the 8 of a batch, over which TRL averages."""
ACCURACY_TOKENS = 256
ACCURACY_STEPS = 32
ACCURACY_RATE = 1e-4
"""The learning rate of RewardConfig."""
ACCURACY_LIBRARIES = ("TRL at its best", "ours")
"""Checkpointing changes no number; the rows keep their order here."""


def trl_trainer(folder: Path, contestant: Contestant, rows: Rows, held_out: Rows = (), **values: Any) -> Any:
    """TRL's trainer on rows that are tokenised already, so that both libraries read the same ids."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    from align.models.reward import draw_head

    def whole(pairs: Rows) -> Dataset:
        sides = ("chosen_ids", "rejected_ids")
        return Dataset.from_list([{side: row["prompt_ids"] + row[side] for side in sides} for row in pairs])

    if contestant.best:
        values["gradient_checkpointing"] = False
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    draw_head(model, seed=values.get("seed", 0))
    return RewardTrainer(
        model=model,
        args=RewardConfig(**values),
        train_dataset=whole(rows),
        eval_dataset=whole(held_out) if held_out else None,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )


def trl_seconds(folder: Path, contestant: Contestant, steps: int, pairs: int) -> tuple[float, list[float]]:
    rows = load_rows(folder, longest_first=contestant.best)
    trainer = trl_trainer(folder, contestant, rows, **training_values(folder, contestant, steps, pairs))
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started, losses(trainer, steps)


def align_trainer(folder: Path, rows: Rows, held_out: Rows = (), **values: Any) -> tuple[Any, float]:
    """Our trainer and the seconds of building it, the search for a layout included; loading is not."""
    import numpy as np
    import torch
    from datasets import Dataset
    from transformers import TrainingArguments

    from align.config.schema import Layout, ModelConfig
    from align.data.forest import Tree
    from align.losses.reward import RewardObjective
    from align.models.layout import prove_layout
    from align.models.reward import SCORES, load_reward_model
    from align.trainers.order import tree_tokens
    from align.trainers.rewards import RewardTrainer

    train, other = (Dataset.from_list([tree_row(row) for row in some]) for some in (rows, held_out))
    model = load_reward_model(str(folder), ModelConfig(), torch.float32, seed=values.get("seed", 0))
    started = time.perf_counter()
    longest = np.argsort(-tree_tokens(train), kind="stable")[:2].tolist()
    trees = [Tree(train[i]["prompt_ids"], train[i]["completion_ids"]) for i in longest]
    cpu = torch.device("cpu")
    proven = prove_layout(model, trees, Layout.auto, pad_token_id=0, device=cpu, reading=SCORES)
    trainer = RewardTrainer(
        model,
        TrainingArguments(**values, remove_unused_columns=False),
        RewardObjective(),
        layout=proven.layout,
        pad_token_id=0,
        train_dataset=train,
        eval_dataset=other if held_out else None,
    )
    return trainer, time.perf_counter() - started


def align_seconds(folder: Path, contestant: Contestant, steps: int, pairs: int) -> tuple[float, list[float]]:
    values = training_values(folder, contestant, steps, pairs)
    trainer, building = align_trainer(folder, load_rows(folder), **values)
    started = time.perf_counter()
    trainer.train()
    return building + time.perf_counter() - started, losses(trainer, steps)


def tree_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A pair as the reward stage stores it."""
    completions = [row["chosen_ids"], row["rejected_ids"]]
    return {
        "prompt_ids": row["prompt_ids"],
        "completion_ids": completions,
        "ranks": [0.0, 1.0],
        "p": 1.0,
        "margin": 0.0,
    }


def losses(trainer: Any, steps: int) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history[:steps]]


def needed_flops(row: Mapping[str, Any]) -> float:
    """What Bradley-Terry needs on a row: 3 forwards' worth, the prompt once. The head is next to nothing."""
    return 3.0 * backbone_flops(len(row["prompt_ids"]), [len(row["chosen_ids"]), len(row["rejected_ids"])])


CONTEST = Contest(
    script=__file__,
    title="one forward and one backward",
    libraries={"trl": trl_seconds, "align": align_seconds},
    needed_flops=needed_flops,
    goal=2.5,
    lean=False,
)


def judge(options: argparse.Namespace) -> None:
    """Train one library for a seed and write the accuracy that it reports on the held-out pairs."""
    contestant, folder = contestant_named(options.contestant), options.folder
    rows = load_rows(folder)
    train, held_out = rows[:-HELD_OUT], rows[-HELD_OUT:]
    random.Random(options.seed).shuffle(train)
    values = training_values(folder, contestant, options.steps, options.pairs, ACCURACY_RATE) | {"seed": options.seed}
    if contestant.library == "trl":
        trainer = trl_trainer(folder, contestant, train, held_out, **values)
    else:
        trainer, _ = align_trainer(folder, train, held_out, **values)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    seen = trainer.evaluate()
    write_result(folder, {"seconds": seconds, "accuracy": seen["eval_accuracy"], "loss": seen["eval_loss"]})


def accuracy_report(folder: Path, seeds: int, steps: int, pairs: int) -> str:
    """Both libraries once for each seed: a line a seed, then mean and standard deviation over seeds."""
    prepare(folder, steps * pairs + HELD_OUT, ACCURACY_TOKENS)
    titles = ("TRL accuracy", "loss", "ours accuracy", "loss")
    lines = [
        f"{steps} steps of {pairs} pairs, rows of at most {ACCURACY_TOKENS} tokens, {HELD_OUT} held-out pairs",
        "seed" + "".join(f"{title:>15}" for title in titles),
    ]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ACCURACY_LIBRARIES}
    for seed in range(seeds):
        save_model(folder, seed=seed)
        line = f"{seed:4}"
        for name, results in found.items():
            result = run_apart(__file__, folder, name, seed=seed, steps=steps, pairs=pairs)
            results.append(result)
            line += f"{result['accuracy']:15.2%}{result['loss']:15.6f}"
        lines.append(line)
    lines += [over_seeds(name, results) for name, results in found.items()]
    worst = max(result["others"] for results in found.values() for result in results)
    return "\n".join([*lines, f"other load at most {worst:.0%}"])


def over_seeds(name: str, results: Rows) -> str:
    accuracies = [result["accuracy"] for result in results]
    spread = f" +- {statistics.stdev(accuracies):.2%}" if len(accuracies) > 1 else ""
    seconds = statistics.mean(result["seconds"] for result in results)
    return f"{name}: {statistics.mean(accuracies):.2%}{spread}, {seconds:.0f} s of training a seed"


def main() -> None:
    parser = contest_parser(__doc__)
    parser.add_argument("--accuracy", type=int, metavar="SEEDS", help="compare held-out accuracy over so many seeds")
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.seed is not None:
        judge(options)
    elif options.accuracy:
        require_rows()
        with tempfile.TemporaryDirectory() as folder:
            print(accuracy_report(Path(folder), options.accuracy, options.steps or ACCURACY_STEPS, options.pairs))
    else:
        run_contest(CONTEST, options)


if __name__ == "__main__":
    main()
