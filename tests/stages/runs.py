"""A small chain on rows of its own, run in this process."""

import json
from pathlib import Path

from align.artifacts import Manifest
from align.chain import run_chain
from align.config.store import compose_run

COLOURS = ("blue", "red", "green", "white", "black")
THINGS = ("sky", "rose", "grass", "snow", "coal", "door", "boat", "hat")


def write_pairs(folder: Path) -> Path:
    """40 pairs in plain words."""
    file = folder / "pairs.jsonl"
    with open(file, "w", encoding="utf-8") as out:
        for thing in THINGS:
            for at, colour in enumerate(COLOURS):
                prompt = f"What is the colour of the {thing} of villager {at}?"
                pair = {"prompt": prompt, "chosen": f"The {thing} is {colour}.", "rejected": f"I like my {thing}."}
                out.write(json.dumps(pair) + "\n")
    return file


def overrides(folder: Path, *more: str) -> list[str]:
    """The command line of a short SFT and DPO on the embedded model and the pairs, in `folder`."""
    own = [f"data.preferences={write_pairs(folder)}", f"run_dir={folder / 'run'}", f"cache_dir={folder / 'cache'}"]
    stages = next((entry for entry in more if entry.startswith("run=")), "run=[sft,dpo]")
    short = [f"stages.{name}.max_steps=3" for name in ("sft", "dpo") if name in stages]
    if not any(entry.startswith("precision=") for entry in more):
        short.append("precision=fp32")
    rest = [entry for entry in more if entry != stages]
    return ["+recipe=sft_dpo", stages, "data.held_out_fraction=0.2", *own, *short, *rest]


def run(folder: Path, *more: str) -> list[Manifest]:
    """Compose and run; returns the manifests."""
    return run_chain(compose_run(overrides(folder, *more)).config)
