"""The methods of ``pfs_v2.API`` about commits and sets of commits."""

from collections.abc import Iterator

from betterproto.lib.google.protobuf import Empty
from pachyderm_sdk.api import pfs as pb

from qa_platform.embedded.pachd.errors import PachError
from qa_platform.embedded.pachd.pfs import CommitRef, Pfs, Wait
from qa_platform.embedded.pachd.protocol import convert
from qa_platform.embedded.pachd.protocol.rpc import PFS_SERVICE, Call, Entries, Method, named


class CommitMethods:
    """Commits and sets of commits."""

    def __init__(self, pfs: Pfs) -> None:
        self._pfs = pfs
        self._trees = pfs.store.trees

    def methods(self) -> dict[str, Method]:
        """The methods by their full names."""
        unary: Entries = [
            ("StartCommit", pb.StartCommitRequest, self.start_commit),
            ("FinishCommit", pb.FinishCommitRequest, self.finish_commit),
            ("ClearCommit", pb.ClearCommitRequest, self.clear_commit),
            ("InspectCommit", pb.InspectCommitRequest, self.inspect_commit),
            ("DropCommit", pb.DropCommitRequest, self.drop_commit),
            ("SquashCommit", pb.SquashCommitRequest, self.squash_commit),
            ("DropCommitSet", pb.DropCommitSetRequest, self.drop_commit_set),
            ("SquashCommitSet", pb.SquashCommitSetRequest, self.squash_commit_set),
        ]
        streaming: Entries = [
            ("ListCommit", pb.ListCommitRequest, self.list_commit),
            ("SubscribeCommit", pb.SubscribeCommitRequest, self.subscribe_commit),
            ("Fsck", pb.FsckRequest, self.fsck),
            ("InspectCommitSet", pb.InspectCommitSetRequest, self.inspect_commit_set),
            ("ListCommitSet", pb.ListCommitSetRequest, self.list_commit_set),
            ("FindCommits", pb.FindCommitsRequest, self.find_commits),
        ]
        return named(PFS_SERVICE, unary) | named(PFS_SERVICE, streaming, streams_out=True)

    def start_commit(self, request: pb.StartCommitRequest, call: Call) -> pb.Commit:
        branch = convert.branch_key(request.branch)
        started = self._pfs.start_commit(branch, parent=_optional_ref(request.parent), description=request.description)
        return convert.commit(started.repo, started.id)

    def finish_commit(self, request: pb.FinishCommitRequest, call: Call) -> Empty:
        ref = convert.commit_ref(request.commit)
        self._pfs.finish_commit(ref, description=request.description, error=request.error, force=request.force)
        return convert.EMPTY

    def clear_commit(self, request: pb.ClearCommitRequest, call: Call) -> Empty:
        self._pfs.clear(convert.commit_ref(request.commit))
        return convert.EMPTY

    def inspect_commit(self, request: pb.InspectCommitRequest, call: Call) -> pb.CommitInfo:
        commit = self._pfs.commit(convert.commit_ref(request.commit))
        if request.wait > Wait.STARTED:
            commit = self._pfs.wait(commit, Wait(int(request.wait)), alive=call.alive)
        return convert.commit_info(self._pfs, commit)

    def list_commit(self, request: pb.ListCommitRequest, call: Call) -> Iterator[pb.CommitInfo]:
        commits = self._pfs.list_commits(
            convert.repo_key(request.repo),
            to=_optional_ref(request.to),
            after=_optional_ref(request.from_),
            number=request.number,
            reverse=request.reverse,
            kind=0 if request.all else int(request.origin_kind),
            started=max(0.0, convert.seconds(request.started_time)),
        )
        return (convert.commit_info(self._pfs, commit) for commit in commits)

    def subscribe_commit(self, request: pb.SubscribeCommitRequest, call: Call) -> Iterator[pb.CommitInfo]:
        commits = self._pfs.subscribe(
            convert.repo_key(request.repo),
            request.branch,
            after=_optional_ref(request.from_),
            state=Wait(max(1, int(request.state))),
            kind=0 if request.all else int(request.origin_kind),
            alive=call.alive,
        )
        return (convert.commit_info(self._pfs, commit) for commit in commits)

    def inspect_commit_set(self, request: pb.InspectCommitSetRequest, call: Call) -> Iterator[pb.CommitInfo]:
        for commit in self._pfs.commit_set(request.commit_set.id):
            shown = self._pfs.wait(commit, Wait.FINISHED, alive=call.alive) if request.wait else commit
            yield convert.commit_info(self._pfs, shown)

    def list_commit_set(self, request: pb.ListCommitSetRequest, call: Call) -> Iterator[pb.CommitSetInfo]:
        for set_id in self._pfs.commit_sets():
            commits = self._pfs.commit_set(set_id)
            if request.project.name in ("", *(commit.repo.project for commit in commits if commit.id == set_id)):
                infos = [convert.commit_info(self._pfs, commit) for commit in commits]
                yield pb.CommitSetInfo(commit_set=pb.CommitSet(id=set_id), commits=infos)

    def drop_commit(self, request: pb.DropCommitRequest, call: Call) -> pb.DropCommitResponse:
        self._pfs.drop_commit(convert.commit_ref(request.commit), recursive=request.recursive)
        return pb.DropCommitResponse()

    def squash_commit(self, request: pb.SquashCommitRequest, call: Call) -> pb.SquashCommitResponse:
        self._pfs.squash_commit(convert.commit_ref(request.commit), recursive=request.recursive)
        return pb.SquashCommitResponse()

    def drop_commit_set(self, request: pb.DropCommitSetRequest, call: Call) -> Empty:
        self._pfs.drop_commit_set(request.commit_set.id)
        return convert.EMPTY

    def squash_commit_set(self, request: pb.SquashCommitSetRequest, call: Call) -> Empty:
        self._pfs.squash_commit_set(request.commit_set.id)
        return convert.EMPTY

    def fsck(self, request: pb.FsckRequest, call: Call) -> Iterator[pb.FsckResponse]:
        """Report nothing, like a healthy cluster. The database itself enforces the relations that Pachyderm checks here."""
        return iter(())

    def find_commits(self, request: pb.FindCommitsRequest, call: Call) -> Iterator[pb.FindCommitsResponse]:
        """The commits that changed a path, the newest first, then the last commit that was searched."""
        found = 0
        line = self._pfs.list_commits(convert.commit_ref(request.start).repo, to=convert.commit_ref(request.start))
        for searched, commit in enumerate(line):
            if commit.finished is None:
                raise PachError(f"commit {commit} not finished")
            parent = line[searched + 1] if searched + 1 < len(line) else None
            pair = [self._trees.find(side.root, request.file_path) if side else None for side in (parent, commit)]
            if next(self._trees.differences(*pair), None) is not None:
                found += 1
                yield pb.FindCommitsResponse(found_commit=convert.commit(commit.repo, commit.id), commits_searched=searched)
            if found == request.limit != 0 or parent is None:
                yield pb.FindCommitsResponse(last_searched_commit=convert.commit(commit.repo, commit.id), commits_searched=searched + 1)
                return


def _optional_ref(commit: pb.Commit) -> CommitRef | None:
    return convert.commit_ref(commit) if commit.id or commit.branch.name else None
