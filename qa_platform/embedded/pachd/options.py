"""The server's options, which make it as slow and as strict as a cluster. ``PachdServer`` passes them to its parts."""

from qa_platform.settings import EmbeddedPachdSettings as Options

__all__ = ["Options"]
