"""Errors of a run's state. What a user wrote wrongly is a ValueError, and a file an OSError."""


class RunError(RuntimeError):
    """The state of the machine, of the data or of the ranks does not allow what was asked."""


class OtherRankError(RunError):
    """Another rank failed; the message says which, while doing what, and how."""
