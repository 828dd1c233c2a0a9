"""The answering engine: ``Answerer(model).answer(pairs)``."""

from qa_platform.answering.engine import Answer, Answerer

__all__ = ["Answer", "Answerer"]
