"""Faults of the bucket: it responds with errors, refuses operations, holds objects, is out of disk space, or is restored."""

import random
import time
from contextlib import suppress
from functools import partial

from google.api_core.exceptions import NotFound, PreconditionFailed
from google.cloud import storage

from qa_platform.clients.bucket import archived_name, version_of
from qa_platform.contract import INCOMING
from qa_platform_tests.faults.proxies import CUT
from qa_platform_tests.faults.victims import PATIENCE_SECONDS, Fault, copy_folder, fill_disk_of
from qa_platform_tests.faults.world import World


def bucket_answers(kind: str) -> Fault:
    """A few requests get an error, or are cut off."""

    def fault(world: World, rng: random.Random) -> str:
        # Any request, or one of the rare ones that matter most.
        on = rng.choice([None, "read", "copy", "delete"]) if kind != CUT else None
        world.proxy.arm(kind, on=on, count=rng.choice([1, 1, 2, 4, 12]))
        return _spoilt(world, rng, longest=2)

    return fault


def bucket_refuses(operation: str) -> Fault:
    """The role lacks one permission for a while."""

    def fault(world: World, rng: random.Random) -> str:
        world.proxy.arm("403", on=operation, count=10**6)
        return _spoilt(world, rng, longest=4)

    return fault


def _spoilt(world: World, rng: random.Random, *, longest: float) -> str:
    """Wait for the first spoilt request and up to ``longest`` seconds more, then disarm the proxy. Returns what it spoilt."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not world.proxy.spoilt and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(rng.uniform(0, longest))
    world.proxy.disarm()
    return ", ".join(sorted(set(world.proxy.spoilt)))


def hold_a_source(world: World, rng: random.Random) -> str:
    """Put a hold on an upload: it can be read and copied, but not deleted."""
    blobs = list(world.bucket.list_blobs(prefix=INCOMING))
    if not blobs:
        return ""
    blob = rng.choice(blobs)
    kind = rng.choice(["temporary_hold", "event_based_hold"])
    with suppress(NotFound):
        _set(blob, kind, value=True)
        time.sleep(rng.uniform(1, 6))
        _set(blob, kind, value=False)
    return kind.replace("_", " ")


def _set(blob: storage.Blob, hold: str, *, value: bool) -> None:
    setattr(blob, hold, value)
    blob.patch()


def retain_everything(world: World, rng: random.Random) -> str:
    """Give the bucket a retention policy for a while: recent objects cannot be deleted."""
    _set_retention(world, 3600)
    time.sleep(rng.uniform(1, 6))
    _set_retention(world, None)
    return "retention policy"


def _set_retention(world: World, seconds: int | None) -> None:
    world.bucket.retention_period = seconds
    world.bucket.patch()


def occupy_a_place(world: World, rng: random.Random) -> str:
    """Put another object where an upload will be archived, and delete it later."""
    blobs = list(world.bucket.list_blobs(prefix=INCOMING))
    if not blobs:
        return ""
    place = world.bucket.blob(archived_name(version_of(rng.choice(blobs)), rejected=rng.random() < 0.1))
    try:
        place.upload_from_string(b"somebody else's", if_generation_match=0)
    except PreconditionFailed:
        return ""
    time.sleep(rng.uniform(1, 8))
    place.delete(if_generation_match=place.generation)
    return "a place under processed/"


def restore_bucket(world: World, rng: random.Random) -> str:
    """Restore the bucket from a copy. Uploads since the copy are gone; files archived since then are under ``incoming/`` again."""
    copy = world.state / "gcs.copy"
    with world.only_new_names():
        world.restart("gcs", partial(copy_folder, target=copy))
        copied_at = _now()
        time.sleep(rng.uniform(1, 12))
        with world.uploading:
            world.restart("gcs", partial(copy_folder, copy))
            world.vanished.append((copied_at, _now()))
    return "bucket"


def _now() -> int:
    """The time in microseconds, like a bucket's generations."""
    return int(time.time() * 1e6)


BUCKET: dict[str, Fault] = {
    "bucket answers 429": bucket_answers("429"),
    "bucket answers 500": bucket_answers("500"),
    "bucket answers 503": bucket_answers("503"),
    "bucket answers 412": bucket_answers("412"),
    "download cut in the middle": bucket_answers(CUT),
    "bucket refuses to delete": bucket_refuses("delete"),
    "bucket refuses to copy": bucket_refuses("copy"),
    "bucket refuses to read": bucket_refuses("read"),
    "bucket refuses to list": bucket_refuses("list"),
    "an upload is held": hold_a_source,
    "a retention policy": retain_everything,
    "another object at the archive's place": occupy_a_place,
    "disk full under the bucket": fill_disk_of("gcs"),
    "the bucket is restored": restore_bucket,
}
