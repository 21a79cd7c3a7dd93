"""What is wrong with a command line, found before anything is composed and said in one line with a near match.

Hydra adds unknown `+x=y` silently and runs the default job when a group is missing, so nothing is left to it here.
"""

import difflib
from collections.abc import Iterator
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from align.config import keys, listing
from align.config.errors import UserError

MEANT_NONE = ("off", "false", "no", "null", "0")
TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def parse(arguments: list[str], user_dir: Path | None = None) -> list[Override]:
    """The `key=value` arguments of a command line.

    Raises: UserError naming the first that is not one.
    """
    for argument in arguments:
        if "=" not in argument and not argument.startswith("~"):
            recipe = argument in listing.options("recipe", user_dir)
            hint = f"did you mean +recipe={argument}?" if recipe else "settings are key=value"
            raise UserError(f"{argument!r} is not a setting; {hint}")
    parser = OverridesParser.create()
    parsed = []
    for argument in arguments:
        try:
            parsed.append(parser.parse_override(argument))
        except HydraException as error:
            raise UserError(f"{argument}: cannot be read ({_one_line(error)}); put quotes around the value") from error
    return parsed


def refuse(overrides: list[Override], run: list[str], *, sweep: bool, user_dir: Path | None = None) -> None:
    """Judge every override that is not the recipe's; `run` are the stages that would run.

    Raises: UserError for the first that is wrong.
    """
    for override in overrides:
        if override.key_or_group in ("recipe", "recipes"):
            continue
        _refuse_form(override, sweep)
        if override.key_or_group.startswith(("hydra.", "hydra/")):
            continue
        for single in singles(override):
            if single.key_or_group in listing.GROUPS:
                _refuse_option(single, user_dir)
            else:
                _refuse_key(single, run)
                _refuse_value(single)


def recipe_name(overrides: list[Override], *, sweep: bool, user_dir: Path | None = None) -> str:
    """The recipe that the command line asks for; of a sweep over recipes, the first.

    Raises: UserError if there is none, more than one, one without a plus, or one that does not exist.
    """
    known = listing.options("recipe", user_dir)
    asked = [o for o in overrides if o.key_or_group in ("recipe", "recipes")]
    if not asked:
        raise UserError(f"no recipe; add one of {', '.join(f'+recipe={name}' for name in known)}")
    if len(asked) > 1:
        raise UserError(
            f"{' '.join(o.input_line for o in asked)}: a run has one recipe; chains are recipes too: sft_dpo"
        )
    override = asked[0]
    value = override.input_line.partition("=")[2]
    if override.key_or_group != "recipe" or override.type is not OverrideType.ADD or override.package:
        raise UserError(f"{override.input_line}: write +recipe={value}")
    _refuse_form(override, sweep)
    for single in singles(override):
        name = single.value()
        if not isinstance(name, str) or name not in known:
            raise UserError(f"+recipe={_shown(single)}: there is no such recipe{near(str(name), list(known))}")
    return next(singles(override)).value()


def refuse_shadows(user_dir: Path) -> None:
    """A user's option with the name of a shipped one would be silently ignored.

    Raises: UserError naming the file.
    """
    for group in ("recipe", *listing.GROUPS):
        shipped = listing.options(group)
        for file in sorted((user_dir / group).glob("*.yaml")):
            if file.stem in shipped:
                raise UserError(f"{file}: {group} {file.stem} exists already; rename the file")


def singles(override: Override) -> Iterator[Override]:
    """The override itself, or one for each value that a sweep over it takes."""
    if not override.is_sweep_override():
        yield override
    elif override.is_discrete_sweep():
        key = override.input_line.partition("=")[0]
        parser = OverridesParser.create()
        for value in override.sweep_string_iterator():
            yield parser.parse_override(f"{key}={value}")


def _refuse_form(override: Override, sweep: bool) -> None:
    line, key = override.input_line, override.key_or_group
    if override.is_sweep_override() and not sweep:
        raise UserError(f"{line} is several values; add -m for a sweep, or brackets for a list: {_bracketed(line)}")
    if override.type is OverrideType.DEL:
        hint = f"write {key}=none" if "none" in listing.options(key) else f"set {key} to another value"
        raise UserError(f"{line}: nothing can be taken out of a run; {hint}")
    if key.startswith(("hydra.", "hydra/")) and not sweep:
        raise UserError(f"{line} has no effect: only sweeps (-m) run inside Hydra")
    if not sweep and only_in_sweeps(key):
        raise UserError(f"{line} would have no effect: only sweeps (-m) read it")


def only_in_sweeps(name: str) -> bool:
    """Whether a key is read in sweeps alone."""
    return name.startswith("sweep.") or fnmatchcase(name, "stages.*.prune")


def _bracketed(line: str) -> str:
    key, _, value = line.partition("=")
    return f"{key}=[{value}]"


def _refuse_option(override: Override, user_dir: Path | None) -> None:
    group, known = override.key_or_group, listing.options(override.key_or_group, user_dir)
    line = f"{group}={_shown(override)}"
    if override.type is not OverrideType.CHANGE or override.package:
        raise UserError(f"{override.input_line}: write {line}")
    chosen = override.value()
    if isinstance(chosen, dict):
        raise UserError(f"{line}: a group takes the name of an option ({', '.join(known)})")
    for option in chosen if isinstance(chosen, list) else [chosen]:
        if isinstance(chosen, list) and group != "stage":
            raise UserError(f"{line}: {group} takes one option ({', '.join(known)})")
        name = "null" if option is None else str(option).lower() if isinstance(option, bool) else str(option)
        if name in known:
            continue
        if "none" in known and name in MEANT_NONE:
            raise UserError(f"{line}: did you mean {group}=none?")
        own = f"; {group}.path={name} names your own" if group == "model" else ""
        raise UserError(f"{line}: {group} has no such option{near(name, list(known))}{own}")


def _refuse_key(override: Override, run: list[str]) -> None:
    path = override.key_or_group
    key = keys.find(path)
    shown = _shown(override)
    if key is not None and not override.package:
        if override.type is not OverrideType.CHANGE and path == key.path:
            raise UserError(f"{override.input_line}: write {path}={shown}, without the plus")
        return
    if path in keys.sections():
        raise UserError(f"{path} is a section; set a key of it (--help {path} lists them)")
    group = difflib.get_close_matches(path, [*listing.GROUPS, "recipe"], n=1, cutoff=0.75)
    close = keys.nearest(path, run)
    if "." not in path and group and not any(path == near.rsplit(".", 1)[-1] for near in close):
        plus = "+" if group == ["recipe"] else ""
        raise UserError(f"{path} is not a key; did you mean {plus}{group[0]}={shown}?")
    hint = f"; did you mean {' or '.join(f'{near}={shown}' for near in close)}?" if close else ""
    raise UserError(f"{path} is not a key{hint or '; --help lists what there is'}")


def _refuse_value(override: Override) -> None:
    key, value = keys.find(override.key_or_group), override.value()
    if key is None or key.type is Any or override.key_or_group != key.path:
        return
    if isinstance(value, str) and "${" in value:
        return
    try:
        OmegaConf.structured(key.owner)[key.leaf] = value
    except OmegaConfBaseException as error:
        raise UserError(f"{key.path}={_shown(override)}: {_wanted(key, value)}") from error


def _wanted(key: keys.Key, value: Any) -> str:
    kind = key.type
    if isinstance(kind, type) and issubclass(kind, Enum):
        choices = [member.name for member in kind]
        return f"not a choice{near(str(value), choices)}"
    if get_origin(kind) is list:
        return _wanted_list(key, value)
    if get_origin(kind) is dict:
        return "a dictionary was expected, such as {name: folder}"
    return f"{TYPE_WORDS[kind]} was expected"


def _wanted_list(key: keys.Key, value: Any) -> str:
    """What a list is, by the first entry that is none of its choices, or by an example: its default, if it has one."""
    kind = get_args(key.type)[0]
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        entries = getattr(key.owner(), key.leaf) or ["sft", "dpo"]
        return f"a list was expected, such as [{','.join(map(str, entries))}]"
    known = [member.name for member in kind]
    wrong = [str(entry) for entry in value if str(entry) not in known] if isinstance(value, list) else []
    if wrong:
        return f"{wrong[0]} is not a choice{near(wrong[0], known)}"
    example = difflib.get_close_matches(str(value), known, n=1) or known[:2]
    return f"a list was expected, such as [{','.join(example)}] ({', '.join(known)})"


def near(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1) or [k for k in known if name and k.endswith(name)][:1]
    return (f"; did you mean {close[0]}?" if close else "") + f" ({', '.join(known)})"


def _shown(override: Override) -> str:
    return override.input_line.partition("=")[2]


def _one_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].strip()
