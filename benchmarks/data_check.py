"""The structural checks on many rows: reading, parsing, checking and `align.data.findings`, without a tokenizer.

    python benchmarks/data_check.py [--rows 1000000] [--format preference|hh_rlhf|messages] [--profile]

Writes a JSONL file of made-up rows of about 1 KB to a temporary folder, then reads it in a process of its own on one
core. Prints rows a second (goal: 20,000) and the peak memory of that process (goal: under 1.5 GB for a million rows).
`other load` is what other processes took of a core meanwhile: figures mean something where it is near zero.
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
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GOAL_ROWS, GOAL_GB = 20_000, 1.5
WORDS = 20_000


def texts(seed: int) -> Iterator[str]:
    """Sentences of made-up words, of 4 to 60 words as answers are: most short, few long."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(WORDS)]
    while True:
        start = draw.randrange(WORDS - 128)
        yield " ".join(words[start : start + min(4 + int(draw.expovariate(1 / 28)), 120)]).capitalize() + "."


def made_up_rows(count: int, row_format: str) -> Iterator[dict]:
    """Five texts a row; 1 % of the rows are exact copies of the row before."""
    source = texts(1)
    row: dict = {}
    for number in range(count):
        if number % 100 != 99:
            row = in_format([next(source) for _ in range(5)], row_format)
        yield row


def in_format(written: list[str], row_format: str) -> dict:
    """A conversation, or three turns and two answers to them."""
    *turns, chosen, rejected = written
    if row_format == "hh_rlhf":
        prompt = "".join(
            f"\n\n{role}: {text}" for role, text in zip(("Human", "Assistant", "Human"), turns, strict=True)
        )
        return {side: f"{prompt}\n\nAssistant: {text}" for side, text in (("chosen", chosen), ("rejected", rejected))}
    if row_format == "messages":
        turns = [*turns, f"{chosen} {rejected}"]
        roles = ("user", "assistant") * 2
        return {"messages": [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]}
    return {"prompt": "\n".join(turns), "chosen": chosen, "rejected": rejected}


def check(path: str) -> dict:
    """Read a file as the data doctor does; returns rows, seconds, load of others and peak memory."""
    from align.config.schema import DataConfig
    from align.data.findings import Findings
    from align.data.kinds import DEMONSTRATIONS, PREFERENCES
    from align.data.records import BadRow
    from align.data.sources import parse_slot
    from align.data.walk import walk

    slot = "demonstrations" if "messages" in Path(path).name else "preferences"
    kind = {kind.slot: kind for kind in (DEMONSTRATIONS, PREFERENCES)}[slot]
    findings, rows = Findings(), 0
    started, used = time.perf_counter(), time.process_time()
    [source] = parse_slot(path, slot, format="auto", split="train")
    for batch in walk(source, kind.record, kind.check, DataConfig())[1]:
        sound = [(row.origin, one) for row in batch for one in row.records if not isinstance(one, BadRow)]
        findings.add([origin for origin, _ in sound], [record for _, record in sound])
        rows += len(batch)
    results = findings.results()
    seconds = time.perf_counter() - started
    return {
        "rows": rows,
        "seconds": seconds,
        "other_load": 1 - (time.process_time() - used) / seconds,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "copies": results[0].count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--format", default="preference", choices=["preference", "hh_rlhf", "messages"])
    parser.add_argument("--profile", action="store_true", help="print where the time goes instead (slows it down)")
    parser.add_argument("--check", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.check:
        print(json.dumps(check(arguments.check)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{arguments.format}.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in made_up_rows(arguments.rows, arguments.format))
        report(path, arguments.profile)


def report(path: Path, profile: bool) -> None:
    profiler = ["-m", "cProfile", "-s", "tottime"] if profile else []
    command = [sys.executable, *profiler, __file__, "--check", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    if profile:
        print("\n".join(output.splitlines()[:45]))
        return
    found = json.loads(output)
    rate, size = found["rows"] / found["seconds"], path.stat().st_size
    print(f"{found['rows']:,} rows of {size / found['rows']:,.0f} bytes in {found['seconds']:.1f} s")
    print(f"{rate:,.0f} rows/s (goal {GOAL_ROWS:,}: {'met' if rate >= GOAL_ROWS else 'MISSED'})")
    print(f"peak memory {found['peak_gb']:.2f} GB (goal {GOAL_GB} GB), other load {found['other_load']:.0%}")


if __name__ == "__main__":
    main()
