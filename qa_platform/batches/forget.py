"""Forgets a file: removes its rows, its records, its objects, its commits in Pachyderm, and its history in Dagster.

The records are first replaced by ones without content. From then on nothing loads, restores or lists the file. Every step finds its
data by the file's name, never by something that another step removes, so the work can be interrupted anywhere and repeated.
"""

import enum
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from qa_platform.batches.file_commits import FileCommit, find_file_commits, remove_commits
from qa_platform.clients import pachyderm
from qa_platform.clients.file_objects import FileObject, delete_file_object, list_file_objects
from qa_platform.clients.services import Services
from qa_platform.errors import InputError, QaPlatformError
from qa_platform.ledger import Ledger
from qa_platform.ledger.forgetting import Holdings


class TraceState(enum.StrEnum):
    """The state of a trace of a file."""

    # In a dry run: it would be removed.
    FOUND = "found"
    REMOVED = "removed"
    # It should have been removed, but is still there.
    LEFT = "left"
    # It cannot be removed now. The bucket removes it later.
    KEPT = "kept"


@dataclass(frozen=True)
class Trace:
    """Something that a service holds of a file.

    Args:
        service: PostgreSQL, bucket, Pachyderm or Dagster.
        what: what it is, for people.
        count: how many of them.
        detail: further information, or why it is left.
    """

    service: str
    what: str
    count: int = 1
    state: TraceState = TraceState.FOUND
    detail: str = ""


class History(Protocol):
    """The orchestrator's history of a file."""

    def find(self, name: str, generation: int | None) -> Sequence[Trace]:
        """The traces of a file, or of one generation."""
        ...

    def remove(self, name: str, generation: int | None) -> None:
        """Remove these traces. Can be repeated."""
        ...


class NoHistory:
    """The history of a platform that has never run with Dagster."""

    def find(self, name: str, generation: int | None) -> Sequence[Trace]:
        """Nothing."""
        return ()

    def remove(self, name: str, generation: int | None) -> None:
        """There is nothing to remove."""


@dataclass(frozen=True)
class _Found:
    """Everything found of the generations to forget."""

    generations: frozenset[int]
    holdings: Holdings
    objects: Sequence[FileObject]
    commits: Sequence[FileCommit]
    history: Sequence[Trace]

    def traces(self) -> Iterator[Trace]:
        for table, rows in (("question_answer", self.holdings.answers), ("question_answer_reject", self.holdings.rejects)):
            if count := sum(rows.get(generation, 0) for generation in self.generations):
                yield Trace("PostgreSQL", f"rows of {table}", count)
        if records := self.holdings.records & self.generations:
            yield Trace("PostgreSQL", "records of question_file", len(records), detail="their name and generation stay")
        for each in self.objects:
            what = _object(each)
            if each.kept_until:
                yield Trace("bucket", what, state=TraceState.KEPT, detail=f"soft-deleted; the bucket keeps it until {each.kept_until}")
            else:
                yield Trace("bucket", what)
        for commit in self.commits:
            detail = f"{commit.others} other files are in it; their answers stay in PostgreSQL" if commit.others else ""
            yield Trace("Pachyderm", f"commit {commit.id}", detail=detail)
        yield from self.history


@dataclass(frozen=True)
class Forgetting:
    """Forgets one file: one generation of it, or all that exist now."""

    services: Services
    ledger: Ledger
    history: History
    name: str
    generation: int | None = None

    def find(self) -> list[Trace]:
        """Everything that exists of the file. Changes nothing.

        Raises:
            InputError: the file or the generation is unknown, or a service refuses.
            TransientError: a service is unavailable.
        """
        return list(self._find().traces())

    def forget(self) -> Iterator[Trace]:
        """Remove everything that exists of the file, then search once more.

        Yields:
            The traces found before, as removed, left or kept, and those that have appeared since.

        Raises:
            InputError: a run is working on the file, or the file or the generation is unknown; nothing was removed. Or a service refuses.
            TransientError: a service is unavailable. What was removed stays removed; repeat the call for the rest.
        """
        before = self._find()
        self.ledger.forget(self.name, before.generations)
        reasons = self._delete_objects(before.objects) | self._remove_commits(before.commits)
        self.history.remove(self.name, self.generation)
        after = {(trace.service, trace.what): trace for trace in self._find(before.generations).traces()}
        for trace in before.traces():
            left = after.pop((trace.service, trace.what), None)
            yield _outcome(left, reasons) if left else replace(trace, state=TraceState.REMOVED)
        yield from (_outcome(trace, reasons) for trace in after.values())

    def _find(self, generations: Collection[int] | None = None) -> _Found:
        """``generations``: those to look for; None for the requested one, or for all if none was requested."""
        holdings = self.ledger.holdings(self.name)
        objects = list(list_file_objects(self.services.bucket, self.name, self.services.work.answered_prefix))
        with pachyderm.session(self.services.pachyderm, f"looking for the commits of {self.name}") as client:
            commits = find_file_commits(client, self.name)
        there = {
            *holdings.answers,
            *holdings.rejects,
            *holdings.records,
            *holdings.forgotten,
            *(each.upload_generation for each in objects),
        }
        there.update(*(commit.generations for commit in commits))
        if self.generation is not None and self.generation not in there:
            advice = "`qa-platform status FILE` lists the generations"
            raise InputError(f"nothing is known of generation {self.generation}", where=self.name, advice=advice)
        history = self.history.find(self.name, self.generation)
        if generations is None and not (there or commits or history):
            raise InputError("nothing is known of such a file", where=self.name, advice="`qa-platform status` lists the names")
        wanted = frozenset(generations or (there if self.generation is None else there & {self.generation}))
        return _Found(
            wanted,
            holdings,
            [each for each in objects if each.upload_generation in wanted],
            [commit for commit in commits if commit.holds(wanted)],
            history,
        )

    def _delete_objects(self, objects: Sequence[FileObject]) -> dict[str, str]:
        """Delete objects. Returns the bucket's reasons for refusals, by the ``what`` of the trace."""
        reasons = {}
        for each in objects:
            try:
                if not each.kept_until:
                    delete_file_object(self.services.bucket, each)
            except QaPlatformError as error:
                reasons[_object(each)] = str(error)
        return reasons

    def _remove_commits(self, commits: Sequence[FileCommit]) -> dict[str, str]:
        """Remove commits. Returns why some of them stay, by the ``what`` of the trace."""
        ids = [commit.id for commit in commits]
        in_use = self.ledger.commits_in_use(ids)
        free = [commit_id for commit_id in ids if commit_id not in in_use]
        with pachyderm.session(self.services.pachyderm, f"removing the commits of {self.name}") as client:
            refused = remove_commits(client, free) if free else {}
        reasons = dict.fromkeys(in_use, "its other files are being answered; repeat the command later") | dict(refused)
        return {f"commit {commit_id}": reason for commit_id, reason in reasons.items()}


def _object(found: FileObject) -> str:
    return f"object {found.place}#{found.generation}"


def _outcome(trace: Trace, reasons: dict[str, str]) -> Trace:
    if trace.state is TraceState.KEPT:
        return trace
    return replace(trace, state=TraceState.LEFT, detail=reasons.get(trace.what, "repeat the command"))
