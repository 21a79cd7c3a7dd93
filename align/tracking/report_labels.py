"""The classify stage on a run's page: accuracy and macro-F1 of each model, and which label it took for which."""

from align.tracking.page import Figure, html, table
from align.tracking.run_folder import StageFolder


def label_tables(classified: StageFolder | None) -> list[str]:
    """A table of models, then a confusion table of each; nothing where no stage put labels to texts."""
    scores = {} if classified is None else classified.scores
    labels, models = scores.get("labels"), scores.get("models")
    if not labels or not isinstance(models, dict):
        return []
    rows = [[name, Figure(_share(one["accuracy"])), Figure(f"{one['macro_f1']:.3f}")] for name, one in models.items()]
    says = f"{scores['rows']:,} texts that no stage was trained on. In brackets: 95 % of resampled sets of texts."
    parts = [f'<p class="soft">{html(says)}</p>', table(["model", "accuracy", "macro-F1"], rows)]
    for name, one in models.items():
        counted = [
            [label, *(Figure(f"{count:,}") for count in counts), Figure(f"{one['f1'][label]:.3f}")]
            for label, counts in zip(labels, one["confusion"], strict=True)
        ]
        missing = f"; {one['unanswered']:,} without an answer" if one["unanswered"] else ""
        parts.append(f"<h3>{html(name)}: true label down, given label across{html(missing)}</h3>")
        parts.append(table(["", *labels, "F1"], counted))
    return parts


def _share(estimate: dict[str, float]) -> str:
    return f"{estimate['mean']:.1%} [{estimate['low']:.1%}, {estimate['high']:.1%}]"
