"""The card of a model: `README.md` beside the weights, facts only. The same run writes the same card in any folder."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from align.artifacts import MODEL_CARD, Manifest, package_versions, read_manifest
from align.config.errors import UserError
from align.config.redaction import redacted_text
from align.tracking.report_figures import changes, shown

METHODS = {
    "pretrain": "training on raw text",
    "sft": "supervised fine-tuning on demonstrations",
    "dpo": "direct preference optimization on pairs of answers",
    "reward": "learning a score from preferences",
    "ppo": "reinforcement learning with PPO",
}
KINDS = {
    "policy": "A language model",
    "policy_ema": "The moving average of a language model's weights in training",
    "reward_model": "A reward model: it scores an answer to a prompt",
    "value": "A value model: it foresees the reward of a completion",
}
UNKNOWN = "unknown"


def write_model_cards(stage_dir: Path, manifest: Manifest, run_dir: Path) -> None:
    """A card into each folder of weights that a stage has left. Call it on rank 0, before its outputs are listed."""
    for folder in KINDS:
        if (stage_dir / folder).is_dir():
            (stage_dir / folder / MODEL_CARD).write_text(model_card(manifest, folder, run_dir), encoding="utf-8")


def model_card(manifest: Manifest, folder: str, run_dir: Path) -> str:
    """Markdown with the metadata block of the Hugging Face hub. `folder`: which of the stage's models it is of."""
    base = next((entry["path"] for entry in manifest.inputs if entry["name"] == "policy"), None)
    root = None if base is None else root_of(base)
    licence = UNKNOWN if root is None else licence_of(root)
    stage = manifest.stage
    parts = [
        _metadata(root, licence, stage),
        f"# {stage}/{folder}",
        f"{KINDS[folder]}. Written by stage `{stage}` of align: {METHODS.get(stage, stage)}.",
        _facts(manifest, base, root, licence, run_dir),
        "## Made from",
        _table(["input", "where", "sha256"], [_input(entry, run_dir) for entry in manifest.inputs]),
        _rows(manifest.rows),
        *_figures(manifest),
        "## Settings",
        f"```yaml\n{yaml.safe_dump(_without(manifest.config, run_dir), sort_keys=False, allow_unicode=True)}```",
        "## Versions",
        _table(["package", "version"], [[name, version] for name, version in package_versions().items()]),
    ]
    return redacted_text("\n\n".join(parts)) + "\n"


def exported_card(
    manifest: Manifest | None, policy: str, run_dir: Path, told: Mapping[str, Any], *, adapter_of: str | None
) -> str:
    """The card of an exported folder: that of the training, and what the export has compared (`verification.json`).

    manifest: of the stage that trained it; of a model from elsewhere its own card is kept. adapter_of: the base that an
    adapter is served beside.
    """
    if manifest is not None:
        card = model_card(manifest, "policy", Path(policy).parent.parent)
    else:
        card = _own_card(policy)
    parts = [card.rstrip("\n"), "## Export"]
    if adapter_of is not None:
        parts.append(f"An adapter: it is served beside its base, `{_without(adapter_of, run_dir)}`.")
    rows = [
        [
            name,
            f"{one['same']} of {one['prompts']}",
            f"{one['largest']:.2g}",
            f"{one['mean']:.2g}",
            f"{one['tolerance']:g}",
        ]
        for name, one in told["compared"].items()
    ]
    header = ["compared with the trained model", "same greedy replies", "largest difference", "mean", "passes up to"]
    parts += [_table(header, rows), "Differences are in the log-probability of a token, in nats."]
    return redacted_text("\n\n".join(parts)) + "\n"


def _own_card(policy: str) -> str:
    card = Path(policy).expanduser() / MODEL_CARD
    if card.is_file():
        return card.read_text(encoding="utf-8", errors="replace")
    return f"{_metadata(policy, licence_of(policy), 'export')}\n\n# {Path(policy).name}"


def _metadata(root: str | None, licence: str, stage: str) -> str:
    """Only a hub id is a base model to the hub; a path of this machine means nothing there."""
    said: dict[str, Any] = {"license": licence, "tags": ["align", stage]}
    if root is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", root) and not Path(root).exists():
        said["base_model"] = root
    return f"---\n{yaml.safe_dump(said, sort_keys=False)}---"


def _facts(manifest: Manifest, base: str | None, root: str | None, licence: str, run_dir: Path) -> str:
    sharded = "" if manifest.zero_stage is None else f", ZeRO-{manifest.zero_stage}"
    facts = [
        ("starts from", UNKNOWN if base is None else f"`{_without(base, run_dir)}`"),
        ("base of the chain", UNKNOWN if root is None else f"`{_without(root, run_dir)}`"),
        ("licence", licence if licence != UNKNOWN else "unknown: no card of the base says it"),
        ("optimizer steps", f"{manifest.steps:,}"),
        ("ranks", f"{manifest.world_size}{sharded}"),
        ("seed", str(manifest.seed)),
        ("sha256 of the config", f"`{manifest.config_digest}`"),
    ]
    if manifest.template_digest:
        facts.append(("sha256 of the chat template", f"`{manifest.template_digest}`"))
    return "\n".join(f"* {name}: {fact}" for name, fact in facts)


def _rows(rows: Mapping[str, Any]) -> str:
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in rows.get("dropped", {}).items())
    said = (
        f"{rows.get('read', 0):,} rows read, {rows.get('kept', 0):,} trained on, {rows.get('held_out', 0):,} held out"
    )
    return f"{said}; dropped: {dropped or 'none'}."


def _figures(manifest: Manifest) -> list[str]:
    rows = [[c.figure, shown(c.before, c.form), shown(c.after, c.form)] for c in changes(manifest)]
    if not rows:
        return []
    says = (
        "On held-out rows before the first step and after the last; of PPO the first update and the last tenth of them."
    )
    return ["## Figures", _table(["figure", "before", "after"], rows), says]


def _input(entry: Mapping[str, str], run_dir: Path) -> list[str]:
    return [entry["name"], f"`{_without(entry['path'], run_dir)}`", f"`{entry['digest']}`"]


def _without(value: Any, run_dir: Path) -> Any:
    """JSON values without the folders of this machine: what lies in the run, from there; of another file its name."""
    if isinstance(value, dict):
        return {key: _without(inner, run_dir) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without(inner, run_dir) for inner in value]
    if not isinstance(value, str):
        return value
    inside = value.replace(str(run_dir), "<run_dir>")
    return Path(inside).name if Path(inside).is_absolute() else inside


def root_of(path: str) -> str:
    """The model that a chain started from: followed through the manifests beside each policy."""
    seen: set[str] = set()
    while path not in seen:
        seen.add(path)
        try:
            manifest = read_manifest(Path(path).expanduser().parent)
        except (UserError, OSError):
            break
        before = [entry["path"] for entry in manifest.inputs if entry["name"] == "policy"] if manifest else []
        path = before[0] if before else path
    return path


def licence_of(model: str) -> str:
    """What the card of a model says: of a folder, or of a hub model in the local cache. Asks no server."""
    card = Path(model).expanduser() / MODEL_CARD
    if not card.is_file():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model, MODEL_CARD) if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) else None
        if not isinstance(cached, str):
            return UNKNOWN
        card = Path(cached)
    block = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        said = yaml.safe_load(block[1]) if block else None
    except yaml.YAMLError:
        return UNKNOWN
    licence = said.get("license") if isinstance(said, dict) else None
    return str(licence) if licence else UNKNOWN


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
