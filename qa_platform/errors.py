"""The kinds of failure that callers distinguish: wrong input, which no retry fixes, and temporary trouble.

An error carries fields: what is wrong, where, and what to do about it. Its text is built from them for people; nothing parses it.
"""

from typing import ClassVar

from qa_platform.text import escaped, escaped_lines


class QaPlatformError(Exception):
    """Base of the platform's own errors.

    ``blameless``: if such an error ends the work on a file, the file is not to blame.

    Args:
        what: what is wrong.
        where: the affected object, row, column or address.
        advice: what to do about it.
    """

    blameless: ClassVar[bool] = False

    def __init__(self, what: str, *, where: str = "", advice: str = "") -> None:
        self.what = what
        self.where = where
        self.advice = advice
        super().__init__(str(self))

    def __str__(self) -> str:
        return f"{self.cause}; {escaped_lines(self.advice)}" if self.advice else self.cause

    @property
    def cause(self) -> str:
        """What is wrong, and where, for display: unprintable characters are escaped."""
        what = escaped_lines(self.what)
        return f"{escaped(self.where)}: {what}" if self.where else what


class InputError(QaPlatformError):
    """The request or the input is wrong. Never retried."""


class TransientError(QaPlatformError):
    """Something the platform depends on is temporarily unavailable. A retry may succeed."""

    blameless = True


class DeviceFailed(TransientError):
    """A GPU failed, and this process cannot use it again. Another process may."""
