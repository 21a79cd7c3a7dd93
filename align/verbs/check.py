"""`do=check`: what is wrong with the data of a run, and what training would make of it. Trains nothing.

The rows are prepared as training prepares them, so the cache is filled on the way. Reports go to `<run_dir>/check/`.
"""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from align import __version__
from align.config.errors import UserError
from align.config.keys import SLOTS
from align.config.schema import OnBadRows, RunConfig
from align.data.bad_rows import TooManyBadRows, enforce_policy
from align.data.prepare import prepare_prompts, slot_sources
from align.data.report import CHOSEN_REASONS, RowReport
from align.stages.rows import PREPARE, load_template, prepare_rows, starting_model
from align.tracking.progress import say
from align.trainers.quiet import quiet_libraries
from align.verbs.check_lengths import lengths, limit_cost
from align.verbs.check_page import check_page
from align.verbs.check_text import check_text
from align.verbs.deep_checks import deep_findings, evaluation_sources, prompt_findings

SCHEMA = 1
FOLDER, JSON_NAME, PAGE_NAME = "check", "data_report.json", "data_report.html"


def run_check(config: RunConfig) -> None:
    """Look at every slot that the run's stages read, print and write what was found.

    Raises: UserError if a slot cannot be read or has more bad rows than the policy allows; the reports are written
    all the same.
    """
    quiet_libraries()
    if not config.run:
        raise UserError("run is empty: name the stages whose data is to be checked, such as run=[sft,dpo]")
    folder = Path(config.run_dir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    evaluation_sources(config.data)
    report = _report(config, folder)
    _write(folder / JSON_NAME, json.dumps(report, ensure_ascii=False, indent=1))
    _write(folder / PAGE_NAME, check_page(report))
    print(check_text(report))
    print(f"\n{folder / PAGE_NAME}\n{folder / JSON_NAME}")
    if refusals := _refusals(report):
        raise UserError(f"{refusals[0]}; the report is in {folder}")


def _report(config: RunConfig, folder: Path) -> dict[str, Any]:
    """The whole report as JSON values, see docs/data.md. `not_checked`: slots without rows to look at, and why."""
    slots, not_checked = [], []
    for name in config.run:
        entry = {"stage": name, "slot": SLOTS[name]}
        try:
            if (why := _not_there(config, name)) is None:
                slots.append(entry | _check_stage(config, name, folder))
            else:
                say(f"{name}: skipped, {why}")
                not_checked.append(entry | {"why": why, "refusal": None})
        except UserError as error:
            not_checked.append(entry | {"why": str(error), "refusal": str(error)})
    report = {"schema": SCHEMA, "align": __version__, "recipe": config.name, "slots": slots, "not_checked": not_checked}
    return report | {"verdict": _verdict(report)}


def _refusals(report: dict[str, Any]) -> list[str]:
    """Why training would refuse the data; empty if it would not."""
    return [entry["refusal"] for entry in report["slots"] + report["not_checked"] if entry["refusal"]]


def _not_there(config: RunConfig, name: str) -> str | None:
    """Why a stage's rows cannot be looked at yet: an earlier stage is to write them."""
    if getattr(config.stages, name, None) is None:
        raise UserError(f"run has {name}, but stages.{name} is not set; add stage=[{','.join(config.run)}]")
    if name == "score":
        return "scoring reads rows of any format and says itself what it leaves out"
    for source in slot_sources(config.data, SLOTS[name]):
        path = Path(source.path)
        if Path(config.run_dir) in path.parents and not path.exists():
            return f"{path} is not there yet: an earlier stage writes it"
    return None


def _check_stage(config: RunConfig, name: str, folder: Path) -> dict[str, Any]:
    """All that is known of the rows of one stage, as JSON values."""
    # What is bad is judged after all of it was read.
    lenient = replace(config, data=replace(config.data, on_bad_rows=OnBadRows.drop))
    if name in PREPARE:
        entry, report = _check_trained(lenient, name, folder)
    else:
        report = prepare_prompts(lenient.data).report
        findings = prompt_findings(config.data, report.read)
        entry = {"model": None, "lengths": {}, "limit": None, "findings": [asdict(found) for found in findings]}
    file = folder / f"bad_rows.{_file_label(config, name)}.jsonl"
    report.bad_rows.write(_beside(file))
    _replace(file)
    return entry | _counts(report) | {
        "left_out": _left_out(report),
        "bad_rows_file": file.name if report.dropped else None,
        "refusal": _refusal(report, config),
    }  # fmt: skip


def _check_trained(config: RunConfig, name: str, folder: Path) -> tuple[dict[str, Any], RowReport]:
    model = starting_model(config, name)
    prepared = prepare_rows(config, name, load_template(config, model), folder)
    report, found_lengths = prepared.report, lengths(prepared)
    del prepared  # its mapped files would count as memory while the deep checks run
    judged_by_prompts = "evaluate" in config.run and _not_there(config, "evaluate") is None
    deep = deep_findings(config.data, SLOTS[name], report.read, judged_by_prompts=judged_by_prompts)
    findings = report.findings + [asdict(finding) for finding in deep]
    entry = {"model": model, "lengths": found_lengths, "limit": limit_cost(report), "findings": findings}
    return entry, report


def _file_label(config: RunConfig, name: str) -> str:
    """The slot; with the stage where two stages read the same slot."""
    slot = SLOTS[name]
    return slot if sum(SLOTS[other] == slot for other in config.run) == 1 else f"{slot}.{name}"


def _counts(report: RowReport) -> dict[str, Any]:
    names = (
        *("formats", "read", "made", "kept", "held_out", "sampled_out", "copies", "pieces", "pieces_held_out"),
        *("tokens", "borders_cut"),
    )
    return {name: getattr(report, name) for name in names}


def _left_out(report: RowReport) -> list[dict[str, Any]]:
    """Why rows were left out, the most frequent reason first, each with its first rows and one example in words."""
    details: dict[str, str] = {}
    for line in report.bad_rows.first:
        details.setdefault(line["reason"], line["detail"])
    return [
        {
            "reason": reason,
            "count": count,
            "rows": report.bad_rows.origins.get(reason, []),
            "detail": details.get(reason, ""),
            "bad": reason not in CHOSEN_REASONS,
        }
        for reason, count in report.dropped.items()
    ]


def _refusal(report: RowReport, config: RunConfig) -> str | None:
    """What training would say to so many bad rows; None if it takes them."""
    try:
        enforce_policy(report.bad_rows, report.made, config.data, allowed=CHOSEN_REASONS)
    except TooManyBadRows as error:
        return f"data.{report.slot}: {error}"
    if not report.kept:
        return f"data.{report.slot}: none of {report.read} rows is left"
    return None


def _verdict(report: dict[str, Any]) -> dict[str, str]:
    said = [entry for slot in report["slots"] for entry in (*slot["findings"], slot["limit"] or {"level": "info"})]
    warnings = sum(entry["level"] == "warn" for entry in said)
    waiting = sum(not entry["refusal"] for entry in report["not_checked"])
    later = f"; {waiting} not there yet" if waiting else ""
    if _refusals(report):
        refused = [entry["slot"] for entry in report["slots"] + report["not_checked"] if entry["refusal"]]
        return {"level": "bad", "text": f"Not usable as it is: training would refuse {', '.join(refused)}{later}"}
    if warnings:
        return {"level": "warn", "text": f"Usable, {warnings} warning{'s' if warnings > 1 else ''}{later}"}
    return {"level": "good", "text": f"Usable, no warnings{later}"}


def _write(path: Path, text: str) -> None:
    _beside(path).write_text(text, encoding="utf-8", errors="backslashreplace")
    _replace(path)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _replace(path: Path) -> None:
    """Put what was written beside in its place; a file that was not written this time goes."""
    if _beside(path).exists():
        os.replace(_beside(path), path)
    else:
        path.unlink(missing_ok=True)
