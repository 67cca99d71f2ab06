"""The two ways in which a ring can fail that are not a plain ValueError."""


class RingError(RuntimeError):
    """A ring could not be completed: a rank is lost, late, or runs something else."""


class RankMismatchError(ValueError):
    """The ranks of a group called the same operation with different arguments."""
