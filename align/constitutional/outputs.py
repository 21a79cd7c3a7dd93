"""What the stage leaves: demonstrations, preferences, unpaired answers, what was left out, and a trace of it all."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from align.config.constitution import Constitution
from align.config.schema import ConstitutionalStage, Draw, RevisionTarget
from align.constitutional.drawing import draw_principles, seed_of
from align.constitutional.judging import Judge, Pair
from align.constitutional.rows import Asked, PromptWork, Round, going
from align.constitutional.verdicts import Verdict
from align.data.canonical import canonical
from align.data.records import Demonstration, Message, PreferencePair, Unpaired
from align.generation.speakers import Chosen, Speaker

DEMONSTRATIONS, PREFERENCES, UNPAIRED = "demonstrations.jsonl", "preferences.jsonl", "unpaired.jsonl"
TRACE, LEFT_OUT = "trace.jsonl", "bad_rows.jsonl"
NO_TARGET = "no_revision_accepted"
"""Why a prompt gives no demonstration although its first reply was sound."""


def choose_targets(
    rows: Sequence[PromptWork], stage: ConstitutionalStage, constitution: Constitution, judge: Judge
) -> dict[str, list[str]]:
    """Prompt id -> the replies to learn. A first reply in which no flaw was found is kept; without a reply that can
    stand, the prompt gives none and is marked."""
    targets = {}
    for row in going(rows):
        accepted = [one.revision or "" for one in row.accepted]
        if not accepted:
            flawed = any(one.criticised and one.critique.flaw for one in row.rounds)
            if row.rounds and (flawed or not row.ended):
                row.drop(NO_TARGET, row.rounds[-1].fault or "")
                continue
            accepted = [row.initial]
        targets[row.id] = accepted[-1:] if stage.targets is RevisionTarget.last else list(dict.fromkeys(accepted))
    if stage.targets is RevisionTarget.best:
        _keep_best(rows, targets, stage, constitution, judge)
    return targets


def _keep_best(
    rows: Sequence[PromptWork],
    targets: dict[str, list[str]],
    stage: ConstitutionalStage,
    constitution: Constitution,
    judge: Judge,
) -> None:
    """Leave of each prompt's targets the one that wins most; where a verdict fails, the last."""
    by_id = {row.id: row for row in rows}
    count = min(stage.judge_principles, len(constitution.principles))
    pairs: dict[str, list[Pair]] = {}
    for id, texts in targets.items():
        seed = seed_of(stage.seed, "best", id)
        principles = tuple(draw_principles(constitution.principles, count, Draw.without_replacement, seed))
        pairs[id] = [
            Pair(by_id[id], one, other, "best", principles) for i, one in enumerate(texts) for other in texts[i + 1 :]
        ]
    judge.decide("judge_best", [pair for listed in pairs.values() for pair in listed])
    for id, texts in targets.items():
        wins = dict.fromkeys(texts, 0.0)
        for pair in pairs[id]:
            pair.row.asked += pair.asked
            if pair.verdict is not None:
                wins[pair.first] += pair.verdict.p
                wins[pair.second] += 1 - pair.verdict.p
        failed = any(pair.verdict is None for pair in pairs[id])
        targets[id] = [texts[-1] if failed else max(texts, key=lambda text: wins[text])]


def demonstrations(rows: Sequence[PromptWork], targets: dict[str, list[str]]) -> Iterator[dict[str, Any]]:
    """Conversations with the reply to learn, without any of the questions."""
    for row in rows:
        for text in targets.get(row.id, ()):
            yield canonical(Demonstration((*row.row.messages, Message("assistant", text))))


def mixed_in(helpful: Iterable[Demonstration], made: int, ratio: float, seed: int) -> list[dict[str, Any]]:
    """`ratio` helpful rows for each of `made`, to the nearest row, drawn without replacement in a seeded order."""
    listed = list(helpful)
    random = Random(seed_of(seed, "helpful"))
    order = sorted(range(len(listed)), key=lambda _: random.random())
    return [canonical(listed[place]) for place in order[: round(ratio * made)]]


def preferences(pairs: Sequence[Pair]) -> Iterator[dict[str, Any]]:
    """Judged pairs, the likelier one chosen, with the probability that it is the better one."""
    for pair in pairs:
        if pair.verdict is None:
            continue
        p, texts = pair.verdict.p, (pair.first, pair.second)
        chosen, rejected = texts if p >= 0.5 else texts[::-1]
        record = PreferencePair(
            pair.row.row.messages, Message("assistant", chosen), Message("assistant", rejected), p=max(p, 1 - p)
        )
        # A p of 1 is left out by canonical form, one of 0.5 is a tie; both are kept as numbers here.
        yield canonical(record) | {"p": record.p}


def unpaired(rows: Sequence[PromptWork], targets: dict[str, list[str]]) -> Iterator[dict[str, Any]]:
    """What may be learnt as desirable; first replies that were revised, and not back again, as undesirable."""
    for row in rows:
        for text in targets.get(row.id, ()):
            yield canonical(Unpaired(row.row.messages, Message("assistant", text), True))
        if row.accepted and row.initial not in targets.get(row.id, ()):
            yield canonical(Unpaired(row.row.messages, Message("assistant", row.initial), False))


def left_out(rows: Sequence[PromptWork], pairs: Sequence[Pair], replies: Sequence[tuple[PromptWork, str, str]]):
    """One line for each prompt, revision, reply and pair that came to nothing, with the reason."""
    for row in rows:
        if row.fault is not None:
            yield _left_out("prompt", row, row.fault, row.detail, reply=row.initial)
        for number, one in enumerate(row.rounds):
            if one.fault is not None:
                p = {} if one.verdict is None else {"p": one.verdict.p}
                yield _left_out(
                    "revision", row, one.fault, f"round {number + 1}, {one.principle.id}", before=one.reply,
                    reply=one.revision, critique=one.critique.text, **p,
                )  # fmt: skip
    for row, reason, which in replies:
        yield _left_out("reply", row, reason, which)
    for pair in pairs:
        if pair.fault is not None:
            yield _left_out("pair", pair.row, pair.fault, pair.source, first=pair.first, second=pair.second)


def _left_out(what: str, row: PromptWork, reason: str, detail: str, **texts: Any) -> dict[str, Any]:
    prompt = row.conversation[-1]["content"]
    return {"what": what, "reason": reason, "detail": detail, "id": row.id, "prompt": prompt, **texts}


def traces(
    rows: Sequence[PromptWork], targets: dict[str, list[str]], pairs: Sequence[Pair], speakers: dict[str, Speaker]
) -> Iterator[dict[str, Any]]:
    """A line a prompt: each question as its model was given it, each answer with seed and tokens, and what came of it.

    speakers: of the roles generator, critic and judge.
    """
    of_row: dict[str, list[Pair]] = {}
    for pair in pairs:
        of_row.setdefault(pair.row.id, []).append(pair)
    for row in rows:
        yield {
            "id": row.id,
            "conversation": list(row.conversation),
            "left_out": row.fault,
            "targets": targets.get(row.id, []),
            "rounds": [_round(one) for one in row.rounds],
            "answers": [_answer(one, speakers) for one in row.asked],
            "pairs": [_pair(pair, speakers) for pair in of_row.get(row.id, ())],
        }


def _round(one: Round) -> dict[str, Any]:
    return {
        "principle": one.principle.id,
        "before": one.reply,
        "critique": one.critique.text,
        "flaw": one.critique.flaw,
        "marked": one.critique.marked,
        "revision": one.revision,
        "left_out": one.fault,
        "verdict": _verdict(one.verdict),
    }


def _pair(pair: Pair, speakers: dict[str, Speaker]) -> dict[str, Any]:
    return {
        "source": pair.source,
        "first": pair.first,
        "second": pair.second,
        "left_out": pair.fault,
        "verdict": _verdict(pair.verdict),
        "answers": [_answer(one, speakers) for one in pair.asked],
    }


def _answer(one: Asked, speakers: dict[str, Speaker]) -> dict[str, Any]:
    speaker, answer = speakers[one.role], one.answer
    line = {"step": one.step, "model": speaker.name, "prompt": speaker.prompt_text(one.ask.messages)}
    line |= {"seed": one.ask.seed, "prompt_tokens": answer.prompt_tokens}
    if isinstance(answer, Chosen):
        return line | {"candidates": one.ask.candidates, "logps": answer.logps, "votes": answer.votes}
    return line | {"text": answer.text, "new_tokens": answer.new_tokens, "finished": answer.finished}


def _verdict(verdict: Verdict | None) -> dict[str, Any] | None:
    if verdict is None:
        return None
    return {
        "p": verdict.p,
        "position_gap": verdict.position_gap,
        "disagreement": verdict.disagreement,
        "principles": [
            {"id": one.principle, "first_slot_as_given": one.as_given, "first_slot_swapped": one.swapped, "p": one.p}
            for one in verdict.orders
        ],
    }


def write_lines(file: Path, lines: Iterable[dict[str, Any]]) -> int:
    """Write JSONL, complete or not at all; returns how many lines."""
    partial, count = file.with_name(f"{file.name}.partial"), 0
    with open(partial, "w", encoding="utf-8", errors="surrogatepass") as out:
        for line in lines:
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
            count += 1
    partial.replace(file)
    return count


def append_lines(file: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Add JSONL lines to a file that was written just before."""
    with open(file, "a", encoding="utf-8", errors="surrogatepass") as out:
        out.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
