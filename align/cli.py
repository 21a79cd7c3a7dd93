"""The command line: Hydra in, RunConfig out. The last place where a DictConfig exists.

A run is composed with Hydra's compose API, so that no folder, log file or error format of Hydra's comes in between.
`--info`, `--shell-completion` and `--cfg hydra` go through `hydra.main`.
"""

import argparse
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from align import __version__
from align.config import command_line, listing
from align.config.errors import RankLost, Stopped, UserError
from align.config.redaction import redacted_text
from align.config.schema import RunConfig, Verb

USER_ERROR, INTERRUPTED = 2, 130


def main(arguments: list[str]) -> int:
    """Run a command line; returns the exit code: 0 (also when stopped by SIGTERM or SIGUSR1), 2 for anything the user
    can mend, 130 when interrupted."""
    command_line.remember(command_line.as_typed(arguments))
    try:
        return _dispatch(arguments)
    except UserError as error:
        if os.environ.get("ALIGN_DEBUG"):
            print(redacted_text(traceback.format_exc()), file=sys.stderr)
        _say(str(error))
        return USER_ERROR
    except RankLost as lost:
        return lost.exit_code
    except Stopped as stopped:
        _say(f"{stopped}; the same command goes on: {command_line.as_typed(arguments)}")
        return 0
    except KeyboardInterrupt:
        _say(f"interrupted; the same command resumes: {command_line.as_typed(arguments)}")
        return INTERRUPTED
    except BrokenPipeError:
        # `| head` closed our output; nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run(config: RunConfig) -> int:
    """Do what the verb says; returns the exit code: 0, of `do=doctor` 1 where something failed."""
    with _collector_paused():
        do = _verb(config.do)
    done = do(config)
    return done if config.do is Verb.doctor else 0


@contextmanager
def _collector_paused() -> Iterator[None]:
    """For imports: what libraries make lives as long as the process, and the garbage collector need not look for what
    has died in it, now or later. Of importing torch and transformers that is 3.1 of 7.9 s (2 cores, 2026-11-22).
    """
    if "torch" in sys.modules:  # nothing large is left to import, and what else there is by now may yet die
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if "torch" in sys.modules:
            gc.freeze()
        gc.enable()


def _verb(do: Verb) -> Callable[[RunConfig], Any]:
    """What does a verb, with no more imported than it needs."""
    if do is Verb.recipes:
        from align.verbs.recipes import show_recipe

        return lambda config: print(show_recipe(config), end="")
    if do is Verb.plan:
        from align.verbs.plan import run_plan

        return run_plan
    if do is Verb.check:
        from align.verbs.check import run_check

        return run_check
    if do is Verb.preview:
        from align.verbs.preview import run_preview

        return run_preview
    if do is Verb.convert:
        from align.verbs.convert import run_convert

        return run_convert
    if do is Verb.doctor:
        from align.chain import check_chain
        from align.verbs.doctor import run_doctor

        return partial(run_doctor, check=check_chain)
    if do is Verb.report:
        from align.verbs.report import run_report

        return run_report
    if do is Verb.chat:
        from align.verbs.chat import run_chat

        return run_chat
    if do is Verb.env:
        from align.verbs.launch_env import run_env

        return run_env
    assert do is Verb.train
    from align.chain import run_chain

    return run_chain


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        print(listing.recipe_list() + "\n\nalign: no recipe; run one with python -m align +recipe=NAME, see --help")
        return USER_ERROR
    if "--version" in arguments:
        print(f"align {__version__}")
        return 0
    flags = _parse_flags(arguments)
    user_dir = Path(flags.config_dir) if flags.config_dir else None
    if flags.help:
        print("\n".join(map(listing.key_help, flags.overrides)) if flags.overrides else listing.help_text(user_dir))
    elif flags.hydra_help or flags.info or flags.shell_completion or flags.cfg in ("hydra", "all"):
        _hydra_main(arguments)
    elif flags.multirun:
        from align.verbs.sweep import run_members

        return 0 if run_members(flags.overrides, user_dir, run) else USER_ERROR
    elif "do=recipes" in flags.overrides and not any("recipe=" in o for o in flags.overrides):
        print(listing.recipe_list(user_dir))
    else:
        return _single_run(flags, user_dir)
    return 0


def _parse_flags(arguments: list[str]) -> argparse.Namespace:
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.error = _refuse_flags  # type: ignore[method-assign]
    flags = parser.parse_intermixed_args(arguments)
    for name in ("config_path", "config_name", "experimental_rerun"):
        if getattr(flags, name):
            raise UserError(f"--{name.replace('_', '-')} is not supported; --config-dir DIR adds options of your own")
    if (flags.resolve and not flags.cfg) or (flags.package and not flags.cfg):
        raise UserError("--resolve and --package go with --cfg job")
    if flags.multirun and flags.cfg:
        raise UserError("--cfg shows the configuration of one run; leave -m out, and name one value")
    return flags


def _refuse_flags(message: str) -> NoReturn:
    raise UserError(f"{message}; see --help")


def _single_run(flags: argparse.Namespace, user_dir: Path | None) -> int:
    from align.config.store import compose_run

    composed = compose_run(flags.overrides, user_dir)
    for note in composed.notes:
        _say(note)
    if flags.cfg:
        print(_yaml(composed.tree, flags.package, flags.resolve), end="")
        return 0
    return run(composed.config)


def _yaml(tree: Any, package: str | None, resolve: bool) -> str:
    from omegaconf import OmegaConf

    if package is None:
        return OmegaConf.to_yaml(tree, resolve=resolve)
    node = OmegaConf.select(tree, package)
    if node is None:
        raise UserError(f"--package {package}: there is no such part in this run")
    is_section = OmegaConf.is_config(node)
    text = OmegaConf.to_yaml(node, resolve=resolve) if is_section else OmegaConf.to_yaml(OmegaConf.create([node]))[2:]
    return f"# @package {package}\n{text}"


def _hydra_main(arguments: list[str]) -> None:
    import hydra

    from align.config.store import register

    register()
    sys.argv = ["align", *arguments]
    hydra.main(version_base="1.3", config_path=str(listing.conf_dir()), config_name="config")(lambda _: None)()


def _say(message: str) -> None:
    """One line on stderr, from the first rank of a launch."""
    if os.environ.get("RANK", "0") == "0":
        print(f"align: {redacted_text(' '.join(message.splitlines()))}", file=sys.stderr)
