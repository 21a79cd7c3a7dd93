"""Sweeps (-m): Hydra's sweeper says which values each member gets, Hydra's launcher where it runs. The rest is ours.

The basic sweeper runs every combination; `hydra/sweeper=optuna` chooses. The basic launcher runs members one after the
other in this process; `hydra/launcher=submitit_slurm` makes a job of each.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from align.config import listing, refusals, store
from align.config.errors import UserError
from align.config.schema import RunConfig, SweepBy

SEED = 7
"""Of a search whose own is not typed: the same command asks for the same members, and goes on with those it has."""
LOWER_IS_BETTER = frozenset({SweepBy.loss})
PLUGINS = {"hydra/sweeper": ("optuna",), "hydra/launcher": ("submitit_slurm", "submitit_local")}
"""Options of Hydra's that `align-train[sweeps]` brings."""


@dataclass(frozen=True)
class Sweep:
    """A command line with -m, checked."""

    overrides: list[Override]
    user_dir: Path | None

    @property
    def swept(self) -> list[Override]:
        return [o for o in self.overrides if o.is_sweep_override()]

    @property
    def fixed(self) -> list[str]:
        """What is the same for all members, as it was typed."""
        return [o.input_line for o in self.overrides if not o.is_sweep_override() and not _is_hydras(o)]

    @property
    def search(self) -> str | None:
        """The sweeper that chooses values, if one was asked for."""
        return _typed(self.overrides, "hydra/sweeper")

    @property
    def launcher(self) -> str | None:
        """What starts members elsewhere, if that was asked for."""
        return _typed(self.overrides, "hydra/launcher")

    def members(self) -> list[list[str]]:
        """The command line of each member; of a search, whose members are not known, one of the lowest values."""
        if self.search is None:
            return [self.member(values) for values in BasicSweeper.split_arguments(self.swept, None)[0]]
        return [self.member([f"{key(o.input_line)}={_lowest(o)}" for o in self.swept])]

    def member(self, values: list[str]) -> list[str]:
        """The command line of the member with these values."""
        return [*self.fixed, *values]

    def values(self, task: list[str]) -> list[str]:
        """The lines of what Hydra calls a task that are the member's own, under the keys as they were typed."""
        typed = {o.key_or_group: key(o.input_line) for o in self.swept}
        given = {key(line).lstrip("+"): line.partition("=")[2] for line in task}
        return [f"{typed[name]}={given[name]}" for name in typed]


def read_sweep(arguments: list[str], user_dir: Path | None) -> tuple[Sweep, list[RunConfig]]:
    """The sweep, and the configs of its members as far as they are known: of a search that of one.

    Raises: UserError for anything that can be refused before a member runs.
    """
    overrides = refusals.parse(arguments, user_dir)
    store.check_command_line(overrides, sweep=True, user_dir=user_dir)
    sweep = Sweep(overrides, user_dir)
    _refuse_unusable(sweep)
    return sweep, [store.compose_run(member, user_dir, sweep=True).config for member in sweep.members()]


def run_sweep(sweep: Sweep, by: SweepBy, folder: Path, task: Callable[[Any], float | None]) -> None:
    """Run the members. task: called with Hydra's config in each one, in this process or in a job of the launcher.

    folder: for what sweeper and launcher write. Raises: UserError for what they refuse; whatever `task` raises that is
    no `Exception`.
    """
    arguments = [store.line(override) for override in sweep.overrides]
    arguments += [f"hydra.sweep.dir={store.quoted(str(folder))}", *_defaults(sweep, by)]
    if sweep.user_dir:
        arguments.append(f"hydra.searchpath=[{store.quoted(f'file://{sweep.user_dir.resolve()}')}]")
    store.register()
    try:
        with initialize_config_dir(str(listing.conf_dir()), version_base="1.3", job_name="align"):
            GlobalHydra.instance().hydra.multirun("config", task, arguments)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_hydras_error(str(error), sweep)) from error


def values_of_this_member(sweep: Sweep) -> list[str]:
    """Call it inside of a task."""
    return sweep.values(list(HydraConfig.get().overrides.task))


def member_name(values: list[str]) -> str:
    """A folder name that tells a sweep's members apart: the values that differ, without path separators."""
    return ",".join(re.sub(r"[^\w.=+,-]+", "_", line.lstrip("+")) for line in sorted(values))


def key(line: str) -> str:
    """Left of the equals sign."""
    return line.partition("=")[0]


def _is_hydras(override: Override) -> bool:
    return override.key_or_group.startswith(("hydra.", "hydra/"))


def _typed(overrides: list[Override], name: str) -> str | None:
    found = next((o.input_line.partition("=")[2] for o in overrides if o.key_or_group == name), None)
    return None if found == "basic" else found


def _refuse_unusable(sweep: Sweep) -> None:
    for group, plugins in PLUGINS.items():
        asked = _typed(sweep.overrides, group)
        if asked is None or asked in (known := _options(group, sweep.user_dir)):
            continue
        if asked in plugins:
            raise UserError(f"{group}={asked} is not installed; pip install 'align-train[sweeps]'")
        raise UserError(f"{group}={asked}: no such option{refusals.near(asked, known)}")
    for override in sweep.swept:
        if sweep.search is None and not override.is_discrete_sweep():
            raise UserError(
                f"{override.input_line}: name the values, or let a search choose them: hydra/sweeper=optuna"
            )
    if sweep.search is not None and not sweep.swept:
        raise UserError(
            f"hydra/sweeper={sweep.search}: nothing to choose; give ranges: 'stages.dpo.beta=interval(0.01,0.5)'"
        )


def _options(group: str, user_dir: Path | None) -> list[str]:
    """What Hydra and its plugins have, and a folder of the user's own."""
    Plugins.instance()  # finds the plugins, which register themselves
    found: Any = ConfigStore.instance().repo
    for name in group.split("/"):
        found = found.get(name, {})
    own = sorted((user_dir / group).glob("*.yaml")) if user_dir else []
    return sorted({"basic", *(name.removesuffix(".yaml") for name in found), *(file.stem for file in own)} - {"_"})


def _hydras_error(said: str, sweep: Sweep) -> str:
    """One line of what Hydra refused."""
    if (key := re.search(r"Could not override '(hydra\.(sweeper|launcher)\S*)'", said)) is not None:
        group = f"hydra/{key[2]}"
        return f"{key[1]} is no setting of {group}={_typed(sweep.overrides, group) or 'basic'}; see docs/sweeps.md"
    return f"sweep: {' '.join(said.split())}"


def _lowest(override: Override) -> Any:
    value = override.value()
    if isinstance(value, IntervalSweep | RangeSweep):
        return value.start
    return next(iter(override.sweep_string_iterator()))


def _defaults(sweep: Sweep, by: SweepBy) -> Iterator[str]:
    """Settings of a search that the user has not typed."""
    if sweep.search != "optuna":
        return
    settings: dict[str, Any] = {
        # A member that fails is a trial that failed, and the search goes on.
        "hydra.sweeper.max_failure_rate": 1.0,
        "hydra.sweeper.direction": "minimize" if by in LOWER_IS_BETTER else "maximize",
    }
    if sweep.launcher is None:
        # One after the other, each can learn of all that were before.
        settings["hydra.sweeper.n_jobs"] = 1
    if _typed(sweep.overrides, "hydra/sweeper/sampler") != "grid":
        settings["hydra.sweeper.sampler.seed"] = SEED
    typed = {o.key_or_group for o in sweep.overrides}
    yield from (f"{name}={value}" for name, value in settings.items() if name not in typed)
