"""Works on several files at once: while one waits for a distant bucket, the others proceed."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

# Each file keeps one shard and a few pieces in transit in memory.
FILES_AT_ONCE = 8


@contextmanager
def threads() -> Iterator[ThreadPoolExecutor]:
    """A thread pool. At the end of the block, queued tasks are cancelled and running ones are awaited."""
    pool = ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="files")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
