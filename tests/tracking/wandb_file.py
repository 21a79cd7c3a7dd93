"""Reads the file that an offline wandb run writes: LevelDB's log format, 32 KiB blocks of protobuf records."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK_BYTES, FILE_HEADER_BYTES, CHUNK_HEADER_BYTES = 32768, 7, 7
FULL, FIRST, LAST = 1, 2, 4
FLUSH_SECONDS = 10
"""On a busy machine wandb's own process has been seen to write the file after `finish` has returned."""


def _records(path: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), FILE_HEADER_BYTES, b""
    while at + CHUNK_HEADER_BYTES <= len(data):
        left = BLOCK_BYTES - at % BLOCK_BYTES
        _, size, kind = struct.unpack("<IHB", data[at : at + CHUNK_HEADER_BYTES])
        if left < CHUNK_HEADER_BYTES or (size == 0 and kind == 0):
            at += left
            continue
        start = at + CHUNK_HEADER_BYTES
        parts = data[start : start + size] if kind in (FULL, FIRST) else parts + data[start : start + size]
        at = start + size
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record


def _values(items: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def read_run(path: Path) -> dict[str, Any]:
    """id, project, group, job_type, name, tags, config, axis (of every metric), rows, summary, artifacts, alerts,
    exit_code.

    Of a .wandb file. Artifacts: {name, type, aliases, files, metadata}, the tables that wandb makes left out.
    """
    run: dict[str, Any] = {"config": {}, "rows": [], "summary": {}, "axis": {}, "artifacts": [], "alerts": []}
    for record in _records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            seen = record.run
            run |= {"id": seen.run_id, "project": seen.project, "group": seen.run_group, "job_type": seen.job_type}
            run["tags"], run["name"] = list(seen.tags), seen.display_name
            run["config"] |= _values(seen.config.update)
        elif kind == "config":
            run["config"] |= _values(record.config.update)
        elif kind == "history":
            run["rows"].append(_values(record.history.item))
        elif kind == "summary":
            run["summary"] |= _values(record.summary.update)
        elif kind == "metric":
            run["axis"][record.metric.glob_name or record.metric.name] = record.metric.step_metric
        elif kind == "artifact" and record.artifact.type != "run_table":
            seen = record.artifact
            files = [content.path for content in seen.manifest.contents]
            told = {"name": seen.name, "type": seen.type, "aliases": list(seen.aliases), "files": files}
            run["artifacts"].append(told | {"metadata": json.loads(seen.metadata or "{}")})
        elif kind == "alert":
            run["alerts"].append((record.alert.title, record.alert.text, record.alert.level))
        elif kind == "exit":
            run["exit_code"] = record.exit.exit_code
    return run


def read_runs(run_dir: Path) -> list[dict[str, Any]]:
    """Every run below a folder, in the order of their paths; runs of the same second are in no order."""
    deadline = time.monotonic() + FLUSH_SECONDS
    while True:
        runs = [read_run(path) for path in sorted(run_dir.rglob("run-*.wandb"))]
        if all("id" in run for run in runs) or time.monotonic() > deadline:
            return runs
        time.sleep(0.05)
