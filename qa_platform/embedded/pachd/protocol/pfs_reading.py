"""The methods of ``pfs_v2.API`` that read files."""

import itertools
import tarfile
from collections.abc import Callable, Iterator

from pachyderm_sdk.api import pfs as pb

from qa_platform.embedded.pachd.errors import InvalidArgument, NotFound, PachError, Unimplemented
from qa_platform.embedded.pachd.pfs import Commit, Pfs
from qa_platform.embedded.pachd.protocol import convert
from qa_platform.embedded.pachd.protocol.rpc import PFS_SERVICE, Call, Entries, Method, named
from qa_platform.embedded.pachd.protocol.wire import FileInfos, bytes_values
from qa_platform.embedded.pachd.storage import globs
from qa_platform.embedded.pachd.storage.trees import FileEntry, Found


class ReadMethods:
    """Lists, compares and sends files."""

    def __init__(self, pfs: Pfs) -> None:
        self._pfs = pfs
        self._trees = pfs.store.trees

    def methods(self) -> dict[str, Method]:
        """The methods by their full names."""
        unary: Entries = [
            ("InspectFile", pb.InspectFileRequest, self.inspect_file),
        ]
        streaming: Entries = [
            ("DiffFile", pb.DiffFileRequest, self.diff_file),
            ("GetFile", pb.GetFileRequest, self.get_file),
            ("GetFileTAR", pb.GetFileRequest, self.get_file_tar),
            ("ListFile", pb.ListFileRequest, self.list_file),
            ("WalkFile", pb.WalkFileRequest, self.walk_file),
            ("GlobFile", pb.GlobFileRequest, self.glob_file),
        ]
        return named(PFS_SERVICE, unary) | named(PFS_SERVICE, streaming, streams_out=True)

    def inspect_file(self, request: pb.InspectFileRequest, call: Call) -> pb.FileInfo:
        commit, found = find_file(self._pfs, request.file, alive=call.alive)
        return convert.file_info(commit, found)

    def list_file(self, request: pb.ListFileRequest, call: Call) -> Iterator[bytes]:
        commit, root = self._readable(request.file.commit, call)
        found = self._trees.find(root, request.file.path or "/")
        entries = iter(()) if found is None else self._trees.list(found) if found.is_dir else iter([found])
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

    def get_file(self, request: pb.GetFileRequest, call: Call) -> Iterator[bytes]:
        if request.url:
            raise Unimplemented("GetFile to a url is not supported by the embedded server")
        commit, root = self._readable(request.file.commit, call)
        path = request.file.path
        matched = [found for found in self._matching(root, path) if not request.file.datum or _has_tag(found, request.file.datum)]
        if not matched:
            raise NotFound(f"file {path} not found in repo {commit.repo} at commit {commit.id}")
        # Pachyderm stops at the second match; the error depends on which comes first.
        entry = next((found.entry for found in matched[:2] if found.is_dir), matched[0].entry)
        if not isinstance(entry, FileEntry):
            raise PachError("cannot get directory or non-regular file. Use GetFileTAR instead")
        if len(matched) > 1:
            raise PachError("matched multiple files. Use GetFileTAR instead")
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
        """The files at a path, which may be a glob. A file with exactly this path takes precedence over matches."""
        found = self._trees.find(root, path)
        if found is not None:
            return [found]
        return list(globs.match(self._trees, root, path)) if globs.is_glob(path) else []

    def _readable(self, commit: pb.Commit, call: Call) -> tuple[Commit, str | None]:
        known = self._pfs.commit(convert.commit_ref(commit))
        return known, self._pfs.readable_root(known, alive=call.alive)


def find_file(pfs: Pfs, file: pb.File, *, alive: Callable[[], bool]) -> tuple[Commit, Found]:
    """A file or folder, and its commit.

    Raises:
        NotFound: the commit, or the file in it, does not exist.
    """
    commit = pfs.commit(convert.commit_ref(file.commit))
    found = pfs.store.trees.find(pfs.readable_root(commit, alive=alive), file.path)
    if found is None:
        raise NotFound(f"file {file.path} not found in repo {commit.repo} at commit {commit.id}")
    return commit, found


def _has_tag(found: Found, tag: str) -> bool:
    return isinstance(found.entry, FileEntry) and any(name == tag for name, _ in found.entry.parts)


def _page(owner: Commit, entries: Iterator[Found], *, marker: str, number: int, reverse: bool) -> Iterator[bytes]:
    if number < 0:
        raise InvalidArgument("validate request: invalid request: number must not be negative")
    if reverse and not number:
        raise PachError("number must be > 0 when reverse is true")
    if reverse:
        entries = iter(list(entries)[::-1])
    if marker:
        entries = (found for found in entries if (found.path < marker if reverse else found.path > marker))
    return map(FileInfos(owner).encode, itertools.islice(entries, number or None))
