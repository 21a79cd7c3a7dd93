"""The one way that `do=convert` writes each kind of record; every form is read back as the record it was."""

import json
from collections.abc import Sequence
from typing import Any

from align.data.records import (
    Demonstration,
    Message,
    PreferencePair,
    PromptRow,
    Ranking,
    Record,
    TextDocument,
    Unpaired,
)


def canonical(record: Record) -> dict[str, Any]:
    """A record as a row: conversations as messages, answers as lists of one message."""
    if isinstance(record, TextDocument):
        return {"text": record.text}
    tools = {"tools": [json.loads(tool) for tool in record.tools]} if record.tools else {}
    if isinstance(record, Demonstration):
        score = {} if record.score is None else {"score": record.score}
        return {"messages": _messages(record.messages)} | score | tools
    prompt = {"prompt": _messages(record.messages if isinstance(record, PromptRow) else record.prompt)}
    return prompt | _answers(record) | tools


def _answers(record: Record) -> dict[str, Any]:
    if isinstance(record, PreferencePair):
        verdict = {"p": record.p} if record.p != 1.0 else {}
        verdict |= {"margin": record.margin} if record.margin else {}
        verdict |= {"tie": True} if record.tie else {}
        verdict |= dict(zip(("score_chosen", "score_rejected"), record.scores or (), strict=False))
        return {"chosen": _messages([record.chosen]), "rejected": _messages([record.rejected])} | verdict
    if isinstance(record, Ranking):
        order = {"ranks": list(record.ranks)} if record.scores is None else {"scores": list(record.scores)}
        return {"completions": [_messages([one]) for one in record.completions]} | order
    if isinstance(record, Unpaired):
        return {"completion": _messages([record.completion]), "label": record.desirable}
    assert isinstance(record, PromptRow)
    return {}


def _messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [message.as_dict() for message in messages]
