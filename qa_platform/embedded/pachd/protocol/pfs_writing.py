"""The methods of ``pfs_v2.API`` that write files, and those about file sets."""

from collections.abc import Callable, Iterator
from typing import Any

import betterproto
from betterproto.lib.google.protobuf import Empty
from pachyderm_sdk.api import pfs as pb

from qa_platform.embedded.pachd.errors import PachError
from qa_platform.embedded.pachd.pfs import CommitRef, Pfs, check_path, tag_of
from qa_platform.embedded.pachd.protocol import convert
from qa_platform.embedded.pachd.protocol.pfs_reading import find_file
from qa_platform.embedded.pachd.protocol.rpc import PFS_SERVICE, Call, Entries, Method, named
from qa_platform.embedded.pachd.protocol.wire import RawAdd, modify_request
from qa_platform.embedded.pachd.storage import urls
from qa_platform.embedded.pachd.storage.filesets import FileSetWriter
from qa_platform.embedded.pachd.storage.trees import FileEntry
from qa_platform.settings import EmbeddedPachdSettings

_NANOSECONDS = 1_000_000_000
# Deletes a folder. Takes the writer, the folder's path and the tag.
DeleteFolder = Callable[[FileSetWriter, str, str], None]


class WriteMethods:
    """Writes files, and makes file sets."""

    def __init__(self, pfs: Pfs, options: EmbeddedPachdSettings) -> None:
        self._options = options
        self._pfs = pfs
        self._trees = pfs.store.trees

    def methods(self) -> dict[str, Method]:
        """The methods by their full names."""
        unary: Entries = [
            ("GetFileSet", pb.GetFileSetRequest, self.get_file_set),
            ("AddFileSet", pb.AddFileSetRequest, self.add_file_set),
            ("RenewFileSet", pb.RenewFileSetRequest, self.renew_file_set),
            ("ComposeFileSet", pb.ComposeFileSetRequest, self.compose_file_set),
        ]
        streams = {
            f"/{PFS_SERVICE}/ModifyFile": Method(modify_request, self.modify_file, streams_in=True),
            f"/{PFS_SERVICE}/CreateFileSet": Method(modify_request, self.create_file_set, streams_in=True),
        }
        return named(PFS_SERVICE, unary) | streams

    def modify_file(self, requests: Iterator[pb.ModifyFileRequest | RawAdd], call: Call) -> Empty:
        first = next(requests, None)
        if first is None or isinstance(first, RawAdd) or betterproto.which_one_of(first, "body")[0] != "set_commit":
            raise PachError("first message must be a commit")
        ref = convert.commit_ref(first.set_commit)
        commit, _ = self._pfs.writable(ref)

        def delete_folder(writer: FileSetWriter, path: str, tag: str) -> None:
            # Pachyderm lists the folder at this point, which needs a finished parent.
            if commit is not None:
                self._pfs.check_base(commit)
            writer.delete(path, tag)

        with self._pfs.store.gate.writing():
            writer = self._write(requests, delete_folder)
            if call.alive():
                self._pfs.add_fileset(ref, writer.close(None), owned=True)
        return convert.EMPTY

    def create_file_set(self, requests: Iterator[pb.ModifyFileRequest | RawAdd], call: Call) -> pb.CreateFileSetResponse:
        with self._pfs.store.gate.writing():
            writer = self._write(requests, FileSetWriter.delete_written)
            return pb.CreateFileSetResponse(file_set_id=writer.close(self._options.file_set_seconds))

    def _write(self, requests: Iterator[pb.ModifyFileRequest | RawAdd], delete_folder: DeleteFolder) -> FileSetWriter:
        writer = self._pfs.store.filesets.writer()
        for request in requests:
            self._modify(writer, request, delete_folder)
        return writer

    def _modify(self, writer: FileSetWriter, request: pb.ModifyFileRequest | RawAdd, delete_folder: DeleteFolder) -> None:
        if isinstance(request, RawAdd):
            writer.add(_file_path(request.path), tag_of(request.datum), request.data)
            return
        body: Any
        kind, body = betterproto.which_one_of(request, "body")
        if kind == "add_file":
            self._add(writer, body)
        elif kind == "delete_file":
            path = check_path(body.path)
            (delete_folder if path.endswith("/") else FileSetWriter.delete)(writer, path, tag_of(body.datum))
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
        _, found = find_file(self._pfs, source, alive=lambda: True)
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
        file_set = self._pfs.fileset_of(convert.commit_ref(request.commit), self._options.file_set_seconds)
        return pb.CreateFileSetResponse(file_set_id=file_set)

    def add_file_set(self, request: pb.AddFileSetRequest, call: Call) -> Empty:
        commit = self._pfs.commit(convert.commit_ref(request.commit))
        self._pfs.add_fileset(CommitRef(commit.repo, commit.id), request.file_set_id)
        return convert.EMPTY

    def renew_file_set(self, request: pb.RenewFileSetRequest, call: Call) -> Empty:
        asked, most = (seconds * _NANOSECONDS for seconds in (request.ttl_seconds, self._options.file_set_most_seconds))
        if asked < _NANOSECONDS:
            raise PachError(f"ttl ({asked}) must be at least one second")
        if asked > most:
            raise PachError(f"ttl ({asked}) exceeds max ttl ({most})")
        self._pfs.store.filesets.renew(request.file_set_id, float(request.ttl_seconds))
        return convert.EMPTY

    def compose_file_set(self, request: pb.ComposeFileSetRequest, call: Call) -> pb.CreateFileSetResponse:
        file_set = self._pfs.store.filesets.compose(request.file_set_ids, float(request.ttl_seconds) or self._options.file_set_seconds)
        return pb.CreateFileSetResponse(file_set_id=file_set)


def _file_path(path: str) -> str:
    checked = check_path(path).rstrip("/")
    if not checked:
        raise PachError(f"path ({path}) invalid: it names a folder")
    return checked
