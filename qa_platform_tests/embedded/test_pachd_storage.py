"""The embedded pachd's storage against plain models of it."""

import sqlite3
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_platform.embedded.pachd import pfs
from qa_platform.embedded.pachd.errors import PachError
from qa_platform.embedded.pachd.storage import globs
from qa_platform.embedded.pachd.storage.chunks import CHUNK_BYTES, Chunk, Chunker, ChunkStore, CorruptError, is_canonical
from qa_platform.embedded.pachd.storage.database import Database
from qa_platform.embedded.pachd.storage.logs import LogLine, LogQuery, LogStore
from qa_platform.embedded.pachd.storage.store import Store
from qa_platform.embedded.pachd.storage.tree_editor import TreeEditor
from qa_platform.embedded.pachd.storage.trees import FileEntry, TreeError

PATHS = st.sampled_from(["/a", "/b", "/d/a", "/d/b", "/d/e/a", "/f/a", "/f/g/h/i"])
FOLDERS = st.sampled_from(["/", "/d/", "/d/e/", "/f/", "/none/"])
CHANGES = st.one_of(
    st.tuples(st.just("add"), PATHS, st.sampled_from(["default", "x"]), st.binary(max_size=5)),
    st.tuples(st.just("delete"), st.one_of(PATHS, FOLDERS), st.sampled_from(["default", "x"]), st.just(b"")),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"), pfs.SCHEMA)


def contents(store: Store, root: str | None) -> dict[str, bytes]:
    top = store.trees.find(root, "/")
    found = store.trees.walk(top) if top else ()
    return {one.path: b"".join(store.chunks.read_all(one.entry.chunks)) for one in found if isinstance(one.entry, FileEntry)}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(CHANGES, max_size=8), max_size=4))
def test_a_tree_holds_what_a_plain_mapping_holds(store: Store, commits: list[list[tuple[str, str, str, bytes]]]) -> None:
    model: dict[tuple[str, str], bytes] = {}
    root: str | None = None
    for changes in commits:
        writer = store.filesets.writer()
        for kind, path, tag, data in changes:
            if kind == "add":
                writer.add(path, tag, data)
                model[path, tag] = model.get((path, tag), b"") + data
            else:
                writer.delete(path, tag)
                gone = [key for key in model if key[1] == tag and (key[0] == path or (path.endswith("/") and key[0].startswith(path)))]
                for key in gone:
                    del model[key]
        editor = TreeEditor(store.trees, root)
        store.filesets.apply(editor, [writer.close(None)])
        written = editor.write()
        root = written.node if written else None
        expected: dict[str, bytes] = {}
        for (path, _), data in sorted(model.items()):
            expected[path] = expected.get(path, b"") + data
        assert contents(store, root) == expected


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3 * CHUNK_BYTES), st.lists(st.integers(0, 3 * CHUNK_BYTES), max_size=4))
def test_chunks_depend_on_the_content_alone(tmp_path_factory: pytest.TempPathFactory, size: int, cuts: list[int]) -> None:
    folder = tmp_path_factory.getbasetemp() / "chunks"
    folder.mkdir(exist_ok=True)
    database = Database(folder / "objects.db", "CREATE TABLE IF NOT EXISTS chunk (hash TEXT PRIMARY KEY, data BLOB NOT NULL)")
    chunks = ChunkStore(folder / "pieces", database)
    data = bytes(range(251)) * (size // 251 + 1)
    data = data[:size]
    batch = chunks.batch()
    whole, pieces = Chunker(batch), Chunker(batch)
    whole.write(data)
    at = 0
    for cut in [*sorted(cut for cut in cuts if cut < size), size]:
        pieces.write(data[at:cut])
        at = cut
    made = whole.finish()
    assert made == pieces.finish()
    batch.flush()
    assert is_canonical(made)
    assert b"".join(chunks.read_all(made)) == data
    assert b"".join(chunks.read_all(made, offset=size // 2)) == data[size // 2 :]
    chunks.close()
    database.close()


def test_a_missing_piece_is_noticed(store: Store) -> None:
    with pytest.raises(CorruptError, match="missing"):
        store.chunks.read(Chunk("0" * 64, 5))


def test_damage_in_the_database_is_noticed(tmp_path: Path) -> None:
    store = Store(tmp_path, pfs.SCHEMA)
    writer = store.filesets.writer()
    writer.add("/d/a", "default", b"content")
    editor = TreeEditor(store.trees, None)
    store.filesets.apply(editor, [writer.close(None)])
    written = editor.write()
    assert written is not None
    store.close()
    with sqlite3.connect(tmp_path / "objects.db") as objects:
        objects.execute("UPDATE chunk SET data = substr(data, 1, 3)")
    store = Store(tmp_path, pfs.SCHEMA)
    with pytest.raises(CorruptError, match="damaged"):
        contents(store, written.node)
    store.close()
    with sqlite3.connect(tmp_path / "objects.db") as objects:
        objects.execute("UPDATE node SET data = substr(data, 1, length(data) - 1)")
    store = Store(tmp_path, pfs.SCHEMA)
    with pytest.raises(TreeError, match="damaged"):
        store.trees.find(written.node, "/d/a")
    store.close()


def test_merging_trees_notices_a_path_that_both_have(store: Store) -> None:
    roots = []
    for path in ("/d/a", "/d/b", "/d/a"):
        writer = store.filesets.writer()
        writer.add(path, "default", b"1")
        editor = TreeEditor(store.trees, None)
        store.filesets.apply(editor, [writer.close(None)])
        written = editor.write()
        assert written is not None
        roots.append(written.node)
    editor = TreeEditor(store.trees, None)
    editor.merge(roots[0])
    editor.merge(roots[1])
    with pytest.raises(TreeError, match="/d/a"):
        editor.merge(roots[2])


@given(st.text("ab/*?[]{}()!@+,|\\-x", max_size=12))
def test_any_pattern_is_read_or_refused(pattern: str) -> None:
    refusal = None
    try:
        globs.translate(pattern).fullmatch("/a/b")
    except PachError as error:
        refusal = str(error)
    assert refusal is None or "cannot parse glob" in refusal


@given(st.text("abc.-_/", min_size=1, max_size=12))
def test_a_pattern_without_special_characters_matches_itself_alone(path: str) -> None:
    pattern = globs.translate(path)
    assert pattern.fullmatch(path)
    assert not pattern.fullmatch(path + "x")


def test_a_transaction_that_fails_leaves_nothing(tmp_path: Path) -> None:
    database = Database(tmp_path / "db", "CREATE TABLE t (a INTEGER)")

    def fail() -> None:
        with database.transaction():
            database.execute("INSERT INTO t VALUES (1)")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert database.rows("SELECT * FROM t") == []
    database.close()


def test_waiters_are_woken_by_a_commit(tmp_path: Path) -> None:
    database = Database(tmp_path / "db", "CREATE TABLE t (a INTEGER)")
    found: list[int | None] = []
    waiter = threading.Thread(
        target=lambda: found.append(database.wait_until(lambda: database.value("SELECT a FROM t"), alive=lambda: True))
    )
    waiter.start()
    database.execute("INSERT INTO t VALUES (7)")
    waiter.join(10)
    assert found == [7]
    database.close()


def test_log_lines_are_found_by_what_they_belong_to(tmp_path: Path) -> None:
    logs = LogStore(tmp_path / "logs.db")
    for number in range(2500):
        logs.append(
            LogLine("default", "p", f"j{number % 2}", "w", "d", (("/a", "ab"),), user=True, master=False, time=number, message=str(number))
        )

    def messages(query: LogQuery) -> list[str]:
        return [line.message for line in logs.read(query, follow=False, alive=lambda: True)]

    assert messages(LogQuery(pipeline="p")) == [str(number) for number in range(2500)]
    assert messages(LogQuery(job="j1", tail=2)) == ["2497", "2499"]
    assert messages(LogQuery(since=2498)) == ["2498", "2499"]
    assert messages(LogQuery(data=("/b",))) == []
    assert messages(LogQuery(data=("/a", "ab"), until=1)) == ["0", "1"]
    logs.append(LogLine("default", "p", "j2", "w", "", (), user=False, master=True, time=1, message="of the master"))
    assert messages(LogQuery(job="j2", master=False)) == []
    assert messages(LogQuery(master=True)) == ["of the master"]
    logs.close()
