"""`report.html`: written into a run folder, or of several runs beside them."""

from collections.abc import Sequence
from pathlib import Path

from align import artifacts
from align.config.errors import UserError
from align.config.schema import SweepBy
from align.tracking.compare_page import compare_page
from align.tracking.progress import say
from align.tracking.ranking import labels, ranking
from align.tracking.report_page import report_page
from align.tracking.run_folder import RunFolder, read_run

REPORT, SWEEP_REPORT = "report.html", "sweep_report.html"


def write_report(runs: Sequence[RunFolder], path: Path, by: SweepBy = SweepBy.auto, others: Sequence[str] = ()) -> None:
    """Write the page of one run, or of several compared. Raises: UserError if the place cannot be written.

    by, others: as `compare_page` takes them.
    """
    text = report_page(runs[0]) if len(runs) == 1 else compare_page(runs, by, others)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        artifacts.write_text(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}; use out=FILE.html") from error


def leave_report(run_dir: Path) -> None:
    """Write the page of a chain that is complete, into its folder. A page that cannot be made is said, and no more: the
    models are there and signed."""
    try:
        write_report([read_run(run_dir)], run_dir / REPORT)
    except Exception as error:
        say(f"WARN {run_dir / REPORT} was not written: {type(error).__name__}: {error}")


def leave_comparison(folders: Sequence[Path], path: Path, by: SweepBy, others: Sequence[str]) -> list[str]:
    """Write the page of a sweep's members and return their ranking as text, in the last line where the page is. As
    `leave_report`, it fails nothing.

    others: of members that are not ranked, a line each.
    """
    try:
        runs = [read_run(folder) for folder in folders]
        write_report(runs, path, by, others)
        found = ranking(runs, by)
    except Exception as error:
        say(f"WARN {path} was not written: {type(error).__name__}: {error}")
        return []
    return [*([] if found is None else found.lines(labels(runs))), f"report   {path}"]
