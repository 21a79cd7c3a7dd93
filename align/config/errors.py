"""The error that users see, and the ways a run ends that was told to stop, or lost one of its ranks."""


class UserError(ValueError):
    """Bad input, named in one line: what was found, where, and what to do. Shown without a traceback, exit code 2."""


class RankLost(Exception):
    """Another rank is dead, cut off or failed, so this one ends too; the line that names it is said where it is found.

    The exit code is that of sysexits.h for "try again": the same command goes on.
    """

    exit_code = 75


class Stopped(BaseException):
    """The run was told to stop and has; the same command goes on. Exit code 0.

    Like KeyboardInterrupt no `Exception`, so that nobody who guards against a failing model takes it for one.
    """


class Pruned(BaseException):
    """A member of a sweep was ended early; the sweep goes on. As `Stopped`, no `Exception`."""

    def __init__(self, says: str, figure: float) -> None:
        """figure: the best of its evaluations."""
        super().__init__(says)
        self.figure = figure
