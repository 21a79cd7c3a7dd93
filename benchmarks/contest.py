"""What the contests with TRL share: rows, tokenizer, model, a process for each contestant, machine's rate, table.

Every contestant gets the same 21.6M-parameter Llama (random weights, fixed seed), the same hh-rlhf rows in the same
order, AdamW with the same settings and as many pairs an optimizer step. Rows come from ALIGN_REAL_DATA (default
../shared/data). A script gives a `Contest` and calls `run_contest`.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROWS = Path(os.environ.get("ALIGN_REAL_DATA", ROOT.parent / "shared" / "data")) / "hh_rlhf_harmless_test/test.jsonl.gz"
THREADS = 2
MAX_TOKENS = 1024
STEPS, QUICK_STEPS = 6, 3
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


@dataclass(frozen=True)
class Contest:
    """What one script adds."""

    script: str
    title: str
    """What is counted, for the first line."""
    libraries: Mapping[str, Callable[[Path, Contestant, int, int], tuple[float, list[float]]]]
    """Library -> (folder, contestant, steps, pairs) -> (seconds, loss of each step)."""
    needed_flops: Callable[[Mapping[str, Any]], float]
    """Multiplications and additions that a row needs."""
    goal: float
    """Times TRL's default, in fp32."""
    lean: bool
    """Whether peak memory no higher than TRL's default belongs to the goal."""


def contest_parser(description: str) -> argparse.ArgumentParser:
    """The options of every contest."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help=f"optimizer steps of each contestant ({STEPS})")
    parser.add_argument("--pairs", type=int, default=8, help="pairs an optimizer step (8 is TRL's default)")
    parser.add_argument("--quick", action="store_true", help="the two fp32 contestants only, 3 steps")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def run_contest(contest: Contest, options: argparse.Namespace) -> None:
    """One contestant in this process if the options name one, else all of them in turn and the table."""
    if options.contestant:
        compete(contest, options)
        return
    require_rows()
    contestants = CONTESTANTS[:2] if options.quick else [c for c in CONTESTANTS if not c.bf16 or has_bf16()]
    steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    with tempfile.TemporaryDirectory() as folder:
        print(report(contest, Path(folder), contestants, steps, options.pairs))


def require_rows() -> None:
    if not ROWS.is_file():
        raise SystemExit(f"{ROWS} is missing; set ALIGN_REAL_DATA to the folder that holds hh_rlhf_harmless_test")


def read_rows() -> Iterator[dict[str, str]]:
    """Prompt and the two last assistant turns; rows that differ earlier or not at all are left out."""
    turn = "\n\nAssistant:"
    with gzip.open(ROWS, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            (prompt, chosen), (other, rejected) = (row[side].rsplit(turn, 1) for side in ("chosen", "rejected"))
            if prompt == other and chosen != rejected and chosen.strip() and rejected.strip():
                yield {"prompt": prompt + turn, "chosen": chosen, "rejected": rejected}


def prepare(folder: Path, rows: int, max_tokens: int = MAX_TOKENS) -> None:
    """Write model, tokenizer, texts and token ids that every contestant starts from."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

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
    save_model(folder, seed=0)
    taken = []
    for row in read_rows():
        prompt, chosen, rejected = (tokenizer.encode(row[key]).ids for key in ("prompt", "chosen", "rejected"))
        if len(prompt) + max(len(chosen), len(rejected)) < max_tokens:
            ids = {"prompt_ids": prompt, "chosen_ids": [*chosen, 1], "rejected_ids": [*rejected, 1]}
            taken.append({**row, **ids, "p": 1.0, "margin": 0.0})
        if len(taken) == rows:
            break
    assert len(taken) == rows, f"{len(taken)} rows of at most {max_tokens} tokens, {rows} wanted"
    (folder / "rows.json").write_text(json.dumps(taken))


def save_model(folder: Path, *, seed: int) -> None:
    """Write the model with weights drawn from `seed`, over those that are there."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(folder)


def load_rows(folder: Path, *, longest_first: bool = False) -> list[dict[str, Any]]:
    """What `prepare` wrote; longest first is what length grouping makes of so few rows."""
    rows = json.loads((folder / "rows.json").read_text())
    if longest_first:
        rows.sort(key=lambda row: -len(row["prompt_ids"]) - max(len(row["chosen_ids"]), len(row["rejected_ids"])))
    return rows


def training_values(
    folder: Path, contestant: Contestant, steps: int, pairs: int, learning_rate: float = 1e-5
) -> dict[str, Any]:
    """What both libraries are told."""
    return {
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "bf16": contestant.bf16,
        "per_device_train_batch_size": pairs,
        "max_steps": steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def contestant_named(name: str) -> Contestant:
    return next(c for c in CONTESTANTS if c.name == name)


def compete(contest: Contest, options: argparse.Namespace) -> None:
    """Run one contestant in this process and write what it did."""
    import torch

    torch.set_num_threads(THREADS)
    contestant = contestant_named(options.contestant)
    run = contest.libraries[contestant.library]
    seconds, losses = run(options.folder, contestant, options.steps, options.pairs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    write_result(options.folder, {"seconds": seconds, "losses": losses, "peak_mib": peak})


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    (folder / "result.json").write_text(json.dumps(result))


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


def run_apart(script: str, folder: Path, name: str, **options: int) -> dict[str, Any]:
    """A contestant of a script in a fresh process: what it wrote, and the load of `others` meanwhile, in cores."""
    command = [sys.executable, script, "--contestant", name, "--folder", str(folder)]
    command += [word for key, value in options.items() for word in (f"--{key}", str(value))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": str(THREADS), "TOKENIZERS_PARALLELISM": "false"}
    started, busy, own = time.perf_counter(), busy_seconds(), child_seconds()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-4000:]}")
    others = max(0.0, (busy_seconds() - busy) - (child_seconds() - own)) / (time.perf_counter() - started)
    return {**json.loads((folder / "result.json").read_text()), "others": others}


def block_weights() -> int:
    """Weights of all blocks that a token is multiplied by."""
    hidden = MODEL["hidden_size"]
    keys = 2 * MODEL["num_key_value_heads"] * hidden // MODEL["num_attention_heads"]
    return MODEL["num_hidden_layers"] * (hidden * (2 * hidden + keys) + 3 * hidden * MODEL["intermediate_size"])


def backbone_flops(prompt: int, completions: Sequence[int]) -> float:
    """Of one forward of the blocks over a prompt once and its completions, given in tokens that are inputs."""
    seen = prompt**2 / 2 + sum(n * (prompt + n / 2) for n in completions)
    products = 2 * block_weights() * (prompt + sum(completions))
    return products + 4 * MODEL["num_hidden_layers"] * MODEL["hidden_size"] * seen


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


def report(contest: Contest, folder: Path, contestants: Sequence[Contestant], steps: int, pairs: int) -> str:
    """Run the contestants in turn; the table, and whether the goal is met."""
    prepare(folder, steps * pairs)
    flops = sum(contest.needed_flops(row) for row in load_rows(folder))
    rates = {False: 0.0, True: 0.0}
    results: dict[str, dict[str, Any]] = {}
    lines = [f"{steps} steps of {pairs} pairs, {contest.title}, {THREADS} threads"]
    titles = f"{'pairs/s':>9}{'x TRL':>8}{'matmul share':>14}{'peak MiB':>10}{'loss difference':>17}{'other load':>12}"
    lines.append(" " * 18 + titles)
    for contestant in contestants:
        rates[contestant.bf16] = max(rates[contestant.bf16], matmul_rate(contestant.bf16))
        result = run_apart(contest.script, folder, contestant.name, steps=steps, pairs=pairs)
        results[contestant.name] = result
        base = results["TRL default bf16" if contestant.bf16 else "TRL default"]
        share = flops / result["seconds"] / rates[contestant.bf16]
        lines.append(
            f"{contestant.name:18}{steps * pairs / result['seconds']:9.2f}{base['seconds'] / result['seconds']:8.2f}"
            f"{share:14.0%}{result['peak_mib']:10.0f}{_difference(contestant, results):>17}{result['others']:12.0%}"
        )
    return "\n".join([*lines, _verdict(contest, results["ours"], results["TRL default"])])


def _difference(contestant: Contestant, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Largest relative difference of its losses to those it must reproduce; empty where there are none."""
    if not contestant.losses_of:
        return ""
    curves = (results[name]["losses"] for name in (contestant.name, contestant.losses_of))
    worst = max(abs(a - b) / abs(b) for a, b in zip(*curves, strict=True))
    assert worst < (0.05 if contestant.bf16 else 1e-5), f"losses differ by {worst:.1e}"
    return f"{worst:.1e}"


def _verdict(contest: Contest, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    met = theirs["seconds"] / ours["seconds"] >= contest.goal
    if contest.lean:
        met = met and ours["peak_mib"] <= theirs["peak_mib"]
    memory = ", peak memory no higher" if contest.lean else ""
    return f"goal (at least {contest.goal} times TRL's default{memory}): {'met' if met else 'MISSED'}"
