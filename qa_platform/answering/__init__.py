"""The answering engine: ``Answerer(model).answer(pairs)``."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qa_platform.answering.engine import Answer, Answerer, AnswerOptions

__all__ = ["Answer", "AnswerOptions", "Answerer"]


def __getattr__(name: str) -> Any:
    # When it is asked for: the command line, which is in this package too, has no use for the engine's libraries before that.
    if name in __all__:
        from qa_platform.answering import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
