"""Small gold sets for the tests of evaluation."""

from qa_platform.evaluation.gold import GoldAnswer, GoldQuestion

CONTEXT = "The lighthouse on Ferris Rock is kept by Marta Olsen, who took over in 1987."


def gold(count: int, context: str, *answers: str) -> list[GoldQuestion]:
    """``count`` copies of one question, with its right answers."""
    return [
        GoldQuestion(str(n), "g", "Who keeps the lighthouse?", context, tuple(GoldAnswer(a, None) for a in answers)) for n in range(count)
    ]
