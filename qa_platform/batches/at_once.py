"""Several files at once: while one waits for a distant bucket, the others go on."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

# Each holds a shard of its file, and some pieces on their way.
FILES_AT_ONCE = 8


@contextmanager
def threads() -> Iterator[ThreadPoolExecutor]:
    """A pool of threads. At the end of the block, what has not begun is dropped, and what has begun is waited for."""
    pool = ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="files")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
