"""PPO on real prompts: the PPOTrainer of TRL 1.12.0, the last release that had one, and ours, each in its own process.

    python benchmarks/ppo.py [--peer-python PATH] [--updates 3] [--setting natural] [--alone trl]

The peer needs an environment of its own, with the torch and transformers of this one:

    python -m venv peer
    peer/bin/pip install trl==1.12.0 accelerate==1.15.0 datasets==5.2.0 torch==2.13.0 transformers==5.23.0
    python benchmarks/ppo.py --peer-python peer/bin/python

ALIGN_TRL112_PYTHON may name its python too. Without either the script runs ours alone and says so.

Both get the same 21.6M-parameter Llama (random weights, fixed seed) as policy and reference, the same backbone under
the same score head as reward and value model, full weights, fp32, and the same prompts in the same order: the first
rows of hh-rlhf of at most 128 tokens, 32 an update. An update is a rollout at temperature 0.7, scoring, and 4 epochs of
one AdamW step each. Random weights do not stop by themselves, so both sample through `force_lengths`:

* `natural`: completions stop as hh-rlhf's answers do (median 28 tokens and the stop token, mean 41, limit 128). Every
  update gets the same 32 quantiles of the answers' lengths, dealt to its prompts in a drawn order;
* `limit`: all completions reach the limit of 64 tokens.

Rollout is what samples. Scoring is all between sampling and the first training forward: log-probabilities, reference,
values, rewards, advantages. Update is the 4 epochs. Seconds and memory (the peak of the whole process) are those of the
training call; tokens are sampled ones. The share is of the best matrix product this machine does, for the work that has
to be done: every prompt and completion once through policy (rollout), reference, value and reward model (scoring), and
3 forwards' worth of policy and value an epoch (update), output logits of completion tokens only. `other load` is what
other processes took of a core meanwhile: figures mean something where it is near zero.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contest import (
    MODEL,
    ROOT,
    THREADS,
    backbone_flops,
    busy_seconds,
    child_seconds,
    load_rows,
    matmul_rate,
    prepare,
    require_rows,
    write_result,
)

PAD, STOP = MODEL["pad_token_id"], MODEL["eos_token_id"]
POOL = 1024
"""Rows whose answers give the lengths and whose prompts are taken."""
PROMPT_TOKENS = 128
PROMPTS = 32
"""Prompts an update, one completion each."""
EPOCHS = 4
UPDATES = 3
TEMPERATURE = 0.7
LEARNING_RATE = 3e-6
PARTS = ("rollout", "scoring", "update")


@dataclass(frozen=True)
class Setting:
    """How long completions are, and what is to be reached."""

    name: str
    limit: int
    """Tokens of the longest completion."""
    natural: bool
    """Completions stop as answers do; else all reach the limit."""
    goal: float
    """Times the peer's samples a second."""


SETTINGS = (Setting("natural", 128, True, 1.8), Setting("limit", 64, False, 1.2))


# --- what both sides start from ---


def write_prompts(folder: Path, setting: Setting, updates: int) -> None:
    """Write models and tokenizer, and prompts with the length of the completion that each gets."""
    prepare(folder, POOL)
    save_scorer(folder / "scorer")
    pool = load_rows(folder)
    answers = sorted(len(row["chosen_ids"]) for row in pool)
    prompts = [row["prompt_ids"] for row in pool if len(row["prompt_ids"]) <= PROMPT_TOKENS]
    if updates * PROMPTS > len(prompts):
        raise SystemExit(f"--updates {updates}: there are prompts for {len(prompts) // PROMPTS}")
    rows, draw = [], random.Random(0)
    for update in range(updates):
        stops = [answers[(2 * i + 1) * len(answers) // (2 * PROMPTS)] for i in range(PROMPTS)]
        if not setting.natural:
            stops = [setting.limit + 1] * PROMPTS
        draw.shuffle(stops)
        some = prompts[update * PROMPTS : (update + 1) * PROMPTS]
        rows += [{"prompt_ids": prompt, "stop_at": stop} for prompt, stop in zip(some, stops, strict=True)]
    (folder / "prompts.json").write_text(json.dumps(rows))


def save_scorer(folder: Path) -> None:
    """Write what reward and value model start from: the backbone of `prepare` under a head of one score."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(folder.parent, num_labels=1)
    torch.nn.init.normal_(model.score.weight, std=(MODEL["hidden_size"] + 1) ** -0.5)
    model.save_pretrained(folder)


def load_prompts(folder: Path) -> list[dict[str, Any]]:
    """`prompt_ids`, and `stop_at`: the completion's tokens with the stop token, beyond the limit if none comes."""
    return json.loads((folder / "prompts.json").read_text())


def sampled_tokens(rows: Sequence[Mapping[str, Any]], setting: Setting) -> int:
    return sum(min(row["stop_at"], setting.limit) for row in rows)


def force_lengths(policy: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Have `policy.generate` end each completion where its prompt's row says, and nowhere else.

    A row of a batch is known by its prompt, so that batches may be made, ordered and continued in any way; `input_ids`
    are left-padded and hold the prompt and what was sampled before. Other logits processors see the forced scores, and
    who asks for the logits of the next token to draw it by himself gets forced ones.
    """
    from transformers import LogitsProcessorList

    plain = policy.generate
    stops = {tuple(row["prompt_ids"]): row["stop_at"] for row in rows}

    def generate(input_ids: Any, **options: Any) -> Any:
        force = forced_stop(input_ids, stops)
        processors = [force, *(options.pop("logits_processor", None) or ())]
        output = plain(input_ids=input_ids, logits_processor=LogitsProcessorList(processors), **options)
        if getattr(output, "logits", None) is not None and len(output.logits) == 1:
            output.logits = (force(input_ids, output.logits[0]),)
        return output

    policy.generate = generate


def forced_stop(input_ids: Any, stops: Mapping[tuple[int, ...], int]) -> Callable[[Any, Any], Any]:
    """A logits processor for one batch: the stop token at its place, before it neither stop nor pad token.

    A row that starts with no prompt of `stops` is a trial of the model and not stopped.
    """
    import torch

    width = input_ids.shape[1]
    lengths = sorted({len(prompt) for prompt in stops}, reverse=True)
    ends = []
    for row in input_ids.tolist():
        ids = tuple(row[next((i for i, token in enumerate(row) if token != PAD), width) :])
        prompt = next((n for n in lengths if n <= len(ids) and ids[:n] in stops), None)
        ends.append(sys.maxsize if prompt is None else width - len(ids) + prompt + stops[ids[:prompt]])
    end = torch.tensor(ends, device=input_ids.device)

    def force(input_ids: Any, scores: Any) -> Any:
        left = end - input_ids.shape[1]
        scores[:, [PAD, STOP]] = scores[:, [PAD, STOP]].masked_fill((left > 1)[:, None], -torch.inf)
        last = left == 1
        scores[last] = -torch.inf
        scores[last, STOP] = 0.0
        return scores

    return force


class Clock:
    """Charges time to one part at a time."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((*PARTS, "other"), 0.0)
        self.part, self.since = "other", time.perf_counter()

    def turn(self, part: str) -> None:
        """What went by belongs to the part before, what comes to this one."""
        now = time.perf_counter()
        self.seconds[self.part] += now - self.since
        self.part, self.since = part, now


# --- the peer ---

PEER_MICRO_BATCH = 8
PEER_ROLLOUT_BATCH = 32


def peer_settings(folder: Path, setting: Setting, updates: int) -> dict[str, Any]:
    """What PPOConfig is told. Epochs, KL coefficient, clips, gamma and lambda keep its defaults, which are ours too."""
    return {
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "bf16": False,
        "total_episodes": updates * PROMPTS,
        "per_device_train_batch_size": PEER_MICRO_BATCH,
        "gradient_accumulation_steps": PROMPTS // PEER_MICRO_BATCH,
        "num_mini_batches": 1,
        "num_ppo_epochs": EPOCHS,
        "local_rollout_forward_batch_size": PEER_ROLLOUT_BATCH,
        "response_length": setting.limit,
        # Without it every completion is sampled to the limit.
        "stop_token": "eos",
        "temperature": TEMPERATURE,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "num_sample_generations": 0,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
    }


def peer_trainer(folder: Path, setting: Setting, updates: int) -> Any:
    """TRL's trainer with four models of the shared weights, reading the prompts in their order."""
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    reward, value = (AutoModelForSequenceClassification.from_pretrained(folder / "scorer") for _ in range(2))
    rows = load_prompts(folder)
    force_lengths(policy, rows)
    prompts = Dataset.from_list([{"input_ids": row["prompt_ids"]} for row in rows])
    trainer = PPOTrainer(
        args=PPOConfig(**peer_settings(folder, setting, updates)),
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=prompts,
    )
    # Its own loader shuffles, and accelerate steps after every micro-batch of the update that reads its last batch.
    trainer.dataloader = DataLoader(prompts, batch_size=PROMPTS, collate_fn=trainer.data_collator)
    return trainer


def watch_peer(trainer: Any, clock: Clock) -> dict[str, int]:
    """Turn the clock at the seams of TRL's loop, from outside. Counts tokens and optimizer steps as they come."""
    from transformers import TrainerCallback
    from trl.experimental.ppo import ppo_trainer

    counts = {"tokens": 0, "optimizer_steps": 0}
    sample = ppo_trainer.batch_generation

    def watched(model: Any, queries: Any, *rest: Any) -> Any:
        clock.turn("rollout")
        sequences, logits = sample(model, queries, *rest)
        clock.turn("scoring")
        counts["tokens"] += int((sequences[:, queries.shape[1] :] != PAD).sum())
        return sequences, logits

    def first_training_forward(*_: Any) -> None:
        if clock.part == "scoring":
            clock.turn("update")

    def count_step(*_: Any) -> None:
        counts["optimizer_steps"] += 1

    class UpdateEnd(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.turn("other")

    ppo_trainer.batch_generation = watched
    # Scoring calls policy and value model by themselves; only training calls the module that holds both.
    trainer.model.register_forward_pre_hook(first_training_forward)
    trainer.optimizer.optimizer.register_step_post_hook(count_step)
    trainer.add_callback(UpdateEnd)
    return counts


def theirs(folder: Path, setting: Setting, updates: int) -> dict[str, Any]:
    """Run TRL's loop: seconds of each part, tokens and optimizer steps."""
    trainer = peer_trainer(folder, setting, updates)
    clock = Clock()
    counts = watch_peer(trainer, clock)
    clock.since = time.perf_counter()
    trainer.train()
    clock.turn("other")
    return {"seconds": clock.seconds, **counts}


# --- ours ---


OUR_MICRO_BATCH = 8
OUR_ROLLOUT_BATCH = 32


def our_settings(setting: Setting, updates: int) -> Any:
    """What the stage is told; the rest keeps its defaults, which are the peer's too."""
    from align.config.schema import PPOStage, Schedule

    return PPOStage(
        max_steps=updates,
        learning_rate=LEARNING_RATE,
        schedule=Schedule.constant,
        warmup_fraction=0.0,
        batch_size=PROMPTS,
        micro_batch_size=OUR_MICRO_BATCH,
        completions_per_update=PROMPTS,
        completions_per_prompt=1,
        rollout_batch_size=OUR_ROLLOUT_BATCH,
        update_epochs=EPOCHS,
        max_new_tokens=setting.limit,
        temperature=TEMPERATURE,
        rewards={"scorer": {"model": "scorer"}},
        save_every=0,
    )


def our_trainer(folder: Path, setting: Setting, updates: int) -> Any:
    """The stage's trainer with four models of the shared weights, reading the prompts in their order."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

    from align.data.plain import PLAIN_TEMPLATE
    from align.data.template import Template
    from align.models.actor_critic import ActorCritic
    from align.models.layout import prove_layout
    from align.models.reward import as_scorer
    from align.trainers.arguments import Machine, trainer_arguments
    from align.trainers.experience import FORWARD
    from align.trainers.ppo import ADAM_EPSILON, PPOTrainer
    from align.trainers.quiet import quiet_trainer
    from align.trainers.reference import reference_engine
    from align.trainers.reward_sources import ModelReward

    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    scorers = (AutoModelForSequenceClassification.from_pretrained(folder / "scorer") for _ in range(2))
    reward, value = map(as_scorer, scorers)
    template = Template(AutoTokenizer.from_pretrained(folder, chat_template=PLAIN_TEMPLATE))
    rows, settings = load_prompts(folder), our_settings(setting, updates)
    layout = prove_layout(policy, real_trees(rows), settings.layout, pad_token_id=PAD, device=policy.device).layout
    force_lengths(policy, rows)
    machine = Machine(world_size=1, cuda=False, bf16=False, zero=None)
    arguments = trainer_arguments(settings, machine, folder / "out", log_every=1, evaluate=False, fresh=True)
    arguments |= {"optim": "adamw_torch_fused", "adam_epsilon": ADAM_EPSILON, "logging_strategy": "no"}
    trainer = PPOTrainer(
        ActorCritic(policy, value, temperature=TEMPERATURE),
        TrainingArguments(**arguments),
        settings,
        updates=updates,
        prompts=prompt_rows(rows, settings.seed),
        template=template,
    )
    source = ModelReward(
        trainer.rewards[0],
        reference_engine(reward, trainer.accelerator),
        template,
        policy_template_digest=template.digest,
        layout=layout,
        micro_batch_size=FORWARD * OUR_MICRO_BATCH,
        accelerator=trainer.accelerator,
    )
    frozen = ActorCritic(reference, None, temperature=TEMPERATURE).eval()
    frozen.attach(layout)
    trainer.begin(layout, [source], reference_engine(frozen, trainer.accelerator), offload=False)
    return quiet_trainer(trainer)


def real_trees(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The two longest prompts, second halves for completions: what layouts are proven on."""
    from align.data.forest import Tree

    longest = sorted((row["prompt_ids"] for row in rows), key=len)[-2:]
    return [Tree(ids[: len(ids) // 2], [ids[len(ids) // 2 :]]) for ids in longest]


def prompt_rows(rows: Sequence[Mapping[str, Any]], seed: int) -> Any:
    """The prompts as the stage prepares them, placed so that it draws them in their order."""
    from datasets import Dataset

    from align.trainers.experience import prompt_of

    record = json.dumps({"messages": [{"role": "user", "content": "", "tool_calls": []}], "tools": [], "row": {}})
    places = [prompt_of(position, len(rows), seed) for position in range(len(rows))]
    ordered = sorted(zip(places, rows, strict=True), key=lambda pair: pair[0])
    return Dataset.from_list([{"prompt_ids": row["prompt_ids"], "record": record} for _, row in ordered])


def watch_ours(trainer: Any, clock: Clock) -> dict[str, int]:
    """Turn the clock at the seams at which the peer's turns. Counts tokens and optimizer steps as they come."""
    import torch
    from transformers import TrainerCallback

    from align.trainers.ppo_callbacks import UpdateEnd

    counts = {"tokens": 0, "optimizer_steps": 0}
    sample = trainer.maker._sample

    def watched(*arguments: Any) -> Any:
        clock.turn("rollout")
        sampled = sample(*arguments)
        clock.turn("scoring")
        counts["tokens"] += sum(len(one.ids) for one in sampled)
        return sampled

    def first_training_forward(*_: Any) -> None:
        if clock.part == "scoring" and torch.is_grad_enabled():
            clock.turn("update")

    class Steps(TrainerCallback):
        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            counts["optimizer_steps"] += 1

        def on_step_end(self, args: Any, state: Any, control: Any, **__: Any) -> None:
            if state.global_step % trainer.steps_per_update == 0:
                clock.turn("other")

    trainer.maker._sample = watched
    trainer.model.register_forward_pre_hook(first_training_forward)
    # The figures and the guards of an update belong to it, so the clock turns after them.
    trainer.add_callback(UpdateEnd(trainer, None, None, None))
    trainer.add_callback(Steps())
    return counts


def ours(folder: Path, setting: Setting, updates: int) -> dict[str, Any]:
    """Run our loop: seconds of each part, tokens and optimizer steps."""
    trainer = our_trainer(folder, setting, updates)
    clock = Clock()
    counts = watch_ours(trainer, clock)
    clock.since = time.perf_counter()
    trainer.train()
    clock.turn("other")
    return {"seconds": clock.seconds, **counts}


# --- the contest ---

LIBRARIES = {"trl": theirs, "align": ours}
NAMES = {"trl": "TRL 1.12.0", "align": "ours"}


def compete(options: argparse.Namespace) -> None:
    """Run one contestant in this process and write what it did."""
    import torch

    torch.set_num_threads(THREADS)
    setting = next(s for s in SETTINGS if s.name == options.setting)
    result = LIBRARIES[options.contestant](options.folder, setting, options.updates)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    write_result(options.folder, {**result, "peak_mib": peak})


def run_contestant(python: str, folder: Path, library: str, setting: Setting, updates: int) -> dict[str, Any]:
    """A contestant in a fresh process of its own python: what it wrote, and the load of `others`, in cores."""
    command = [python, __file__, "--contestant", library, "--folder", str(folder)]
    command += ["--setting", setting.name, "--updates", str(updates)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": str(THREADS), "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"TRL_EXPERIMENTAL_SILENCE": "1"}
    started, busy, own = time.perf_counter(), busy_seconds(), child_seconds()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{NAMES[library]} failed:\n{done.stderr[-4000:]}")
    others = max(0.0, (busy_seconds() - busy) - (child_seconds() - own)) / (time.perf_counter() - started)
    return {**json.loads((folder / "result.json").read_text()), "others": others}


def needed_flops(rows: Sequence[Mapping[str, Any]], setting: Setting) -> dict[str, float]:
    """Multiplications and additions that each part needs, the sampler's log-probabilities taken as they are."""
    blocks = logits = 0.0
    for row in rows:
        tokens = min(row["stop_at"], setting.limit)
        blocks += backbone_flops(len(row["prompt_ids"]), [tokens - 1])
        logits += 2 * MODEL["hidden_size"] * MODEL["vocab_size"] * tokens
    return {"rollout": blocks + logits, "scoring": 3 * blocks + logits, "update": EPOCHS * 3 * (2 * blocks + logits)}


def report(folder: Path, setting: Setting, updates: int, pythons: Mapping[str, str]) -> str:
    """Run the contestants in turn; the table, and whether the goal is met."""
    write_prompts(folder, setting, updates)
    rows = load_prompts(folder)
    needed, tokens, rate = needed_flops(rows, setting), sampled_tokens(rows, setting), 0.0
    length = f"{tokens / len(rows):.1f} tokens a completion, limit {setting.limit}"
    lines = [f"{setting.name}: {updates} updates of {PROMPTS} prompts, {EPOCHS} epochs, {length}, {THREADS} threads"]
    parts = "".join(f"{f'{part} s':>11}{'share':>7}" for part in PARTS)
    titles = f"{'samples/s':>22}{'x TRL':>7}{'s/update':>10}{parts}{'rollout tok/s':>15}{'peak MiB':>10}"
    lines.append(f"{titles}{'other load':>12}")
    results: dict[str, dict[str, Any]] = {}
    for library, python in pythons.items():
        rate = max(rate, matmul_rate(False))
        result = run_contestant(python, folder, library, setting, updates)
        assert (result["tokens"], result["optimizer_steps"]) == (tokens, updates * EPOCHS), f"other work: {result}"
        results[library] = result
        lines.append(line_of(library, results, needed, rate, updates))
    return "\n".join([*lines, *verdict(setting, results)])


def line_of(library: str, results: Mapping[str, Any], needed: Mapping[str, float], rate: float, updates: int) -> str:
    result = results[library]
    seconds, total = result["seconds"], sum(result["seconds"].values())
    times = f"{sum(results['trl']['seconds'].values()) / total:7.2f}" if "trl" in results else f"{'':7}"
    parts = "".join(f"{seconds[part] / updates:11.2f}{needed[part] / seconds[part] / rate:7.0%}" for part in PARTS)
    return (
        f"{NAMES[library]:12}{updates * PROMPTS / total:10.2f}{times}{total / updates:10.2f}{parts}"
        f"{result['tokens'] / seconds['rollout']:15.0f}{result['peak_mib']:10.0f}{result['others']:12.0%}"
    )


def verdict(setting: Setting, results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if len(results) < len(LIBRARIES):
        return []
    theirs, ours = results["trl"], results["align"]
    faster = sum(theirs["seconds"].values()) / sum(ours["seconds"].values())
    met = faster >= setting.goal and ours["peak_mib"] < theirs["peak_mib"]
    goal = f"goal (at least {setting.goal} times TRL's samples/s, peak memory below its)"
    return [f"{goal}: {'met' if met else 'MISSED'}"]


def contestants(options: argparse.Namespace) -> dict[str, str]:
    """Library -> python, in the order of the table."""
    pythons = {"trl": options.peer_python, "align": sys.executable}
    if options.alone:
        pythons = {options.alone: pythons[options.alone]}
    if "trl" in pythons and not options.peer_python:
        if options.alone:
            raise SystemExit("--alone trl needs --peer-python; the docstring of this script says how to make one")
        print("ours alone: --peer-python does not name the python of an environment with trl 1.12.0")
        del pythons["trl"]
    return pythons


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=os.environ.get("ALIGN_TRL112_PYTHON"), help="with trl 1.12.0")
    parser.add_argument("--updates", type=int, default=UPDATES, help=f"updates of each contestant ({UPDATES})")
    parser.add_argument("--setting", choices=[s.name for s in SETTINGS], help="one setting only")
    parser.add_argument("--alone", choices=list(LIBRARIES), help="one contestant only")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        compete(options)
        return
    require_rows()
    pythons = contestants(options)
    for setting in SETTINGS:
        if options.setting in (None, setting.name):
            with tempfile.TemporaryDirectory() as folder:
                print(report(Path(folder), setting, options.updates, pythons))


if __name__ == "__main__":
    main()
