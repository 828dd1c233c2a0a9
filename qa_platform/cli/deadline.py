"""A deadline for calls that have none, or one that is too long for a person who waits."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def begin(call: Callable[[], T], name: str) -> "Future[T]":
    """Make a call in a new thread, which does not keep the process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    # Not an executor's thread: the interpreter waits for those to end.
    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def within(seconds: float, call: Callable[[], T], name: str) -> T:
    """The result of a call, or its exception.

    Raises:
        TimeoutError: it takes longer than ``seconds``. The call continues, and its result is dropped.
    """
    return begin(call, name).result(seconds)
