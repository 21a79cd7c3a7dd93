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

import argparse
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROWS = Path(os.environ.get("ALIGN_REAL_DATA", ROOT.parent / "shared" / "data")) / "hh_rlhf_harmless_test/test.jsonl.gz"
THREADS = 2
MAX_TOKENS = 1024
GOAL = 3.5
LEARNING_RATE = 1e-5
MODEL = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1376,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Contestant:
    """One line of the table. `losses_of`: the contestant whose losses it must reproduce."""

    name: str
    library: str
    best: bool
    bf16: bool
    losses_of: str | None


CONTESTANTS = (
    Contestant("TRL default", "trl", False, False, None),
    Contestant("ours", "align", True, False, "TRL default"),
    Contestant("TRL at its best", "trl", True, False, None),
    Contestant("TRL default bf16", "trl", False, True, None),
    Contestant("ours bf16", "align", True, True, "TRL default bf16"),
)


def read_rows() -> Iterator[dict[str, str]]:
    """Prompt and the two last assistant turns; rows that differ earlier or not at all are left out."""
    turn = "\n\nAssistant:"
    with gzip.open(ROWS, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            (prompt, chosen), (other, rejected) = (row[side].rsplit(turn, 1) for side in ("chosen", "rejected"))
            if prompt == other and chosen != rejected and chosen.strip() and rejected.strip():
                yield {"prompt": prompt + turn, "chosen": chosen, "rejected": rejected}


def prepare(folder: Path, rows: int) -> None:
    """Write model, tokenizer, texts and token ids that every contestant starts from."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((text for row in read_rows() for text in row.values()), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(folder)
    taken = []
    for row in read_rows():
        prompt, chosen, rejected = (tokenizer.encode(row[key]).ids for key in ("prompt", "chosen", "rejected"))
        if len(prompt) + max(len(chosen), len(rejected)) < MAX_TOKENS:
            ids = {"prompt_ids": prompt, "chosen_ids": [*chosen, 1], "rejected_ids": [*rejected, 1]}
            taken.append({**row, **ids, "p": 1.0, "margin": 0.0})
        if len(taken) == rows:
            break
    (folder / "rows.json").write_text(json.dumps(taken))


def arguments(folder: Path, contestant: Contestant, steps: int, pairs: int) -> dict[str, Any]:
    """What both libraries are told."""
    return {
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "bf16": contestant.bf16,
        "per_device_train_batch_size": pairs,
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def trl_seconds(folder: Path, contestant: Contestant, steps: int, pairs: int) -> tuple[float, list[float]]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = json.loads((folder / "rows.json").read_text())
    if contestant.best:
        # What length grouping does with this few rows: sort them all.
        rows.sort(key=lambda row: -len(row["prompt_ids"]) - max(len(row["chosen_ids"]), len(row["rejected_ids"])))
    texts = Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows])
    settings = arguments(folder, contestant, steps, pairs)
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

    rows = Dataset.from_list(json.loads((folder / "rows.json").read_text()))
    model = AutoModelForCausalLM.from_pretrained(folder)
    started = time.perf_counter()
    longest = [pair_tree(rows[i]) for i in longest_first(rows)[:2]]
    proven = prove_layout(model, longest, Layout.auto, pad_token_id=0, device=torch.device("cpu"))
    args = TrainingArguments(**arguments(folder, contestant, steps, pairs), remove_unused_columns=False)
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


def contest(folder: Path, name: str, steps: int, pairs: int) -> None:
    """Run one contestant in this process and write what it did."""
    import torch

    torch.set_num_threads(THREADS)
    contestant = next(c for c in CONTESTANTS if c.name == name)
    run = {"trl": trl_seconds, "align": align_seconds}[contestant.library]
    seconds, losses = run(folder, contestant, steps, pairs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (folder / "result.json").write_text(json.dumps({"seconds": seconds, "losses": losses, "peak_mib": peak}))


def busy_seconds() -> float:
    """Processor seconds that all processes of this machine have used; 0 where the system does not say."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return 0.0
    user, nice, system = (int(field) for field in stat.read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def child_seconds() -> float:
    """Processor seconds of the finished contestants."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_apart(folder: Path, name: str, steps: int, pairs: int) -> dict[str, Any]:
    """`contest` in a fresh process."""
    command = [sys.executable, __file__, "--contestant", name, "--folder", str(folder)]
    command += ["--steps", str(steps), "--pairs", str(pairs)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": str(THREADS), "TOKENIZERS_PARALLELISM": "false"}
    started, busy, own = time.perf_counter(), busy_seconds(), child_seconds()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-4000:]}")
    others = max(0.0, (busy_seconds() - busy) - (child_seconds() - own)) / (time.perf_counter() - started)
    return {**json.loads((folder / "result.json").read_text()), "others": others}


def needed_flops(rows: Sequence[Mapping[str, Any]]) -> float:
    """Multiplications and additions that DPO needs on these rows: 4 forwards' worth, each prompt once."""
    hidden, layers, heads = MODEL["hidden_size"], MODEL["num_hidden_layers"], MODEL["num_attention_heads"]
    keys = 2 * MODEL["num_key_value_heads"] * hidden // heads
    weights = layers * (hidden * (2 * hidden + keys) + 3 * hidden * MODEL["intermediate_size"])
    total = 0
    for row in rows:
        prompt, completions = len(row["prompt_ids"]), (len(row["chosen_ids"]), len(row["rejected_ids"]))
        tokens = prompt + sum(completions) - 2
        seen = prompt**2 / 2 + sum((n - 1) * (prompt + n / 2) for n in completions)
        total += 2 * weights * tokens + 4 * layers * hidden * seen + 2 * hidden * MODEL["vocab_size"] * sum(completions)
    return 4.0 * total


def matmul_rate(bf16: bool) -> float:
    """Best multiplications and additions a second of this machine, on a matrix of the size of a packed batch."""
    import torch

    torch.set_num_threads(THREADS)
    dtype = torch.bfloat16 if bf16 else torch.float32
    left, right = torch.randn(2048, 512).to(dtype), torch.randn(512, 1376).to(dtype)
    best = float("inf")
    for _ in range(300):
        started = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - started)
    return 2 * 2048 * 512 * 1376 / best


def has_bf16() -> bool:
    """Whether the processor multiplies bf16 numbers itself."""
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and "bf16" in flags.read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of each contestant")
    parser.add_argument("--pairs", type=int, default=8, help="pairs an optimizer step (8 is TRL's default)")
    parser.add_argument("--quick", action="store_true", help="the two fp32 contestants only, 3 steps")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        contest(options.folder, options.contestant, options.steps, options.pairs)
        return
    if not ROWS.is_file():
        raise SystemExit(f"{ROWS} is missing; set ALIGN_REAL_DATA to the folder that holds hh_rlhf_harmless_test")
    contestants = CONTESTANTS[:2] if options.quick else [c for c in CONTESTANTS if not c.bf16 or has_bf16()]
    steps = 3 if options.quick else options.steps
    with tempfile.TemporaryDirectory() as folder:
        print(report(Path(folder), contestants, steps, options.pairs))


def report(folder: Path, contestants: Sequence[Contestant], steps: int, pairs: int) -> str:
    """Run the contestants in turn; the table, and whether the goal is met."""
    prepare(folder, steps * pairs)
    flops = needed_flops(json.loads((folder / "rows.json").read_text()))
    rates = {False: 0.0, True: 0.0}
    results: dict[str, dict[str, Any]] = {}
    lines = [f"{steps} steps of {pairs} pairs, reference pass included, {THREADS} threads"]
    titles = f"{'pairs/s':>9}{'x TRL':>8}{'matmul share':>14}{'peak MiB':>10}{'loss difference':>17}{'other load':>12}"
    lines.append(" " * 18 + titles)
    for contestant in contestants:
        rates[contestant.bf16] = max(rates[contestant.bf16], matmul_rate(contestant.bf16))
        result = results[contestant.name] = run_apart(folder, contestant.name, steps, pairs)
        base = results["TRL default bf16" if contestant.bf16 else "TRL default"]
        share = flops / result["seconds"] / rates[contestant.bf16]
        difference = ""
        if contestant.losses_of:
            worst = largest_difference(result["losses"], results[contestant.losses_of]["losses"])
            assert worst < (0.05 if contestant.bf16 else 1e-5), f"losses differ by {worst:.1e}"
            difference = f"{worst:.1e}"
        lines.append(
            f"{contestant.name:18}{steps * pairs / result['seconds']:9.2f}{base['seconds'] / result['seconds']:8.2f}"
            f"{share:14.0%}{result['peak_mib']:10.0f}{difference:>17}{result['others']:12.0%}"
        )
    ratio = results["TRL default"]["seconds"] / results["ours"]["seconds"]
    lean = results["ours"]["peak_mib"] <= results["TRL default"]["peak_mib"]
    met = "met" if ratio >= GOAL and lean else "MISSED"
    lines.append(f"goal (at least {GOAL} times TRL's default, peak memory no higher): {met}")
    return "\n".join(lines)


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest relative difference of two loss curves."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    main()
