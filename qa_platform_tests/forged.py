"""Different files with the same size and CRC32C. The checksum is linear, so four chosen bytes give any value."""

import google_crc32c

_PATCH_BYTES = 4


def forged(head: bytes, tail: bytes, *, like: bytes) -> bytes:
    """``head``, four bytes, and ``tail``, with the CRC32C of ``like``."""

    def with_patch(patch: int) -> bytes:
        return head + patch.to_bytes(_PATCH_BYTES, "little") + tail

    start = google_crc32c.value(with_patch(0))
    # How each bit of the patch changes the checksum, reduced (Gaussian elimination) to rows with distinct highest bits.
    rows: list[tuple[int, int]] = []
    for bit in range(8 * _PATCH_BYTES):
        change, patch = _reduced(google_crc32c.value(with_patch(1 << bit)) ^ start, 1 << bit, rows)
        rows = sorted([*rows, (change, patch)], reverse=True)
    left, patch = _reduced(google_crc32c.value(like) ^ start, 0, rows)
    assert left == 0
    return with_patch(patch)


def _reduced(change: int, patch: int, rows: list[tuple[int, int]]) -> tuple[int, int]:
    for row_change, row_patch in rows:
        if change ^ row_change < change:
            change, patch = change ^ row_change, patch ^ row_patch
    return change, patch
