"""`do=report`: a page of one run, or of several compared; the lineage as a tree; with report.to=wandb a W&B Report."""

from glob import glob
from pathlib import Path

from align.artifacts import MANIFEST
from align.config.errors import UserError
from align.config.schema import ReportTo, RunConfig
from align.distributed.runtime import launched_rank
from align.tracking.lineage import lineage, tree_text
from align.tracking.progress import say
from align.tracking.report_figures import verdict
from align.tracking.report_files import REPORT, write_report
from align.tracking.run_folder import RunFolder, read_run


def run_report(config: RunConfig) -> None:
    """Print verdict and lineage of each run and write their page; on the first rank of a launch.

    Raises: UserError for a run without a complete stage, and for a place that cannot be written.
    """
    if launched_rank() != 0:
        return
    runs = [read_run(folder) for folder in run_folders(config)]
    page = page_path(config, runs)
    write_report(runs, page)
    for run in runs:
        print("\n".join([str(run.folder), verdict(run), "", tree_text(lineage(run)), ""]))
    print(f"report   {page}")
    if config.report.to is ReportTo.wandb:
        from align.tracking.wandb_report import send_report

        print("\n".join(send_report(config.log, runs, page)))


def run_folders(config: RunConfig) -> list[Path]:
    """The folders that are asked for, each once, in the order in which they were named.

    Raises: UserError for one that does not exist, or a pattern that matches none.
    """
    found: list[Path] = []
    key = "report.runs" if config.report.runs else "run_dir"
    for name in config.report.runs or [config.run_dir]:
        place = Path(name).expanduser()
        matched = [place] if place.exists() else [path for path in map(Path, sorted(glob(str(place)))) if path.is_dir()]
        if not matched:
            raise UserError(f"{key}: {name}: no such folder; run the chain first")
        complete = [path for path in matched if any(path.glob(f"*/{MANIFEST}"))]
        if matched != [place] and complete != matched:
            left_out = [path.name for path in matched if path not in complete]
            say(f"report: without a complete stage, left out: {', '.join(left_out)}")
            if not complete:
                raise UserError(f"{key}: {name}: none of {len(matched)} matches holds a complete stage")
            matched = complete
        found += [path for path in matched if path not in found]
    return found


def page_path(config: RunConfig, runs: list[RunFolder]) -> Path:
    """`out`, or report.html: of one run in its folder, of several beside the first of them.

    Raises: UserError if `out` is no page.
    """
    if config.out:
        path = Path(config.out).expanduser()
        if path.suffix != ".html":
            raise UserError(f"out={config.out}: a report is a page; name it {path.with_suffix('.html').name}")
        return path
    return runs[0].folder / REPORT if len(runs) == 1 else runs[0].folder.parent / REPORT
