"""The two kinds of failure that callers tell apart: wrong input, which no retry mends, and trouble that passes.

Every message says what is wrong, where (object, row, column, address), and what to do about it.
"""


class QaPlatformError(Exception):
    """Base of the platform's own errors."""


class InputError(QaPlatformError):
    """What was asked for or handed in is wrong. Never retried."""


class TransientError(QaPlatformError):
    """Something the platform depends on is away for a while. Trying again may succeed."""
