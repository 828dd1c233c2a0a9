"""What a watch asks for, look by look."""

from collections.abc import Sequence
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

from qa_platform.cli.status.observe import FileState, Snapshot
from qa_platform.cli.status.watch import Watch
from qa_platform.contract import FileVersion
from qa_platform.settings import WorkSettings


class _Observed:
    """An observer of all files. ``asked`` has the versions that each snapshot was to include."""

    settings = SimpleNamespace(work=WorkSettings())
    observes_all = True
    may_overlook_uploads = False

    def __init__(self) -> None:
        self.files: tuple[FileState, ...] = ()
        self.asked: list[list[str]] = []

    def snapshot(self, also: Sequence[FileVersion] = ()) -> Snapshot:
        self.asked.append([version.name for version in also])
        return Snapshot(datetime.now(UTC), self.files)


def test_a_file_that_has_ended_is_told_once_and_not_asked_for_again() -> None:
    observed = _Observed()
    watch = Watch(cast(Any, observed))
    ends, stays = FileVersion("ends.csv", 1), FileVersion("stays.csv", 1)
    told = []
    for has_ended in (False, True, True, True):
        observed.files = (FileState(ends, is_gone=has_ended), FileState(stays))
        told.append([file.version.name for file in watch.look()])
    assert told == [["stays.csv", "ends.csv"], ["ends.csv"], [], []]
    assert [sorted(names) for names in observed.asked[2:]] == [["ends.csv", "stays.csv"], ["stays.csv"], ["stays.csv"]]
