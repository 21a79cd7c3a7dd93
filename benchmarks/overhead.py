"""What this library adds to a step of a bare transformers.Trainer with the same DeepSpeed config: the goal is < 2 %.

    python benchmarks/overhead.py [--rounds 4] [--steps 30] [--ranks 1 2] [--models tiny 21M]

SFT under ZeRO-2, fp32, on 1 and 2 ranks, on the embedded model and on one of 21M parameters. The contestants are the
bare Trainer, TRL's SFTTrainer, and the stage of this library with all its callbacks (log of every step, stop signals,
steps that are not finite, seals of checkpoints). All get the same weights, packed rows, order and arguments, so their
losses have to agree. They run by turns in one launch, in another order each round; the first steps of a turn do not
count. A step is what passes from its beginning to the beginning of the next; processor time is that of rank 0, and is
the figure to trust where others use the machine too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from contest import MODEL, ROOT, busy_seconds, child_seconds

WARM_UP = 5
GOAL = 0.02
BARE, TRL, OURS = "bare Trainer", "TRL", "align"
NAMES = (BARE, TRL, OURS)
MODELS = ("tiny", "21M")
BATCH = {"tiny": (8, 128), "21M": (4, 128)}
"""Model -> packed rows an optimizer step, and their tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="turns of each contestant")
    parser.add_argument("--steps", type=int, default=30, help=f"optimizer steps a turn; {WARM_UP} do not count")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        compete(options.rank_of, options)
        return
    print(f"{options.rounds} rounds of {options.steps} steps, ZeRO-2, fp32; a step in ms: median (middle half)")
    titles = "".join(f"{name:>22}" for name in NAMES)
    print(f"{'model':6}{'ranks':>6}  {'time':10}{titles}{'align adds':>12}{'other load':>12}")
    missed = [one for model in options.models for ranks in options.ranks for one in launch(model, ranks, options)]
    print(f"goal (under {GOAL:.0%} added): {'MISSED: ' + ', '.join(missed) if missed else 'met'}")


def launch(model: str, ranks: int, options: argparse.Namespace) -> list[str]:
    """One launch of all contestants; prints its lines. Returns its name if the goal is missed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", __file__]
        command += [f"--rank-of={folder}", f"--rounds={options.rounds}", f"--steps={options.steps}", "--models", model]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        started, busy, own = time.perf_counter(), busy_seconds(), child_seconds()
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{model} on {ranks} ranks failed:\n{done.stderr[-4000:]}")
        others = max(0.0, (busy_seconds() - busy) - (child_seconds() - own)) / (time.perf_counter() - started)
        turns = json.loads((Path(folder) / "turns.json").read_text())
    check_losses(turns)
    added = {}
    for kind, label in (("seconds", "wall"), ("busy", "processor")):
        added[kind], cells = result(turns, kind)
        load = f"{others:12.1f}" if kind == "seconds" else ""
        print(f"{model:6}{ranks:6}  {label:10}{''.join(cells)}{added[kind]:+12.1%}{load}", flush=True)
    return [f"{model} on {ranks} ranks"] if added["seconds"] >= GOAL else []


def check_losses(turns: list[dict[str, Any]]) -> None:
    """All contestants have trained on the same tensors."""
    expected = next(turn["losses"] for turn in turns if turn["name"] == BARE)
    for turn in turns:
        worst = max(abs(a - b) / abs(b) for a, b in zip(turn["losses"], expected, strict=True))
        assert worst < 1e-4, f"{turn['name']} does not train on the same tensors: losses differ by {worst:.1e}"


def result(turns: list[dict[str, Any]], kind: str) -> tuple[float, list[str]]:
    """The share of a step that ours adds to the bare Trainer's, and the cells of the table."""
    times = {name: [t for turn in turns if turn["name"] == name for t in turn[kind]] for name in NAMES}
    cells = []
    for values in times.values():
        low, middle, high = statistics.quantiles(values, n=4)
        cells.append(f"{middle * 1e3:.1f} ({low * 1e3:.0f}-{high * 1e3:.0f})".rjust(22))
    return statistics.median(times[OURS]) / statistics.median(times[BARE]) - 1, cells


def compete(folder: Path, options: argparse.Namespace) -> None:
    """All turns, on one rank of a launch."""
    import torch

    torch.set_num_threads(1)
    from align.config.store import compose_run
    from align.distributed import runtime
    from align.trainers.quiet import quiet_libraries

    quiet_libraries()
    model = options.models[0]
    this = runtime.start(deepspeed=True, timeout_seconds=600)
    path = "tiny-sft" if model == "tiny" else str(folder / "model")
    if model != "tiny" and this.is_main:
        save_larger_model(folder / "model")
    runtime.barrier()
    batch, tokens = BATCH[model]
    config = compose_run([
        "+recipe=sft", f"model.path={path}", "data=tiny", "precision=fp32", "deepspeed=zero2",
        f"cache_dir={folder}/cache",
        "data.held_out_fraction=0", f"stages.sft.max_steps={options.steps}", "stages.sft.save_every=0",
        "stages.sft.eval_every=0", f"stages.sft.batch_size={batch}", f"stages.sft.micro_batch_size={batch // 2}",
        f"stages.sft.max_tokens={tokens}", "stages.sft.packing=true", "stages.sft.learning_rate=1e-5",
    ]).config  # fmt: skip
    turns = []
    for turn in range(options.rounds * len(NAMES)):
        round_number, place = divmod(turn, len(NAMES))
        name = NAMES[(place + round_number) % len(NAMES)]
        turns.append(take_turn(name, config, folder / f"turn{turn}", this))
    if this.is_main:
        (folder / "turns.json").write_text(json.dumps(turns))
    runtime.stop()


def take_turn(name: str, config: Any, run_dir: Path, this: Any) -> dict[str, Any]:
    """Train once: {name, seconds and processor seconds (busy) of each step that counts, losses}."""
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from trl import SFTTrainer

    from align.distributed import runtime
    from align.stages.context import RunContext
    from align.stages.session import close_session, open_session
    from align.stages.training import run_trainer
    from align.trainers.quiet import quiet_trainer
    from align.trainers.sft import build_sft_trainer, sft_arguments
    from align.trainers.stopping import STOP

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.began: list[tuple[float, float]] = []

        def on_step_begin(self, args, state, control, **kwargs):
            self.began.append((time.perf_counter(), time.process_time()))

    stage, clock = config.stages.sft, Clock()
    context = RunContext(config, this, run_dir, "sft")
    if this.is_main:
        context.stage_dir.mkdir(parents=True)
    runtime.barrier()
    session = open_session(stage, context)
    arguments = sft_arguments(stage, session.argument_values())
    rows, tokenizer = session.prepared.train, session.tokenizer
    model = session.load_policy()
    if name == OURS:
        trainer = build_sft_trainer(model, arguments, rows, None, tokenizer, session.callbacks, stage_name="sft")
        trainer.add_callback(clock)
        with STOP.held():
            run_trainer(session, trainer)
    else:
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
        if name == BARE:
            packed, collator = trainer.train_dataset, trainer.data_collator
            arguments = TrainingArguments(**session.argument_values())
            trainer = Trainer(model=model, args=arguments, train_dataset=packed, data_collator=collator)
        trainer.add_callback(clock)
        quiet_trainer(trainer).train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    steps = list(pairwise(clock.began))[WARM_UP:]
    seconds, busy = ([after[i] - before[i] for before, after in steps] for i in (0, 1))
    del trainer, model
    close_session(session)
    return {"name": name, "seconds": seconds, "busy": busy, "losses": losses}


def save_larger_model(folder: Path) -> None:
    """A Llama of the size of the other benchmarks, with the embedded tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from align.config.schema import ModelConfig
    from align.models.load import load_tokenizer

    torch.manual_seed(0)
    tokenizer = load_tokenizer("tiny-sft", ModelConfig(), None)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    LlamaForCausalLM(LlamaConfig(**(MODEL | ids))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
