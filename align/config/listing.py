"""What there is to choose from, read off the files: recipes, group options, verbs; and the text of `--help`."""

from pathlib import Path

from align.config import keys
from align.config.errors import UserError
from align.config.schema import Verb

GROUPS = ("stage", "model", "data", "peft", "deepspeed", "log")

VERBS = {
    Verb.train: "run the stages of a recipe (the default)",
    Verb.plan: "does it fit: memory by ZeRO stage, steps, disk; of constitutional data calls, tokens, price",
    Verb.check: "the data doctor: what is in the rows, what is wrong with them, what the limits cost; trains nothing",
    Verb.doctor: "whether this machine, or each of a launch, can do this run; exit code 1 if not; trains nothing",
    Verb.preview: "show rendered rows with what is learnt marked; trains nothing",
    Verb.convert: "write the rows of one slot as canonical JSONL to out=FILE",
    Verb.env: "write .deepspeed_env, the variables that a launch by hostfile sends to other nodes",
    Verb.report: "one page of a run, or of several compared; its lineage as a tree; with report.to=wandb a W&B Report",
    Verb.chat: "talk to a stage's model in the terminal, or by a script on its standard input; /base beside the base",
    Verb.recipes: "list the recipes; with +recipe=NAME show what that one would run",
}

USAGE = """\
usage: python -m align +recipe=NAME [GROUP=OPTION ...] [KEY=VALUE ...]

  --cfg job           print the whole configuration of this command line and stop (-p stages.dpo: a part of it)
  --help [KEY]        this text; with a key or section, such as stages.dpo, what its keys mean
  -m                  sweep: run every combination of comma-separated values, then rank them; hydra/sweeper=optuna
                      searches ranges, hydra/launcher=submitit_slurm makes Slurm jobs (docs/sweeps.md)
  --config-dir DIR    also find options of your own, such as DIR/recipe/mine.yaml
"""


def conf_dir() -> Path:
    """The folder of groups and recipes: inside the installed package, or beside it in a checkout.

    Raises: UserError if it has no recipes, as in a checkout made without symbolic links.
    """
    package = Path(__file__).resolve().parents[1]
    folder = package.parent / "conf"
    if not (folder / "config.yaml").is_file():
        folder = package / "_conf"
    if not (folder / "recipe").is_dir():
        raise UserError(
            f"{folder / 'recipe'} is not a folder of recipes; in a checkout it is a symbolic link to recipes/ "
            "(on Windows: git config core.symlinks true, then check out again)"
        )
    return folder


def options(group: str, user_dir: Path | None = None) -> dict[str, str]:
    """Option -> its one-line comment, for a group of the package and of the user's own folder."""
    folders = [conf_dir(), *([user_dir] if user_dir else [])]
    files = [file for folder in folders for file in sorted((folder / group).glob("*.yaml"))]
    return {file.stem: first_comment(file) for file in files if not file.name.startswith("_")}


def first_comment(file: Path) -> str:
    """The first line of a YAML file that says something; `# @package` lines are for Hydra."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and not line.startswith("# @"):
            return line.lstrip("# ").strip()
        if line and not line.startswith("#"):
            break
    return ""


def recipe_list(user_dir: Path | None = None) -> str:
    """The recipes, a line each."""
    return "recipes (+recipe=NAME):\n" + _table(options("recipe", user_dir))


def help_text(user_dir: Path | None = None) -> str:
    """Recipes, verbs and groups, each with its one-line comment."""
    parts = [USAGE, recipe_list(user_dir)]
    parts.append("\nverbs (do=NAME):\n" + _table({verb.value: note for verb, note in VERBS.items()}))
    for group in GROUPS:
        example = "stage=[NAME,...]" if group == "stage" else f"{group}=NAME"
        parts.append(f"\n{group} ({example}):\n" + _table(options(group, user_dir)))
    sections = ", ".join(name for name in keys.sections() if name != "stages")
    parts.append(f"\nkeys: --help KEY explains, with KEY one of run, do, run_dir, precision, ... or {sections}")
    return "\n".join(parts)


def key_help(name: str) -> str:
    """What a key, or each key of a section, means.

    Raises: UserError for a name that is neither, with a near match.
    """
    found = {path: key.note for path, key in keys.keys().items() if path == name or path.startswith(f"{name}.")}
    if not found:
        close = keys.nearest(name, [])
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise UserError(f"--help {name}: there is no such key{hint}")
    return _table(found)


def _table(rows: dict[str, str]) -> str:
    width = max(len(name) for name in rows)
    return "\n".join(f"  {name.ljust(width)}  {note}" for name, note in rows.items())
