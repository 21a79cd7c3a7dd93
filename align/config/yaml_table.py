"""A YAML file whose values are read key by key, so that every refusal can name file, line and key.

The file is composed to nodes, which know their lines, and never constructed: what is not asked for is refused, what is
asked for is typed. `mine.yaml:12: principle 'kind' has no critique; add critique`.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import yaml

from align.config.errors import UserError
from align.config.refusals import near

INT, FLOAT, STR, BOOL, NULL = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "str", "bool", "null"))
T = TypeVar("T")


def read_table(file: Path) -> "Table":
    """The mapping that a YAML file is.

    Raises: UserError for a file that cannot be read, is not YAML, is empty or no mapping.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); give a readable YAML file") from error
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{file}:{line}: is not UTF-8; save the file as UTF-8") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        line, said = _syntax_error(error, text)
        raise UserError(f"{file}:{line}: is not YAML ({said}); put texts with signs such as ': ' in quotes") from error
    except RecursionError as error:
        raise UserError(f"{file}:1: is nested too deeply to be read; take levels out") from error
    if node is None:
        raise UserError(f"{file}:1: is empty; write KEY: VALUE lines")
    return Table(str(file), node, "the file")


def _syntax_error(error: yaml.YAMLError, text: str) -> tuple[int, str]:
    """Line, from 1, and what the parser says."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is not None:
        said = [part for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part]
        return mark.line + 1, ", ".join(said)
    position = getattr(error, "position", 0)
    return text[:position].count("\n") + 1, f"the character {text[position : position + 1]!r} is not allowed"


class Table:
    """A mapping of a YAML file; `title` is what it is called in refusals. White space at the ends of texts goes."""

    def __init__(self, file: str, node: yaml.Node, title: str):
        self.file, self.node, self.title = file, node, title
        self.values: dict[str, yaml.Node] = {}
        self.keys: dict[str, yaml.Node] = {}
        if not isinstance(node, yaml.MappingNode):
            raise self.fault(node, f"{title} is not a mapping of keys", "write KEY: VALUE lines")
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else "?"
            if name in self.values:
                first = self.keys[name].start_mark.line + 1
                raise self.fault(key, f"{title} has {name} twice, first in line {first}", "keep one of them")
            self.keys[name], self.values[name] = key, value

    def inner(self, name: str) -> "Table":
        """The mapping under a key."""
        return Table(self.file, self.require(name), name)

    def fault(self, node: yaml.Node, found: str, to_do: str) -> UserError:
        """The refusal of a node; to be raised."""
        return UserError(f"{self.file}:{node.start_mark.line + 1}: {found}; {to_do}")

    def only(self, kind: type) -> None:
        """Refuse a key that is no field of a dataclass."""
        known = [f.name for f in dataclasses.fields(kind)]
        for name, key in self.keys.items():
            if name not in known:
                raise self.fault(
                    key, f"{self.title}: {name} is not a key{near(name, known)}", "rename it or take it out"
                )

    def require(self, name: str) -> yaml.Node:
        """The node under a key. Raises: UserError if there is none."""
        if name not in self.values:
            raise self.fault(self.node, f"{self.title} has no {name}", f"add {name}")
        return self.values[name]

    def text(self, name: str, default: str | None = None, *, may_be_empty: bool = False) -> str:
        """A text; `default` is for a key that is not there."""
        if name not in self.values and default is not None:
            return default
        node = self.require(name)
        text = self._text_of(node, name)
        if not text and not may_be_empty:
            raise self.fault(
                node, f"{self.title}: {name} is empty", "write a text" if default is None else "take it out"
            )
        return text

    def _text_of(self, node: yaml.Node, name: str) -> str:
        # The source of a version is its text: 1.10 is not 1.1.
        allowed = (STR, INT, FLOAT) if name == "version" else (STR,)
        if isinstance(node, yaml.ScalarNode) and node.tag in allowed:
            return node.value.strip()
        if node.tag == NULL:
            raise self.fault(node, f"{self.title}: {name} is empty", "write a text")
        found = f"({node.value}) is not text" if isinstance(node, yaml.ScalarNode) else "is not text"
        raise self.fault(node, f"{self.title}: {name} {found}", "put it in quotes")

    def tables(self, name: str, read: Callable[["Table"], T], title: str, *, required: bool = False) -> tuple[T, ...]:
        """A list of mappings, each read by `read`; numbered from 1 in what is said of them."""
        if name not in self.values and not required:
            return ()
        items = self._items(name)
        return tuple(read(Table(self.file, item, f"{title} {number}")) for number, item in enumerate(items, start=1))

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts."""
        return tuple(self._text_of(item, name) for item in self._items(name))

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        return tuple(self._number_of(item, name) for item in self._items(name))

    def number(self, name: str, default: float) -> float:
        """A finite number; `default` is for a key that is not there."""
        return self._number_of(self.values[name], name) if name in self.values else default

    def flag(self, name: str, default: bool) -> bool:
        """true or false; `default` is for a key that is not there."""
        if name not in self.values:
            return default
        node = self.values[name]
        if node.tag != BOOL:
            raise self.fault(node, f"{self.title}: {name} is neither true nor false", "write true or false")
        return bool(yaml.safe_load(node.value))

    def _items(self, name: str) -> list[yaml.Node]:
        node = self.require(name)
        if not isinstance(node, yaml.SequenceNode):
            raise self.fault(node, f"{self.title}: {name} is not a list", "write its items as '- ...' lines")
        return node.value

    def _number_of(self, node: yaml.Node, name: str) -> float:
        value = yaml.safe_load(node.value) if node.tag in (INT, FLOAT) else None
        if value is None or not math.isfinite(value):
            shown = f"={node.value}" if isinstance(node, yaml.ScalarNode) else ""
            raise self.fault(node, f"{self.title}: {name}{shown} is not a finite number", "write one such as 1.0")
        return float(value)
