"""The one error that users see."""


class UserError(ValueError):
    """Bad input, named in one line: what was found, where, and what to do. Shown without a traceback, exit code 2."""
