"""`do=preview`: what would be learnt from the rows of each trained stage, in the terminal and as an HTML page."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from align.config.errors import UserError
from align.config.rewards import parse_rewards
from align.config.schema import PPOStage, RunConfig, StageConfig
from align.data.prepare import Prepared
from align.data.preview import (
    CHOSEN,
    CONTEXT,
    LEARNT,
    PROMPT,
    REJECTED,
    STOP,
    TRAINED,
    Sample,
    Segment,
    pick,
    problems,
)
from align.data.template import Template
from align.stages.rows import load_template, prepare_rows, row_tokens, starting_model, trained_stages
from align.tracking.page import page

SHOWN_PROBLEMS = 5
OPEN, CLOSE = "⟦", "⟧"
RESET = "\x1b[0m"
COLOURS = {
    CONTEXT: "\x1b[2m",
    PROMPT: "\x1b[2m",
    TRAINED: "\x1b[32m",
    CHOSEN: "\x1b[32m",
    REJECTED: "\x1b[31m",
    STOP: "\x1b[1;7m",
}
LEGEND = {
    TRAINED: "trained",
    CHOSEN: "chosen answer",
    REJECTED: "rejected answer",
    STOP: "stop token, trained too",
    CONTEXT: "read, not trained",
    PROMPT: "prompt, not trained",
}
# Control characters of the data must neither steer a terminal nor hide: they become their pictures.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
VISIBLE |= dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)

STYLE = """
pre { line-height: 1.7; } .legend span { margin-right: .75rem; }
.trained, .chosen { background: #cdeed6; color: #0f3d20; border-bottom: 2px solid #2f7d4f; }
.rejected { background: #f8d7d4; color: #5a120d; border-bottom: 2px dashed #b3261e; }
.stop { background: #2b4a7a; color: #fff; border-radius: 3px; padding: 0 .2rem; }
.context, .prompt { color: var(--soft); }
@media (prefers-color-scheme: dark) {
  .trained, .chosen { background: #163a24; color: #c9f2d6; } .rejected { background: #47191a; color: #fbd3cf; }
  .stop { background: #8fb4ec; color: #10213d; } }
"""


@dataclass(frozen=True)
class Preview:
    """Samples of one stage, and what is wrong with each of them."""

    stage: str
    slot: str
    samples: list[Sample]
    problems: list[list[str]]
    note: str = ""
    """Of prompts, what becomes of them."""


def run_preview(config: RunConfig) -> None:
    """Show what the trained stages of `config.run` would learn; writes <run_dir>/preview/<stage>.html for each.

    Raises: UserError, after everything was shown, naming the samples that would train wrongly.
    """
    names = trained_stages(config)
    if not names:
        raise UserError(f"do=preview: run=[{','.join(config.run)}] trains on no rows; name a stage that does in run=")
    colour, wrong = use_colour(), []
    for name in names:
        template = load_template(config, starting_model(config, name))
        prepared = prepare_rows(config, name, template, Path(config.run_dir) / name)
        shown = preview(name, prepared, template, sampling_note(getattr(config.stages, name)))
        file = Path(config.run_dir) / "preview" / f"{name}.html"
        _write(file, html_page(shown))
        lines = [f"{name}: {line}" for line in prepared.report.lines()]
        _print("\n".join([*lines, "", terminal_text(shown, colour), f"{name}: as a page: {file}"]))
        wrong += problem_lines(shown) if len(prepared.train) else [f"{name}: there is no row to train on"]
    if wrong:
        more = f"; and {len(wrong) - SHOWN_PROBLEMS} more" if len(wrong) > SHOWN_PROBLEMS else ""
        raise UserError(
            f"training would go wrong: {'; '.join(wrong[:SHOWN_PROBLEMS])}{more}; mend the rows, or give another "
            "model.chat_template"
        )


def _print(text: str) -> None:
    """Print what the terminal's encoding may lack as escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def preview(stage: str, prepared: Prepared, template: Template, note: str = "") -> Preview:
    """Samples of a stage's rows, judged."""
    tokenizer, slot = template.tokenizer, prepared.report.slot
    stop_token_ids = {tokenizer.eos_token_id} if slot == "text" else template.stop_token_ids
    samples = pick(prepared, tokenizer, stop_token_ids)
    found = [problems(sample, stop_token_ids, tokenizer.bos_token_id) for sample in samples]
    return Preview(stage, slot, samples, found, note)


def sampling_note(stage: StageConfig) -> str:
    """What a stage samples after each of its prompts, in words; nothing for a stage that learns from its rows."""
    if not isinstance(stage, PPOStage):
        return ""
    count, names = stage.completions_per_prompt, ", ".join(reward.name for reward in parse_rewards(stage.rewards))
    return (
        f"prompts, of which nothing is learnt; after each, {count} completion{'s' if count > 1 else ''} of at most "
        f"max_new_tokens={stage.max_new_tokens} tokens will be sampled at temperature {stage.temperature:g} and scored "
        f"by {names}. A prompt has at most max_tokens - max_new_tokens = {row_tokens(stage)} tokens"
    )


def problem_lines(shown: Preview) -> list[str]:
    """Each problem with the stage and the sample that has it."""
    return [
        f"{shown.stage}: {sample.label}: {problem}"
        for sample, found in zip(shown.samples, shown.problems, strict=True)
        for problem in found
    ]


def use_colour() -> bool:
    """Whether output goes to a terminal that may be coloured (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def terminal_text(shown: Preview, colour: bool) -> str:
    """The samples for a terminal: learnt text coloured, or between marks."""
    roles = _roles(shown.samples)
    legend = ", ".join(_painted(LEGEND[role], role) if colour else LEGEND[role] for role in roles)
    marks = legend if colour else f"{OPEN}what is learnt{CLOSE}, the stop token included"
    lines = [f"{shown.stage}: {shown.note or marks}"]
    for sample, found in zip(shown.samples, shown.problems, strict=True):
        lines += ["", f"── {sample.label.translate(VISIBLE)}, {_counts(sample)} ──", _body(sample, colour)]
        lines += [f"PROBLEM: {problem.translate(VISIBLE)}" for problem in found]
    return "\n".join(lines) + "\n"


def _counts(sample: Sample) -> str:
    counts = ", ".join(f"{name} {count:,}" for name, count in sample.tokens.items())
    return f"tokens: {counts}" if counts else "not tokenised"


def _body(sample: Sample, colour: bool) -> str:
    text, inside = "", False
    for segment in sample.segments:
        learnt = segment.role in LEARNT or segment.role == STOP
        border = segment.role in (CHOSEN, REJECTED)
        if not colour and inside and (border or not learnt):
            text += CLOSE
        text += f"\n── {segment.role} ──\n" if border else ""
        if not colour and learnt and (border or not inside):
            text += OPEN
        inside = learnt
        text += _painted(segment.text.translate(VISIBLE), segment.role) if colour else segment.text.translate(VISIBLE)
    return text + (CLOSE if inside and not colour else "")


def _painted(text: str, role: str) -> str:
    """Coloured line by line, so that a pager or a cut line does not lose the colour."""
    return "\n".join(f"{COLOURS[role]}{line}{RESET}" for line in text.split("\n"))


def _roles(samples: Sequence[Sample]) -> list[str]:
    """The roles that occur, in the order of the legend."""
    there = {segment.role for sample in samples for segment in sample.segments}
    return [role for role in LEGEND if role in there]


def html_page(shown: Preview) -> str:
    """The samples as a page of its own."""
    what = "what is sampled after" if shown.note else "what is learnt from"
    title = f"{shown.stage}: {what} data.{shown.slot}"
    legend = " ".join(f'<span class="{role}">{LEGEND[role]}</span>' for role in _roles(shown.samples))
    sections = [_section(sample, found) for sample, found in zip(shown.samples, shown.problems, strict=True)]
    head = f'<h1>{escape(title)}</h1>\n<p class="legend">{legend}</p>\n'
    head += f"<p>{escape(shown.note)}.</p>\n" if shown.note else ""
    return page(title, head + "\n".join(sections), STYLE)


def _section(sample: Sample, found: Sequence[str]) -> str:
    lines = [f"<h2>{escape(sample.label)}</h2>", f'<p class="soft">{escape(_counts(sample))}</p>']
    lines += [f'<p class="bad">Problem: {escape(problem)}</p>' for problem in found]
    return "\n".join([*lines, *_blocks(sample.segments)])


def _blocks(segments: Sequence[Segment]) -> list[str]:
    """A block of spans, and further ones with a heading for the chosen and the rejected answer."""
    blocks: list[tuple[str, str]] = [("", "")]
    for segment in segments:
        if segment.role in (CHOSEN, REJECTED):
            blocks.append((f"<h3>{segment.role}</h3>", ""))
        heading, spans = blocks[-1]
        text = escape(segment.text.translate(VISIBLE))
        blocks[-1] = (heading, f'{spans}<span class="{segment.role}">{text}</span>')
    return [f"{heading}<pre>{spans}</pre>" for heading, spans in blocks if spans]


def _write(path: Path, text: str) -> None:
    """The whole file or none. Raises: UserError if the place does not take it."""
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); use another run_dir") from error
