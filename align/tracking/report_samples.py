"""Answers to the same prompts, side by side: of several models (evaluate), or of one model by update (PPO)."""

from collections.abc import Mapping, Sequence
from typing import Any

from align.tracking.page import html
from align.tracking.run_folder import StageFolder

MOST_PROMPTS, MOST_UPDATES = 12, 4


def reply_samples(evaluated: StageFolder | None) -> list[str]:
    """A few prompts of an evaluation with every model's reply; those on which models differ come first."""
    asked = [line for line in evaluated.samples if isinstance(line.get("replies"), dict)] if evaluated else []
    if not asked:
        return []
    told_apart = [line for line in asked if len(set(map(str, line["replies"].values()))) > 1]
    chosen = _spread(told_apart or asked, MOST_PROMPTS)
    said = f"{len(told_apart):,} of {len(asked):,} prompts are answered differently by some model; "
    said += f"{len(chosen)} of {'these' if told_apart else 'all'}, evenly spread. All are in evaluate/samples.jsonl."
    return [f'<p class="soft">{said}</p>', *(_sample(line["prompt"], line["replies"]) for line in chosen)]


def update_samples(stage: StageFolder) -> list[str]:
    """The prompts that were answered at several moments of training: the first, the last and some between."""
    taken = [line for line in stage.samples if "step" in line and "completion" in line]
    if not taken:
        return []
    steps = _spread(sorted({line["step"] for line in taken}), MOST_UPDATES)
    by_place: dict[Any, dict[int, Mapping[str, Any]]] = {}
    for line in taken:
        by_place.setdefault(line.get("place", str(line["prompt"])), {})[line["step"]] = line
    unit = "update" if stage.name == "ppo" else "step"
    parts = [f"<h3>{html(stage.name)}: the same prompts by {unit}</h3>"]
    for answers in _spread(list(by_place.values()), MOST_PROMPTS // 2):
        shown = {_moment(step, answers[step], unit): answers[step]["completion"] for step in steps if step in answers}
        parts.append(_sample(next(iter(answers.values()))["prompt"], shown))
    return parts


def _moment(step: int, line: Mapping[str, Any], unit: str) -> str:
    score = line.get("score")
    scored = f", score {score:+.2f}".replace("-", "\N{MINUS SIGN}") if isinstance(score, int | float) else ""
    return ("before training" if step == 0 else f"{unit} {step:,}") + scored


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def _sample(prompt: str | Sequence[Mapping[str, Any]], replies: Mapping[str, Any]) -> str:
    """A reply that is the same as the one before it is set back."""
    sides, before = [], None
    for name, reply in replies.items():
        text = reply_text(reply)
        same = ' class="same"' if text == before else ""
        sides.append(f"<div{same}><h4>{html(name)}</h4>{_text(text)}</div>")
        before = text
    replied = f'<div class="replies">{"".join(sides)}</div>'
    return f'<div class="sample"><h4>prompt</h4>{_text(prompt_text(prompt))}{replied}</div>'


def reply_text(reply: Any) -> str:
    """A reply as text: as it is, or what stands under `text` or `content`; of a server that failed there is none."""
    if reply is None:
        return "(no reply)"
    if isinstance(reply, dict):
        reply = reply.get("text", reply.get("content", ""))
    return str(reply)


def prompt_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt as text: a single question as it is, several turns with who speaks."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _text(text: str) -> str:
    # A newline at the start of <pre> is no part of it, so one is put there.
    return f'<pre dir="auto">\n{html(text)}</pre>'
