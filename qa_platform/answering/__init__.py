"""The answering engine: ``Answerer(model).answer(pairs)``."""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qa_platform.answering.engine import Answer, Answerer, AnswerOptions

__all__ = ["Answer", "AnswerOptions", "Answerer"]

# Importing OpenVINO tells Google Analytics so, from a process of its own, and keeps count in the home folder; what it offers to stop
# that is a file in the home folder. Without the package that does it, which this makes it find missing, it has a stub of its own.
# Here, since Python imports this before any module below, and so before all that imports OpenVINO.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def __getattr__(name: str) -> Any:
    # When it is asked for: the command line, which is in this package too, has no use for the engine's libraries before that.
    if name in __all__:
        from qa_platform.answering import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
