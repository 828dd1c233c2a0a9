"""The service ``pfs_v2.API``."""

import itertools
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

import betterproto
from betterproto.lib.google.protobuf import Empty
from pachyderm_sdk.api import pfs as pb

from qa_platform.embedded.pachd.errors import InvalidArgument, NotFound, PachError, Unimplemented
from qa_platform.embedded.pachd.pfs import Commit, CommitRef, Pfs, Wait, check_path, tag_of
from qa_platform.embedded.pachd.pps import Pps
from qa_platform.embedded.pachd.protocol import convert
from qa_platform.embedded.pachd.protocol.rpc import Call, Method
from qa_platform.embedded.pachd.protocol.wire import FileInfos, RawAdd, bytes_values, modify_request
from qa_platform.embedded.pachd.storage import globs, urls
from qa_platform.embedded.pachd.storage.filesets import FileSetWriter
from qa_platform.embedded.pachd.storage.trees import FileEntry, Found

_FILESET_SECONDS = 600.0


class PfsApi:
    """Every method takes a request, or an iterator of them, and the call."""

    def __init__(self, pfs: Pfs, pps: Pps) -> None:
        self._pfs = pfs
        self._pps = pps
        self._trees = pfs.store.trees

    def methods(self) -> dict[str, Method]:
        unary: list[tuple[str, type[betterproto.Message], Callable[[Any, Call], Any]]] = [
            ("CreateProject", pb.CreateProjectRequest, self.create_project),
            ("InspectProject", pb.InspectProjectRequest, self.inspect_project),
            ("DeleteProject", pb.DeleteProjectRequest, self.delete_project),
            ("CreateRepo", pb.CreateRepoRequest, self.create_repo),
            ("InspectRepo", pb.InspectRepoRequest, self.inspect_repo),
            ("DeleteRepo", pb.DeleteRepoRequest, self.delete_repo),
            ("DeleteRepos", pb.DeleteReposRequest, self.delete_repos),
            ("CreateBranch", pb.CreateBranchRequest, self.create_branch),
            ("InspectBranch", pb.InspectBranchRequest, self.inspect_branch),
            ("DeleteBranch", pb.DeleteBranchRequest, self.delete_branch),
            ("StartCommit", pb.StartCommitRequest, self.start_commit),
            ("FinishCommit", pb.FinishCommitRequest, self.finish_commit),
            ("ClearCommit", pb.ClearCommitRequest, self.clear_commit),
            ("InspectCommit", pb.InspectCommitRequest, self.inspect_commit),
            ("DropCommit", pb.DropCommitRequest, self.drop_commit),
            ("SquashCommit", pb.SquashCommitRequest, self.squash_commit),
            ("DropCommitSet", pb.DropCommitSetRequest, self.drop_commit_set),
            ("SquashCommitSet", pb.SquashCommitSetRequest, self.squash_commit_set),
            ("InspectFile", pb.InspectFileRequest, self.inspect_file),
            ("GetFileSet", pb.GetFileSetRequest, self.get_file_set),
            ("AddFileSet", pb.AddFileSetRequest, self.add_file_set),
            ("RenewFileSet", pb.RenewFileSetRequest, self.renew_file_set),
            ("ComposeFileSet", pb.ComposeFileSetRequest, self.compose_file_set),
        ]
        streaming: list[tuple[str, type[betterproto.Message], Callable[[Any, Call], Any]]] = [
            ("ListProject", pb.ListProjectRequest, self.list_project),
            ("ListRepo", pb.ListRepoRequest, self.list_repo),
            ("ListBranch", pb.ListBranchRequest, self.list_branch),
            ("ListCommit", pb.ListCommitRequest, self.list_commit),
            ("SubscribeCommit", pb.SubscribeCommitRequest, self.subscribe_commit),
            ("InspectCommitSet", pb.InspectCommitSetRequest, self.inspect_commit_set),
            ("ListCommitSet", pb.ListCommitSetRequest, self.list_commit_set),
            ("FindCommits", pb.FindCommitsRequest, self.find_commits),
            ("DiffFile", pb.DiffFileRequest, self.diff_file),
            ("GetFile", pb.GetFileRequest, self.get_file),
            ("GetFileTAR", pb.GetFileRequest, self.get_file_tar),
            ("ListFile", pb.ListFileRequest, self.list_file),
            ("WalkFile", pb.WalkFileRequest, self.walk_file),
            ("GlobFile", pb.GlobFileRequest, self.glob_file),
        ]
        methods = {f"/pfs_v2.API/{name}": Method(request.FromString, run) for name, request, run in unary}
        methods |= {f"/pfs_v2.API/{name}": Method(request.FromString, run, streams_out=True) for name, request, run in streaming}
        methods["/pfs_v2.API/ModifyFile"] = Method(modify_request, self.modify_file, streams_in=True)
        methods["/pfs_v2.API/CreateFileSet"] = Method(modify_request, self.create_file_set, streams_in=True)
        return methods

    # Projects, repos, branches

    def create_project(self, request: pb.CreateProjectRequest, call: Call) -> Empty:
        self._pfs.create_project(request.project.name, request.description, update=request.update)
        return convert.EMPTY

    def inspect_project(self, request: pb.InspectProjectRequest, call: Call) -> pb.ProjectInfo:
        return _project_info(self._pfs.project(request.project.name))

    def list_project(self, request: pb.ListProjectRequest, call: Call) -> Iterator[pb.ProjectInfo]:
        return map(_project_info, self._pfs.projects())

    def delete_project(self, request: pb.DeleteProjectRequest, call: Call) -> Empty:
        self._pfs.delete_project(request.project.name)
        return convert.EMPTY

    def create_repo(self, request: pb.CreateRepoRequest, call: Call) -> Empty:
        self._pfs.create_repo(convert.repo_key(request.repo), request.description, update=request.update)
        return convert.EMPTY

    def inspect_repo(self, request: pb.InspectRepoRequest, call: Call) -> pb.RepoInfo:
        return convert.repo_info(self._pfs.repo(convert.repo_key(request.repo)))

    def list_repo(self, request: pb.ListRepoRequest, call: Call) -> Iterator[pb.RepoInfo]:
        return map(convert.repo_info, self._pfs.repos(request.type, [project.name for project in request.projects]))

    def delete_repo(self, request: pb.DeleteRepoRequest, call: Call) -> pb.DeleteRepoResponse:
        key = convert.repo_key(request.repo)
        owner = self._pps.owner(key)
        if owner is not None and self._pfs.repo_exists(key):
            raise PachError(f"cannot delete a pipeline repo: delete the pipeline {owner} instead")
        return pb.DeleteRepoResponse(deleted=self._pfs.delete_repo(key, force=request.force))

    def delete_repos(self, request: pb.DeleteReposRequest, call: Call) -> pb.DeleteReposResponse:
        """All repos of some projects, or of all; those of pipelines go with their pipelines alone."""
        projects = [project.name for project in request.projects]
        found = self._pfs.repos("user", projects) if projects or request.all else []
        gone = [one.key for one in found if self._pps.owner(one.key) is None and self._pfs.delete_repo(one.key, force=request.force)]
        return pb.DeleteReposResponse(repos=[convert.repo(key) for key in gone])

    def create_branch(self, request: pb.CreateBranchRequest, call: Call) -> Empty:
        if convert.is_set(request.trigger):
            raise Unimplemented(f"branch {request.branch.name!r} has a trigger, which the embedded server does not do")
        head = request.head
        ref = convert.commit_ref(head) if head.id or head.branch.name else None
        self._pfs.create_branch(convert.branch_key(request.branch), ref, [convert.branch_key(one) for one in request.provenance])
        return convert.EMPTY

    def inspect_branch(self, request: pb.InspectBranchRequest, call: Call) -> pb.BranchInfo:
        return convert.branch_info(self._pfs, self._pfs.branch(convert.branch_key(request.branch)))

    def list_branch(self, request: pb.ListBranchRequest, call: Call) -> Iterator[pb.BranchInfo]:
        found = self._pfs.branches(convert.repo_key(request.repo), reverse=request.reverse)
        return (convert.branch_info(self._pfs, branch) for branch in found)

    def delete_branch(self, request: pb.DeleteBranchRequest, call: Call) -> Empty:
        self._pfs.delete_branch(convert.branch_key(request.branch), force=request.force)
        return convert.EMPTY

    # Commits

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
        found = self._pfs.list_commits(
            convert.repo_key(request.repo),
            to=_optional_ref(request.to),
            after=_optional_ref(request.from_),
            number=request.number,
            reverse=request.reverse,
            kind=0 if request.all else int(request.origin_kind),
            started=max(0.0, convert.seconds(request.started_time)),
        )
        return (convert.commit_info(self._pfs, commit) for commit in found)

    def subscribe_commit(self, request: pb.SubscribeCommitRequest, call: Call) -> Iterator[pb.CommitInfo]:
        found = self._pfs.subscribe(
            convert.repo_key(request.repo),
            request.branch,
            after=_optional_ref(request.from_),
            state=Wait(max(1, int(request.state))),
            kind=0 if request.all else int(request.origin_kind),
            alive=call.alive,
        )
        return (convert.commit_info(self._pfs, commit) for commit in found)

    def inspect_commit_set(self, request: pb.InspectCommitSetRequest, call: Call) -> Iterator[pb.CommitInfo]:
        for commit in self._pfs.commit_set(request.commit_set.id):
            found = self._pfs.wait(commit, Wait.FINISHED, alive=call.alive) if request.wait else commit
            yield convert.commit_info(self._pfs, found)

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

    # Writing files

    def modify_file(self, requests: Iterator[pb.ModifyFileRequest | RawAdd], call: Call) -> Empty:
        first = next(requests, None)
        if first is None or isinstance(first, RawAdd) or betterproto.which_one_of(first, "body")[0] != "set_commit":
            raise PachError("the first message of ModifyFile must be set_commit")
        ref = convert.commit_ref(first.set_commit)
        self._pfs.writable(ref)
        with self._pfs.store.gate.writing():
            writer = self._write(requests)
            if call.alive():
                self._pfs.add_fileset(ref, writer.close(None), owned=True)
        return convert.EMPTY

    def create_file_set(self, requests: Iterator[pb.ModifyFileRequest | RawAdd], call: Call) -> pb.CreateFileSetResponse:
        if self._pfs.store.filesets.forget_expired():
            self._pfs.store.gate.garbage.set()
        with self._pfs.store.gate.writing():
            return pb.CreateFileSetResponse(file_set_id=self._write(requests).close(_FILESET_SECONDS))

    def _write(self, requests: Iterator[pb.ModifyFileRequest | RawAdd]) -> FileSetWriter:
        writer = self._pfs.store.filesets.writer()
        for request in requests:
            self._modify(writer, request)
        return writer

    def _modify(self, writer: FileSetWriter, request: pb.ModifyFileRequest | RawAdd) -> None:
        if isinstance(request, RawAdd):
            writer.add(_file_path(request.path), tag_of(request.datum), request.data)
            return
        body: Any
        kind, body = betterproto.which_one_of(request, "body")
        if kind == "add_file":
            self._add(writer, body)
        elif kind == "delete_file":
            writer.delete(check_path(body.path), tag_of(body.datum))
        elif kind == "copy_file":
            self._copy(writer, body)
        else:
            raise PachError(f"unexpected {kind or 'empty message'} in the middle of the stream")

    def _add(self, writer: FileSetWriter, add: pb.AddFile) -> None:
        path = _file_path(add.path)
        source: Any
        kind, source = betterproto.which_one_of(add, "source")
        if kind != "url":
            writer.add(path, tag_of(add.datum), source or b"")
            return
        for rest, content in urls.read(source.url, recursive=source.recursive):
            writer.add(_file_path(path + rest), tag_of(add.datum), b"")
            for data in content:
                writer.add(_file_path(path + rest), tag_of(add.datum), data)

    def _copy(self, writer: FileSetWriter, copy: pb.CopyFile) -> None:
        source = copy.src
        _, found = self._file(source, alive=lambda: True)
        target = check_path(copy.dst).rstrip("/")
        tag = tag_of(copy.datum)
        if not copy.append:
            writer.delete(target, tag)
            writer.delete(target + "/", tag)
        for part in self._trees.walk(found):
            if isinstance(part.entry, FileEntry):
                name = target + (f"/{part.path[len(found.path) :]}" if found.is_dir else "")
                writer.add_chunks(name, tag, part.entry.chunks)

    def get_file_set(self, request: pb.GetFileSetRequest, call: Call) -> pb.CreateFileSetResponse:
        return pb.CreateFileSetResponse(file_set_id=self._pfs.fileset_of(convert.commit_ref(request.commit), _FILESET_SECONDS))

    def add_file_set(self, request: pb.AddFileSetRequest, call: Call) -> Empty:
        self._pfs.add_fileset(convert.commit_ref(request.commit), request.file_set_id)
        return convert.EMPTY

    def renew_file_set(self, request: pb.RenewFileSetRequest, call: Call) -> Empty:
        self._pfs.store.filesets.renew(request.file_set_id, float(request.ttl_seconds))
        return convert.EMPTY

    def compose_file_set(self, request: pb.ComposeFileSetRequest, call: Call) -> pb.CreateFileSetResponse:
        made = self._pfs.store.filesets.compose(request.file_set_ids, float(request.ttl_seconds) or _FILESET_SECONDS)
        return pb.CreateFileSetResponse(file_set_id=made)

    # Reading files

    def inspect_file(self, request: pb.InspectFileRequest, call: Call) -> pb.FileInfo:
        commit, found = self._file(request.file, alive=call.alive)
        return convert.file_info(commit, found)

    def list_file(self, request: pb.ListFileRequest, call: Call) -> Iterator[bytes]:
        commit, root = self._readable(request.file.commit, call)
        found = self._trees.find(root, request.file.path or "/")
        if found is None:
            return iter(())
        entries = self._trees.list(found) if found.is_dir else iter([found])
        return _page(commit, entries, marker=request.pagination_marker.path, number=request.number, reverse=request.reverse)

    def walk_file(self, request: pb.WalkFileRequest, call: Call) -> Iterator[bytes]:
        commit, root = self._readable(request.file.commit, call)
        path = request.file.path or "/"
        found = self._trees.find(root, path)
        if found is None:
            if path.strip("/"):
                raise NotFound(f"file set at commit {commit} does not contain item {path}")
            return iter(())
        return _page(commit, self._trees.walk(found), marker=request.pagination_marker.path, number=request.number, reverse=request.reverse)

    def glob_file(self, request: pb.GlobFileRequest, call: Call) -> Iterator[bytes]:
        commit, root = self._readable(request.commit, call)
        encode = FileInfos(commit).encode
        lower, upper = request.path_range.lower, request.path_range.upper
        for found in globs.match(self._trees, root, request.pattern):
            if (not lower or found.path >= lower) and (not upper or found.path < upper):
                yield encode(found)

    def diff_file(self, request: pb.DiffFileRequest, call: Call) -> Iterator[pb.DiffFileResponse]:
        new_commit, new_root = self._readable(request.new_file.commit, call)
        old_commit: Commit | None
        if convert.is_set(request.old_file):
            path = request.old_file.path
            old_commit, old_root = self._readable(request.old_file.commit, call)
        else:
            path = request.new_file.path
            old_commit = self._pfs.commit_by_pk(new_commit.parent) if new_commit.parent is not None else None
            old_root = self._pfs.readable_root(old_commit, alive=call.alive) if old_commit else None
        pairs = self._trees.differences(self._trees.find(old_root, path or "/"), self._trees.find(new_root, request.new_file.path or "/"))
        for old, new in pairs:
            yield pb.DiffFileResponse(
                old_file=convert.file_info(old_commit, old) if old and old_commit else None,
                new_file=convert.file_info(new_commit, new) if new else None,
            )

    def find_commits(self, request: pb.FindCommitsRequest, call: Call) -> Iterator[pb.FindCommitsResponse]:
        """The commits that changed a path, newest first, and at the end where the search has ended."""
        found = 0
        line = self._pfs.list_commits(convert.commit_ref(request.start).repo, to=convert.commit_ref(request.start))
        for searched, commit in enumerate(line):
            if commit.finished is None:
                raise PachError(f"commit {commit} not finished")
            parent = line[searched + 1] if searched + 1 < len(line) else None
            pair = [self._trees.find(one.root, request.file_path) if one else None for one in (parent, commit)]
            if next(self._trees.differences(*pair), None) is not None:
                found += 1
                yield pb.FindCommitsResponse(found_commit=convert.commit(commit.repo, commit.id), commits_searched=searched)
            if found == request.limit != 0 or parent is None:
                yield pb.FindCommitsResponse(last_searched_commit=convert.commit(commit.repo, commit.id), commits_searched=searched + 1)
                return

    def get_file(self, request: pb.GetFileRequest, call: Call) -> Iterator[bytes]:
        if request.url:
            raise Unimplemented("GetFile to a url is something that the embedded server does not do")
        commit, root = self._readable(request.file.commit, call)
        path = request.file.path
        matched = [found for found in self._matching(root, path) if not request.file.datum or _has_tag(found, request.file.datum)]
        if not matched:
            raise NotFound(f"file {path} not found in repo {commit.repo} at commit {commit.id}")
        files = [found for found in matched if not found.is_dir]
        if not files:
            raise PachError(f"cannot get directory {path}: use GetFileTAR")
        if len(matched) > 1:
            raise PachError(f"matched multiple files with {path}: use GetFileTAR")
        entry = files[0].entry
        assert isinstance(entry, FileEntry)
        chunks = itertools.chain.from_iterable(part for tag, part in entry.parts if not request.file.datum or tag == request.file.datum)
        for data in self._pfs.store.chunks.read_all(chunks, offset=request.offset):
            yield from bytes_values(data)

    def get_file_tar(self, request: pb.GetFileRequest, call: Call) -> Iterator[bytes]:
        commit, root = self._readable(request.file.commit, call)
        matched = self._matching(root, request.file.path or "/")
        if not matched:
            raise NotFound(f"file {request.file.path} not found in repo {commit.repo} at commit {commit.id}")
        for data in self._tar(matched, commit):
            yield from bytes_values(data)

    def _tar(self, matched: list[Found], commit: Commit) -> Iterator[bytes]:
        moment = commit.finished or commit.started
        for top in matched:
            for found in self._trees.walk(top):
                info = tarfile.TarInfo(found.path)
                info.mtime = int(moment)
                if found.is_dir:
                    info.type, info.mode = tarfile.DIRTYPE, 0o755
                else:
                    info.size, info.mode = found.entry.size, 0o644
                yield info.tobuf(tarfile.PAX_FORMAT)
                if isinstance(found.entry, FileEntry):
                    yield from self._pfs.store.chunks.read_all(found.entry.chunks)
                    yield bytes(-info.size % tarfile.BLOCKSIZE)
        yield bytes(2 * tarfile.BLOCKSIZE)

    def _matching(self, root: str | None, path: str) -> list[Found]:
        """What a path means that may be a glob; an exact path comes first."""
        found = self._trees.find(root, path)
        if found is not None:
            return [found]
        return list(globs.match(self._trees, root, path)) if globs.is_glob(path) else []

    def _readable(self, commit: pb.Commit, call: Call) -> tuple[Commit, str | None]:
        found = self._pfs.commit(convert.commit_ref(commit))
        return found, self._pfs.readable_root(found, alive=call.alive)

    def _file(self, file: pb.File, *, alive: Callable[[], bool]) -> tuple[Commit, Found]:
        commit = self._pfs.commit(convert.commit_ref(file.commit))
        found = self._trees.find(self._pfs.readable_root(commit, alive=alive), file.path)
        if found is None:
            raise NotFound(f"file {file.path} not found in repo {commit.repo} at commit {commit.id}")
        return commit, found


def _file_path(path: str) -> str:
    checked = check_path(path)
    if checked.endswith("/") or checked == "/":
        raise PachError(f"path ({path}) invalid: it is that of a folder")
    return checked


def _has_tag(found: Found, tag: str) -> bool:
    return isinstance(found.entry, FileEntry) and any(name == tag for name, _ in found.entry.parts)


def _optional_ref(commit: pb.Commit) -> CommitRef | None:
    return convert.commit_ref(commit) if commit.id or commit.branch.name else None


def _page(owner: Commit, entries: Iterator[Found], *, marker: str, number: int, reverse: bool) -> Iterator[bytes]:
    if number < 0:
        raise InvalidArgument("validate request: invalid request: number must not be negative")
    if reverse:
        entries = iter(list(entries)[::-1])
    if marker:
        entries = (found for found in entries if (found.path < marker if reverse else found.path > marker))
    return map(FileInfos(owner).encode, itertools.islice(entries, number or None))


def _project_info(row: Any) -> pb.ProjectInfo:
    return pb.ProjectInfo(project=pb.Project(name=row["name"]), description=row["description"], created_at=convert.when(row["created"]))
