"""Prompts as rows: token ids to sample from, and the record itself, which rewards and samples are shown."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from align.data import held_out
from align.data.kinds import IDS, Encoded, Kind
from align.data.quality import check_prompt
from align.data.records import Message, PromptRow, RowRefused, ToolCall
from align.data.template import Template


def _encode_prompts(template: Template, rows: Sequence[PromptRow]) -> list[Encoded]:
    return [_encoded(template, row) for row in rows]


def _encoded(template: Template, row: PromptRow) -> Encoded:
    try:
        ids = template.encode_prompt(row.messages, row.tools)
    except RowRefused as refusal:
        return refusal
    record = {"messages": [dataclasses.asdict(message) for message in row.messages], "tools": row.tools, "row": row.row}
    return [{"prompt_ids": ids, "record": json.dumps(record, ensure_ascii=False, default=str)}]


PROMPTS = Kind(
    "prompts",
    PromptRow,
    check_prompt,
    lambda row: held_out.first_turn(row.messages),
    _encode_prompts,
    lambda columns: len(columns["prompt_ids"]),
    pa.schema({"prompt_ids": IDS, "record": pa.string()}),
)


def read_record(columns: Mapping[str, Any]) -> PromptRow:
    """The prompt of a row of PROMPTS."""
    record = json.loads(columns["record"])
    messages = tuple(_message(fields) for fields in record["messages"])
    return PromptRow(messages, record["row"], tuple(record["tools"]))


def _message(fields: dict[str, Any]) -> Message:
    return Message(**(fields | {"tool_calls": tuple(ToolCall(**call) for call in fields["tool_calls"])}))
