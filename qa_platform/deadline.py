"""A bound on calls that have none of their own, or one that is too long for a person who waits."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def begin(call: Callable[[], T], name: str) -> "Future[T]":
    """Make a call in a thread of its own, which does not keep the process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    # Not an executor's thread: the interpreter waits for the ends of those.
    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def within(seconds: float, call: Callable[[], T], name: str) -> T:
    """What a call returns or raises.

    Raises:
        TimeoutError: it takes longer than ``seconds``; it goes on, and nobody hears of it.
    """
    return begin(call, name).result(seconds)
