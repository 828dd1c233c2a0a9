"""The log of a sensor's tick."""

import logging
from typing import Any

import dagster as dg


class TickLog(logging.LoggerAdapter):
    """Opens the tick's log with its first message.

    Dagster opens it whenever ``context.log`` is read, and an opened log leaves a file for ever, or two objects in a bucket: thousands a day
    of sensors with nothing to say.
    """

    def __init__(self, context: dg.SensorEvaluationContext) -> None:
        super().__init__(logging.getLogger(__name__))
        self._context = context

    def log(self, level: int, msg: object, *args: Any, **options: Any) -> None:
        self._context.log.log(level, msg, *args, **options)
