"""A deadline for calls that have none, or one too long for an interactive command."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def begin(call: Callable[[], T], name: str) -> "Future[T]":
    """Make a call in a new daemon thread, which does not keep the process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    # Not an executor: the interpreter waits for an executor's threads at exit.
    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def within(seconds: float, call: Callable[[], T], name: str) -> T:
    """The result of a call, or its exception.

    Raises:
        TimeoutError: the call takes longer than ``seconds``. It continues, and its result is dropped.
    """
    return begin(call, name).result(seconds)
