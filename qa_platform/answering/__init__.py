"""The answering engine: ``Answerer(model).answer(pairs)``."""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qa_platform.answering.engine import Answer, Answerer, AnswerOptions

__all__ = ["Answer", "AnswerOptions", "Answerer"]

# On import, OpenVINO reports to Google Analytics from a separate process, and keeps counts in the home folder. Only a file there stops it.
# This line makes the reporting package seem missing, so that OpenVINO uses a stub.
# It is here because Python runs it before any module of this package, and so before any import of OpenVINO.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def __getattr__(name: str) -> Any:
    # Imported on first use: the engine's libraries take seconds to import, and not every module of this package needs them.
    if name in __all__:
        from qa_platform.answering import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
