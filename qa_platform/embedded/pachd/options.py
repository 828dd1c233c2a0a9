"""The server's options: what makes it as slow and as strict as a cluster. ``PachdServer`` hands them to its parts."""

from qa_platform.settings import EmbeddedPachdSettings as Options

__all__ = ["Options"]
