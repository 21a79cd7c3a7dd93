"""Where a model comes from: a tree from the last outputs of a run back to rows and base, along digests of manifests.

An input is joined to the stage that wrote it if its digest is that of the stage's output; another digest means that the
stage was made anew since, and the tree says so.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from align.artifacts import Manifest, digest_of_output, read_manifest
from align.config.errors import UserError
from align.tracking.run_folder import RunFolder, StageFolder, place_in_run

SHOWN_DIGITS = 12
"""Of a digest: enough to tell two apart at a glance; the whole one is in the manifest."""


@dataclass
class Node:
    """A model or a file of rows, and what it was made from."""

    label: str
    digest: str
    note: str = ""
    """What made it, in figures."""
    warning: str = ""
    above: bool = False
    """What it was made from stands further up: the stage that wrote it has a node there."""
    children: list["Node"] = field(default_factory=list)

    @property
    def short(self) -> str:
        """The beginning of a digest; a hub id as it is."""
        return self.digest if self.digest.startswith("hub:") else self.digest[:SHOWN_DIGITS]


def lineage(run: RunFolder) -> list[Node]:
    """A tree for each model of the run that no later stage trains on, or of a run without one, for its last rows."""
    made: set[str] = set()
    roots = [_output(run, stage, name, made) for stage, name in _last_outputs(run)]
    return roots or [_stage(run, run.stages[-1], made)]


def tree_text(nodes: list[Node]) -> str:
    """The trees as lines for a terminal."""
    return "\n".join(line for node in nodes for line in _lines(node, "", ""))


def _lines(node: Node, first: str, rest: str) -> Iterator[str]:
    words = [node.label, node.short, node.note, "(above)" if node.above else "", node.warning and f"! {node.warning}"]
    yield first + "  ".join(word for word in words if word)
    for place, child in enumerate(node.children):
        last = place == len(node.children) - 1
        yield from _lines(child, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))


def _last_outputs(run: RunFolder) -> list[tuple[StageFolder, str]]:
    """The first model of each stage that trained, unless a later one was made of it; else the files of rows."""
    taken = {
        place
        for stage in run.stages
        if stage.manifest.steps
        for entry in stage.manifest.inputs
        if (place := place_in_run(entry["path"], stage.config))
    }
    models = [(stage, stage.models()[0]) for stage in run.stages if stage.models()]
    last = [(stage, name) for stage, name in models if (stage.name, name) not in taken]
    if last:
        return last
    rows = ((stage, output["path"]) for stage in run.stages for output in stage.manifest.outputs)
    return [(stage, path) for stage, path in rows if path in ("demonstrations.jsonl", "preferences.jsonl")]


def _output(run: RunFolder, stage: StageFolder, name: str, made: set[str]) -> Node:
    digest = digest_of_output(stage.manifest.outputs, name) or ""
    if stage.name in made:
        return Node(f"{stage.name}/{name}", digest, above=True)
    node = Node(f"{stage.name}/{name}", digest, made_by(stage.manifest))
    made.add(stage.name)
    node.children = [_input(run, stage, entry, made) for entry in stage.manifest.inputs]
    return node


def _stage(run: RunFolder, stage: StageFolder, made: set[str]) -> Node:
    """A stage that left no model and no rows, such as one of scores."""
    inputs = [_input(run, stage, entry, made) for entry in stage.manifest.inputs]
    return Node(stage.name, stage.manifest.config_digest, made_by(stage.manifest), children=inputs)


def _input(run: RunFolder, stage: StageFolder, entry: dict[str, str], made: set[str]) -> Node:
    place = place_in_run(entry["path"], stage.config)
    producer = next((s for s in run.stages if place and s.name == place[0] and s is not stage), None)
    if producer is None or place is None:
        return _from_outside(entry)
    signed = digest_of_output(producer.manifest.outputs, place[1])
    if signed != entry["digest"]:
        warning = f"{producer.name} was made anew since"
        return Node(f"{entry['name']}: {'/'.join(place)}", entry["digest"], warning=warning)
    node = _output(run, producer, place[1], made)
    node.label = f"{entry['name']}: {'/'.join(place)}"
    return node


def _from_outside(entry: dict[str, str]) -> Node:
    """A base, a file or an embedded set; of another run's output what that run says of it, if it still lies there."""
    node = Node(f"{entry['name']}: {entry['path']}", entry["digest"])
    path = Path(entry["path"]).expanduser()
    manifest = _manifest_beside(path)
    if manifest is not None and digest_of_output(manifest.outputs, path.name) == entry["digest"]:
        node.note = made_by(manifest)
        node.children = [_from_outside(inner) for inner in manifest.inputs]
    return node


def _manifest_beside(path: Path) -> Manifest | None:
    try:
        return read_manifest(path.parent)
    except (UserError, OSError):
        return None


def made_by(manifest: Manifest) -> str:
    """What a stage did, in one line: rows, steps."""
    rows, words = manifest.rows.get("kept"), [manifest.stage]
    if rows is not None:
        words.append(f"{rows:,} rows")
    if manifest.steps:
        words.append(f"{manifest.steps:,} steps")
    return f"({', '.join(words)})"
