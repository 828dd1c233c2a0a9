"""The embedded pachd deletes unreferenced content from its disk, and nothing else."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pachyderm_sdk.api import pfs as pb
from pachyderm_sdk.api import pps

from qa_platform.embedded.pachd import pfs
from qa_platform.embedded.pachd.pfs import BranchKey, CommitRef, Pfs, RepoKey
from qa_platform.embedded.pachd.storage.garbage import Collector
from qa_platform.embedded.pachd.storage.store import Store
from qa_platform.embedded.pachd.storage.trees import FileEntry
from qa_platform_tests.pachd_helpers import SUCCESS, Pachd, Server, eventually

REPO = RepoKey("default", "r")
BIG, SMALL = 200_000, 20


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Pfs]:
    store = Store(tmp_path, pfs.SCHEMA)
    found = Pfs(store)
    found.create_repo(REPO)
    yield found
    store.close()


def collector(files: Pfs) -> Collector:
    return Collector(files.store.trees, files.store.filesets, files.store.gate, files.roots, quiet=0)


def write(files: Pfs, content: dict[str, bytes]) -> str:
    """A file set's id."""
    writer = files.store.filesets.writer()
    writer.delete("/", "default")
    for path, data in content.items():
        writer.add(path, "default", data)
    return writer.close(600)


def commit(files: Pfs, content: dict[str, bytes]) -> str:
    """A finished commit of just these files; its id."""
    made = files.start_commit(BranchKey(REPO, "master"))
    files.add_fileset(CommitRef(REPO, made.id), write(files, content))
    files.finish_commit(CommitRef(REPO, made.id))
    files.finish_next(alive=lambda: True)
    return made.id


def read(files: Pfs, ref: CommitRef) -> dict[str, bytes]:
    top = files.store.trees.find(files.readable_root(files.commit(ref), alive=lambda: True), "/")
    parts = files.store.trees.walk(top) if top else ()
    return {part.path: b"".join(files.store.chunks.read_all(part.entry.chunks)) for part in parts if isinstance(part.entry, FileEntry)}


def test_what_only_a_squashed_commit_had_is_freed(files: Pfs) -> None:
    shared = os.urandom(BIG)
    contents = [{"/d/a": os.urandom(BIG), "/d/b": os.urandom(SMALL), "/shared": shared, "/n": b"%d" % number} for number in range(3)]
    made = [commit(files, content) for content in contents]
    files.store.metadata.execute("DELETE FROM fileset")
    kept = len(files.store.chunks.all_names())
    assert collector(files).collect() == 0
    files.squash_commit_set(made[0])
    assert collector(files).collect() == 5, "three chunks and two folders"
    assert len(files.store.chunks.all_names()) == kept - 3
    assert [read(files, CommitRef(REPO, one)) for one in made[1:]] == contents[1:]
    assert collector(files).collect() == 0
    assert read(files, CommitRef(REPO, commit(files, contents[0]))) == contents[0], "what was freed can be stored again"


def test_what_somebody_may_still_use_is_kept(files: Pfs) -> None:
    opened = files.start_commit(BranchKey(REPO, "master"))
    ref = CommitRef(REPO, opened.id)
    content = {"/a": os.urandom(BIG), "/b": os.urandom(SMALL)}
    files.add_fileset(ref, write(files, content))
    lonely = write(files, {"/c": os.urandom(BIG)})
    assert read(files, ref) == content
    assert collector(files).collect() == 0
    assert read(files, ref) == content
    files.store.metadata.execute("UPDATE fileset SET expires = ? WHERE id = ?", time.time() - 1, lonely)
    assert files.store.filesets.forget_expired()
    assert collector(files).collect() == 1
    files.finish_commit(ref)
    files.finish_next(alive=lambda: True)
    assert read(files, ref) == content


def test_what_a_killed_server_left_is_freed(files: Pfs) -> None:
    name = files.store.chunks.batch().put(os.urandom(BIG)).hash
    piece = next(files.store.folder.glob(f"chunks/*/{name}"))
    torn = piece.with_name(f".{name}.cut-off")
    torn.write_bytes(b"half of it")
    assert collector(files).collect() == 2
    assert not piece.exists()
    assert not torn.exists()


def test_it_gives_way_to_whoever_writes(files: Pfs) -> None:
    name = files.store.chunks.batch().put(os.urandom(BIG)).hash
    with files.store.gate.writing():
        assert collector(files).collect() is None

    def roots() -> list[str]:
        # Another thread stores the same piece once more just now.
        with files.store.gate.writing():
            return []

    late = Collector(files.store.trees, files.store.filesets, files.store.gate, roots, quiet=0)
    assert late.collect() is None
    assert name in files.store.chunks.all_names()


def test_it_comes_back_when_it_was_disturbed(files: Pfs) -> None:
    files.store.chunks.batch().put(os.urandom(BIG))
    running = collector(files)
    writing, done = threading.Event(), threading.Event()

    def disturb() -> None:
        with files.store.gate.writing():
            writing.set()
            done.wait(10)

    disturber = threading.Thread(target=disturb)
    disturber.start()
    writing.wait(10)
    running.start()
    assert files.store.chunks.all_names()
    done.set()
    disturber.join(10)
    eventually(lambda: not files.store.chunks.all_names())
    running.stop()


@pytest.mark.slow
def test_old_batches_are_squashed_with_their_results_and_the_rest_stays(tmp_path: Path) -> None:
    server = Server(tmp_path)
    pachd = Pachd(server.address)
    repo = pachd.repo()
    name = pachd.pipeline("p", "cp $source $pfs/out/", repo)
    old, *kept = (os.urandom(size) for size in (300_000, 400_000, 500_000))
    first = pachd.put(repo, {"/old": old})
    assert pachd.wait(name, first).state == SUCCESS
    second = pachd.put(repo, {"/b": kept[0]}, delete=["/"])
    third = pachd.put(repo, {"/c": kept[1]})
    assert pachd.wait(name, third).state == SUCCESS
    pachd.client.pfs.squash_commit_set(commit_set=pb.CommitSet(id=first))
    assert not pachd.client.pps.job_exists(pachd.job(name, first))

    def sizes() -> set[int]:
        return {path.stat().st_size for path in (server.state / "chunks").glob("*/*")}

    assert 300_000 in sizes()
    eventually(lambda: sizes() == {400_000, 500_000})
    pachd.client.pps.rerun_pipeline(pipeline=pps.Pipeline(name=name, project=pb.Project(name="default")))
    again = pachd.jobs(name)[0].job.id
    assert pachd.wait(name, again).data_skipped == 2
    for repo_name in (repo.name, name):
        assert pachd.read(repo_name, second, "/b") == kept[0]
        assert pachd.read(repo_name, again, "/c") == kept[1]
    assert server.stop() == 0
