"""The answering engine: ``Answerer(model).answer(pairs)``."""

from qa_platform.answering.engine import Answer, Answerer, AnswerOptions

__all__ = ["Answer", "AnswerOptions", "Answerer"]
