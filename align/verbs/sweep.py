"""`-m`: the members of a sweep, each in a run folder of its own, and how they compare. One that fails stops none."""

import math
import os
import shutil
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from align.artifacts import digest_value
from align.config import command_line, refusals, store, sweeps
from align.config.errors import Pruned, RankLost, UserError
from align.config.redaction import redacted_text
from align.config.schema import RunConfig, StageConfig, SweepBy, Verb
from align.distributed import runtime
from align.distributed.runtime import launched_rank, launched_world_size
from align.tracking.members import Member, State, members_of, read_member
from align.tracking.progress import say
from align.tracking.ranking import figure_of
from align.tracking.report_files import SWEEP_REPORT, leave_comparison
from align.tracking.run_folder import read_run

SECONDS_BETWEEN_LOOKS = 5.0
"""At the members that run elsewhere."""


def run_members(arguments: list[str], user_dir: Path | None, run: Callable[[RunConfig], int]) -> bool:
    """Run every member, print the ranking, write its page; returns whether none has failed.

    run: does what one config says, and returns 0 if it went well. Raises: UserError for anything that can be refused
    before a member runs.
    """
    sweep, configs = sweeps.read_sweep(arguments, user_dir)
    by, trained = configs[0].sweep.by, configs[0].do is Verb.train
    _refuse_search(sweep, by, trained)
    parents = list(dict.fromkeys(Path(config.run_dir) for config in configs))
    digest = digest_value([*sweep.fixed, *(o.input_line for o in sweep.swept)])
    task = Task(sweep, run, digest, by, parents[0] if len(parents) == 1 else None)
    elsewhere = sweep.launcher is not None
    with _scratch(parents[0] if elsewhere else None) as folder:
        if elsewhere:
            say(f"align: sweep: members run as jobs of {sweep.launcher}; what they print is in {folder}/.submitit")
        with _watched(task, parents) if elsewhere and trained else _nothing():
            try:
                with runtime.one_group():
                    sweeps.run_sweep(sweep, by, folder, task)
            except _Over as over:
                raise over.lost from None
            except Exception as error:
                # A task answers for what its member does; only a job that was killed does not.
                if not elsewhere or isinstance(error, UserError):
                    raise
                said = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise UserError(
                    f"sweep: a job ended without an answer ({said}), the others go on; see {folder}/.submitit, and "
                    "type the same command to go on with what is missing"
                ) from error
    if not trained or launched_rank() != 0:
        return not task.failed
    found = [member for parent in parents for member in members_of(task.digest, parent)]
    _end(found, by, parents[0])
    return all(member.state in (State.done, State.pruned) for member in found)


class _Over(BaseException):
    """Hydra lets no `Exception` of a member end the sweep; the loss of a rank has to."""

    def __init__(self, lost: RankLost) -> None:
        super().__init__(str(lost))
        self.lost = lost


@dataclass
class Task:
    """What Hydra calls for each member, in this process or pickled into a job."""

    sweep: sweeps.Sweep
    run: Callable[[RunConfig], int]
    digest: str
    by: SweepBy
    parent: Path | None
    """Of all run folders; None if members differ in it, such as those of several recipes."""
    failed: bool = False
    """Any of those that ran in this process."""

    def __call__(self, _: Any) -> float | None:
        """Returns the figure that a search makes better; None where there is none."""
        join_ranks()
        values = sweeps.values_of_this_member(self.sweep)
        name = sweeps.member_name(values)
        line = self.sweep.member(values)
        parent = self.parent or store.compose_run(line, self.sweep.user_dir, sweep=True).config.run_dir
        folder = f"{parent}/{name}" if name else str(parent)
        line = [*(part for part in line if not part.startswith("run_dir=")), f"run_dir={store.quoted(folder)}"]
        composed = store.compose_run(line, self.sweep.user_dir, sweep=True)
        alone = [part for part in line if not refusals.only_in_sweeps(sweeps.key(part))]
        command_line.remember(command_line.as_typed(alone))
        member = Member(self.digest, name, Path(folder))
        if composed.config.do is Verb.train and (before := _pruned_before(member)):
            _say(f"{name}: pruned before: {before.says}")
            return before.figure
        _say(f"{name or 'one run'} in {folder}")
        return self._carry_out(composed.config, member)

    def _carry_out(self, config: RunConfig, member: Member) -> float | None:
        keep = config.do is Verb.train and launched_rank() == 0
        if keep:
            member.write()
        try:
            went_well = not self.run(config)
            ended = replace(member, state=State.done if went_well else State.failed)
            if went_well and config.do is Verb.train and self.by is not SweepBy.auto:
                ended = replace(ended, figure=figure_of(read_run(member.folder), self.by))
        except Pruned as pruned:
            # The figure that pruned it may be another one than the search is for.
            figure = pruned.figure if self.by in _pruned_by(config) and math.isfinite(pruned.figure) else None
            ended = replace(member, state=State.pruned, says=str(pruned), figure=figure)
        except RankLost as lost:
            raise _Over(lost) from lost
        except Exception as error:
            if not isinstance(error, UserError):
                say(redacted_text(traceback.format_exc()), active=launched_rank() == 0)
            first = (str(error).strip().splitlines() or [""])[0]
            said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first}"
            ended = replace(member, state=State.failed, says=redacted_text(said))
        if ended.says:
            _say(f"{member.name}: {ended.says}")
        self.failed |= ended.state is State.failed
        if keep:
            ended.write()
        return ended.figure


def join_ranks() -> None:
    """Name the tasks of a Slurm job of several as a launcher would. Without one, nothing."""
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm" or tasks == 1 or "RANK" in os.environ:
        return
    import submitit

    job = submitit.JobEnvironment()
    os.environ.setdefault("MASTER_ADDR", job.hostnames[0])
    os.environ |= {
        "RANK": str(job.global_rank),
        "LOCAL_RANK": str(job.local_rank),
        "WORLD_SIZE": str(job.num_tasks),
        "LOCAL_WORLD_SIZE": os.environ.get("SLURM_NTASKS_PER_NODE", str(job.num_tasks // job.num_nodes)),
        # The same on all tasks, and another one for another job on the same node.
        "MASTER_PORT": str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000),
    }


def _pruned_by(config: RunConfig) -> list[SweepBy]:
    """The figures by which stages of the run are pruned, as far as a search can be for them too."""
    of_stages = (getattr(config.stages, name) for name in config.run)
    names = [stage.best_by.value for stage in of_stages if isinstance(stage, StageConfig)]
    return [by for by in SweepBy if by.value in names]


def _pruned_before(member: Member) -> Member | None:
    before = read_member(member.folder)
    same = before is not None and before.sweep == member.sweep and before.state is State.pruned
    return before if same else None


def _refuse_search(sweep: sweeps.Sweep, by: SweepBy, trained: bool) -> None:
    if launched_world_size() > 1 and (sweep.search or sweep.launcher):
        asked = f"hydra/sweeper={sweep.search}" if sweep.search else f"hydra/launcher={sweep.launcher}"
        raise UserError(f"{asked} runs in one process; start it without a launcher of ranks, see docs/sweeps.md")
    if sweep.search is not None and by is SweepBy.auto and trained:
        known = ", ".join(one.value for one in SweepBy if one is not SweepBy.auto)
        raise UserError(f"hydra/sweeper={sweep.search}: name the figure to search by: sweep.by= one of {known}")


def _end(found: list[Member], by: SweepBy, parent: Path) -> None:
    done = [member for member in found if member.state is State.done]
    others = [_ended_words(member) for member in found if member.state is not State.done]
    ranked = leave_comparison([m.folder for m in done], parent / SWEEP_REPORT, by, others) if len(done) > 1 else []
    print("\n".join(["", *ranked[:-1], *others, *ranked[-1:]]))
    if failed := [member.name for member in found if member.state in (State.failed, State.running)]:
        _say(f"{len(failed)} failed: {'; '.join(failed)}")


def _ended_words(member: Member) -> str:
    if member.state is State.running:
        return f"not done  {member.name}: it has said nothing more; the same command goes on with it"
    return f"{member.state.value:<8}  {member.name}: {member.says or 'see what it printed'}"


def _say(text: str) -> None:
    say(f"align: sweep: {' '.join(text.splitlines())}", active=launched_rank() == 0)


@contextmanager
def _scratch(shared: Path | None) -> Iterator[Path]:
    """Where Hydra writes: a folder that jobs on other machines see and that is kept, or one for this process alone."""
    if shared is not None:
        yield (shared / ".jobs").absolute()
        return
    scratch = Path(tempfile.mkdtemp(prefix="align-sweep-"))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _watched(task: Task, parents: list[Path]) -> Iterator[None]:
    """Inside, it is said of members that run elsewhere how they end."""
    over = threading.Event()
    known = {member.folder: member.state for parent in parents for member in members_of(task.digest, parent)}

    def look() -> None:
        for member in (member for parent in parents for member in members_of(task.digest, parent)):
            if known.get(member.folder) is not member.state:
                known[member.folder] = member.state
                ended = sum(state is not State.running for state in known.values())
                _say(f"{member.name}: {member.state.value} ({ended} of {len(known)} started are over)")

    def watch() -> None:
        while not over.wait(SECONDS_BETWEEN_LOOKS):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        look()
