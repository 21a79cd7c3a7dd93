"""From a slot of the config to tokenised rows, ready to train on, with an account of every row."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from align.config.errors import UserError
from align.config.schema import DataConfig
from align.data import cache
from align.data.bad_rows import BadRows, enforce_policy
from align.data.encoded import EncodedRows
from align.data.findings import Findings
from align.data.formats import named_format
from align.data.kinds import COMPARISONS, DEMONSTRATIONS, PREFERENCES, RATINGS, RECORDS, TEXT, Kind
from align.data.prompt_rows import PROMPTS
from align.data.quality import check_demonstration, check_prompt
from align.data.records import BadRow, Demonstration, PromptRow, RowRefused
from align.data.report import CHOSEN_REASONS, RowReport
from align.data.sources import Source, expected_rows, parse_slot, source_files, source_inputs
from align.data.template import Ids, Template
from align.data.walk import Walked, walk

if TYPE_CHECKING:
    import datasets

R = TypeVar("R", Demonstration, PromptRow)

MEANT = {"tiny:prompts": "tiny:training_prompts", "tiny:preferences": "tiny:comparisons"}
"""What PPO, constitutional data and reward models read of the embedded world where its usual rows are named."""

Watch = Callable[[int, int | None], None]
"""Told how many rows are done, and of how many, where that is known."""


@dataclass
class Prepared:
    """Tokenised rows of one slot: `input_ids labels`, or `prompt_ids chosen_ids rejected_ids p margin`."""

    train: "datasets.Dataset"
    held_out: "datasets.Dataset"
    report: RowReport
    inputs: list[dict[str, str]]
    """{name, path, digest} of each file, hub data set or embedded set."""


@dataclass
class PreparedPrompts:
    """Prompts in file order, each with the row it came from."""

    rows: list[PromptRow]
    read: int
    report: RowReport
    inputs: list[dict[str, str]]


def prepare_demonstrations(
    data: DataConfig, template: Template, max_tokens: int, cache_dir: Path | None, watch: Watch | None = None
) -> Prepared:
    """`data.demonstrations` as `input_ids` and `labels` (-100: not trained); of a pair, the chosen answer."""
    return _prepare(DEMONSTRATIONS, data, template, max_tokens, cache_dir, watch)


def _meant(data: DataConfig, slot: str) -> DataConfig:
    """`data` with what is meant where the embedded world's usual rows are named."""
    value = getattr(data, slot)
    return replace(data, **{slot: MEANT.get(str(value), value)})


def prepare_preferences(
    data: DataConfig, template: Template, max_tokens: int, cache_dir: Path | None, watch: Watch | None = None
) -> Prepared:
    """`data.preferences` as `prompt_ids`, `chosen_ids`, `rejected_ids`, `p`, `margin`."""
    return _prepare(PREFERENCES, data, template, max_tokens, cache_dir, watch)


def prepare_comparisons(
    data: DataConfig, template: Template, max_tokens: int, cache_dir: Path | None, watch: Watch | None = None
) -> Prepared:
    """`data.preferences` as `prompt_ids`, `completion_ids`, `ranks`, `p`, `margin`, `scores`; rankings stay whole.

    In place of `tiny:preferences`, enough for DPO, a reward model gets more pairs of the same prompts.
    """
    return _prepare(
        COMPARISONS,
        _meant(data, "preferences"),
        template,
        max_tokens,
        cache_dir,
        watch,
    )


def prepare_ratings(
    data: DataConfig, template: Template, max_tokens: int, cache_dir: Path | None, watch: Watch | None = None
) -> Prepared:
    """The columns of `prepare_comparisons`, of rows whose answers all have scores; one answer is enough."""
    return _prepare(RATINGS, data, template, max_tokens, cache_dir, watch)


def prepare_prompt_rows(
    data: DataConfig, template: Template, max_tokens: int, cache_dir: Path | None, watch: Watch | None = None
) -> Prepared:
    """`data.prompts` as `prompt_ids` and `record`, see `align.data.prompt_rows.read_record`.

    In place of `tiny:prompts`, on which models are judged, training gets other prompts of the same kinds.
    """
    return _prepare(
        PROMPTS,
        _meant(data, "prompts"),
        template,
        max_tokens,
        cache_dir,
        watch,
    )


def prepare_text(
    data: DataConfig, template: Template, max_tokens: int, cache_dir: Path | None, watch: Watch | None = None
) -> Prepared:
    """`data.text` as `input_ids` and equal `labels`; a longer document becomes consecutive pieces, nothing is lost."""
    return _prepare(TEXT, data, template, max_tokens, cache_dir, watch)


def prompts_to_answer(data: DataConfig) -> PreparedPrompts:
    """Sound rows of `data.prompts` for a stage that makes data of them, held-out ones too.

    What is made of a prompt has its first turn, by which later stages hold rows out: they hold out the same ones.
    Raises: UserError as `prepare_prompts`.
    """
    return prepare_prompts(_meant(data, "prompts"))


def helpful_demonstrations(data: DataConfig) -> tuple[list[Demonstration], RowReport, list[dict[str, str]]]:
    """Sound rows of `data.helpful`, the account of them, and their inputs.

    Raises: UserError by the policy of `data`.
    """
    found = slot_sources(data, "helpful")
    report = RowReport("helpful", BadRows(_scratch() / cache.BAD_ROWS))
    rows = list(_records(found, Demonstration, check_demonstration, data, report))
    enforce_policy(report.bad_rows, report.made, data, allowed=CHOSEN_REASONS)
    report.kept = len(rows)
    return rows, report, _inputs(found, "helpful")


@dataclass
class PreparedDemonstrations:
    """Conversations in file order, not tokenised."""

    rows: list[Demonstration]
    report: RowReport
    inputs: list[dict[str, str]]


def read_demonstrations(data: DataConfig) -> PreparedDemonstrations:
    """Sound rows of `data.demonstrations`. Raises: UserError by the policy of `data`, or if none is left."""
    found = slot_sources(data, "demonstrations")
    report = RowReport("demonstrations", BadRows(_scratch() / cache.BAD_ROWS))
    rows = list(_records(found, Demonstration, check_demonstration, data, report))
    enforce_policy(report.bad_rows, report.made, data, allowed=CHOSEN_REASONS)
    report.kept = len(rows)
    if not rows:
        raise UserError(f"data.demonstrations: none of {report.read} rows can be used")
    return PreparedDemonstrations(rows, report, _inputs(found, "demonstrations"))


def few_shot_examples(data: DataConfig, count: int) -> list[Demonstration]:
    """The first `count` sound rows of `data.demonstrations` that are a question and its answer, without tools.

    Raises: UserError if there are fewer.
    """
    report = RowReport("demonstrations", BadRows(_scratch() / cache.BAD_ROWS))
    rows = _records(slot_sources(data, "demonstrations"), Demonstration, check_demonstration, data, report)
    plain = (row for row in rows if not row.tools and [one.role for one in row.messages] == ["user", "assistant"])
    found = list(islice(plain, count))
    if len(found) < count:
        raise UserError(
            f"stages.evaluate.few_shot={count}: data.demonstrations has only {len(found)} rows of one question and its "
            f"answer; use stages.evaluate.few_shot={len(found)}"
        )
    return found


def prepare_prompts(data: DataConfig, max_prompts: int | None = None) -> PreparedPrompts:
    """The first `max_prompts` sound rows of `data.prompts`, not tokenised: each model brings its own tokenizer.

    Raises: UserError for bad rows by the policy of `data`, or if no prompt is left.
    """
    found = slot_sources(data, "prompts")
    report = RowReport("prompts", BadRows(_scratch() / cache.BAD_ROWS))
    rows = list(islice(_records(found, PromptRow, check_prompt, data, report), max_prompts))
    enforce_policy(report.bad_rows, report.made, data, allowed=CHOSEN_REASONS)
    report.kept = len(rows)
    if not rows:
        raise UserError(f"data.prompts: none of {report.read} rows is a prompt that can be used")
    return PreparedPrompts(rows, report.read, report, _inputs(found, "prompts"))


def _records(
    sources: Sequence[Source],
    wanted: type[R],
    check: Callable[[Any], None],
    data: DataConfig,
    report: RowReport,
) -> Iterator[R]:
    """Sound records of a slot, counted in `report`; the others go to its bad rows."""
    for source in sources:
        row_format, batches = walk(source, wanted, check, data)
        report.formats[source.path] = row_format.name
        for row in chain.from_iterable(batches):
            report.read += 1
            for record in row.records:
                report.made += 1
                if isinstance(record, BadRow):
                    report.bad_rows.add(record)
                else:
                    yield record


def answered_prompts(data: DataConfig, template: Template, max_tokens: int, rows: int) -> list[tuple[Ids, Ids]]:
    """(prompt_ids, answer_ids) of the first `rows` conversations of `data.demonstrations` that are sound and fit.

    The answer is the last assistant turn; what comes before is its prompt.
    """
    found: list[tuple[Ids, Ids]] = []
    for source in slot_sources(data, "demonstrations"):
        for batch in walk(source, Demonstration, check_demonstration, data)[1]:
            records = [record for row in batch for record in row.records if isinstance(record, Demonstration)]
            trees = template.encode_trees([(r.messages[:-1], r.messages[-1:], r.tools) for r in records])
            pairs = [(tree[0], tree[1][0]) for tree in trees if not isinstance(tree, RowRefused)]
            found += [pair for pair in pairs if sum(map(len, pair)) <= max_tokens]
            if len(found) >= rows:
                return found[:rows]
    return found


def check_slot(data: DataConfig, slot: str) -> None:
    """Prove that every source of a slot is there (a hub id only looks like one) and its format is known. Reads no row.

    Raises: UserError.
    """
    for source in slot_sources(data, slot):
        source_files(source)
        if source.format != "auto":
            named_format(source.format, RECORDS[slot], source.where)


def slot_digests(data: DataConfig, slot: str) -> list[dict[str, str]]:
    """{name, path, digest} of a slot's files and embedded sets as they are now, without the hub's."""
    return _inputs(slot_sources(data, slot), slot, with_hub=False)


def slot_sources(data: DataConfig, slot: str) -> list[Source]:
    """The sources of `data.<slot>`. Raises: UserError."""
    slots = {
        "text": data.text,
        "demonstrations": data.demonstrations,
        "preferences": data.preferences,
        "prompts": data.prompts,
        "helpful": data.helpful,
        "evaluation_sets": data.evaluation_sets,
    }
    return parse_slot(slots[slot], slot, format=data.format, split=data.split)


def _inputs(sources: Sequence[Source], slot: str, *, with_hub: bool = True) -> list[dict[str, str]]:
    found = chain.from_iterable(source_inputs(source, with_hub=with_hub) for source in sources)
    return [{"name": f"data.{slot}", "path": entry.path, "digest": entry.digest} for entry in found]


def _prepare(
    kind: Kind,
    data: DataConfig,
    template: Template,
    max_tokens: int,
    cache_dir: Path | None,
    watch: Watch | None,
) -> Prepared:
    """Rows from the cache if they are there; else read, checked, tokenised, fitted, split, and put there.

    Whether too many rows are bad is asked afterwards, so that another policy needs no second reading.
    """
    sources = slot_sources(data, kind.slot)
    if kind is not TEXT:
        template.chat  # noqa: B018  proven before the first row is read
    inputs = _inputs(sources, kind.slot)
    key = cache.cache_key(
        slot=kind.slot,
        columns=kind.schema.names,
        record=kind.record.__name__,
        sources=[source.key for source in sources],
        inputs=inputs,
        template=template.digest,
        max_tokens=max_tokens,
        held_out_fraction=data.held_out_fraction,
        ties=data.ties.value,
    )
    place = _scratch() if cache_dir is None else cache_dir
    cache.fill(place, key, lambda folder: _tokenise(kind, sources, data, template, max_tokens, folder, watch))
    rows, report = cache.load(place, key)
    enforce_policy(report.bad_rows, report.made, data, allowed=CHOSEN_REASONS)
    return Prepared(rows["train"], rows["held_out"], report, inputs)


def _tokenise(
    kind: Kind,
    sources: Sequence[Source],
    data: DataConfig,
    template: Template,
    max_tokens: int,
    folder: Path,
    watch: Watch | None,
) -> RowReport:
    """Every row of the sources as columns in `train` or `held_out`, or in the report with a reason."""
    report = RowReport(kind.slot, BadRows(folder / cache.BAD_ROWS), max_tokens=max_tokens)
    borders_cut = template.borders_cut
    encoded = EncodedRows(kind, template, max_tokens, folder, report.bad_rows)
    findings = Findings()
    total = _total(sources) if watch else None
    for source in sources:
        row_format, batches = walk(source, kind.record, kind.check, data)
        report.formats[source.path] = row_format.name
        for batch in batches:
            report.read += len(batch)
            report.made += _made(batch)
            kept = encoded.add(batch, source.weight)
            findings.add([origin for origin, _ in kept], [record for _, record in kept])
            if watch:
                watch(report.read, total)
    report.borders_cut = template.borders_cut - borders_cut
    report.tokens_lost = encoded.tokens_lost
    report.findings = [vars(finding) for finding in findings.results()]
    encoded.split(data.held_out_fraction, report)
    report.bad_rows.close()
    return report


def _made(batch: Sequence[Walked]) -> int:
    return sum(len(row.records) for row in batch)


def _total(sources: Sequence[Source]) -> int | None:
    """Rows of all sources, or None where one does not say."""
    counts = [expected_rows(source) for source in sources]
    return None if None in counts else sum(counts)


_KEPT_UNTIL_EXIT: list[tempfile.TemporaryDirectory] = []


def _scratch() -> Path:
    """A new folder for what no cache keeps; it goes when the process does."""
    _KEPT_UNTIL_EXIT.append(tempfile.TemporaryDirectory(prefix="align-"))
    return Path(_KEPT_UNTIL_EXIT[-1].name)
