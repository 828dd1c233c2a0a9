"""Calibration of scores: from the probability that a model gives its answer to the probability that the answer is right."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qa_platform.errors import InputError

# The key in a model's config.json.
KEY = "score_calibration"
# Beyond this, scores say nothing: all are 0 or 1.
_LIMIT = 100


@dataclass(frozen=True)
class Calibration:
    """Platt scaling (Platt, 1999): a score's logit is the probability's logit times ``slope``, plus ``intercept``. It keeps the order.

    The default changes nothing.
    """

    slope: float = 1.0
    intercept: float = 0.0

    def score(self, probability: float) -> float:
        """The score, in [0, 1], of an answer to which the model gives this probability."""
        right = math.exp(self.intercept) * probability**self.slope
        return right / (right + (1.0 - probability) ** self.slope)

    @classmethod
    def of(cls, config: Mapping[str, Any], *, model: str) -> "Calibration":
        """The calibration in a ``config.json``; the default if it has none.

        Raises:
            InputError: the entry is not a slope above 0 and an intercept, both of a moderate size.
        """
        if KEY not in config:
            return cls()
        entry = config[KEY]
        match entry:
            case {"slope": int() | float() as slope, "intercept": int() | float() as intercept} if len(entry) == 2:
                if 0 < slope <= _LIMIT and abs(intercept) <= _LIMIT and not isinstance(slope, bool) and not isinstance(intercept, bool):
                    return cls(slope, intercept)
        raise InputError(
            f"its config.json has {entry!r} for {KEY}, which is not a slope above 0 and an intercept, of {_LIMIT} at most",
            where=f"model {model}",
            advice=f"remove {KEY}, or write what `python -m qa_platform.training.calibrate` finds",
        )

    def entry(self) -> dict[str, float]:
        """The entry for a ``config.json``, which `of` reads."""
        return asdict(self)
