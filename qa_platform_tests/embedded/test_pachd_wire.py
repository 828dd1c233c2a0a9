"""The embedded pachd's hand-written encoding and decoding of messages agrees with the SDK's own classes."""

import time
from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st
from pachyderm_sdk.api import pfs as pb

from qa_platform.embedded.pachd.pfs import Commit, Kind, RepoKey
from qa_platform.embedded.pachd.protocol import convert, wire
from qa_platform.embedded.pachd.storage.chunks import Chunk
from qa_platform.embedded.pachd.storage.trees import DirEntry, Found, file_entry


@given(path=st.text(), datum=st.text(), data=st.binary(max_size=400))
def test_an_added_file_is_read_as_it_was_written(path: str, datum: str, data: bytes) -> None:
    found = wire.modify_request(bytes(pb.ModifyFileRequest(add_file=pb.AddFile(path=path, datum=datum, raw=data))))
    assert isinstance(found, wire.RawAdd)
    assert (found.path, found.datum, bytes(found.data)) == (path, datum, data)


@given(st.sampled_from([
    pb.ModifyFileRequest(set_commit=pb.Commit(repo=pb.Repo(name="r"), id="i")),
    pb.ModifyFileRequest(delete_file=pb.DeleteFile(path="/a")),
    pb.ModifyFileRequest(copy_file=pb.CopyFile(dst="/a")),
    pb.ModifyFileRequest(add_file=pb.AddFile(path="/a", url=pb.AddFileUrlSource(url="gs://b/o"))),
    pb.ModifyFileRequest(add_file=pb.AddFile(path="/a")),
]))  # fmt: skip
def test_everything_else_is_read_by_the_sdk(request: pb.ModifyFileRequest) -> None:
    assert wire.modify_request(bytes(request)) == request


@given(st.binary(max_size=60))
def test_bytes_that_are_no_message_are_no_crash(data: bytes) -> None:
    with suppress(ValueError, IndexError, EOFError, TypeError, KeyError, AttributeError, NotImplementedError):
        # What the SDK's reader raises; the server answers with a status.
        wire.modify_request(data)


@given(st.integers(0, 2**50), st.text("abc/", max_size=300), st.booleans())
def test_file_infos_are_those_of_the_sdk(size: int, path: str, folder: bool) -> None:
    owner = Commit(1, RepoKey("default", "r"), "i" * 32, "master", None, "", Kind.USER, "", time.time(), 1.0, time.time(), "", None, 0)
    entry = DirEntry(size, "ab" * 32, "n") if folder else file_entry("tag", [Chunk("cd" * 32, size)])
    found = Found("/" + path, entry)
    assert pb.FileInfo.FromString(wire.FileInfos(owner).encode(found)) == convert.file_info(owner, found)


@given(st.binary(max_size=1000))
def test_bytes_values_are_those_of_the_sdk(data: bytes) -> None:
    from betterproto.lib.google.protobuf import BytesValue

    assert b"".join(BytesValue.FromString(message).value for message in wire.bytes_values(data)) == data
