"""Fields of a row, type-checked: what is missing or of a wrong type refuses the row by name."""

import math
import re
from collections.abc import Mapping
from typing import Any

from align.data.records import RowRefused

Row = Mapping[str, Any]

NUMBER = re.compile(r"[+-]?\d{1,15}(\.\d{1,15})?([eE][+-]?\d{1,3})?", re.ASCII)


def field(row: Row, name: str) -> Any:
    """A field that must be there and not null."""
    value = row.get(name)
    if value is None:
        raise RowRefused("missing_field", f"{name!r} is missing" if name not in row else f"{name!r} is null")
    return value


def text_field(row: Row, name: str, *, default: str | None = None) -> str:
    """A field that must be text; `default` stands for a missing or null one, if given."""
    value = row.get(name)
    if type(value) is str:
        if not value.isascii():
            _refuse_surrogates(value, name)
        return value
    if value is None and default is not None:
        return default
    return text_of(field(row, name), repr(name))


def text_of(value: Any, name: str) -> str:
    """A value that must be text."""
    if not isinstance(value, str):
        raise wrong_type(name, value, "text")
    _refuse_surrogates(value, name)
    return value


def list_field(row: Row, name: str) -> list[Any]:
    """A field that must be a list."""
    value = field(row, name)
    if not isinstance(value, list):
        raise wrong_type(repr(name), value, "a list")
    return value


def number_field(row: Row, name: str) -> float:
    """A field that must be a number; CSV has numbers as text."""
    return number_of(field(row, name), repr(name))


def number_of(value: Any, name: str) -> float:
    """A value that must be a finite number, or the text of one."""
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong_type(name, value, "a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RowRefused("wrong_type", f"{name} is not finite, a number was expected")
    return number


def wrong_type(name: str, value: Any, expected: str) -> RowRefused:
    """The refusal of a value, named by its type."""
    return RowRefused("wrong_type", f"{name} is {type(value).__name__}, {expected} was expected")


def _refuse_surrogates(text: str, name: str) -> None:
    """JSON can spell halves of characters (`\\ud800`); no tokenizer takes them, and no file holds them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowRefused("not_unicode", f"{name} holds half a character (a lone surrogate)") from error
