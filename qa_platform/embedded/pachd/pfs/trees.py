"""The files of commits as trees: of finished commits, and what has been written to open ones."""

import threading
from collections.abc import Callable

from qa_platform.embedded.pachd.errors import PachError
from qa_platform.embedded.pachd.pfs.commits import Commits
from qa_platform.embedded.pachd.pfs.model import Commit, CommitRef, Wait
from qa_platform.embedded.pachd.pfs.watching import Watching
from qa_platform.embedded.pachd.storage.store import Store
from qa_platform.embedded.pachd.storage.tree_editor import TreeEditor
from qa_platform.embedded.pachd.storage.trees import FileEntry


class CommitTrees:
    """Builds and finds the trees of commits. None is the tree without files."""

    def __init__(self, store: Store, commits: Commits, watching: Watching) -> None:
        self._store = store
        self._db = store.metadata
        self._commits = commits
        self._watching = watching
        # By open commit: its tree, and the number of layers that the tree has.
        self._open_roots: dict[int, tuple[int, str | None]] = {}
        self._open_lock = threading.Lock()

    def readable_root(self, commit: Commit, *, alive: Callable[[], bool]) -> str | None:
        """The tree that readers of a commit see.

        For an open commit, it has what has been written so far. A finishing commit is waited for while ``alive`` is true. A commit that
        failed without files of its own shows those of the nearest ancestor without an error.

        Raises:
            NotFound: the commit was dropped.
            PachError: the commit is open and its parent is not finished.
        """
        commit = self._commits.by_pk(commit.pk)
        if commit.finished is None and commit.finishing is not None:
            commit = self._watching.wait(commit, Wait.FINISHED, alive=alive)
        if commit.error and commit.root is None:
            return self.good_root(commit.parent)
        if commit.finished is not None:
            return commit.root
        return self._open_root(commit)

    def _open_root(self, commit: Commit) -> str | None:
        layers = int(self._db.value("SELECT count(*) FROM layer WHERE commit_ = ?", commit.pk))
        with self._open_lock:
            cached = self._open_roots.get(commit.pk)
        if cached is not None and cached[0] == layers:
            return cached[1]
        self.check_base(commit)
        with self._store.gate.writing():
            root = self.build(commit)
            with self._open_lock:
                self._open_roots[commit.pk] = (layers, root)
        return root

    def check_base(self, commit: Commit) -> None:
        """Refuse to read an open commit whose base is not finished.

        Raises:
            PachError: the nearest ancestor without an error is not finished.
        """
        base = self._commits.unfinished_base(commit)
        if base is not None:
            raise PachError(f"base commit {base} for commit {commit} unfinished")

    def good_root(self, pk: int | None) -> str | None:
        """The tree of the nearest finished commit without an error, starting with the commit with this primary key."""
        while pk is not None:
            commit = self._commits.by_pk(pk)
            if commit.finished is not None and not commit.error:
                return commit.root
            pk = commit.parent
        return None

    def build(self, commit: Commit) -> str | None:
        """Apply the layers of a commit to the tree of the nearest finished ancestor without an error.

        Raises:
            TreeError: the layers contradict each other.
        """
        base = self.good_root(commit.parent)
        layers = [row["fileset"] for row in self._db.rows("SELECT fileset FROM layer WHERE commit_ = ? ORDER BY seq", commit.pk)]
        if not layers:
            return base
        editor = TreeEditor(self._store.trees, base)
        self._store.filesets.apply(editor, layers)
        written = editor.write()
        return written.node if written else None

    def forget_open(self, pk: int) -> None:
        """Forget the cached tree of a commit that was cleared or is no longer open."""
        with self._open_lock:
            self._open_roots.pop(pk, None)

    def roots(self) -> list[str]:
        """The trees in use: those of all finished commits, and of the open ones that have been read."""
        with self._open_lock:
            opened = [root for _, root in self._open_roots.values() if root]
        return opened + [row["root"] for row in self._db.rows("SELECT DISTINCT root FROM commit_ WHERE root IS NOT NULL")]

    def fileset_of(self, ref: CommitRef, ttl: float) -> str:
        """Create a file set with all files of a commit.

        Args:
            ttl: the seconds after which the file set expires.

        Returns:
            The id of the file set.

        Raises:
            NotFound: the commit does not exist.
            PachError: the commit is open and its parent is not finished.
        """
        writer = self._store.filesets.writer()
        root = self.readable_root(self._commits.get(ref), alive=lambda: True)
        with self._store.gate.writing():
            top = self._store.trees.find(root, "/")
            for file in self._store.trees.walk(top) if top else ():
                if isinstance(file.entry, FileEntry):
                    for tag, chunks in file.entry.parts:
                        writer.add_chunks(file.path, tag, chunks)
            return writer.close(ttl)
